"""Running a model on responses: packed by prompt, in micro-batches, to log-probabilities, scores and values.

From top to bottom: `pack` lays prompts and responses flat; `attend` is attention over packed rows, plugged into
transformers so that the stock model code runs; `states` runs a batch, padded if the model cannot take packed rows;
`selective_logp` reads log-probabilities; `score` reads all responses; `ways` finds out what an architecture allows;
`product` multiplies float32 matrices on processors.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyrite.data.responses import Responses
from pyrite.math.logps import Logps

CACHED = 1 << 19  # numbers that a processor works on at a time, so that its cache holds them

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

    padded: every prompt + response in one bucket, for models that cannot read packed rows. Raises ValueError for a
    group without a response or a prompt without a token.
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
    """Every response in a group of its own."""
    return [[i] for i in range(len(responses))]


def by_prompt(responses: Responses, *, most: int = 64) -> list[list[int]]:
    """Groups of responses to the same prompt tokens, longest first, at most `most` in each."""
    prompts = [tuple(ids) for ids in responses.prompt_ids]
    lengths = responses.lengths.tolist()
    found: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(responses.prompt.tolist()):
        found.setdefault(prompts[p], []).append(i)
    ordered = [sorted(some, key=lambda i: -lengths[i]) for some in found.values()]
    return [some[begin : begin + most] for some in ordered for begin in range(0, len(some), most)]


def _layout(responses: Responses, groups: Groups) -> tuple[np.ndarray, ...]:
    """Of each response: lengths of prompt and response, where its group and the response begin, its group. Of each
    token: its id and position."""
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
    """One bucket of whole texts: the prompt is repeated before each of its responses."""
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
    """Segments sorted by shape and cut where padding would exceed `waste`. A tiny bucket is not worth a kernel call."""
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
    seen = None if causal or bucket.keys == 1 else _visible(bucket)[:, None]
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, dropout, causal, scale=scale, enable_gqa=grouped)


def _visible(bucket: Bucket) -> Tensor:
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
            ~_visible(bucket)[:, None], -math.inf
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
        for row, queries, keys in _query_blocks(bucket, q.shape[1]):
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
        for row, queries, keys in _query_blocks(ctx.bucket, q.shape[1]):
            mine, grad = (part[row, :, queries].reshape(k.shape[1], -1, q.shape[-1]) for part in (q, grads[0]))
            share = _shares(mine, k[row, :, keys], queries)
            d_share = grad @ v[row, :, keys].transpose(-1, -2)
            d_scores = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype)
            d_q[row, :, queries] = (d_scores @ k[row, :, keys]).mul_(ctx.scale).view_as(d_q[row, :, queries])
            d_k[row, :, keys] += d_scores.transpose(-1, -2) @ mine
            d_v[row, :, keys] += share.transpose(-1, -2) @ grad
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _query_blocks(bucket: Bucket, heads: int) -> Iterator[tuple[int, slice, slice]]:
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
    """Attention as transformers calls it: query (1, H, T, D). The batch travels as the keyword `packed`."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("packed attention has no soft-capping and no sinks")
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return attend(q, k, v, packed, scale=scaling, dropout=dropout).unsqueeze(0), None


