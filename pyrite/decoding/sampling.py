"""The sampling loops, over one model or two that are mixed: from our own cache, or for a model that cannot use it
through transformers' `generate`, or with the whole text read anew at every step where such a model is mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pyrite.decoding.adapters import silent
from pyrite.decoding.cached_attention import attending
from pyrite.decoding.draws import Draw, draw, streams, token_logp, uniforms
from pyrite.decoding.engines import Decoder, Path, Prompts
from pyrite.decoding.uncached import Uncached
from pyrite.decoding.voices import Voice
from pyrite.forwards import forget
from pyrite.samplers import mixed_logits

CHECK = 4  # steps between two looks at which rows have finished
COMPACT = 0.8  # finished rows are dropped when fewer than this share is alive


@dataclass(frozen=True)
class Job:
    """What does not change from chunk to chunk; the voices are one model, or the policy and the reference."""

    voices: Sequence[Voice]
    eos: Tensor
    steps: int
    temperature: float
    top_k: int
    top_p: float
    progress: Callable[[int], None]

    @property
    def device(self) -> torch.device:
        return self.voices[0].device

    def path(self, prompts: Sequence[Sequence[int]]) -> Path:
        """How the models are run on these prompts: the slower way of two."""
        columns = max(map(len, prompts)) + self.steps
        paths = {v.engine.path if v.engine and columns <= v.ways.turn else None for v in self.voices}
        if None in paths:
            return "generate" if len(self.voices) == 1 else "uncached"
        return "cached" if "cached" in paths else "lean"

    def run(self, chunk: Chunk) -> Record:
        """Samples of the rows of a chunk."""
        return _generate(self, chunk) if self.path(chunk.prompts.tokens) == "generate" else _decode(self, chunk)

    def draw(self, logits: Sequence[Tensor], exponents: Tensor | None, state: Tensor, step: int) -> Draw:
        """Tokens from the logits (N, V) of each voice, mixed by exponents (N, 2) before temperature and truncation."""
        first, last = logits[0], logits[-1]
        mixed = first if exponents is None else mixed_logits(first, last, exponents)
        drawn = draw(
            mixed,
            uniforms(state, step),
            policy=None if exponents is None else first,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        return drawn._replace(ref_logp=token_logp(last, drawn.token)) if len(logits) > 1 else drawn

    def ends(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self.eos).any(-1)

    def lengths(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) up to the end token, it included: (N,)."""
        ends = self.ends(tokens)
        return torch.where(ends.any(1), ends.int().argmax(1) + 1, self.steps)


@dataclass(frozen=True)
class Chunk:
    """Rows that decode together, ordered by prompt, longest first."""

    rows: Tensor  # (n,) place in the result
    prompts: Prompts
    state: Tensor  # (n,) streams
    exponents: Tensor | None = None  # (n, 2) of policy and reference, on the CPU; None: the one voice as it is


