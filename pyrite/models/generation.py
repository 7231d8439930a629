"""Sampling from a causal language model, or from two mixed: token ids in, tokens and log-probabilities out.

A sample depends on (seed, key of its prompt, sample number) alone, not on the batch, the order or the machine
count. A model is run from our own cache where it can be (`pyrite.decoding`), else by transformers' `generate`.
Under `torch.autocast` models compute in its precision; log-probabilities, mixtures and draws are float32 all the same.
Rounding may then differ with the batch, so that once in a while a token does: it is drawn from the same stream.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pyrite.math.samplers import mixed_logits
from pyrite.models.decoder import (
    PREFILL,
    Decoder,
    Engine,
    Path,
    Prompts,
    adapter_layers,
    attending,
    base_of,
    evaluating,
    open_engine,
    silent,
    transformers_model,
    without_adapters,
)
from pyrite.models.forward import CLOSE, Ways, forget, told, ways
from pyrite.models.loading import context_of
from pyrite.models.packing import FastLinears

# draws: Randomness that belongs to a row, not to a batch: counter-based uniforms and inverse-CDF sampling.


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


# voices: A model as it speaks in a decoding loop: how it is run, and with its adapters or without.


ANY = Ways(padded=True)
VAST = 1 << 30  # no token
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voice:
    """A model, its engine (None: it cannot decode from our cache), and the adapted layers to silence while it runs.

    ways: which texts may share a forward of it. alone: `generate` takes prompts of one length only, without pads.
    """

    model: Any
    engine: Engine | None = None
    silenced: tuple[Any, ...] = ()
    ways: Ways = ANY
    alone: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, ids: Tensor, last: int) -> Tensor:
        """Logits (N, last, V) of the last columns of whole texts ids (N, T), padded at the right, nothing masked."""
        takes = inspect.signature(transformers_model(self.model).forward).parameters
        keep = {"logits_to_keep": last} if "logits_to_keep" in takes else {}
        if self.ways.dynamic:
            forget(self.model)
        with silent(self.silenced), FastLinears():
            return self.model(input_ids=ids, use_cache=False, **keep).logits[:, -last:]


def open_voice(model: Any, columns: int) -> Voice:
    """A model over texts of up to `columns` tokens, in the fastest way it can be run."""
    stock = transformers_model(model)
    found = ways(stock)
    if found.dynamic:
        forget(stock)
    engine = open_engine(model, min(columns, found.turn))
    if engine is None:
        log.warning("%s cannot decode from our cache: using transformers' generate", type(model).__name__)
    alone = columns > found.turn or (engine is None and not told(stock, _ignores_pads))
    return Voice(model, engine, ways=found, alone=alone)


def _ignores_pads(model: PreTrainedModel) -> bool:
    """Whether `generate` gives a prompt behind pads the logits that it gives the prompt alone."""
    config = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=[VAST], pad_token_id=0)
    show: dict[str, Any] = {"generation_config": config, "output_logits": True, "return_dict_in_generate": True}
    size = model.config.get_text_config().vocab_size
    long, short = [[token % size for token in tokens] for tokens in ([5, 3, 8, 4, 9, 7], [6, 10, 11])]
    try:
        alone = torch.stack(model.generate(torch.tensor([short]), **show).logits)[:, 0]  # type: ignore[attr-defined,operator]
        both, mask = torch.tensor([long, [0, 0, 0, *short]]), torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
        padded = torch.stack(model.generate(both, attention_mask=mask, **show).logits)[:, 1]  # type: ignore[attr-defined,operator]
    except Exception:  # whatever a foreign model raises, it cannot be run so
        return False
    return bool((alone - padded).abs().max() <= CLOSE * alone.abs().max())


def open_reference(ref_model: Any, policy: Voice, columns: int) -> Voice:
    """The reference beside a policy: a model of its own, or None for the policy with its adapters off.

    Adapters off, both run on the same weights in memory, the policy's engine included.
    """
    if ref_model is not None:
        same = ref_model is policy.model and policy.engine is not None
        return policy if same else open_voice(ref_model, columns)
    model, layers = base_of(policy.model)
    if not layers:
        return open_voice(model, columns)
    engine = without_adapters(policy.engine, layers) if policy.engine else None
    return Voice(model, engine, layers, policy.ways, policy.alone)


# uncached: Whole texts through the stock model: log-probabilities of given tokens, and decoding for any model,
# slowly.


LOGITS = 2**26  # of one forward, at most


def score(voice: Voice, prompts: Prompts, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities (N, T) of the responses `tokens` (N, T) of `lengths` (N,), nats; 0 beyond the length."""
    texts = _Texts(prompts, tokens.shape[1], tokens.device)
    step = torch.arange(tokens.shape[1], device=tokens.device)
    columns = texts.start[:, None] + step
    texts.ids.scatter_(1, columns, tokens)
    found = torch.zeros(tokens.shape, device=tokens.device)
    order = (texts.start + lengths).argsort(descending=True)
    for rows, first, logits in texts.logits(voice, order, texts.start - 1, texts.start + lengths - 1):
        at = (columns[rows] - 1 - first).clamp_max(logits.shape[1] - 1)
        logps = token_logp(logits.gather(1, at[..., None].expand(-1, -1, logits.shape[2])), tokens[rows])
        found[rows] = logps.masked_fill_(step >= lengths[rows, None], 0.0)
    return found


