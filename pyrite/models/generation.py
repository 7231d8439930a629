"""Sampling from a causal language model, or from two mixed: token ids in, tokens and log-probabilities out.

A sample depends on (seed, key of its prompt, sample number) alone, not on the batch, the order or the number of
machines. Models run from our own cache if they can, else by transformers' `generate`.
Under `torch.autocast` models compute in its precision. Log-probabilities, mixtures and draws are always float32.
Rounding may then differ with the batch, so that once in a while a token does: it is drawn from the same stream.

From top to bottom: what is asked for; the sampling loops; how a token is drawn; how a model is run (`Decoder`), over
its cache, with our attention, or as one flat function (`FusedLlama`); adapters that are switched off.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from pyrite.math.samplers import mixed_logits
from pyrite.models.forward import CLOSE, FastLinears, Ways, context_of, forget, product, told, ways

log = logging.getLogger(__name__)

ROWS, ROWS_CPU = 512, 128  # that decode together by default; on a processor its caches should hold theirs
Path = Literal["fused", "cached", "generate", "uncached"]
SLOWEST: tuple[Path, ...] = ("uncached", "generate", "cached", "fused")


@dataclass(frozen=True)
class Samples:
    """N sampled responses, prompt by prompt, sample by sample; T is the longest; 0 beyond each length.

    path: how the model was run, the slowest way of several: "fused"; "cached"; "generate", transformers' own; or
    "uncached", where two models are mixed of which one cannot use our cache: the whole text anew at every step.
    """

    prompt: Tensor  # (N,) index of the prompt
    sample: Tensor  # (N,) 0 .. k-1
    tokens: Tensor  # (N, T)
    length: Tensor  # (N,) tokens, the end token included
    finished: Tensor  # (N,) bool: ended by an end token, not cut
    logps: Tensor  # (N, T) nats, under the distribution drawn from (0 when greedy)
    policy_logps: Tensor  # (N, T) nats, under the model (of two, the policy): temperature 1, nothing truncated; NaN in
    # rows that did not need it
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
    request = Request(prompts, eos, max_new_tokens, temperature, top_p, top_k, seed, keys, max_rows, progress)
    _check(request, k, model)
    return _sample(request, model, model, torch.tensor([1.0, 0.0]).expand(len(prompts), k, 2))


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
    with the reference. The log-probabilities of a model that did not run are NaN.
    Raises ValueError as `sample` does, and for a reference of another vocabulary.
    """
    arms = _check_arms(exponents, len(prompts))
    if ref_model is not None or bool((arms[..., 1] != 0).any()):
        _check_reference(policy_model, ref_model)
    request = Request(prompts, eos, max_new_tokens, temperature, top_p, top_k, seed, keys, max_rows, progress)
    _check(request, arms.shape[1], policy_model, *([] if ref_model is None else [ref_model]))
    return _sample(request, policy_model, ref_model, arms)


@dataclass(frozen=True)
class Request:
    """The arguments of `sample`, apart from the models and their mixture."""

    prompts: Sequence[Sequence[int]]
    eos: int | Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    keys: Sequence[int] | None
    max_rows: int | None
    progress: Callable[[int], None] | None


