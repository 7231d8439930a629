"""How a model may be run so that each row's numbers are its own: packed, padded, or with rows of its own length.

The answer is found on a small model of the same architecture with sizeable random weights. A model's own weights may
hide a mistake: near-uniform ones, as they are drawn at first, give almost the same numbers without causality, with
another row in sight, or without a multiplier. The small model runs on the processor in float32, whatever the model's
precision, and is compared with the stock forward, one row at a time without padding.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pyrite.data.responses import Responses
from pyrite.math.logps import Logps
from pyrite.models.packing import (
    FastLinears,
    Groups,
    Packed,
    by_prompt,
    micro_batches,
    outer,
    pack,
    packed_forward,
    product,
    sizes,
)

# Log-probabilities of given tokens, without the (tokens x vocabulary) matrix where memory is short


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


# Packed batches through a stock model, padded if it cannot take them; `score`, which reads all responses


NEVER = 1 << 40
STATES = frozenset({"conv1d_state", "recurrent_states"})  # RecurrentGemma's, which the next text would begin with


@dataclass(frozen=True)
class Ways:
    """What a model's architecture and config allow.

    causal: no token sees a later one. packed: the trunk reads packed rows. padded: rows of unequal length may share a
    batch, padded at the right. head: the model's own head, on the trunk's states alone, gives its logits. bare: so does
    the weight of its vocabulary head. longest: tokens of a packed text at most, such as a sliding window. turn: texts
    beyond this length are rotated otherwise than those within; dynamic: each length in its own way.
    """

    causal: bool = True
    packed: bool = False
    padded: bool = False
    head: bool = False
    bare: bool = False
    longest: int = NEVER
    turn: int = NEVER
    dynamic: bool = False

    def apart(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of texts of these lengths, in groups that may share a batch."""
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            own = not self.padded or (self.dynamic and length > self.turn)
            groups.setdefault(length if own else -int(length > self.turn), []).append(index)
        return list(groups.values())


def by_response(flat: Tensor, batch: Packed, *, tokens: bool = False) -> Logps:
    """Log-probabilities (R,) of response tokens as those of the N responses; sums are added up in float64."""
    if tokens:
        return Logps.from_tokens(list(flat.split(batch.lengths.tolist())))
    total = flat.new_zeros(batch.n, dtype=torch.float64).index_add(0, batch.owner, flat.double())
    return Logps.from_sums(total.float(), batch.lengths)


def trunk_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """Hidden states (T, H) of a packed batch after the final norm."""
    with packed_forward(model):
        out = model.base_model(
            input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, packed=batch
        )
    return out.last_hidden_state[0]


class Places(NamedTuple):
    """Where in a batch's states (S, H) response tokens, their predictors, (R,) each, and last tokens (N,) are."""

    predictor: Tensor
    response: Tensor
    last: Tensor


def places(batch: Packed) -> Places:
    """A prompt that several padded texts begin with has states in each of them, which need not be the same."""
    if not batch.padded:
        return Places(batch.predictor, batch.response, batch.last)
    (bucket,) = batch.buckets
    end = torch.arange(batch.n, device=batch.ids.device) * bucket.queries + bucket.lengths
    within = (
        torch.arange(len(batch.owner), device=batch.ids.device) - (batch.lengths.cumsum(0) - batch.lengths)[batch.owner]
    )
    response = (end - batch.lengths)[batch.owner] + within
    return Places(response - 1, response, end - 1)


def states(model: PreTrainedModel, batch: Packed, ways: Ways, *, pad: int | None = None) -> Tensor:
    """Hidden states (S, H) of a batch after the final norm, however it is laid out; `places` says what is where."""
    if not batch.padded:
        if ways.dynamic:
            forget(model)
        return trunk_states(model, batch)
    trunk = model.base_model
    return by_group(model, batch, ways, lambda ids, mask: run(trunk, ids, mask).last_hidden_state, pad=pad).flatten(
        0, 1
    )


Read = Callable[[Tensor, Tensor | None], Tensor]  # ids (N, L) and what of them is text, to (N, ...) or (N, L, ...)


