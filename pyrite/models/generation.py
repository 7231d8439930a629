"""Sampling from a causal language model, or from two mixed: token ids in, tokens and log-probabilities out.

A sample depends on (seed, key of its prompt, sample number) alone, not on the batch, the order or the number of
machines. `pyrite.models.decoder` runs the models, from our own cache if it can, else by transformers' `generate`.
Under `torch.autocast` models compute in its precision; log-probabilities, mixtures and draws are float32 all the same.
Rounding may then differ with the batch, so that once in a while a token does: it is drawn from the same stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pyrite.math.samplers import mixed_logits
from pyrite.models.decoder import (
    Decoder,
    Path,
    Runner,
    Uncached,
    adapter_layers,
    base_of,
    open_reference,
    open_runner,
    silent,
    transformers_model,
)
from pyrite.models.forward import forget
from pyrite.models.loading import context_of

ROWS, ROWS_CPU = 512, 128  # that decode together by default; on a processor its caches should hold theirs
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
    """What `sample` was asked for, apart from the models and their mixture."""

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
    """Samples of arms (P, k, 2), decoded together with those that need the same models."""
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
    """Rows of exponents (N, 2) that need the same models: policy or not, reference or not, one model as it is or not,
    and which rows they are (N,) bool."""
    ref = exponents[:, 1] != 0
    policy = (exponents[:, 0] != 0) | ~ref
    plain = (policy ^ ref) & (exponents.sum(-1) == 1)
    code = 4 * policy + 2 * ref + plain
    for c in code.unique().tolist():
        yield bool(c & 4), bool(c & 2), bool(c & 1), code == c


def _batches(prompts: Sequence[Sequence[int]], k: int, wanted: Tensor, most: int) -> Iterator[list[int]]:
    """Numbers of wanted rows that decode together, sorted by prompt, the longest first, so that equal prompts are
    prefilled once."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), tuple(prompts[index])))
    keep = wanted.tolist()
    rows = [row for index in order for row in range(index * k, index * k + k) if keep[row]]
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


# Checks, before any work.


def _check(request: Request, k: int, *models: Any) -> None:
    """Raises ValueError for options out of range, and prompts that one of the models cannot read."""
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
    """-inf may stand beside the model drawn from; NaN comes of broken weights, or of options beyond float32."""
    if bool(broken.any()):
        what = "its exponents, and the temperature" if whose == "arm" else "the weights"
        index = int(broken.nonzero()[0]) // k
        raise ValueError(f"the {whose}'s logits are not finite on prompt {index}: check {what}")


# The sampling loops.


CHECK = 4  # steps between two looks at which rows have finished
COMPACT = 0.8  # finished rows are dropped when fewer than this share is alive


@dataclass(frozen=True)
class Drawing:
    """What all rows that need the same models share, and where their tokens and log-probabilities are written."""

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
