"""Sampling from a causal language model, or from two mixed: token ids in, tokens and log-probabilities out.

A sample depends on (seed, key of its prompt, sample number) alone, not on the batch, the order or the machine
count. A model is run from our own cache where it can be (`pyrite.decoding`), else by transformers' `generate`.
Under `torch.autocast` models compute in its precision; log-probabilities, mixtures and draws are float32 all the same.
Rounding may then differ with the batch, so that once in a while a token does: it is drawn from the same stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.decoding.engines import Path, evaluating
from pyrite.decoding.requests import Group, Request, check_arms, check_reference, groups
from pyrite.decoding.sampling import Chunk, Job, Record
from pyrite.decoding.uncached import score
from pyrite.decoding.voices import Voice, open_reference, open_voice

SLOWEST: tuple[Path, ...] = ("uncached", "generate", "cached", "lean")


@dataclass(frozen=True)
class Samples:
    """N sampled responses, prompt by prompt, sample by sample; T is the longest; 0 beyond each length.

    path: how the model was run, the slowest way of several: "lean"; "cached"; "generate", transformers' own; or
    "uncached", where two models are mixed of which one cannot use our cache: the whole text anew at every step.
    """

    prompt: Tensor  # (N,) index of the prompt
    sample: Tensor  # (N,) 0 .. k-1
    tokens: Tensor  # (N, T)
    length: Tensor  # (N,) tokens, the end token included
    finished: Tensor  # (N,) bool: ended by an end token, not cut
    logps: Tensor  # (N, T) nats, under the distribution drawn from (0 when greedy)
    policy_logps: Tensor  # (N, T) nats, under the model (of two, the policy): temperature 1, nothing truncated
    path: Path
    ref_logps: Tensor | None = None  # (N, T) nats, likewise of the reference; NaN in rows that did not need it

    def responses(self) -> list[list[int]]:
        """Token ids of each response, end token included."""
        rows = zip(self.tokens.tolist(), self.length.tolist(), strict=True)
        return [row[:length] for row, length in rows]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos: int | Sequence[int],
    k: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    max_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """k responses to each prompt (token ids), from softmax(logits / temperature) cut to top_k, then to top_p.

    eos: token id or ids that end a response (none: every response has max_new_tokens). Temperature 0 is greedy.
    keys: one integer a prompt, its identity in the random streams (by default its index; `seeds.derive` makes one
    of a prompt id).
    max_rows: rows that decode together, a matter of memory and speed only (128 on a processor, else 512).
    progress is told each number of rows finished.
    Raises ValueError for an empty prompt, one too long for the context, options out of range, and NaN logits.
    """
    ask = Request(prompts, k, eos, max_new_tokens, temperature, top_p, top_k, seed, keys, max_rows, progress)
    ask.check(model)
    with torch.inference_mode(), evaluating(model):
        job = ask.job([open_voice(model, ask.columns)])
        record = Record.empty(len(prompts) * k, job.steps, job.device)
        for chunk in ask.chunks(job.device):
            record.write(chunk.rows, job.run(chunk))
    return _samples(
        job, record, k, job.path(prompts)
    )  # outside of inference mode, so that the results may enter a loss


def sample_mixed(
    policy_model: Any,
    ref_model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    exponents: Tensor,
    eos: int | Sequence[int],
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    max_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """k responses to each prompt, each from an arm of its own, token by token from softmax of

    (a · logits of the policy + b · logits of the reference) / temperature, cut to top_k, then to top_p,

    with exponents (P, k, 2) float32 the (a, b) of every sample (`samplers.exponents`); other options as in `sample`.
    ref_model None: the policy with its adapters off, so that one base in memory is both.
    Only the models of a row's arm decode it: (1, 0) gives what `sample` gives with the policy, (0, 1) what it gives
    with the reference; such a row's policy_logps are read off afterwards, in one forward over the whole text.
    Raises ValueError as `sample` does, and for a reference of another vocabulary.
    """
    arms = check_arms(exponents, len(prompts))
    k, ran = arms.shape[1], arms[..., 1].flatten() != 0
    has_ref = bool(ran.any())
    ask = Request(prompts, k, eos, max_new_tokens, temperature, top_p, top_k, seed, keys, max_rows, progress)
    other = check_reference(policy_model, ref_model) if has_ref or ref_model is not None else policy_model
    ask.check(policy_model, other)
    with torch.inference_mode(), evaluating(policy_model), evaluating(other):
        parts = groups(arms)
        policy, ref = _voices(policy_model, ref_model, parts, ask.columns)
        jobs = [ask.job([v for v, on in ((policy, part.policy), (ref, part.ref)) if on]) for part in parts]
        record = Record.empty(len(ran), max_new_tokens, policy.device, ref=has_ref)
        for part, job in zip(parts, jobs, strict=True):
            for chunk in ask.chunks(policy.device, part):
                record.write(chunk.rows, _run(job, chunk, part, policy))
    path = SLOWEST[min(SLOWEST.index(job.path(prompts)) for job in jobs)]
    return _samples(jobs[0], record, k, path, ran.to(policy.device))


def _voices(policy_model: Any, ref_model: Any, parts: Sequence[Group], columns: int) -> tuple[Voice, Voice]:
    """Policy and reference, each made ready to decode only if it will."""
    decodes = ref_model is None or any(part.policy for part in parts)
    policy = open_voice(policy_model, columns) if decodes else Voice(policy_model)
    if not any(part.ref for part in parts):
        return policy, policy
    return policy, open_reference(ref_model, policy, columns)


def _run(job: Job, chunk: Chunk, part: Group, policy: Voice) -> Record:
    """Samples of a chunk, with the policy's log-probabilities where the reference alone has drawn."""
    drawn = job.run(chunk)
    if part.policy:
        return drawn
    read = score(policy, chunk.prompts, drawn.tokens, job.lengths(drawn.tokens))
    return Record(drawn.tokens, drawn.logps, read, ref_logps=drawn.policy_logps)


def _samples(job: Job, record: Record, k: int, path: Path, ran: Tensor | None = None) -> Samples:
    """Records cut at each row's end; `ran` (N,): rows that the reference ran for, None of one model."""
    length, finished = job.lengths(record.tokens), job.ends(record.tokens).any(1)
    inside = torch.arange(int(length.max()), device=length.device) < length[:, None]
    cut = {
        name: None if block is None else block[:, : inside.shape[1]].masked_fill(~inside, 0)
        for name, block in vars(record).items()
    }
    record = Record(**cut)  # type: ignore[arg-type]  # what was there still is
    _check_finite(record, k, "model" if ran is None else "policy")
    ref = record.ref_logps
    if ref is not None and ran is not None:
        ref = ref.masked_fill(inside & ~ran[:, None], math.nan)
    row = torch.arange(len(length), device=length.device)
    drawn = record.tokens, length, finished, record.logps, record.policy_logps
    return Samples(row // k, row % k, *drawn, path, ref)


def _check_finite(record: Record, k: int, policy: str) -> None:
    """-inf may stand beside the model drawn from; NaN comes of broken weights, or of options beyond float32."""
    cause = {policy: "the weights", "reference": "the weights", "arm": "its exponents, and the temperature"}
    blocks = record.policy_logps, record.ref_logps, record.logps
    for (whose, what), block in zip(cause.items(), blocks, strict=True):
        if block is not None and bool((bad := block.isnan().any(1)).any()):
            index = int(bad.nonzero()[0]) // k
            raise ValueError(f"the {whose}'s logits are not finite on prompt {index}: check {what}")