def _sample(request: Request, policy_model: Any, ref_model: Any, arms: Tensor) -> Samples:
    """Samples of arms (P, k, 2). Arms that need the same models are decoded together."""
    prompts, k, steps = request.prompts, arms.shape[1], request.max_new_tokens
    columns, exponents = max(map(len, prompts)) + steps, arms.flatten(0, 1)
    needs_ref = exponents[:, 1] != 0
    needs_policy = (exponents[:, 0] != 0) | ~needs_ref  # a uniform arm (0, 0) takes the policy's logits times 0
    with torch.inference_mode(), _evaluating(policy_model), _evaluating(ref_model):
        decodes = ref_model is None or bool(needs_policy.any())
        policy = open_runner(policy_model, columns) if decodes else Runner(policy_model)
        ref = open_reference(ref_model, policy, columns) if bool(needs_ref.any()) else policy
        device, n = policy.device, len(exponents)
        tokens = torch.zeros(n, steps, dtype=torch.int64, device=device)
        logps = [torch.full((n, steps), math.nan, device=device) for _ in range(3)]  # as drawn, policy, reference
        keys = torch.tensor(list(request.keys or range(len(prompts))), device=device)
        state = streams(request.seed, keys.repeat_interleave(k), torch.arange(k, device=device).repeat(len(prompts)))
        eos = torch.tensor(
            [request.eos] if isinstance(request.eos, int) else list(request.eos), dtype=torch.int64, device=device
        )
        paths = []
        for by_policy, by_ref, plain, rows in _groups(exponents):
            used = [(policy, logps[1])] if by_policy else []
            used += [(ref, logps[2])] if by_ref else []
            runners, blocks = [runner for runner, _ in used], [logps[0], *(block for _, block in used)]
            drawing = Drawing(request, runners, eos, state, None if plain else exponents, tokens, blocks)
            paths.append(drawing.path(columns))
            for batch in _batches(prompts, k, rows, request.max_rows or (ROWS_CPU if device.type == "cpu" else ROWS)):
                texts = [prompts[row // k] for row in batch]
                run = _generate if drawing.path(len(texts[0]) + steps) == "generate" else _decode
                run(drawing, texts, torch.tensor(batch, device=device))
    # outside of inference mode, so that the results may enter a loss
    ended = (tokens[..., None] == eos).any(-1)
    finished = ended.any(1)
    length = torch.where(finished, ended.int().argmax(1) + 1, steps)
    inside = torch.arange(int(length.max()), device=device) < length[:, None]
    tokens, *logps = (block[:, : inside.shape[1]].masked_fill(~inside, 0) for block in (tokens, *logps))
    mixed = ref_model is not policy_model or bool(needs_ref.any())
    whose = {"policy" if mixed else "model": (logps[1], needs_policy), "reference": (logps[2], needs_ref)}
    for name, (block, ran) in {**whose, "arm": (logps[0], needs_ref | True)}.items():
        _check_finite(name, block.isnan().any(1) & ran.to(device), k)
    row, path = torch.arange(n, device=device), min(paths, key=SLOWEST.index)
    read = logps[2] if bool(needs_ref.any()) else None
    return Samples(row // k, row % k, tokens, length, finished, logps[0], logps[1], path, read)


def _groups(exponents: Tensor) -> Iterator[tuple[bool, bool, bool, Tensor]]:
    """Rows of exponents (N, 2) grouped by the models they need.

    Yields whether the policy runs, whether the reference runs, whether one model is used unchanged, and the rows
    (N,).
    """
    ref = exponents[:, 1] != 0
    policy = (exponents[:, 0] != 0) | ~ref
    plain = (policy ^ ref) & (exponents.sum(-1) == 1)
    code = 4 * policy + 2 * ref + plain
    for c in code.unique().tolist():
        yield bool(c & 4), bool(c & 2), bool(c & 1), code == c


def _batches(prompts: Sequence[Sequence[int]], k: int, wanted: Tensor, most: int) -> Iterator[list[int]]:
    """Indices of wanted rows that decode together, by prompt, the longest first: equal prompts are prefilled once."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), tuple(prompts[index])))
    keep = wanted.tolist()
    rows = [row for index in order for row in range(index * k, index * k + k) if keep[row]]
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


# Checks, before any work.


def _check(request: Request, k: int, *models: Any) -> None:
    """Raises ValueError for options out of range, and for prompts that one of the models cannot read."""
    rows = 1 if request.max_rows is None else request.max_rows
    for name, value in (("k", k), ("max_new_tokens", request.max_new_tokens), ("max_rows", rows)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise ValueError(f"temperature={request.temperature}: give 0 (greedy) or a positive number")
    if not 0 < request.top_p <= 1:
        raise ValueError(f"top_p={request.top_p}: give a share of probability above 0, at most 1")
    if request.top_k < 0:
        raise ValueError(f"top_k={request.top_k}: give a number of tokens, or 0 for all")
    if not len(request.prompts):
        raise ValueError("no prompts: give at least one")
    if request.keys is not None and len(request.keys) != len(request.prompts):
        raise ValueError(f"{len(request.keys)} keys for {len(request.prompts)} prompts: give one key a prompt")
    for model in models:
        _check_prompts(model, request.prompts, request.max_new_tokens)


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


def _check_arms(exponents: Tensor, prompts: int) -> Tensor:
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


def _check_reference(policy: Any, ref: Any) -> None:
    """Refuse a reference that cannot be mixed with the policy; ref None is the policy with its adapters off.

    Raises ValueError if there are no adapters to switch off, for a reference that is the adapted policy itself, and
    for one with another vocabulary or on another device.
    """
    if ref is None:
        base_of(policy)
        return
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


def _check_finite(whose: str, broken: Tensor, k: int) -> None:
    """Refuse NaN: broken weights, or options beyond float32. -inf is allowed beside the model drawn from."""
    if bool(broken.any()):
        what = "its exponents, and the temperature" if whose == "arm" else "the weights"
        index = int(broken.nonzero()[0]) // k
        raise ValueError(f"the {whose}'s logits are not finite on prompt {index}: check {what}")


# The sampling loops.


CHECK = 4  # steps between two looks at which rows have finished
COMPACT = 0.8  # finished rows are dropped when fewer than this share is alive


@dataclass(frozen=True)
class Drawing:
    """What rows that need the same models share, and where their tokens and log-probabilities are written."""

    request: Request
    runners: Sequence[Runner]  # one model, or policy and reference
    eos: Tensor
    state: Tensor  # (N,) random streams
    exponents: Tensor | None  # (N, 2) of policy and reference, on the CPU; None: the one model as it is
    tokens: Tensor  # (N, T)
    logps: Sequence[Tensor]  # (N, T) each: as drawn, and under each of the models

    def path(self, columns: int) -> Path:
        """How the models are run on texts of up to `columns` tokens: the slower way of two."""
        paths: list[Path] = [r.path if columns <= r.ways.turn else "generate" for r in self.runners]
        slow = min(paths, key=SLOWEST.index)
        return "uncached" if slow == "generate" and len(paths) > 1 else slow

    def draw(
        self, logits: Sequence[Tensor], step: int, rows: Tensor, state: Tensor, exponents: Tensor | None
    ) -> Tensor:
        """Draw and write the next token (n,) of these rows from the logits (n, V) of each model, mixed by exponents
        before temperature and truncation."""
        first, last = logits[0], logits[-1]
        mixed = first if exponents is None else mixed_logits(first, last, exponents)
        token, *logps = draw(
            mixed,
            uniforms(state, step),
            policy=None if exponents is None else first,
            temperature=self.request.temperature,
            top_k=self.request.top_k,
            top_p=self.request.top_p,
        )
        if len(logits) > 1:
            logps.append(token_logp(last, token))
        self.tokens[rows, step] = token
        for block, values in zip(self.logps, logps, strict=True):
            block[rows, step] = values
        return token

    def report(self, count: int) -> None:
        if self.request.progress:
            self.request.progress(count)


def _decode(drawing: Drawing, prompts: Sequence[Sequence[int]], rows: Tensor) -> None:
    """Step by step, dropping rows as they finish. prompts: of the rows, the longest first."""
    steps, total, reported = drawing.request.max_new_tokens, len(rows), 0
    state = drawing.state[rows]
    exponents = None if drawing.exponents is None else drawing.exponents[rows.cpu()]
    token = torch.tensor([prompt[-1] for prompt in prompts], device=rows.device)
    done = torch.zeros(total, dtype=torch.bool, device=rows.device)
    way = Uncached if drawing.path(len(prompts[0]) + steps) == "uncached" else Decoder
    decoders = [way(runner, prompts, steps=steps) for runner in drawing.runners]
    for step in range(steps):
        token = drawing.draw([decoder.step(token) for decoder in decoders], step, rows, state, exponents)
        done |= (token[:, None] == drawing.eos).any(-1)
        if (step + 1) % CHECK or not len(drawing.eos):
            continue
        left = len(done) - int(done.sum())
        drawing.report(total - left - reported)
        reported = total - left
        if left == 0:
            break
        if left < COMPACT * len(done):
            keep = (~done).nonzero().squeeze(1)
            for decoder in decoders:
                decoder.keep(keep)
            rows, state, token, done = rows[keep], state[keep], token[keep], done[keep]
            exponents = None if exponents is None else exponents[keep.cpu()]
    drawing.report(total - reported)


def _generate(drawing: Drawing, prompts: Sequence[Sequence[int]], rows: Tensor) -> None:
    """By transformers' `generate`, greedy over logits in which our own draw has left one token.

    Prompts are padded at the left, unless that would change what the model says: then those of one length go together.
    """
    (runner,) = drawing.runners
    vocabulary = runner.model.config.get_text_config().vocab_size
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=drawing.request.max_new_tokens,
        eos_token_id=drawing.eos.tolist() or [vocabulary],  # None: the model's own
        pad_token_id=0,
    )
    together: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        together.setdefault(len(prompt) if runner.one_length else 0, []).append(index)
    for group in together.values():
        some = [prompts[index] for index in group]
        width = max(map(len, some))
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in some], device=rows.device)
        visible = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some], device=rows.device)
        forget(runner.model)
        with silent(runner.off):
            runner.model.generate(
                tokens,
                attention_mask=visible,
                generation_config=greedy,
                logits_processor=LogitsProcessorList([_Chosen(drawing, rows[group], width)]),
            )
        drawing.report(len(group))


class _Chosen(LogitsProcessor):
    """Draws each row's token and leaves it as the only choice."""

    def __init__(self, drawing: Drawing, rows: Tensor, width: int) -> None:
        exponents = None if drawing.exponents is None else drawing.exponents[rows.cpu()]
        self.drawing, self.width, self.rows = drawing, width, (rows, drawing.state[rows], exponents)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.drawing.draw([scores], input_ids.shape[1] - self.width, *self.rows)
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """Within this block the model is in evaluation mode; each module's own mode is restored."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# Randomness that belongs to a row and not to a batch: counter-based uniforms and inverse-CDF sampling.


# SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers: torch wraps on overflow
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 48  # of a uniform: u * total < total in float64, so the last arm is never overrun


class Draw(NamedTuple):
    """Tokens (N,) and log-probabilities (N,), nats: as drawn, and of the untruncated policy at temperature 1."""

    token: Tensor
    logp: Tensor
    policy_logp: Tensor


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


# How a model is run: from our cache, fused or by its own forward; else by `generate` or from whole texts.


TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox"})
PREFILL = 16384  # tokens, padding included, of one forward
LOGITS = 2**26  # of one forward over whole texts, at most

Mask = Tensor | dict[str, Tensor | None] | None


@dataclass(frozen=True)
class Runner:
    """A model made ready to decode.

    forward: tokens and positions (N, T), cache, mask -> logits (N, V) of the last column; None if the model cannot
    decode from our cache. windows: the sliding window of each kind of layer, None if the kind sees everything.
    ways: which texts may share a forward. one_length: `generate` takes prompts of one length only, without padding.
    adapted: False switches the model's adapters off while it runs.
    """

    model: Any
    path: Path = "generate"
    forward: Callable[..., Tensor] | None = None
    windows: dict[str, int | None] = field(default_factory=dict)
    ways: Ways = Ways(padded=True)
    one_length: bool = False
    adapted: bool = True

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def off(self) -> tuple[Any, ...]:
        """The layers whose adapters are to be switched off."""
        return () if self.adapted else adapter_layers(self.model)


def open_runner(model: Any, columns: int) -> Runner:
    """The fastest way to run a model over texts of up to `columns` tokens."""
    stock = transformers_model(model)
    found = ways(stock)
    if found.dynamic:
        forget(stock)
    runner = open_cached(model, min(columns, found.turn))
    if runner is None:
        log.warning("%s cannot decode from our cache: using transformers' generate", type(model).__name__)
        runner = Runner(model)
    one_length = columns > found.turn or (runner.forward is None and not told(stock, _ignores_padding))
    return replace(runner, ways=found, one_length=one_length)


def open_reference(ref_model: Any, policy: Runner, columns: int) -> Runner:
    """The reference beside a policy: a model of its own, or None for the policy with its adapters off.

    With its adapters off, the policy's weights in memory serve both.
    """
    if ref_model is not None:
        return policy if ref_model is policy.model and policy.forward else open_runner(ref_model, columns)
    model, layers = base_of(policy.model)
    return replace(policy, adapted=False) if layers else open_runner(model, columns)


def open_cached(model: nn.Module, columns: int) -> Runner | None:
    """The fastest way to run a model over up to `columns` tokens from our cache; None if it cannot use it.

    Families outside `TESTED`, and wrapped models, are compared with the stock forward on a few tokens first: a small
    model of the same architecture, and the model itself in its own precision. Under autocast the runner computes in
    that of autocast.
    """
    windows = _windows(model, columns)
    if windows is None:
        return None
    if set(windows.values()) == {None} and _is_tested(inside := innermost(model)) and can_fuse(inside):
        return Runner(model, "fused", FusedLlama(inside, columns), windows)
    runner = Runner(model, "cached", _stock_forward(model), windows)
    if _is_tested(model):
        return runner
    if not _is_tested(stock := transformers_model(model)) and not told(stock, _caches):
        return None
    return runner if _agrees(runner) else None


class Decoder:
    """Rows of prompts under one model, with room for `steps` new tokens.

    prompts: one a row, the longest first, equal ones side by side.
    """

    def __init__(self, runner: Runner, prompts: Sequence[Sequence[int]], *, steps: int) -> None:
        self.runner, self.cache, device = runner, DecodingCache(), runner.device
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.column = len(prompts[0]) - 1  # the last token of a prompt is the first step's input
        self.shift = self.column - lengths
        self.bias = None  # hides the columns left of a short prompt, (N, 1, 1, S)
        if len(prompts[-1]) - 1 < self.column:
            column = torch.arange(self.column + steps, device=device)
            self.bias = additive((column < self.shift[:, None])[:, None, None])
        self._prefill(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (N, V) after one more token (N,) in each row."""
        positions = self.column - self.shift
        self.column += 1
        return self._forward(tokens[:, None], positions[:, None], self.cache, self._mask(self.column))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.select(rows)
        self.shift = self.shift[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def _forward(self, tokens: Tensor, positions: Tensor, cache: DecodingCache, mask: Mask) -> Tensor:
        assert self.runner.forward is not None
        return self.runner.forward(tokens, positions, cache, mask, adapted=self.runner.adapted)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        device, row = self.shift.device, 0
        distinct = [(prompt, len(list(rows))) for prompt, rows in itertools.groupby(prompts)]
        while distinct and (width := len(distinct[0][0]) - 1) > 0:
            size = max(1, PREFILL // width)
            some, distinct = distinct[:size], distinct[size:]
            block = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt, _ in some]
            tokens, cache = torch.tensor(block, device=device), DecodingCache()
            positions = torch.arange(width, device=device).expand_as(tokens)
            self._forward(tokens, positions, cache, self._causal(width, device))
            repeats = torch.tensor([count for _, count in some], device=device)
            source = torch.arange(len(some), device=device).repeat_interleave(repeats)
            lengths = torch.tensor([len(prompt) - 1 for prompt, _ in some], device=device)
            self.cache.fill(cache, source, lengths, start=row, rows=len(prompts), used=self.column)
            row += len(source)

    def _mask(self, columns: int) -> Mask:
        """What one new token of each row sees: None for all, or additive (N, 1, 1, columns)."""
        bias = None if self.bias is None else self.bias[..., :columns]

        def near(window: int) -> Tensor:
            full = torch.zeros(1, 1, 1, columns, device=self.shift.device) if bias is None else bias.clone()
            full[..., : columns - window] = float("-inf")
            return full

        return self._by_kind(columns, bias, near)

    def _causal(self, width: int, device: torch.device) -> Mask:
        """What the tokens of a right-padded prompt see: None for all before, or additive (1, 1, width, width)."""
        column = torch.arange(width, device=device)
        back = column[:, None] - column
        return self._by_kind(width, None, lambda w: additive(((back < 0) | (back >= w))[None, None]))

    def _by_kind(self, columns: int, full: Tensor | None, near: Callable[[int], Tensor]) -> Mask:
        """One mask for all layers, or one a kind where the kinds differ, as transformers wants it."""
        windows = self.runner.windows
        if all(window is None or window >= columns for window in windows.values()):
            return full
        masks = {kind: full if window is None else near(window) for kind, window in windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


class Uncached:
    """Rows of prompts under one model, as in `Decoder`, but with the whole text read anew at every step."""

    def __init__(self, runner: Runner, prompts: Sequence[Sequence[int]], *, steps: int) -> None:
        self.runner, width = runner, len(prompts[0]) + steps
        self.ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=runner.device)
        self.last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=runner.device)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (N, V) after one more token (N,) in each row."""
        row = torch.arange(len(tokens), device=tokens.device)
        self.ids[row, self.last] = tokens
        vocabulary = self.runner.model.config.get_text_config().vocab_size
        first, width = int(self.last.min()), int(self.last.max()) + 1
        size = max(1, min(LOGITS // ((width - first) * vocabulary), PREFILL // width))
        found, order = [], []
        for group in self.runner.ways.apart((self.last + 1).tolist()):
            for rows in row[group].split(size):
                first, width = int(self.last[rows].min()), int(self.last[rows].max()) + 1
                logits = self._logits(self.ids[rows, :width], width - first)
                found.append(logits[row[: len(rows)], self.last[rows] - first])
                order.append(rows)
        self.last = self.last + 1
        return torch.cat(found)[torch.cat(order).argsort()]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.ids, self.last = self.ids[rows], self.last[rows]

    def _logits(self, ids: Tensor, last: int) -> Tensor:
        """Logits (N, last, V) of the last columns of whole texts ids (N, T), padded at the right, nothing masked."""
        model = self.runner.model
        if self.runner.ways.dynamic:
            forget(model)
        with silent(self.runner.off), FastLinears():
            return model(input_ids=ids, use_cache=False, **_logits_of(model, last)).logits[:, -last:]


def _stock_forward(model: nn.Module) -> Callable[..., Tensor]:
    """The model's own forward over our cache."""
    AttentionInterface.register(NAME, _attention)
    configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
    layers, last = adapter_layers(model), _logits_of(model, 1)

    def forward(tokens: Tensor, positions: Tensor, cache: DecodingCache, mask: Mask, *, adapted: bool = True) -> Tensor:
        with attending(configs), silent(() if adapted else layers):
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **last,
            )
        return output.logits[:, -1]

    return forward


def _logits_of(model: nn.Module, last: int) -> dict[str, int]:
    """The option that asks for the logits of the last columns only, if the model has it."""
    takes = inspect.signature(transformers_model(model).forward).parameters
    return {"logits_to_keep": last} if "logits_to_keep" in takes else {}


def _is_tested(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.config.model_type in TESTED


def _caches(model: PreTrainedModel) -> bool:
    windows = _windows(model, 32)
    return windows is not None and _agrees(Runner(model, "cached", _stock_forward(model), windows))


def _agrees(runner: Runner) -> bool:
    """Whether a ragged batch of two prompts decodes to the stock forward's logits, taken one row at a time."""
    model, device = runner.model, runner.device
    rows = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 4, 3, 2]], device=device) % _text(model).vocab_size
    off = torch.autocast(device.type, enabled=False)  # where there is less rounding to tell from a mistake
    with off:
        stock = [model(row[None]).logits[0, -1].float() for row in (rows[0], rows[1, 2:])]
    try:
        with off:
            decoder = Decoder(runner, [rows[0, :3].tolist(), rows[1, 2:3].tolist()], steps=3)
            ours = [decoder.step(rows[:, column]) for column in (2, 3, 4)][-1]
    except Exception:  # whatever a foreign model raises, it cannot take our cache
        return False
    gap, scale = (ours.float() - torch.stack(stock)).abs().max(), torch.stack(stock).abs().max()
    return bool(gap <= (1e-4 if ours.dtype == torch.float32 else 5e-2) * scale)


