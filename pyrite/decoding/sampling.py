"""The sampling loops: from our own cache, or through transformers' `generate` for a model that cannot use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pyrite.decoding.cached_attention import attending
from pyrite.decoding.draws import Draw, draw, streams, uniforms
from pyrite.decoding.engines import Decoder, Engine, Prompts

CHECK = 4  # steps between two looks at which rows have finished
COMPACT = 0.8  # finished rows are dropped when fewer than this share is alive


@dataclass(frozen=True)
class Job:
    """What does not change from chunk to chunk."""

    model: Any
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
class Chunk:
    """Rows that decode together, ordered by prompt, longest first."""

    rows: Tensor  # (n,) place in the result
    prompts: Prompts
    state: Tensor  # (n,) streams


@dataclass(frozen=True)
class Record:
    """What is drawn: tokens, logps and policy_logps, (n, T) each."""

    tokens: Tensor
    logps: Tensor
    policy_logps: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device) -> Record:
        real = torch.zeros(rows, steps, device=device)
        return cls(torch.zeros(rows, steps, dtype=torch.int64, device=device), real, real.clone())

    def write(self, rows: Tensor, step: int, drawn: Draw) -> None:
        for block, value in zip((self.tokens, self.logps, self.policy_logps), drawn, strict=True):
            block[rows, step] = value


def decode(job: Job, chunk: Chunk) -> Record:
    """Step by step from our cache, dropping rows as they finish."""
    assert job.engine is not None
    total, device = len(chunk.rows), chunk.rows.device
    record, alive, state = Record.empty(total, job.steps, device), torch.arange(total, device=device), chunk.state
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


def generate(job: Job, chunk: Chunk) -> Record:
    """By transformers' `generate`, greedy over logits in which our own draw has left one token."""
    device = chunk.rows.device
    rows = [p for p, n in zip(chunk.prompts.tokens, chunk.prompts.repeats, strict=True) for _ in range(n)]
    width = len(rows[0])
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    visible = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    record = Record.empty(len(rows), job.steps, device)
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

    def __init__(self, job: Job, state: Tensor, record: Record, width: int) -> None:
        self.job, self.state, self.record, self.width = job, state, record, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        drawn = self.job.draw(scores, self.state, step)
        self.record.write(torch.arange(len(scores), device=scores.device), step, drawn)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn.token[:, None], 0.0)


def chunks(prompts: Sequence[Sequence[int]], keys: Tensor, k: int, seed: int, max_rows: int) -> Iterator[Chunk]:
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
        yield Chunk(which[:, 0] * k + which[:, 1], Prompts(list(repeats), list(repeats.values())), state)
