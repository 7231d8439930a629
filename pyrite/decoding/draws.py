"""Randomness that belongs to a row, not to a batch: counter-based uniforms and inverse-CDF sampling.

Every uniform is a hash of (seed, key, sample, step), so a draw does not change with batch size, order or process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers: torch wraps on overflow
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 48  # of a uniform: u * total < total in float64, so the last arm is never overrun


class Draw(NamedTuple):
    """Tokens (N,) and log-probabilities (N,), nats: as drawn, and of the untruncated logits at temperature 1."""

    token: Tensor
    logp: Tensor
    policy_logp: Tensor
    ref_logp: Tensor | None = None  # where the draw is from two models


def streams(seed: int, keys: Tensor, samples: Tensor) -> Tensor:
    """The state (N,) int64 of each row's stream from a seed, keys (N,) int64 and sample numbers (N,) int64."""
    start = torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=keys.device)
    return _hash(_hash(_hash(start) + (keys + 1) * _GOLDEN) + (samples + 1) * _GOLDEN)


def uniforms(streams: Tensor, step: int) -> Tensor:
    """Uniforms (N,) float64 in [0, 1) of the given step: SplitMix64 of each row's stream, upper 48 bits."""
    state = streams + ((step + 1) * _GOLDEN + 2**63) % 2**64 - 2**63
    return _shift(_hash(state), 64 - _BITS).double() * 2.0**-_BITS


def draw(
    logits: Tensor,
    uniform: Tensor,
    *,
    policy: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Draw:
    """Tokens from logits (N, V) by the inverse CDF at uniform (N,), temperature first, then truncation.

    Token i is drawn when C(i-1) <= u < C(i), with C the cumulative distribution. Temperature 0 takes the largest
    logit, and its logp is 0. Computed in float32, the cumulative sum in float64.
    policy: the policy's logits (N, V) where `logits` are not its own.
    """
    raw = logits.float()
    own = raw if policy is None else policy
    if temperature == 0:
        token = raw.argmax(-1)
        return Draw(token, torch.zeros_like(uniform, dtype=torch.float32), token_logp(own, token))
    plain = temperature == 1 and top_k == 0 and top_p == 1
    scores = raw if plain else truncate(raw / temperature, top_k=top_k, top_p=top_p)
    peak = scores.amax(-1, keepdim=True)
    cumulative = (scores - peak).exp_().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    token = token.clamp_max_(logits.shape[-1] - 1)
    logp = (scores.gather(1, token) - peak - total.log().float()).squeeze(1)
    token = token.squeeze(1)
    return Draw(token, logp, logp if plain and policy is None else token_logp(own, token))


def truncate(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (N, V) with -inf off the top k, then off the smallest set of mass at least p; 0 and 1 switch off.

    Equal logits at the k-th place all stay, as in transformers; the most likely token always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        drop = mass.cumsum(-1) - mass >= top_p
        drop[:, 0] = False  # rounding cannot empty a row
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return logits


def token_logp(logits: Tensor, token: Tensor) -> Tensor:
    """Log-probabilities (..., ) in float32 of tokens (...,) under logits (..., V), nats."""
    logits = logits.float()
    return logits.gather(-1, token[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _hash(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch shifts int64 arithmetically