def _ignores_padding(model: PreTrainedModel) -> bool:
    """Whether `generate` gives a prompt behind padding the logits that it gives the prompt alone."""
    config = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=[1 << 30], pad_token_id=0)
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


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside any wrapper."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _text(model: nn.Module) -> Any:
    return transformers_model(model).config.get_text_config()


def _windows(model: nn.Module, columns: int) -> dict[str, int | None] | None:
    """Layer kinds and their windows, None for one that never binds; None where a kind is not known here."""
    text = _text(model)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    binds = window is not None and window < columns
    return {kind: window if kind == "sliding_attention" and binds else None for kind in sorted(set(kinds))}


# Keys and values of the rows that decode together, in one block of memory a layer.


BLOCK = 64  # columns added at a time


class LayerCache(CacheLayerMixin):
    """One layer's keys and values (N, G, columns, D), of which `used` columns are written."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.used = 0
        self.blocks: tuple[Tensor, ...] = ()  # keys, values

    def allocate(self, like: Tensor, rows: int, used: int) -> None:
        """Room for `rows` rows with the heads, dtype and device of `like` (n, G, t, D); `used` columns of zeros."""
        shape = (rows, like.shape[1], used + BLOCK, like.shape[3])
        self.blocks = (like.new_zeros(shape), like.new_zeros(shape))
        self.used, self.is_initialized = used, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Called by transformers before the first write."""
        self.allocate(key_states, key_states.shape[0], 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, G, T, D); return all that are written, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        if self.used > self.blocks[0].shape[2]:
            self.blocks = tuple(_grown(block, self.used + BLOCK) for block in self.blocks)
        keys, values = (block[:, :, : self.used] for block in self.blocks)
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.blocks = tuple(block.index_select(0, rows) for block in self.blocks)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query of this length sees, and the first of them."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.used

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class DecodingCache(Cache):
    """The layers of one model for N rows: a transformers cache that can be filled from prompts and compacted."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=LayerCache)

    @property
    def parts(self) -> list[LayerCache]:
        """The layers met so far."""
        return cast(list[LayerCache], self.layers)

    def fill(
        self, prompts: DecodingCache, source: Tensor, lengths: Tensor, *, start: int, rows: int, used: int
    ) -> None:
        """Copy prefilled prompts into rows start, start + 1, ... of `rows`, so that they end at column `used`.

        prompts: P prompts written from column 0 on; lengths (P,) their tokens; source (n,) the prompt of each row.
        """
        width = prompts.parts[0].used
        columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        while len(self.layers) < len(prompts.layers):
            self.layers.append(LayerCache())
        for ours, theirs in zip(self.parts, prompts.parts, strict=True):
            if not ours.is_initialized:
                ours.allocate(theirs.blocks[0], rows, used)
            for into, block in zip(ours.blocks, theirs.blocks, strict=True):
                into[start : start + len(source), :, used - width : used] = _aligned(block, columns, source)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for layer in self.parts:
            layer.select(rows)


def _grown(block: Tensor, columns: int) -> Tensor:
    bigger = block.new_empty(*block.shape[:2], columns, block.shape[3])
    bigger[:, :, : block.shape[2]] = block
    return bigger


def _aligned(block: Tensor, columns: Tensor, source: Tensor) -> Tensor:
    """Rows of block (P, G, T, D) moved to the right edge (what was beyond it is padding), then repeated."""
    shape = (columns.shape[0], block.shape[1], columns.shape[1], block.shape[3])
    index = columns.clamp_min(0)[:, None, :, None].expand(shape)
    return block.gather(2, index).index_select(0, source)


# Attention while decoding: one query a row, or a prompt, over cached keys and values.


NAME = "pyrite_decode"


@contextmanager
def attending(configs: Sequence[Any]) -> Iterator[None]:
    """Within this block the models of these configs attend through `attend`."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Attention of query (N, H, T, D) on key and value (N, G, S, D), mask additive, to (N, T, H, D).

    One query on a processor is two batched products, which the fused kernel does in almost twice the time.
    """
    rows, heads, length, size = query.shape
    mask = None if mask is None else mask.to(query.dtype)
    if length == 1:  # the heads of a group become its queries, so nothing is repeated
        query = query.reshape(rows, key.shape[1], -1, size)
        if query.device.type == "cpu" and query.dtype == torch.float32:
            scores = (query * scale) @ key.mT
            mixed = (scores if mask is None else scores + mask).softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return mixed.reshape(rows, 1, heads, size)
    causal, grouped = mask is None, key.shape[1] != heads
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return mixed.transpose(1, 2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,  # transformers hands every attention function its own extras
) -> tuple[Tensor, None]:
    """The form transformers calls; under autocast too in the cache's precision, or all of it is cast at every step."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(key.dtype)
        if softcap is None:
            return attend(query, key, value, attention_mask, scale=scale), None
        return _capped(query, key, value, attention_mask, scale, softcap), None


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """`attend` with scores brought between -softcap and softcap."""
    rows, heads, length, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, length, size)
    scores = torch.tanh((grouped @ key.mT[:, :, None]) * (scale / softcap)) * softcap
    if mask is None and length > 1:
        mask = additive(torch.ones_like(scores[:1, 0, :1], dtype=torch.bool).triu(1))
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value[:, :, None]).reshape(rows, heads, length, size).transpose(1, 2)


