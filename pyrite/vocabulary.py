"""Log-probabilities of given tokens, without the (tokens x vocabulary) matrix where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrite.linears import outer, product

CACHED = 1 << 19  # logits worked on at a time
KEEP_BYTES = 1 << 30  # logits up to this size are kept for the backward pass instead of being recomputed


def selective_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, *, keep_bytes: int = KEEP_BYTES, chunk: int = 1024
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], in float32.

    hidden (R, H), weight (V, H), target (R,) to (R,) nats. The logits are kept for the backward pass if they
    take at most `keep_bytes`; otherwise `chunk` rows at a time are computed, and computed again.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    keep = hidden.shape[0] * weight.shape[0] * dtype.itemsize <= keep_bytes
    step = hidden.shape[0] if keep else chunk
    return _SelectiveLogp.apply(hidden.to(dtype), weight.to(dtype), target, max(step, 1), keep)


def logp_details(
    logits: Callable[[slice], Tensor],
    target: Tensor,
    ref: Callable[[slice], Tensor] | None = None,
    *,
    chunk: int = 1024,
) -> Tensor:
    """What some losses read besides log π(target): (3, R) float32 nats.

    Rows: log π(target), KL(π_ref ‖ π) = Σ_v π_ref(v) log(π_ref(v)/π(v)) (0 without `ref`), log Σ_v π(v)².
    `logits(rows)` gives the (chunk, V) logits of these rows; only a chunk is in memory at a time, and computed again
    for the gradient. No gradient goes to `ref`.
    """

    def some(rows: slice) -> Tensor:
        logp = torch.log_softmax(logits(rows).float(), -1)
        picked = logp.gather(1, target[rows, None]).squeeze(1)
        kl = torch.zeros_like(picked)
        if ref is not None:
            with torch.no_grad():
                theirs = torch.log_softmax(ref(rows).float(), -1)
            kl = (theirs.exp() * (theirs - logp)).sum(-1)
        return torch.stack([picked, kl, torch.logsumexp(2 * logp, -1)])

    slices = [slice(begin, begin + chunk) for begin in range(0, len(target), chunk)]
    return torch.cat([checkpoint(some, rows, use_reentrant=False) for rows in slices], dim=1)


def picked_logp(
    logits: Callable[[slice], Tensor], target: Tensor, *, size: int, keep_bytes: int = KEEP_BYTES, chunk: int = 1024
) -> Tensor:
    """log π(target) (R,) float32 nats from `logits(rows)`, (chunk, V) of these rows, V = size.

    Beyond `keep_bytes` of logits only a chunk is in memory at a time, and computed again for the gradient.
    """

    def some(rows: slice) -> Tensor:
        logp = torch.log_softmax(logits(rows), -1, dtype=torch.float32)
        return logp.gather(1, target[rows, None]).squeeze(1)

    if len(target) * size * 4 <= keep_bytes:
        return some(slice(None))
    slices = [slice(begin, begin + chunk) for begin in range(0, len(target), chunk)]
    return torch.cat([checkpoint(some, rows, use_reentrant=False) for rows in slices])


class _SelectiveLogp(torch.autograd.Function):
    """d logp / d logits = onehot(target) - softmax, applied chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int, keep: bool) -> Tensor:
        logp = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        kept = None
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = product(hidden[rows], weight)
            for part in _blocks(logits):
                at = target[rows][part, None]
                logp[rows][part] = torch.log_softmax(logits[part], -1, dtype=torch.float32).gather(1, at).squeeze(1)
            kept = logits if keep else None
        ctx.save_for_backward(hidden, weight, target, kept)
        ctx.chunk = chunk
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, target, kept = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        for begin in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            logits = product(hidden[rows], weight) if kept is None else kept
            for part in _blocks(logits):  # the kept logits are not needed again: their gradient takes their place
                up, at = grad[rows][part, None], target[rows][part, None]
                logits[part] = torch.softmax(logits[part], -1, dtype=torch.float32).mul_(-up).scatter_add_(1, at, up)
            d_hidden[rows] = product(logits, weight.t())
            if ctx.needs_input_grad[1]:
                more = outer(logits, hidden[rows])
                d_weight = more if d_weight is None else d_weight.float().add_(more)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of about 2 MB in float32: what a processor's cache holds, so that each pass after the first is cheap."""
    size = max(1, CACHED // logits.shape[1])
    size = size if logits.device.type == "cpu" else len(logits)
    return (slice(begin, begin + size) for begin in range(0, len(logits), size))
