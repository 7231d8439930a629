"""Sampling from a causal language model: token ids in, tokens and their log-probabilities out.

A sample depends on (seed, key of its prompt, sample number) alone, not on the batch, the order or the machine
count. The model is run from our own cache where it can be (`pyrite.decoding`), else by transformers' `generate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pyrite.decoding import Decoder, Engine, Path, Prompts, attending, evaluating, open_engine
from pyrite.draws import Draw, draw, streams, uniforms

log = logging.getLogger(__name__)

CHECK = 4  # steps between two looks at which rows have finished
ROWS, ROWS_CPU = 512, 128  # that decode together by default; on a processor their cache should stay in its cache
COMPACT = 0.8  # finished rows are dropped when fewer than this share is alive


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


@dataclass(frozen=True)
class _Job:
    """What does not change from chunk to chunk."""

    model: nn.Module
    engine: Engine | None
    eos: Tensor
    steps: int
    temperature: float
    top_k: int
    top_p: float
    progress: Callable[[int], None]

    def draw(self, logits: Tensor, state: Tensor, step: int) -> Draw:
        uniform = uniforms(state, step)
        return draw(logits, uniform, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def ends(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self.eos).any(-1)


@dataclass(frozen=True)
class _Chunk:
    """Rows that decode together, ordered by prompt, longest first."""

    rows: Tensor  # (n,) place in the result
    prompts: Prompts
    state: Tensor  # (n,) streams


@dataclass(frozen=True)
class _Record:
    """What is drawn: tokens, logps and policy_logps, (n, T) each."""

    tokens: Tensor
    logps: Tensor
    policy_logps: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device) -> _Record:
        real = torch.zeros(rows, steps, device=device)
        return cls(torch.zeros(rows, steps, dtype=torch.int64, device=device), real, real.clone())

    def write(self, rows: Tensor, step: int, drawn: Draw) -> None:
        for block, value in zip((self.tokens, self.logps, self.policy_logps), drawn, strict=True):
            block[rows, step] = value


def sample(
    model: nn.Module,
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
    keys: one integer a prompt, its identity in the random streams (its index by default).
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
        job = _Job(
            model=model,
            engine=engine,
            eos=torch.tensor(ends, dtype=torch.int64, device=device),
            steps=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            progress=progress or (lambda _: None),
        )
        record = _Record.empty(len(prompts) * k, max_new_tokens, device)
        for chunk in _chunks(prompts, torch.tensor(list(keys), device=device), k, seed, max_rows):
            part = _decode(job, chunk) if engine else _generate(job, chunk)
            for whole, piece in zip(vars(record).values(), vars(part).values(), strict=True):
                whole[chunk.rows] = piece
        return _samples(job, record, k)


def _decode(job: _Job, chunk: _Chunk) -> _Record:
    """Step by step from our cache, dropping rows as they finish."""
    assert job.engine is not None
    total, device = len(chunk.rows), chunk.rows.device
    record, alive, state = _Record.empty(total, job.steps, device), torch.arange(total, device=device), chunk.state
    last = torch.tensor([prompt[-1] for prompt in chunk.prompts.tokens], device=device)
    token = last.repeat_interleave(torch.tensor(chunk.prompts.repeats, device=device))
    done, reported = torch.zeros(total, dtype=torch.bool, device=device), 0
    with attending(job.model):
        decoder = Decoder(job.engine, chunk.prompts, steps=job.steps, device=device)
        for step in range(job.steps):
            drawn = job.draw(decoder.step(token), state, step)
            record.write(alive, step, drawn)
            token = drawn.token
            done |= job.ends(token)
            if (step + 1) % CHECK or not len(job.eos):
                continue
            left = len(done) - int(done.sum())
            job.progress(total - left - reported)
            reported = total - left
            if left == 0:
                break
            if left < COMPACT * len(done):
                keep = (~done).nonzero().squeeze(1)
                decoder.keep(keep)
                alive, state, token, done = alive[keep], state[keep], token[keep], done[keep]
    job.progress(total - reported)
    return record


def _generate(job: _Job, chunk: _Chunk) -> _Record:
    """By transformers' `generate`, greedy over logits in which our own draw has left one token."""
    device = chunk.rows.device
    rows = [p for p, n in zip(chunk.prompts.tokens, chunk.prompts.repeats, strict=True) for _ in range(n)]
    width = len(rows[0])
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    visible = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    record = _Record.empty(len(rows), job.steps, device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=job.steps,
        eos_token_id=job.eos.tolist() or [job.model.config.get_text_config().vocab_size],  # None: the model's own
        pad_token_id=0,
    )
    drawing = LogitsProcessorList([_Drawing(job, chunk.state, record, width)])
    job.model.generate(tokens, attention_mask=visible, generation_config=config, logits_processor=drawing)
    job.progress(len(rows))
    return record


class _Drawing(LogitsProcessor):
    """Draws each row's token from its own stream, records it, and leaves it as the only choice."""

    def __init__(self, job: _Job, state: Tensor, record: _Record, width: int) -> None:
        self.job, self.state, self.record, self.width = job, state, record, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        drawn = self.job.draw(scores, self.state, step)
        self.record.write(torch.arange(len(scores), device=scores.device), step, drawn)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn.token[:, None], 0.0)


def _chunks(prompts: Sequence[Sequence[int]], keys: Tensor, k: int, seed: int, max_rows: int) -> Iterator[_Chunk]:
    """Rows sorted by prompt, longest first (equal prompts together, prefilled once), cut at max_rows."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), tuple(prompts[index])))
    rows = [(index, number) for index in order for number in range(k)]
    for start in range(0, len(rows), max_rows):
        part = rows[start : start + max_rows]
        repeats: dict[tuple[int, ...], int] = {}
        for index, _ in part:
            repeats[tuple(prompts[index])] = repeats.get(tuple(prompts[index]), 0) + 1
        which = torch.tensor(part, device=keys.device)
        state = streams(seed, keys[which[:, 0]], which[:, 1])
        yield _Chunk(which[:, 0] * k + which[:, 1], Prompts(list(repeats), list(repeats.values())), state)


def _samples(job: _Job, record: _Record, k: int) -> Samples:
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


def _check_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[int], max_new_tokens: int
) -> None:
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