def additive(hidden: Tensor) -> Tensor:
    """0 where visible, -inf where hidden."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


# The Llama family (Llama, Mistral, Qwen2, Qwen3) as one flat function for decoding.


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROTARY = frozenset({"default", "linear", "llama3", "yarn"})  # tables that do not depend on the sequence
LIMIT = 2**30  # bytes of weights up to which a fused copy is made


@dataclass(frozen=True)
class Dense:
    """A linear map: weight (out, in), bias (out,) or None, and what adapters add, down (R, in) then up (out, R)."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, adapted: bool = True) -> Tensor:
        x = x.to(self.weight.dtype)
        y = product(x, self.weight, self.bias)
        if self.adapter is None or not adapted:
            return y
        down, up = self.adapter
        return y.add_(product(product(x, down), up))


@dataclass(frozen=True)
class Block:
    """One transformer layer; qkv and gate_up are fused."""

    norm: Tensor
    qkv: Dense
    qk_norm: Tensor | None  # (H + G, D), Qwen3
    out: Dense
    mlp_norm: Tensor
    gate_up: Dense
    down: Dense
    act: Callable[[Tensor], Tensor]


class FusedLlama:
    """tokens (N, T), positions (N, T), cache, mask -> logits (N, V) of the last column."""

    def __init__(self, model: Any, positions: int) -> None:
        base, config = model.model, model.config
        self.eps = config.rms_norm_eps
        attention = base.layers[0].self_attn
        self.size, self.scale = attention.head_dim, attention.scaling
        self.groups = config.num_key_value_heads
        self.embedding, self.norm = base.embed_tokens.weight, base.norm.weight
        dtype = _computes(self.embedding)
        self.kept = self.embedding.dtype if self.embedding.device.type == "cpu" else dtype  # queries, keys and values
        self.blocks = [_block(layer, dtype) for layer in base.layers]
        self.head = _fused(model.lm_head, dtype=dtype)
        index = torch.arange(positions, device=self.embedding.device)[None]
        cos, sin = base.rotary_emb(self.embedding[:1], position_ids=index)
        half = self.size // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def __call__(
        self, tokens: Tensor, positions: Tensor, cache: DecodingCache, mask: Any, *, adapted: bool = True
    ) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):  # all casts are here
            x = F.embedding(tokens, self.embedding)
            cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
            for index, block in enumerate(self.blocks):
                q, k, v = self._heads(block, self._rms(x, block.norm), cos, sin, adapted)
                k, v = cache.update(k, v, index)
                mixed = attend(q, k, v, mask, scale=self.scale)
                x = x + block.out(mixed.flatten(2), adapted)
                gate, up = block.gate_up(self._rms(x, block.mlp_norm), adapted).chunk(2, -1)
                x = x + block.down(block.act(gate) * up, adapted)
            return self.head(self._rms(x[:, -1], self.norm), adapted)

    def _heads(self, block: Block, x: Tensor, cos: Tensor, sin: Tensor, adapted: bool) -> list[Tensor]:
        heads = block.qkv(x, adapted).to(cos.dtype).unflatten(-1, (-1, self.size))  # (N, T, H + 2G, D)
        qk, v = heads[:, :, : -self.groups], heads[:, :, -self.groups :]
        if block.qk_norm is not None:
            qk = self._rms(qk, None) * block.qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(self.size // 2, -1), sin)
        parts = qk[:, :, : -self.groups], qk[:, :, -self.groups :], v
        return [part.transpose(1, 2).to(self.kept) for part in parts]

    def _rms(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def can_fuse(model: Any) -> bool:
    """Whether `FusedLlama` can stand in for the model: family, plain linear layers (LoRA too), no hooks, small."""
    config = model.config
    if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        return False
    projections = [
        module
        for layer in model.model.layers
        for part in (layer.self_attn, layer.mlp)
        for name, module in part.named_children()
        if name.endswith("_proj")
    ]
    projections.append(model.lm_head)
    return (
        all(map(_is_plain, projections))  # not quantized
        and {*map(id, adapter_layers(model))} <= {*map(id, projections)}
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and config.rope_parameters["rope_type"] in ROTARY
        and sum(weight.nbytes for weight in model.parameters()) <= LIMIT
        and len({(weight.device, weight.dtype) for weight in model.parameters()}) == 1
    )


def _block(layer: Any, dtype: torch.dtype) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        norm=layer.input_layernorm.weight,
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype),
        qk_norm=_qk_norm(attention),
        out=_fused(attention.o_proj, dtype=dtype),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_fused(mlp.gate_proj, mlp.up_proj, dtype=dtype),
        down=_fused(mlp.down_proj, dtype=dtype),
        act=mlp.act_fn,
    )


