"""Attention over packed rows, plugged into transformers so that the stock model code runs.

`attend` computes, for every packed token, causal attention over its own path: the prompt and the response it
belongs to. Prompts and responses of similar length share one kernel call; no token is computed twice.
On CUDA this path has been written for but not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyrite.data.responses import Responses

# Float32 matrix products on processors: oneDNN where MKL, which torch calls by default, is up to twice as slow.


def onednn(x: Tensor) -> bool:
    """Whether products of `x` go to oneDNN."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients: x (..., K), weight (N, K), bias (N,) or None, to (..., N)."""
    if onednn(x) and weight.dtype == x.dtype and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FastLinears(TorchFunctionMode):
    """Within this context every linear layer of a stock model multiplies by `product`, gradients included."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and len(args) >= 2 and not torch.is_autocast_enabled("cpu") and onednn(args[0]):
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return linear(args[0], args[1], bias)
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with gradients."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        flat = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x = product(grad, weight.t()) if need_x else None
        d_weight = outer(flat, x.reshape(-1, x.shape[-1])) if need_weight else None
        return d_x, d_weight, flat.sum(0) if need_bias else None


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b: a (T, N), b (T, K), to (N, K)."""
    return product(b.t(), a.t()).t() if a.shape[1] > b.shape[1] else product(a.t(), b.t())


# Packing: a prompt once, then the responses that are read with it, flat token ids without a single pad.


Groups = Sequence[Sequence[int]]  # indices of responses; those of a group answer one prompt and are packed behind it


@dataclass(frozen=True)
class Bucket:
    """B segments of similar length: `queries` tokens of each see `keys` tokens, its prefix and itself up to each.

    A prompt is a segment without prefix; a response is one whose prefix is its prompt. `prefix` (B,) counts the keys
    before the segment, `lengths` (B,) its real tokens; query i sees key j <= prefix + i.
    """

    queries: int
    keys: int
    prefix: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> Bucket:
        return replace(self, prefix=self.prefix.to(device), lengths=self.lengths.to(device))


@dataclass(frozen=True)
class Packed:
    """N responses in B groups in one flat sequence of T tokens, R of them response tokens.

    `ids`, `positions` (T,); `predictor` (R,) packed index of the hidden state that predicts each response token,
    `target` (R,) that token, `owner` (R,) its response; `last` (N,) packed index of each path's last token.
    `response` (R,) packed index of each response token; `lengths` (N,) response lengths.
    `buckets` describe attention: `query` and `key` are the packed indices of their B x queries and B x keys tokens, one
    bucket after the other (a pad repeats its segment's first token), `restore` (T,) where each token stands in `query`.
    `padded` says that there is one bucket of whole paths, for models that cannot read packed rows. `responses` and
    `groups` are what was packed.
    """

    ids: Tensor
    positions: Tensor
    predictor: Tensor
    target: Tensor
    owner: Tensor
    response: Tensor
    last: Tensor
    lengths: Tensor
    buckets: tuple[Bucket, ...]
    query: Tensor
    key: Tensor
    restore: Tensor
    padded: bool
    responses: Responses
    groups: Groups

    @property
    def n(self) -> int:
        """Number of responses."""
        return len(self.last)

    @property
    def given(self) -> tuple[Responses, Groups]:
        """What was packed."""
        return self.responses, self.groups

    def to(self, device: torch.device | str) -> Packed:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, buckets=tuple(b.to(device) for b in self.buckets), **tensors)


def pack(responses: Responses, groups: Groups | None = None, *, padded: bool = False) -> Packed:
    """Lay responses flat, group by group, by default those to each prompt.

    padded: every path in one bucket, for models that cannot read packed rows. Raises ValueError for a group without a
    response or a prompt without a token.
    """
    groups = responses.groups() if groups is None else groups
    prompt, size, offset, start, row, ids, positions = _layout(responses, groups)
    owner = np.repeat(np.arange(len(size)), size)
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    response = np.repeat(start, size) + within
    predictor = np.where(within == 0, np.repeat(offset + prompt - 1, size), response - 1)
    made = (_whole_paths if padded else _segments)(prompt, size, offset, start, row)
    query, key = (np.concatenate([part[which].reshape(-1) for part in made]) for which in (0, 1))
    real = np.flatnonzero(np.concatenate([part[4].reshape(-1) for part in made]))
    restore = np.empty(len(ids), dtype=np.int64)
    restore[query[real[::-1]]] = real[::-1]  # a token on several padded paths is taken from the first
    return Packed(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        predictor=torch.from_numpy(predictor),
        target=torch.from_numpy(ids[response]),
        owner=torch.from_numpy(owner),
        response=torch.from_numpy(response),
        last=torch.from_numpy(np.where(size > 0, start + size - 1, offset + prompt - 1)),
        lengths=torch.from_numpy(size),
        buckets=tuple(
            Bucket(query.shape[1], key.shape[1], torch.from_numpy(prefix), torch.from_numpy(lengths))
            for query, key, prefix, lengths, _ in made
        ),
        query=torch.from_numpy(query),
        key=torch.from_numpy(key),
        restore=torch.from_numpy(restore),
        padded=padded,
        responses=responses,
        groups=groups,
    )


def longest(responses: Responses, groups: Groups) -> int:
    """Tokens of the longest prompt + response."""
    index = [i for group in groups for i in group]
    _, _, prompts = responses.flat_prompts
    return int((prompts[responses.prompt.numpy()[index]] + responses.lengths.numpy()[index]).max())


