"""Rows that decode together: prompts prefilled once, then one token a step from a preallocated cache.

`Decoder.step` maps the last token of every row to the logits of the next, `Decoder.keep` drops rows: all that a
sampling loop needs, of one model or of two that it mixes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from pyrite.models.forward import told
from pyrite.models.packing import product

# adapters: Adapters switched off for a moment, so that one base in memory is two models.


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


# caches: Keys and values of the rows that decode together, in one block of memory a layer.


BLOCK = 64  # columns added at a time


class Layer(CacheLayerMixin):
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


class Columns(Cache):
    """The layers of one model for N rows: a transformers cache that can be filled from prompts and compacted."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Layer)

    @property
    def parts(self) -> list[Layer]:
        """The layers met so far."""
        return cast(list[Layer], self.layers)

    def fill(self, prompts: Columns, source: Tensor, lengths: Tensor, *, start: int, rows: int, used: int) -> None:
        """Copy prefilled prompts into rows start, start + 1, ... of `rows`, so that they end at column `used`.

        prompts: P prompts written from column 0 on; lengths (P,) their tokens; source (n,) the prompt of each row.
        """
        width = prompts.parts[0].used
        columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        while len(self.layers) < len(prompts.layers):
            self.layers.append(Layer())
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


# cached_attention: Attention while decoding: one query a row, or a prompt, over cached keys and values.


NAME = "pyrite_decode"


@contextmanager
def attending(model: nn.Module) -> Iterator[None]:
    """Within this block the model attends through `attend`."""
    AttentionInterface.register(NAME, _attention)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = {id(part.config): (part.config, part.config._attn_implementation) for part in parts}
    try:
        for config, _ in before.values():
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before.values():
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


# lean: The Llama family (Llama, Mistral, Qwen2, Qwen3) as one flat function for decoding.


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROTARY = frozenset({"default", "linear", "llama3", "yarn"})  # tables that do not depend on the sequence
LIMIT = 2**30  # bytes of weights up to which a fused copy is made


@dataclass(frozen=True)
class Dense:
    """A linear map: weight (out, in), bias (out,) or None, and what adapters add, down (R, in) then up (out, R)."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        y = product(x, self.weight, self.bias)
        if self.adapter is None:
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

    def without_adapters(self) -> Block:
        """The same weights, not copied."""
        dense = {f.name: part for f in fields(self) if isinstance(part := getattr(self, f.name), Dense)}
        return replace(self, **{name: replace(part, adapter=None) for name, part in dense.items()})


class Lean:
    """tokens (N, T), positions (N, T), cache, mask -> logits (N, V) of the last column."""

    def __init__(self, model: Any, positions: int, attend: Callable[..., Tensor]) -> None:
        base, config = model.model, model.config
        self.attend, self.eps = attend, config.rms_norm_eps
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

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Columns, mask: Any) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):  # all casts are here
            return self._logits(tokens, positions, cache, mask)

    def _logits(self, tokens: Tensor, positions: Tensor, cache: Columns, mask: Any) -> Tensor:
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        for index, block in enumerate(self.blocks):
            q, k, v = self._heads(block, self._rms(x, block.norm), cos, sin)
            k, v = cache.update(k, v, index)
            mixed = self.attend(q, k, v, mask, scale=self.scale)
            x = x + block.out(mixed.flatten(2))
            gate, up = block.gate_up(self._rms(x, block.mlp_norm)).chunk(2, -1)
            x = x + block.down(block.act(gate) * up)
        return self.head(self._rms(x[:, -1], self.norm))

    def without_adapters(self) -> Lean:
        """The model below the adapters, on the same weights."""
        base = copy.copy(self)
        base.blocks = [block.without_adapters() for block in self.blocks]
        base.head = replace(self.head, adapter=None)
        return base

    def _heads(self, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        heads = block.qkv(x).to(cos.dtype).unflatten(-1, (-1, self.size))  # (N, T, H + 2G, D)
        qk, v = heads[:, :, : -self.groups], heads[:, :, -self.groups :]
        if block.qk_norm is not None:
            qk = self._rms(qk, None) * block.qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(self.size // 2, -1), sin)
        parts = qk[:, :, : -self.groups], qk[:, :, -self.groups :], v
        return [part.transpose(1, 2).to(self.kept) for part in parts]

    def _rms(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def is_lean(model: Any) -> bool:
    """Whether `Lean` can stand in for the model: family, plain linear layers (LoRA too), no hooks, small enough."""
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
    """The active adapters of all layers as one: down stacked (R, in), up (out, R), each in its layer's rows."""
    found = [(index, *pair) for index, layer in enumerate(layers) for pair in _low_rank(layer)]
    if not found:
        return None
    down = torch.cat([part for _, part, _ in found])
    sizes = [layer.out_features for layer in layers]
    column = [F.pad(part, (0, 0, sum(sizes[:index]), sum(sizes[index + 1 :]))) for index, _, part in found]
    return down, torch.cat(column, 1)