def _is_plain(layer: nn.Module) -> bool:
    """A linear layer, with plain low-rank adapters or none."""
    if type(layer) is not lora.Linear:
        return type(layer) is nn.Linear
    parts: list[Any] = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
    linear = all(type(part) is nn.Linear for part in parts) and all(part.bias is None for part in parts[1:])
    return linear and not (layer.lora_variant or layer.merged or layer.fan_in_fan_out)


def _fused(*layers: Any, dtype: torch.dtype) -> Dense:
    """Linear layers of one input as one, outputs side by side, to multiply in this precision."""
    below: list[Any] = [layer.base_layer if isinstance(layer, lora.Linear) else layer for layer in layers]
    biases = [layer.bias.to(dtype) for layer in below if layer.bias is not None]
    weights = [layer.weight.to(dtype) for layer in below]
    adapter = _adapter(layers)
    return Dense(
        weights[0] if len(weights) == 1 else torch.cat(weights),
        torch.cat(biases) if biases else None,
        adapter and (adapter[0].to(dtype), adapter[1].to(dtype)),
    )


def _computes(weight: Tensor) -> torch.dtype:
    """What autocast, if it is on, has products of this weight computed in; else the weight's own precision."""
    kind = weight.device.type
    cast = torch.is_autocast_enabled(kind) and weight.dtype == torch.float32
    return torch.get_autocast_dtype(kind) if cast else weight.dtype


