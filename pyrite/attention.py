"""Attention over packed rows, plugged into transformers so that the stock model code runs.

`attend` computes, for every packed token, causal attention over its own path: the prompt and the response it
belongs to. Paths of similar length share one kernel call; a prompt with K responses is one packed prompt.
On CUDA this path has been written for but not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyrite.packing import Packed

NAME = "pyrite_packed"


def attend(
    query: Tensor, key: Tensor, value: Tensor, batch: Packed, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of T packed tokens: query (T, H, D), key and value (T, G, D), G dividing H, to (T, H, D)."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave float32 under autocast
    outputs = []
    for bucket in batch.buckets:
        size, length = bucket.gather.shape
        flat = bucket.gather.reshape(-1)
        q, k, v = (
            part.index_select(0, flat).view(size, length, part.shape[1], part.shape[2]).transpose(1, 2)
            for part in (query, key, value)
        )
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=length > 1, scale=scale, enable_gqa=grouped
        )
        out = out.transpose(1, 2).reshape(size * length, *query.shape[1:])
        outputs.append(out.index_select(0, bucket.keep))
    return torch.cat(outputs).index_select(0, batch.restore)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,  # transformers hands every attention function its own extras
) -> tuple[Tensor, None]:
    """The form transformers calls: query (1, H, T, D); the batch travels as the keyword `packed`."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("packed attention has no soft-capping and no sinks")
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return attend(q, k, v, packed, scale=scaling, dropout=dropout).unsqueeze(0), None


@contextmanager
def packed_forward(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model's attention layers read packed rows."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _no_mask(*_: object, **__: object) -> None:
    """The packed layout is the mask."""