class Uncached:
    """The rows of some prompts under one model, as `Decoder`, but with the whole text read anew at every step."""

    def __init__(self, voice: Voice, prompts: Prompts, *, steps: int, device: torch.device) -> None:
        self.voice, self.texts = voice, _Texts(prompts, steps, device)
        self.last = self.texts.start - 1  # a prompt's last token is the first step's input

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (N, V) after one more token (N,) in each row."""
        row = torch.arange(len(tokens), device=tokens.device)
        self.texts.ids[row, self.last] = tokens
        found, order = [], []
        for rows, first, logits in self.texts.logits(self.voice, row, self.last, self.last + 1):
            found.append(logits[row[: len(rows)], self.last[rows] - first])
            order.append(rows)
        self.last = self.last + 1
        return torch.cat(found)[torch.cat(order).argsort()]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.texts.ids, self.last = self.texts.ids[rows], self.last[rows]


class _Texts:
    """Token ids (N, columns) of prompts, repeated, with room for responses; `start` (N,) is each prompt's length."""

    def __init__(self, prompts: Prompts, steps: int, device: torch.device) -> None:
        width = len(prompts.tokens[0])
        block = [[*prompt, *[0] * (width + steps - len(prompt))] for prompt in prompts.tokens]
        repeats = torch.tensor(prompts.repeats, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts.tokens], device=device)
        self.ids = torch.tensor(block, device=device).repeat_interleave(repeats, 0)
        self.start = lengths.repeat_interleave(repeats)

    def logits(self, voice: Voice, order: Tensor, begin: Tensor, end: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Logits of columns begin (N,) to end (N,) of every row, some rows at a time, in this order if they may mix.

        Yields the rows (n,), the first of their columns and the logits from it on (n, columns, V).
        """
        vocabulary = voice.model.config.get_text_config().vocab_size
        first, width = int(begin.min()), int(end.max())
        size = min(LOGITS // ((width - first) * vocabulary), PREFILL // width)
        groups = [order[group] for group in voice.ways.apart(end[order].tolist())]
        for rows in (rows for group in groups for rows in group.split(max(1, size))):
            first, width = int(begin[rows].min()), int(end[rows].max())
            yield rows, first, voice.logits(self.ids[rows, :width], width - first)


# sampling: The sampling loops, over one model or two that are mixed: from our own cache, or for a model that cannot
# use it through transformers' `generate`, or with the whole text read anew at every step where such a model is mixed.


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


# requests: What a caller asks of a decoding loop, checked before any work: prompts, counts, options, models that fit.


ROWS, ROWS_CPU = 512, 128  # that decode together by default; on a processor its caches should hold theirs


@dataclass(frozen=True)
class Request:
    """Everything but the models; `generate.sample` says what each is."""

    prompts: Sequence[Sequence[int]]
    k: int
    eos: int | Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    keys: Sequence[int] | None
    max_rows: int | None
    progress: Callable[[int], None] | None

    @property
    def columns(self) -> int:
        """Tokens of the longest text that may come of it."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    def check(self, *models: Any) -> None:
        """Raises ValueError for options out of range, and prompts that one of the models cannot read."""
        rows = 1 if self.max_rows is None else self.max_rows
        for name, value in (("k", self.k), ("max_new_tokens", self.max_new_tokens), ("max_rows", rows)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a share of probability above 0, at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give a number of tokens, or 0 for all")
        if not len(self.prompts):
            raise ValueError("no prompts: give at least one")
        if self.keys is not None and len(self.keys) != len(self.prompts):
            raise ValueError(f"{len(self.keys)} keys for {len(self.prompts)} prompts: give one key a prompt")
        for model in models:
            _check_prompts(model, self.prompts, self.max_new_tokens)

    def job(self, voices: Sequence[Voice]) -> Job:
        """The loop's side of it, for these models."""
        ends = [self.eos] if isinstance(self.eos, int) else list(self.eos)
        return Job(
            voices=voices,
            eos=torch.tensor(ends, dtype=torch.int64, device=voices[0].device),
            steps=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            progress=self.progress or (lambda _: None),
        )

    def chunks(self, device: torch.device, group: Group | None = None) -> Iterator[Chunk]:
        """All rows of all prompts, or of a group, as they decode together."""
        keys = range(len(self.prompts)) if self.keys is None else self.keys
        rows = self.max_rows or (ROWS_CPU if device.type == "cpu" else ROWS)
        which = {"among": group.rows, "exponents": group.exponents} if group else {}
        return chunks(self.prompts, torch.tensor(list(keys), device=device), self.k, self.seed, rows, **which)


class Group(NamedTuple):
    """Rows (P, k) bool whose arms need the same models, and their exponents (P, k, 2), None where 1 of one model."""

    policy: bool
    ref: bool
    rows: Tensor
    exponents: Tensor | None


def groups(arms: Tensor) -> list[Group]:
    """The rows of arms (P, k, 2) by the models that they need; (0, 0), uniform, only to be read by the policy."""
    ref = arms[..., 1] != 0
    policy = (arms[..., 0] != 0) | ~ref
    plain = (policy ^ ref) & (arms.sum(-1) == 1)
    code = 4 * policy + 2 * ref + plain
    return [Group(bool(c & 4), bool(c & 2), code == c, None if c & 1 else arms) for c in code.unique().tolist()]


def check_arms(exponents: Tensor, prompts: int) -> Tensor:
    """Exponents (P, k, 2) as float32 on the CPU. Raises ValueError for another shape, or one that is not finite."""
    if exponents.dim() != 3 or exponents.shape[0] != prompts or exponents.shape[2] != 2:
        raise ValueError(
            f"exponents {tuple(exponents.shape)}: give ({prompts}, k, 2), of policy and reference for each sample"
        )
    arms = exponents.detach().float().cpu()
    if not bool(arms.isfinite().all()):
        index = (~arms.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"exponents of prompt {index[0]}, sample {index[1]} are not finite: give plain numbers")
    return arms


def check_reference(policy: Any, ref: Any) -> Any:
    """The model that holds the reference's weights; ref None is the policy with its adapters off.

    Raises ValueError where there are no adapters to switch off, for a reference that is the adapted policy itself,
    and for one with another vocabulary or on another device.
    """
    if ref is None:
        return base_of(policy)[0]
    ours, theirs = transformers_model(policy), transformers_model(ref)
    if ours is theirs and adapter_layers(policy):
        raise ValueError(
            "the reference is the policy itself, adapters included: give ref_model=None to switch them off"
        )
    sizes = [model.config.get_text_config().vocab_size for model in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the policy's vocabulary has {sizes[0]} tokens, the reference's {sizes[1]}: "
            "only models of one tokenizer can be mixed"
        )
    places = [next(model.parameters()).device for model in (ours, theirs)]
    if places[0] != places[1]:
        raise ValueError(f"the policy is on {places[0]}, the reference on {places[1]}: move them to one device")
    return ref


def check_tokenizers(policy: Any, ref: Any) -> None:
    """Refuse two tokenizers that do not give each token the same id: their models' logits cannot be mixed."""
    ours, theirs = policy.get_vocab(), ref.get_vocab()
    if ours != theirs:
        token, index = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
        raise ValueError(
            f"the tokenizers of policy ({len(ours)} tokens) and reference ({len(theirs)}) differ, first at id {index} "
            f"({token!r}): only models of one tokenizer can be mixed"
        )


def _check_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    text = model.config.get_text_config()
    context = context_of(transformers_model(model))
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: give at least one token, such as a start token")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, beyond the "
                f"model's context of {context}: shorten one of them"
            )
        if min(prompt) < 0 or max(prompt) >= text.vocab_size:
            raise ValueError(f"prompt {index} has a token outside 0..{text.vocab_size - 1}: wrong tokenizer?")


# generate: Sampling from a causal language model, or from two mixed: token ids in, tokens and log-probabilities out.


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