def by_group(model: PreTrainedModel, batch: Packed, ways: Ways, read: Read, *, pad: int | None = None) -> Tensor:
    """What `read` gives of a padded batch, the texts that may not share a forward apart; nothing masked in texts of
    equal length."""
    (bucket,) = batch.buckets
    ids, mask = as_padded(batch, pad=pad)
    lengths: list[int] = bucket.lengths.tolist()
    parts, groups = [], ways.apart(lengths)
    for group in groups:
        width = max(lengths[i] for i in group)
        even = all(lengths[i] == width for i in group)
        rows = torch.tensor(group, device=ids.device)
        if ways.dynamic:
            forget(model)
        with FastLinears():
            part = read(ids[rows, :width], None if even else mask[rows, :width])
        rest = bucket.queries - width
        parts.append(F.pad(part, [0, 0] * (part.dim() - 2) + [0, rest]) if part.dim() > 2 and rest else part)
    if len(groups) == 1:
        return parts[0]
    order = torch.tensor([i for group in groups for i in group], device=ids.device)
    return torch.cat(parts)[order.argsort()]


def forget(model: nn.Module) -> None:
    """What modules keep of earlier texts is dropped: rotary embeddings grown to the longest, recurrent states."""
    for module in model.modules():
        first = getattr(module, "original_inv_freq", None)
        if isinstance(first, Tensor) and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = first.clone()
            module.max_seq_len_cached = module.original_max_seq_len
        for name in STATES & vars(module).keys():
            setattr(module, name, None)


def pad_of(model: PreTrainedModel) -> int | None:
    """The token that fills padded texts, where the model's config names one."""
    text = model.config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < text.vocab_size else None


def as_padded(batch: Packed, *, pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (N, L) of a batch packed as one bucket."""
    (bucket,) = batch.buckets
    mask = torch.arange(bucket.queries, device=batch.ids.device) < bucket.lengths[:, None]
    ids = batch.ids[batch.query].view(mask.shape)
    return (ids if pad is None else ids.masked_fill(~mask, pad)), mask.long()


class Model(Protocol):
    """What `score` reads with: a policy, a reward model or an ensemble of them, a value model."""

    def pack(self, responses: Responses, groups: Groups) -> Packed: ...

    def __call__(self, batch: Packed) -> Tensor: ...

    def eval(self) -> Any: ...


def packed_batches(
    model: Model, responses: Responses, groups: Groups, *, budget: int
) -> Iterator[tuple[list[int], Packed]]:
    """Micro-batches of at most `budget` tokens, longest groups first: their indices, and as the model reads them."""
    for batch in micro_batches(sizes(responses, groups), budget=budget):
        yield batch, model.pack(responses, [groups[i] for i in batch])


def score(
    model: Model,
    responses: Responses,
    groups: Groups | None = None,
    *,
    read: Callable[[Packed], Tensor] | None = None,
    each: Literal["token", "response"] = "token",
    budget: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """What a model makes of every response, on the processor and in the caller's order; no gradients.

    (..., R), a value a token, or (..., N) with each="response", as `read(batch)` gives them; by default the model
    itself. groups: responses that are packed together, by default those to one prompt; the value is 0 of a response in
    none of them. budget: packed tokens in a forward pass. progress is told each number of responses that are done.

    All reading goes through here. To share it between processes, share out the batches and gather `found`.
    """
    groups = by_prompt(responses) if groups is None else groups
    total = len(responses.ids) if each == "token" else len(responses)
    model.eval()
    found: Tensor | None = None
    for batch, packed in packed_batches(model, responses, groups, budget=budget):
        index = np.array([i for g in batch for i in groups[g]], dtype=np.int64)
        with torch.inference_mode():
            values = (read or model)(packed).cpu()
        if found is None:
            found = torch.zeros(*values.shape[:-1], total, dtype=values.dtype)
        found[..., responses.places(index) if each == "token" else index] = values
        if progress:
            progress(len(index))
    return torch.zeros(total) if found is None else found


def token_logps(model: Model, responses: Responses, groups: Groups | None = None, **options: Any) -> Logps:
    """Log-probabilities of the N responses under a policy, token by token, as losses see them; options of `score`."""
    return Logps.from_tokens(responses.split(score(model, responses, groups, **options)))


def run(module: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    """A model or its trunk on whole texts (N, L), without a cache."""
    takes = inspect.signature(module.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    return module(input_ids=ids, **options, **more, **({} if mask is None else {"attention_mask": mask}))


def own_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's own code from its trunk's states (R, H) to logits (R, V), with its scales, caps and biases."""
    name = model.base_model_prefix

    def logits(states: Tensor) -> Tensor:
        trunk = model._modules[name]
        model._modules[name] = _Said(states[None], trunk)
        try:
            return run(model, torch.zeros(1, len(states), dtype=torch.int64, device=states.device)).logits[0]
        finally:
            model._modules[name] = trunk

    return logits


class _Said(nn.Module):
    """In the place of a trunk: says states that are known already; all else is asked of the trunk."""

    def __init__(self, states: Tensor, trunk: Any) -> None:
        super().__init__()
        self.states, self.trunk = states, (trunk,)  # not a part of it: modules inside would be visited twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["trunk"][0], name)

    @property
    def decoder(self) -> _Said:  # where a model reads this part of its trunk
        return self

    def forward(self, *_: object, **__: object) -> _States:
        return _States(self.states)


class _States(tuple):
    """A trunk's output with nothing but its last states."""

    last_hidden_state: Tensor

    def __new__(cls, states: Tensor) -> _States:
        made = super().__new__(cls, (states,))
        made.last_hidden_state = states
        return made

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# Which way a model may be run: packed, padded, or with texts of one length together


CLOSE = 1e-4  # of the distance to a wrong way: how near the right way must come to the stock model
STILL = 1e-2  # of that distance, which is near enough for numbers that differ by rounding alone,
ROUNDINGS = 32  # such as this many rounding errors of the largest number
LIMIT = 1 << 22  # weights up to which a model is copied in its own shape
HEAVY = 1 << 25  # weights of a small shape at most
HEAD = 16  # size of a head in the small shape of a large model
VOCABULARY = 97
NEAR = r"window|chunk|local_attention|block_size|index_topk$"  # how far or wide a token sees, in configs
SIZES = (  # what else is made smaller, by its name in the config
    (r"vocab_size", VOCABULARY),
    (r"intermediate_size|ffn|dff$|dim_ff$|d_inner|n_inner", 32),
    (r"lora_rank|head_dim|dim_head|d_head|attention_head_size|rotary_dim", HEAD),
    (r"experts_per_tok|moe_topk|moe_k$|topk_group$|n_shared_experts|index_n_heads", 2),
    (r"n_group$|num_expert_group$", 4),
    (r"experts$", 8),
)


def ways(model: PreTrainedModel) -> Ways:
    """The ways of a model of transformers, found once in a process for each architecture.

    Where no small model can be made, or the stock model cannot read a bare text, texts of one length share a forward.
    """
    return replace(told(model, _told) or Ways(), **_lengths(model.config))


def told(model: PreTrainedModel, question: Callable[[PreTrainedModel], Answer]) -> Answer | None:
    """What a small model of the same architecture answers, asked once in a process; None where none can be made."""
    config = _small_config(model)
    if config is None:
        return None
    shape = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = f"{type(model).__module__}.{type(model).__qualname__} {question.__qualname__} {shape}"
    if key not in _FOUND:
        plain = torch.autocast("cpu", enabled=False)
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), plain:
            small = _built(model, config)
            _FOUND[key] = None if small is None else question(small)
    return _FOUND[key]