@contextmanager
def packed_forward(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention layers read packed rows within this block."""
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
        """Indices of texts of these lengths, grouped by which may share a batch."""
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            own = not self.padded or (self.dynamic and length > self.turn)
            groups.setdefault(length if own else -int(length > self.turn), []).append(index)
        return list(groups.values())


def by_response(flat: Tensor, batch: Packed, *, tokens: bool = False) -> Logps:
    """The N responses' log-probabilities from those of their tokens (R,). Sums are added up in float64."""
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
    """Indices into a batch's states (S, H): predictors and response tokens, (R,) each, and last tokens (N,)."""

    predictor: Tensor
    response: Tensor
    last: Tensor


def places(batch: Packed) -> Places:
    """Where each token is in the states of a batch. A padded batch holds a prompt once for each of its responses."""
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
    """Hidden states (S, H) of a batch after the final norm, packed or padded; `places` tells which is which."""
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
    """Run a padded batch through `read`: texts that may not share a forward apart, texts of equal length unmasked."""
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
    """Drop what modules keep of earlier texts: rotary embeddings grown to the longest, recurrent states."""
    for module in model.modules():
        first = getattr(module, "original_inv_freq", None)
        if isinstance(first, Tensor) and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = first.clone()
            module.max_seq_len_cached = module.original_max_seq_len
        for name in STATES & vars(module).keys():
            setattr(module, name, None)


def context_of(model: PreTrainedModel) -> int:
    """Longest sequence in tokens: what the config says, less the positions that RoBERTa and its kin keep for pads."""
    most = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    kept = [m.padding_idx + 1 for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return most - max(kept, default=0)


def pad_of(model: PreTrainedModel) -> int | None:
    """The token that fills padded texts, if the model's config names one."""
    text = model.config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < text.vocab_size else None


def as_padded(batch: Packed, *, pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (N, L) of a batch packed as one bucket."""
    (bucket,) = batch.buckets
    mask = torch.arange(bucket.queries, device=batch.ids.device) < bucket.lengths[:, None]
    ids = batch.ids[batch.query].view(mask.shape)
    return (ids if pad is None else ids.masked_fill(~mask, pad)), mask.long()


def run(module: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    """A model or its trunk on whole texts (N, L), without a cache."""
    takes = inspect.signature(module.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    return module(input_ids=ids, **options, **more, **({} if mask is None else {"attention_mask": mask}))


def own_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's own code from its trunk's states (R, H) to logits (R, V), scales, caps and biases included."""
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
    """Stands in for a trunk and returns states that are known already. Other attributes are the trunk's."""

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
    """The output of a trunk, with its last states only."""

    last_hidden_state: Tensor

    def __new__(cls, states: Tensor) -> _States:
        made = super().__new__(cls, (states,))
        made.last_hidden_state = states
        return made

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# Log-probabilities of given tokens, without the (tokens x vocabulary) matrix where memory is short


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
            for part in _logit_blocks(logits):
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
            for part in _logit_blocks(logits):  # the kept logits are not needed again: their gradient takes their place
                up, at = grad[rows][part, None], target[rows][part, None]
                logits[part] = torch.softmax(logits[part], -1, dtype=torch.float32).mul_(-up).scatter_add_(1, at, up)
            d_hidden[rows] = product(logits, weight.t())
            if ctx.needs_input_grad[1]:
                more = outer(logits, hidden[rows])
                d_weight = more if d_weight is None else d_weight.float().add_(more)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _logit_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of about 2 MB in float32, which stay in a processor's cache from one pass to the next."""
    size = max(1, CACHED // logits.shape[1])
    size = size if logits.device.type == "cpu" else len(logits)
    return (slice(begin, begin + size) for begin in range(0, len(logits), size))


class Model(Protocol):
    """What `score` reads with: a policy, a reward model or an ensemble of them, a value model."""

    def pack(self, responses: Responses, groups: Groups) -> Packed: ...

    def __call__(self, batch: Packed) -> Tensor: ...

    def eval(self) -> Any: ...


def packed_batches(
    model: Model, responses: Responses, groups: Groups, *, budget: int
) -> Iterator[tuple[list[int], Packed]]:
    """Micro-batches of at most `budget` tokens, longest groups first: indices of groups, and the packed batch."""
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
    """The ways of a transformers model, found once in a process for each architecture.

    If no small model can be made, or the stock model cannot read a bare text, only texts of one length share a forward.
    """
    return replace(told(model, _told) or Ways(), **_lengths(model.config))


def told(model: PreTrainedModel, question: Callable[[PreTrainedModel], Answer]) -> Answer | None:
    """What `question` returns for a small model of the architecture, asked once a process; None without one."""
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
    """The lengths at which a model begins to read differently, from its config."""
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
    """Draw weights large enough to keep the size of what they multiply."""
    g = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=g)
        weight.data = noise / weight.shape[-1] ** 0.5 if weight.dim() > 1 else weight.data + 0.2 * noise


def _shrink(config: Any) -> None:
    """Make the sizes of a text config small, in proportion if they depend on each other."""
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
    """The settings of rotary embeddings in a text config, one for each kind of layer."""
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
    """The answer, or False if a foreign model raises anything."""
    try:
        return ask()
    except Exception:
        return False


def _probe(model: PreTrainedModel) -> Responses:
    """Two prompts with responses, without pad tokens."""
    text = model.config.get_text_config()
    free = [token for token in range(3, text.vocab_size) if token != pad_of(model)] or [0]

    def some(tokens: Sequence[int]) -> list[int]:
        return [free[token % len(free)] for token in tokens]

    return Responses.of([(some(p), [some(one) for one in a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)])


def _read(model: PreTrainedModel, texts: list[list[int]], mask: Tensor | None = None) -> Outputs:
    """The stock model's own numbers for texts of equal length, or padded with a mask."""
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
    """Whether two results agree: their difference is small beside that to a wrong way, or it is rounding.

    In deep models with norms behind their layers, another text in front moves the last states by roundings only.
    """
    error = (got - want).abs().max().item()
    rounding = ROUNDINGS * torch.finfo(want.dtype).eps * want.abs().max().item()
    return error <= CLOSE * far or error <= min(rounding, STILL * far)


def _far(name: str, alone: Sequence[Outputs], behind: Sequence[Outputs]) -> float:
    """How far another text in front moves the numbers, in the text that moves least."""
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
    """For some tokens, the tokens that their states (T, H) have a gradient to."""
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
    """Whether a packed token's state has a gradient only to tokens before it in its own text."""
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
    """Logits from the trunk's states alone: of the last token for a classifier, of all for a vocabulary head."""
    score = getattr(model, "score", None)
    return score(states[0, -1]) if isinstance(score, nn.Module) else own_head(model)(states[0])


def _bare(model: Any, states: Tensor) -> Tensor:
    return F.linear(states[0], model.get_output_embeddings().weight)


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
    """Every linear layer of a stock model multiplies by `product` within this context, gradients included."""

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