def sizes(responses: Responses, groups: Groups) -> list[int]:
    """Packed tokens of each group."""
    _, _, prompts = responses.flat_prompts
    prompt, lengths = responses.prompt.tolist(), responses.lengths.tolist()
    return [int(prompts[prompt[group[0]]]) + sum(lengths[i] for i in group) for group in groups]


def micro_batches(sizes: Sequence[int], *, budget: int) -> Iterator[list[int]]:
    """Indices of groups, longest first, in micro-batches of at most `budget` packed tokens (one group at least)."""
    batch: list[int] = []
    used = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batch and used + sizes[index] > budget:
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += sizes[index]
    if batch:
        yield batch


def singles(responses: Responses) -> list[list[int]]:
    """Every response by itself, behind a prompt of its own."""
    return [[i] for i in range(len(responses))]


def by_prompt(responses: Responses, *, most: int = 64) -> list[list[int]]:
    """Responses to the same prompt tokens together, longest first, `most` at a time."""
    prompts = [tuple(ids) for ids in responses.prompt_ids]
    lengths = responses.lengths.tolist()
    found: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(responses.prompt.tolist()):
        found.setdefault(prompts[p], []).append(i)
    ordered = [sorted(some, key=lambda i: -lengths[i]) for some in found.values()]
    return [some[begin : begin + most] for some in ordered for begin in range(0, len(some), most)]


def _layout(responses: Responses, groups: Groups) -> tuple[np.ndarray, ...]:
    """Of each path: prompt length, response length, where its group and its response begin, its group. Of each token:
    its id, its position."""
    counts = np.array([len(group) for group in groups])
    index = np.array([i for group in groups for i in group], dtype=np.int64)
    flat, begins, lengths = responses.flat_prompts
    asked = responses.prompt.numpy()[index]
    if not counts.all() or not lengths[asked].all():
        raise ValueError("a packed group needs at least one response, and its prompt one token")
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    prompt, size = lengths[asked], responses.lengths.numpy()[index]
    before = np.cumsum(size) - size  # response tokens before each response
    ahead = np.cumsum(prompt[first])  # prompt tokens up to each group's, that included
    start = ahead[row] + before
    offset = ahead - prompt[first] + before[first]
    ids = np.empty(int(ahead[-1] + size.sum()), dtype=np.int64)
    positions = np.empty_like(ids)
    for length, begin, source, values, shift in (
        (prompt[first], offset, begins[asked[first]], flat, np.zeros_like(first)),
        (size, start, responses.begins[index], responses.ids.numpy(), prompt),
    ):
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        at = np.repeat(begin, length) + within
        ids[at] = values[np.repeat(source, length) + within]
        positions[at] = np.repeat(shift, length) + within
    return prompt, size, offset[row], start, row, ids, positions


Made = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # query, key, prefix, lengths, real


def _whole_paths(prompt, size, offset, start, row) -> list[Made]:
    """One bucket of whole paths: a prompt is there before each of its responses."""
    lengths = prompt + size
    j = np.arange(lengths.max())[None]
    real = j < lengths[:, None]
    gather = np.where(j < prompt[:, None], offset[:, None] + j, start[:, None] + j - prompt[:, None])
    gather = np.where(real, gather, offset[:, None])
    return [(gather, gather, np.zeros_like(prompt), lengths, real)]


def _segments(prompt, size, offset, start, row) -> list[Made]:
    """Prompts and responses in buckets of similar shape."""
    first = np.flatnonzero(np.diff(row, prepend=-1))
    none = np.zeros(len(first), dtype=np.int64)
    prefix, at = np.concatenate([none, prompt]), np.concatenate([none, offset])
    length, begin = np.concatenate([prompt[first], size]), np.concatenate([offset[first], start])
    some = length > 0
    prefix, at, length, begin = prefix[some], at[some], length[some], begin[some]
    return [_bucket(prefix[g], at[g], length[g], begin[g]) for g in _similar(length, prefix + length)]


def _bucket(prefix: np.ndarray, at: np.ndarray, length: np.ndarray, begin: np.ndarray) -> Made:
    i, j = np.arange(length.max())[None], np.arange((prefix + length).max())[None]
    prefix_, begin_ = prefix[:, None], begin[:, None]
    real = i < length[:, None]
    query = np.where(real, begin_ + i, begin_)
    own = np.where(j < prefix_ + length[:, None], begin_ + j - prefix_, begin_)
    return query, np.where(j < prefix_, at[:, None] + j, own), prefix, length, real


def _similar(queries: np.ndarray, keys: np.ndarray, *, waste: float = 0.2, small: int = 1 << 15) -> list[np.ndarray]:
    """Segments sorted by shape and cut where padding would exceed `waste`; tiny buckets are not worth a kernel call."""
    order = np.lexsort((-keys, -queries))
    groups, begin, real, widest = [], 0, 0, 0
    for i, index in enumerate(order):
        area = queries[index] * keys[index]
        padded = (i - begin + 1) * queries[order[begin]] * max(widest, keys[index])
        if i > begin and padded > small and real + area < (1 - waste) * padded:
            groups.append(order[begin:i])
            begin, real, widest = i, 0, 0
        real, widest = real + area, max(widest, keys[index])
    return [*groups, order[begin:]]


# Attention over packed rows, inside the stock model code.


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