Answer = TypeVar("Answer")
_FOUND: dict[str, Any] = {}


def _lengths(config: Any) -> dict[str, Any]:
    """The lengths at which a model begins to read otherwise, as its config says."""
    text = config.get_text_config()
    near = [
        value
        for name, value in vars(text).items()
        if re.search(NEAR, name) and not re.search(r"layers|pattern|mult", name)
        for value in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(value, int) and not isinstance(value, bool) and value > 1
    ]
    turns, dynamic = [NEVER], False
    for rope in rotary(text):
        kind = rope.get("rope_type") or "default"
        if kind == "longrope":
            first = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", 0)
            turns.append(first or text.max_position_embeddings)
        elif "dynamic" in kind:
            turns.append(text.max_position_embeddings)
            dynamic = True
    return {"longest": min(*turns, *near, NEVER), "turn": min(turns), "dynamic": dynamic}


def _small_config(model: PreTrainedModel) -> Any:
    config = copy.deepcopy(model.config)
    for name in ("pyrite", "_name_or_path", "quantization_config"):
        if hasattr(config, name):
            try:
                delattr(config, name)
            except AttributeError:
                continue
    if sum(weight.numel() for weight in model.parameters()) > LIMIT:
        text = config.get_text_config()
        try:
            _shrink(text)
        except Exception:  # sizes that do not go together, as the config's own class says
            return None
        for name in getattr(config, "sub_configs", ()):  # what reads images takes memory and is never run here
            other = getattr(config, name, None)
            with suppress(Exception):
                if other is not None and other is not text:
                    _shrink(other)
    return config


