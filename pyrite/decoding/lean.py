"""The Llama family (Llama, Mistral, Qwen2, Qwen3) as one flat function for decoding.

A step of a small model spends most of its time between the kernels of the stock code. Here the projections are
fused, the rotary tables computed once and nothing is dispatched. The weights are read, never changed. Low-rank
adapters stay beside the weights, so the same engine without them is the base model at no further memory.

Opened under autocast, it multiplies in autocast's precision: every weight is cast once, then, instead of at every step.
Norms, rotations and the residual stream stay in the weights' own precision, as does attention on a processor, where a
query over its keys in bfloat16 is slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from pyrite.decoding.adapters import adapter_layers
from pyrite.decoding.caches import Columns
from pyrite.linears import product

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