def _adapter(layers: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """The active adapters of all layers as one, scale included: down (R, in) and up (out, R)."""
    found: list[tuple[int, Any, Any]] = [
        (index, layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name])
        for index, layer in enumerate(layers)
        if isinstance(layer, lora.Linear) and not layer.disable_adapters
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
    if not found:
        return None
    sizes = [layer.out_features for layer in layers]
    column = [F.pad(up, (0, 0, sum(sizes[:index]), sum(sizes[index + 1 :]))) for index, _, up in found]
    return torch.cat([down for _, down, _ in found]), torch.cat(column, 1)


def _qk_norm(attention: Any) -> Tensor | None:
    norms = dict(attention.named_children())
    if "q_norm" not in norms:
        return None
    q, k = norms["q_norm"].weight, norms["k_norm"].weight
    heads, groups = (p.out_features // len(q) for p in (attention.q_proj, attention.k_proj))
    return torch.cat([q.expand(heads, -1), k.expand(groups, -1)])


# Adapters switched off for a moment, so that one base in memory is two models.


def adapter_layers(model: nn.Module) -> tuple[Any, ...]:
    """The modules of a model that adapters change."""
    return tuple(module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))


def innermost(model: Any) -> Any:
    """The transformers model that runs alike without its peft wrapper; the model itself where it would not."""
    wrapped = isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.LORA
    return model.get_base_model() if wrapped else model


def base_of(model: Any) -> tuple[Any, tuple[Any, ...]]:
    """A model with its adapters off: what to run, and which of its layers to silence meanwhile.

    Raises ValueError where there are no adapters, or where they are merged into the base.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return model.get_base_model(), ()  # virtual tokens are put before the base, not into it
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("ref_model=None means the policy with its adapters off, but it has none: give a ref_model")
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in layers):
        raise ValueError("the policy's adapters are merged into its weights: unmerge them, or give a ref_model")
    return model, layers


@contextmanager
def silent(layers: Sequence[Any]) -> Iterator[None]:
    """Within this block these layers work as if they had no adapters.

    Peft's own switch visits every module and resets requires_grad, too much for twice a decoding step.
    """
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off