def _built(model: PreTrainedModel, config: Any) -> PreTrainedModel | None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                size = sum(weight.numel() for weight in type(model)(copy.deepcopy(config)).parameters())
            made = type(model)._from_config(config, dtype=torch.float32) if size <= HEAVY else None
        except Exception:  # a foreign class says in its own way that it cannot be made of these sizes
            return None
    if made is not None:
        _enlarge(made)
    return made and made.eval()


def _enlarge(model: nn.Module) -> None:
    """Weights that keep the size of what they multiply, from a stream of their own."""
    g = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=g)
        weight.data = noise / weight.shape[-1] ** 0.5 if weight.dim() > 1 else weight.data + 0.2 * noise


def _shrink(config: Any) -> None:
    """The sizes of a text config made small, in proportion where they depend on each other."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or width // heads
    some = 2 if groups >= 2 and 2 * (heads // groups) <= 8 else 1
    for name, value in list(vars(config).items()):
        if isinstance(value, int) and not isinstance(value, bool):
            if name.endswith("_token_id"):
                setattr(config, name, min(value, 2))
            elif most := next((most for pattern, most in SIZES if re.search(pattern, name)), None):
                setattr(config, name, min(value, most))
    if isinstance(getattr(config, "eos_token_id", None), list):
        config.eos_token_id = [2]
    config.num_attention_heads = some * (heads // groups)
    config.hidden_size = config.num_attention_heads * HEAD if width == heads * size else 4 * HEAD
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(config, name, some)
    for rope in rotary(config):
        for name, value in rope.items():
            if isinstance(value, list) and name.endswith("_factor"):
                rope[name] = value[: max(1, len(value) * HEAD // size)]
            elif isinstance(value, list):  # sections of half a head
                rest = [max(1, n * HEAD // size) for n in value[1:]]
                rope[name] = [sum(value) * HEAD // size - sum(rest), *rest]


def rotary(config: Any) -> list[dict[str, Any]]:
    """A text config's settings of rotary embeddings, one a kind of layers."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


PROMPTS = ((5, 3, 8), (4, 9))
ANSWERS = (((7, 6, 11, 4), (10, 12)), ((6, 13, 3, 8, 5), (14, 7, 9)))
Outputs = dict[str, Tensor]  # "logits" (N, ...), and "states" (N, L, H) where the trunk gives some


