"""Attention while decoding: one query a row, or a prompt, over cached keys and values.

Plugged into transformers without a mask function, so that the masks given to the model are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

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