def _low_rank(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each active adapter's down (r, in) and up (out, r), scale included."""
    if isinstance(layer, lora.Linear) and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                yield down, up * layer.scaling[name]  # type: ignore[operator]


def _qk_norm(attention: Any) -> Tensor | None:
    norms = dict(attention.named_children())
    if "q_norm" not in norms:
        return None
    q, k = norms["q_norm"].weight, norms["k_norm"].weight
    heads, groups = (p.out_features // len(q) for p in (attention.q_proj, attention.k_proj))
    return torch.cat([q.expand(heads, -1), k.expand(groups, -1)])


# engines: Rows that decode together: prompts prefilled once, then one token a step from a preallocated cache.


TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox"})
PREFILL = 16384  # tokens, padding included, of one prefill forward

Path = Literal["lean", "cached", "generate", "uncached"]
Mask = Tensor | dict[str, Tensor | None] | None
Forward = Callable[[Tensor, Tensor, Columns, Mask], Tensor]  # tokens, positions (N, T) -> logits (N, V)


class Engine(NamedTuple):
    """How a model is run: its path, the forward, and the sliding window of its layer kinds (None: full)."""

    path: Path
    forward: Forward
    windows: dict[str, int | None]


def open_engine(model: nn.Module, columns: int) -> Engine | None:
    """The fastest way to run a causal LM over up to `columns` tokens from our cache; None where there is none.

    Families outside `TESTED`, and wrapped models, are compared with the stock forward on a few tokens first: a small
    model of the same architecture, and the model itself in its own precision. Under autocast the engine computes in
    that of autocast.
    """
    windows = _windows(model, columns)
    if windows is None:
        return None
    if set(windows.values()) == {None} and _is_tested(inside := innermost(model)) and is_lean(inside):
        return Engine("lean", Lean(inside, columns, attend), windows)
    engine = Engine("cached", _stock(model), windows)
    if _is_tested(model):
        return engine
    if not _is_tested(stock := transformers_model(model)) and not told(stock, _caches):
        return None
    return engine if _agrees(model, engine) else None


def without_adapters(engine: Engine, layers: Sequence[Any]) -> Engine:
    """The same engine, on the same weights, with these adapted layers silent."""
    whole = engine.forward
    if isinstance(whole, Lean):
        return engine._replace(forward=whole.without_adapters())

    def forward(tokens: Tensor, positions: Tensor, cache: Columns, mask: Mask) -> Tensor:
        with silent(layers):
            return whole(tokens, positions, cache, mask)

    return engine._replace(forward=forward)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in evaluation mode; each module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts (token ids), longest first, and how many rows each gets."""

    tokens: Sequence[Sequence[int]]
    repeats: Sequence[int]


class Decoder:
    """The rows of some prompts under one model, prompt by prompt, with room for `steps` new tokens."""

    def __init__(self, engine: Engine, prompts: Prompts, *, steps: int, device: torch.device) -> None:
        self.engine, self.cache = engine, Columns()
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts.tokens], device=device)
        self.column = len(prompts.tokens[0]) - 1  # the last token of a prompt is the first step's input
        self.shift = _repeated(self.column - lengths, prompts.repeats)
        self.bias = None  # hides the columns left of a short prompt, (N, 1, 1, S)
        if len(prompts.tokens[-1]) - 1 < self.column:
            column = torch.arange(self.column + steps, device=device)
            self.bias = additive((column < self.shift[:, None])[:, None, None])
        self._prefill(prompts, lengths, device)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (N, V) after one more token (N,) in each row."""
        positions = self.column - self.shift
        self.column += 1
        return self.engine.forward(tokens[:, None], positions[:, None], self.cache, self._mask(self.column))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.select(rows)
        self.shift = self.shift[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def _prefill(self, prompts: Prompts, lengths: Tensor, device: torch.device) -> None:
        start, row, total = 0, 0, sum(prompts.repeats)
        while start < len(prompts.tokens) and (width := len(prompts.tokens[start]) - 1) > 0:
            stop = min(len(prompts.tokens), start + max(1, PREFILL // width))
            block = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts.tokens[start:stop]]
            tokens, cache = torch.tensor(block, device=device), Columns()
            positions = torch.arange(width, device=device).expand_as(tokens)
            self.engine.forward(tokens, positions, cache, self._causal(width, device))
            source = _repeated(torch.arange(stop - start, device=device), prompts.repeats[start:stop])
            self.cache.fill(cache, source, lengths[start:stop], start=row, rows=total, used=self.column)
            start, row = stop, row + len(source)

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
        windows = self.engine.windows
        if all(window is None or window >= columns for window in windows.values()):
            return full
        masks = {kind: full if window is None else near(window) for kind, window in windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _stock(model: nn.Module) -> Forward:
    """The model's own forward over our cache."""
    last = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(transformers_model(model).forward).parameters
        else {}
    )

    def forward(tokens: Tensor, positions: Tensor, cache: Columns, mask: Mask) -> Tensor:
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


def _is_tested(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.config.model_type in TESTED


def _caches(model: PreTrainedModel) -> bool:
    windows = _windows(model, 32)
    return windows is not None and _agrees(model, Engine("cached", _stock(model), windows))


def _agrees(model: nn.Module, engine: Engine) -> bool:
    """Whether a ragged batch of two prompts decodes to the stock forward's logits, taken one row at a time."""
    device = next(model.parameters()).device
    rows = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 4, 3, 2]], device=device) % _text(model).vocab_size
    off = torch.autocast(device.type, enabled=False)  # where there is less rounding to tell from a mistake
    with off:
        stock = [model(row[None]).logits[0, -1].float() for row in (rows[0], rows[1, 2:])]
    try:
        with off, attending(model):
            decoder = Decoder(
                engine, Prompts([rows[0, :3].tolist(), rows[1, 2:3].tolist()], [1, 1]), steps=3, device=device
            )
            ours = [decoder.step(rows[:, column]) for column in (2, 3, 4)][-1]
    except Exception:  # whatever a foreign model raises, it cannot take our cache
        return False
    gap, scale = (ours.float() - torch.stack(stock)).abs().max(), torch.stack(stock).abs().max()
    return bool(gap <= (1e-4 if ours.dtype == torch.float32 else 5e-2) * scale)


def _repeated(values: Tensor, times: Sequence[int]) -> Tensor:
    return values.repeat_interleave(torch.tensor(times, device=values.device))


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