def _told(model: PreTrainedModel) -> Ways:
    probe = _probe(model)
    batch = pack(probe, probe.groups(), padded=True)
    texts = [[*probe.prompt_ids[p], *answer] for p, answer in zip(probe.prompt.tolist(), probe.tokens(), strict=True)]
    try:
        alone = [_read(model, [text]) for text in texts]
        behind = [_read(model, [texts[i - 1] + text]) for i, text in enumerate(texts)]
    except Exception:  # a foreign model may need more than a text
        return Ways()
    if not all(bool(value.isfinite().all()) for read in alone for value in read.values()):
        return Ways()
    far = {name: _far(name, alone, behind) for name in alone[0]}

    def near(name: str, ours: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether this way comes near the stock model, and much nearer than with another text in sight."""

        def close() -> bool:
            pairs = zip(ours(), [read[name][0] for read in alone], strict=True)
            return all(_is_near(got, want, far[name]) for got, want in pairs)

        return _works(close)

    causal = _works(lambda: _is_causal(model, texts[0]))
    return Ways(
        causal=causal,
        packed=causal and near("states", lambda: _packed(model, batch)) and _works(lambda: _is_tight(model, batch)),
        padded=near("logits", lambda: _padded(model, batch, "logits"))
        and ("states" not in far or near("states", lambda: _padded(model, batch, "states"))),
        head=near("logits", lambda: [_head(model, read["states"]) for read in alone]),
        bare=near("logits", lambda: [_bare(model, read["states"]) for read in alone]),
    )


def _works(ask: Callable[[], bool]) -> bool:
    """The answer; no, where a foreign model raises, whatever it raises."""
    try:
        return ask()
    except Exception:
        return False


def _probe(model: PreTrainedModel) -> Responses:
    """Two prompts with responses, of tokens that are no pads."""
    text = model.config.get_text_config()
    free = [token for token in range(3, text.vocab_size) if token != pad_of(model)] or [0]

    def some(tokens: Sequence[int]) -> list[int]:
        return [free[token % len(free)] for token in tokens]

    return Responses.of([(some(p), [some(one) for one in a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)])


def _read(model: PreTrainedModel, texts: list[list[int]], mask: Tensor | None = None) -> Outputs:
    """The stock model's own numbers of texts of equal length, or padded by whoever gives a mask."""
    found: Outputs = {}

    def keep(module: nn.Module, args: object, out: Any) -> None:
        states = getattr(out, "last_hidden_state", None)
        if isinstance(states, Tensor):
            found["states"] = states

    trunk, ids = model.base_model, torch.tensor(texts)
    hook = trunk.register_forward_hook(keep)
    try:
        logits = run(model, ids, mask).logits
        if not found and trunk is not model:  # the model called a part of its trunk
            run(trunk, ids, mask)
    finally:
        hook.remove()
    return {"logits": logits, **found}


def _is_near(got: Tensor, want: Tensor, far: float) -> bool:
    """Whether numbers differ by little of the distance to a wrong way, or by no more than rounding, and that is little.

    In deep models with norms behind their layers another text in front moves the last states by some rounding errors.
    """
    error = (got - want).abs().max().item()
    rounding = ROUNDINGS * torch.finfo(want.dtype).eps * want.abs().max().item()
    return error <= CLOSE * far or error <= min(rounding, STILL * far)


def _far(name: str, alone: Sequence[Outputs], behind: Sequence[Outputs]) -> float:
    """How far another text in front moves the numbers, in the least moved text."""
    pairs = [(a[name][0], b[name][0]) for a, b in zip(alone, behind, strict=True)]
    return min((b[-len(a) :] - a).abs().max().item() for a, b in pairs)


def _is_causal(model: PreTrainedModel, text: list[int]) -> bool:
    """Whether no token's state has a gradient, however small, to a later token."""
    ids = torch.tensor([text])
    trunk = model if model.base_model is model else model.base_model

    def states() -> Tensor:
        out = run(trunk, ids)
        return (out.logits if trunk is model else out.last_hidden_state)[0]

    half = len(text) // 2
    return all(at in seen and max(seen) <= at for at, seen in _seen(model, states, [half, len(text) - 2]))


def _seen(
    model: PreTrainedModel, states: Callable[[], Tensor], places: Sequence[int]
) -> Iterator[tuple[int, set[int]]]:
    """The tokens that some tokens' states (T, H) have a gradient to."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1].clone()  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[union-attr]
    try:
        with torch.enable_grad():
            found = states()
            reads = [found[at] @ torch.linspace(-1, 1, found.shape[1]) for at in places]
    finally:
        hook.remove()
    for at, read in zip(places, reads, strict=True):
        (grad,) = torch.autograd.grad(read, kept[0], retain_graph=True)
        yield at, set(grad.reshape(-1, grad.shape[-1]).abs().amax(-1).nonzero().flatten().tolist())


def _packed(model: PreTrainedModel, batch: Packed) -> list[Tensor]:
    states = trunk_states(model, pack(batch.responses, batch.groups))
    (bucket,) = batch.buckets
    paths = batch.query.view(-1, bucket.queries)
    return [states[path[:length]] for path, length in zip(paths, bucket.lengths.tolist(), strict=True)]


def _is_tight(model: PreTrainedModel, paths: Packed) -> bool:
    """Whether a packed token's state has a gradient to no token but those before it in its own text."""
    batch = pack(paths.responses, paths.groups)
    (bucket,) = paths.buckets
    ends = zip(paths.query.view(-1, bucket.queries).tolist(), bucket.lengths.tolist(), strict=True)
    before = {path[length - 2]: set(path[: length - 1]) for path, length in ends}
    seen = _seen(model, lambda: trunk_states(model, batch), list(before))
    return all({at} <= found <= before[at] for at, found in seen)


def _padded(model: PreTrainedModel, batch: Packed, name: str) -> list[Tensor]:
    ids, mask = as_padded(batch, pad=pad_of(model))
    values = _read(model, ids.tolist(), mask)[name]
    whole = values.dim() < 3
    return [value if whole else value[:length] for value, length in zip(values, mask.sum(1).tolist(), strict=True)]


def _head(model: Any, states: Tensor) -> Tensor:
    """What a head makes of the trunk's states alone: a decoder classifier's of the last, a vocabulary head's of all."""
    score = getattr(model, "score", None)
    return score(states[0, -1]) if isinstance(score, nn.Module) else own_head(model)(states[0])


def _bare(model: Any, states: Tensor) -> Tensor:
    return F.linear(states[0], model.get_output_embeddings().weight)
