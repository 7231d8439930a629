"""Sampling from a causal language model: token ids in, tokens and their log-probabilities out.

A sample depends on (seed, key of its prompt, sample number) alone, not on the batch, the order or the machine
count. The model is run from our own cache where it can be (`pyrite.decoding`), else by transformers' `generate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.decoding.engines import Path, evaluating, open_engine
from pyrite.decoding.sampling import Job, Record, chunks, decode, generate

log = logging.getLogger(__name__)

ROWS, ROWS_CPU = 512, 128  # that decode together by default; on a processor its caches should hold theirs


@dataclass(frozen=True)
class Samples:
    """N sampled responses, prompt by prompt, sample by sample; T is the longest; 0 beyond each length."""

    prompt: Tensor  # (N,) index of the prompt
    sample: Tensor  # (N,) 0 .. k-1
    tokens: Tensor  # (N, T)
    length: Tensor  # (N,) tokens, the end token included
    finished: Tensor  # (N,) bool: ended by an end token, not cut
    logps: Tensor  # (N, T) nats, under the distribution drawn from (0 when greedy)
    policy_logps: Tensor  # (N, T) nats, under the model: temperature 1, nothing truncated
    path: Path  # how the model was run: "lean", "cached" or "generate" (transformers' own, slower)

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
    device = next(model.parameters()).device
    max_rows = (ROWS_CPU if device.type == "cpu" else ROWS) if max_rows is None else max_rows
    ends = [eos] if isinstance(eos, int) else list(eos)
    keys = range(len(prompts)) if keys is None else keys
    _check_options(k, max_new_tokens, temperature, top_p, top_k, max_rows)
    _check_prompts(model, prompts, keys, max_new_tokens)
    columns = max(map(len, prompts)) + max_new_tokens
    with torch.inference_mode(), evaluating(model):
        engine = open_engine(model, columns)
        if engine is None:
            log.warning("%s cannot decode from our cache: using transformers' generate", type(model).__name__)
        job = Job(
            model=model,
            engine=engine,
            eos=torch.tensor(ends, dtype=torch.int64, device=device),
            steps=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            progress=progress or (lambda _: None),
        )
        record = Record.empty(len(prompts) * k, max_new_tokens, device)
        for chunk in chunks(prompts, torch.tensor(list(keys), device=device), k, seed, max_rows):
            part = decode(job, chunk) if engine else generate(job, chunk)
            for whole, piece in zip(vars(record).values(), vars(part).values(), strict=True):
                whole[chunk.rows] = piece
    return _samples(job, record, k)  # outside of inference mode, so that the results may enter a loss


def _samples(job: Job, record: Record, k: int) -> Samples:
    ends = job.ends(record.tokens)
    finished = ends.any(1)
    length = torch.where(finished, ends.int().argmax(1) + 1, job.steps)
    width = int(length.max())
    inside = torch.arange(width, device=length.device) < length[:, None]
    tokens, logps, policy = (block[:, :width] * inside for block in vars(record).values())
    row = torch.arange(len(length), device=length.device)
    if bool((bad := ~policy.isfinite().all(1)).any()):
        raise ValueError(f"the model's logits are not finite on prompt {int(bad.nonzero()[0]) // k}: check the weights")
    path = job.engine.path if job.engine else "generate"
    return Samples(row // k, row % k, tokens, length, finished, logps, policy, path)


def _check_options(k: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int, max_rows: int) -> None:
    for name, value in (("k", k), ("max_new_tokens", max_new_tokens), ("max_rows", max_rows)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature}: give 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: give a share of probability above 0, at most 1")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: give a number of tokens, or 0 for all")


def _check_prompts(model: Any, prompts: Sequence[Sequence[int]], keys: Sequence[int], max_new_tokens: int) -> None:
    if not len(prompts):
        raise ValueError("no prompts: give at least one")
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: give one key a prompt")
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: give at least one token, such as a start token")
        if context and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, beyond the "
                f"model's context of {context}: shorten one of them"
            )
        if min(prompt) < 0 or max(prompt) >= text.vocab_size:
            raise ValueError(f"prompt {index} has a token outside 0..{text.vocab_size - 1}: wrong tokenizer?")
