"""Attention over packed rows, plugged into transformers so that the stock model code runs.

`attend` computes, for every packed token, causal attention over its own path: the prompt and the response it
belongs to. Prompts and responses of similar length share one kernel call; no token is computed twice.
On CUDA this path has been written for but not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyrite.linears import FastLinears
from pyrite.packing import Bucket, Packed

NAME = "pyrite_packed"
SHORT = 512  # keys up to which a processor keeps the probabilities for the gradient
CACHED = 1 << 19  # scores worked on at a time beyond that


def attend(
    query: Tensor, key: Tensor, value: Tensor, batch: Packed, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of T packed tokens: query (T, H, D), key and value (T, G, D), G dividing H, to (T, H, D)."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave float32 under autocast
    by = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys, values = (
        part.index_select(0, index).split([len(b.prefix) * size for b, size in zip(batch.buckets, sizes, strict=True)])
        for part, index, sizes in (
            (query, batch.query, [b.queries for b in batch.buckets]),
            (key, batch.key, [b.keys for b in batch.buckets]),
            (value, batch.key, [b.keys for b in batch.buckets]),
        )
    )
    outputs = []
    for bucket, q, k, v in zip(batch.buckets, queries, keys, values, strict=True):
        rows = len(bucket.prefix)
        q, k, v = (part.unflatten(0, (rows, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, L, D)
        if q.device.type != "cpu" or dropout:
            out = _kernel(q, k, v, bucket, by, dropout)
        else:
            out = (_Short if bucket.keys <= SHORT else _Long).apply(q, k, v, bucket, by)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, batch.restore)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float, dropout: float) -> Tensor:
    causal = bucket.queries == bucket.keys and bucket.keys > 1  # no prefix
    seen = None if causal or bucket.keys == 1 else _seen(bucket)[:, None]
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, dropout, causal, scale=scale, enable_gqa=grouped)


def _seen(bucket: Bucket) -> Tensor:
    """(B, queries, keys), True where the query sees the key."""
    i, j = (torch.arange(n, device=bucket.prefix.device) for n in (bucket.queries, bucket.keys))
    return j <= bucket.prefix[:, None, None] + i[:, None]


class _Short(torch.autograd.Function):
    """softmax(scale q k' + mask) v with the probabilities kept: on processors, for some hundred keys, several times
    as fast backward as the flash kernel, whose memory it does not spare."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
        rows, heads, length, size = q.shape
        groups = k.shape[1]
        q, k, v = (q * scale).reshape(rows, groups, -1, size), k.contiguous(), v.contiguous()
        scores = (q @ k.transpose(-1, -2)).view(rows, heads, length, -1)
        hidden = torch.zeros(rows, 1, length, bucket.keys, dtype=q.dtype).masked_fill_(
            ~_seen(bucket)[:, None], -math.inf
        )
        share = torch.softmax(scores.add_(hidden), -1).view(rows, groups, -1, bucket.keys)
        ctx.save_for_backward(q, k, v, share)
        ctx.scale = scale
        return (share @ v).view(rows, heads, length, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, share = ctx.saved_tensors
        grad = grads[0].reshape(q.shape)
        d_share = grad @ v.transpose(-1, -2)
        d_scores = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype)
        d_q = (d_scores @ k).mul_(ctx.scale).view(grads[0].shape)
        return d_q, d_scores.transpose(-1, -2) @ q, share.transpose(-1, -2) @ grad, None, None


class _Long(torch.autograd.Function):
    """softmax(scale q k' + mask) v by blocks of queries that fit the cache, each with the keys it sees and no others;
    probabilities are computed again for the gradient. The flash kernel's memory in about two thirds of its time, in
    bfloat16 half to a third, on processors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
        q, k, v = q * scale, k.contiguous(), v.contiguous()
        out = torch.zeros_like(q)
        for row, queries, keys in _blocks(bucket, q.shape[1]):
            mine = q[row, :, queries].reshape(k.shape[1], -1, q.shape[-1])
            share = _shares(mine, k[row, :, keys], queries)
            out[row, :, queries] = (share @ v[row, :, keys]).view_as(out[row, :, queries])
        ctx.save_for_backward(q, k, v)
        ctx.bucket, ctx.scale = bucket, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v).float()
        for row, queries, keys in _blocks(ctx.bucket, q.shape[1]):
            mine, grad = (part[row, :, queries].reshape(k.shape[1], -1, q.shape[-1]) for part in (q, grads[0]))
            share = _shares(mine, k[row, :, keys], queries)
            d_share = grad @ v[row, :, keys].transpose(-1, -2)
            d_scores = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype)
            d_q[row, :, queries] = (d_scores @ k[row, :, keys]).mul_(ctx.scale).view_as(d_q[row, :, queries])
            d_k[row, :, keys] += d_scores.transpose(-1, -2) @ mine
            d_v[row, :, keys] += share.transpose(-1, -2) @ grad
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _blocks(bucket: Bucket, heads: int) -> Iterator[tuple[int, slice, slice]]:
    """Row, real queries and the keys that the last of them sees; about CACHED scores each."""
    for row, (prefix, length) in enumerate(zip(bucket.prefix.tolist(), bucket.lengths.tolist(), strict=True)):
        step = max(16, CACHED // (heads * (prefix + length)))
        for begin in range(0, length, step):
            end = min(begin + step, length)
            yield row, slice(begin, end), slice(0, prefix + end)


def _shares(query: Tensor, key: Tensor, queries: slice) -> Tensor:
    """Probabilities (G, R n, keys) of a block of n queries, R heads a group: query (G, R n, D), key (G, keys, D)."""
    n = queries.stop - queries.start
    scores = query @ key.transpose(-1, -2)
    later = torch.full((n, n), -math.inf, dtype=scores.dtype).triu_(1)
    scores.unflatten(1, (-1, n))[..., -n:].add_(later)
    return torch.softmax(scores, -1)


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
    with _attention(model, NAME):
        yield


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: each layer's activations are computed again for its gradients, by the same attention."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _attention(model, model.config._attn_implementation)

    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


@contextmanager
def _attention(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        with FastLinears():
            yield
    finally:
        model.config._attn_implementation = before


def _no_mask(*_: object, **__: object) -> None:
    """The packed layout is the mask."""