@dataclass(frozen=True)
class Record:
    """What is drawn: tokens and log-probabilities, (n, T) each; `policy_logps` are those of the first voice."""

    tokens: Tensor
    logps: Tensor
    policy_logps: Tensor
    ref_logps: Tensor | None = None  # of the second voice

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device, *, ref: bool = False) -> Record:
        tokens, real = (torch.zeros(rows, steps, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
        return cls(tokens, real, real.clone(), real.clone() if ref else None)

    def write(self, at: Tensor | tuple[Tensor, int], values: Draw | Record) -> None:
        """Set rows, or one step of some rows; what one of the two lacks is left out."""
        found = values if isinstance(values, Draw) else vars(values).values()
        for block, value in zip(vars(self).values(), found, strict=True):
            if block is not None and value is not None:
                block[at] = value


def _decode(job: Job, chunk: Chunk) -> Record:
    """Step by step, dropping rows as they finish."""
    total, device = len(chunk.rows), chunk.rows.device
    record = Record.empty(total, job.steps, device, ref=len(job.voices) > 1)
    alive, state, exponents = torch.arange(total, device=device), chunk.state, chunk.exponents
    last = torch.tensor([prompt[-1] for prompt in chunk.prompts.tokens], device=device)
    token = last.repeat_interleave(torch.tensor(chunk.prompts.repeats, device=device))
    done, reported = torch.zeros(total, dtype=torch.bool, device=device), 0
    with ExitStack() as stack:
        decoders = [_decoder(job, voice, chunk.prompts, stack, device) for voice in job.voices]
        for step in range(job.steps):
            drawn = job.draw([decoder.step(token) for decoder in decoders], exponents, state, step)
            record.write((alive, step), drawn)
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
                for decoder in decoders:
                    decoder.keep(keep)
                alive, state, token, done = alive[keep], state[keep], token[keep], done[keep]
                exponents = None if exponents is None else exponents[keep.cpu()]
    job.progress(total - reported)
    return record


def _decoder(job: Job, voice: Voice, prompts: Prompts, stack: ExitStack, device: torch.device) -> Decoder | Uncached:
    """The rows under one voice; the model attends in our way until the stack is left, if it is run from our cache."""
    if job.path(prompts.tokens) == "uncached" or voice.engine is None:
        return Uncached(voice, prompts, steps=job.steps, device=device)
    stack.enter_context(attending(voice.model))
    return Decoder(voice.engine, prompts, steps=job.steps, device=device)


def _generate(job: Job, chunk: Chunk) -> Record:
    """By transformers' `generate`, greedy over logits in which our own draw has left one token.

    Prompts are padded at the left, unless that would change what the model says: then those of one length go together.
    """
    (voice,), device = job.voices, chunk.rows.device
    rows = [list(p) for p, n in zip(chunk.prompts.tokens, chunk.prompts.repeats, strict=True) for _ in range(n)]
    record = Record.empty(len(rows), job.steps, device)
    together: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        together.setdefault(len(row) if voice.alone else 0, []).append(index)
    for group in together.values():
        width = max(len(rows[index]) for index in group)
        tokens = torch.tensor([[0] * (width - len(rows[i])) + rows[i] for i in group], device=device)
        visible = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in group], device=device)
        drawing = _Drawing(job, chunk, record, torch.tensor(group, device=device), width)
        forget(voice.model)
        with silent(voice.silenced):
            voice.model.generate(
                tokens,
                attention_mask=visible,
                generation_config=_greedy(job),
                logits_processor=LogitsProcessorList([drawing]),
            )
        job.progress(len(group))
    return record


def _greedy(job: Job) -> GenerationConfig:
    (voice,) = job.voices
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=job.steps,
        eos_token_id=job.eos.tolist() or [voice.model.config.get_text_config().vocab_size],  # None: the model's own
        pad_token_id=0,
    )


class _Drawing(LogitsProcessor):
    """Draws each row's token from its own stream, records it, and leaves it as the only choice."""

    def __init__(self, job: Job, chunk: Chunk, record: Record, rows: Tensor, width: int) -> None:
        self.job, self.record, self.rows, self.width = job, record, rows, width
        self.state = chunk.state[rows]
        self.exponents = None if chunk.exponents is None else chunk.exponents[rows.cpu()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        drawn = self.job.draw([scores], self.exponents, self.state, step)
        self.record.write((self.rows, step), drawn)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn.token[:, None], 0.0)


def chunks(
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    k: int,
    seed: int,
    max_rows: int,
    *,
    among: Tensor | None = None,
    exponents: Tensor | None = None,
) -> Iterator[Chunk]:
    """Rows sorted by prompt, longest first (equal prompts together, prefilled once), cut at max_rows.

    among (P, k): the rows to take, all by default; exponents (P, k, 2) of each row, on the CPU.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), tuple(prompts[index])))
    wanted = None if among is None else among.tolist()
    rows = [(index, number) for index in order for number in range(k) if wanted is None or wanted[index][number]]
    for start in range(0, len(rows), max_rows):
        part = rows[start : start + max_rows]
        repeats: dict[tuple[int, ...], int] = {}
        for index, _ in part:
            repeats[tuple(prompts[index])] = repeats.get(tuple(prompts[index]), 0) + 1
        which = torch.tensor(part)
        arms = None if exponents is None else exponents[which[:, 0], which[:, 1]]
        which = which.to(keys.device)
        state = streams(seed, keys[which[:, 0]], which[:, 1])
        yield Chunk(which[:, 0] * k + which[:, 1], Prompts(list(repeats), list(repeats.values())), state, arms)
