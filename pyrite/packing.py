"""Packed rows: a prompt once, then its K responses, flat token ids without a single pad.

Each response sees its prompt and itself, never its siblings, and its positions restart after the prompt, so a
packed row gives the same numbers as K separate sequences while the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One prompt and its K responses as token ids; `prompt` has at least one token."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Tokens this row costs when packed."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


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
    """N responses of B rows in one flat sequence of T tokens, R of them response tokens.

    `ids`, `positions` (T,); `predictor` (R,) packed index of the hidden state that predicts each response token,
    `target` (R,) that token, `owner` (R,) its response; `last` (N,) packed index of each path's last token.
    `response` (R,) packed index of each response token; `lengths` (N,) response lengths.
    `buckets` describe attention: `query` and `key` are the packed indices of their B x queries and B x keys tokens, one
    bucket after the other (a pad repeats its segment's first token), `restore` (T,) where each token stands in `query`.
    `padded` says that there is one bucket of whole paths, for models that cannot read packed rows; `rows` is what was
    packed.
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
    rows: Sequence[Row]

    @property
    def n(self) -> int:
        """Number of responses."""
        return len(self.last)

    def to(self, device: torch.device | str) -> Packed:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, buckets=tuple(b.to(device) for b in self.buckets), **tensors)


def pack(rows: Sequence[Row], *, padded: bool = False) -> Packed:
    """Lay rows flat; `padded=True` puts every path in one bucket, for models that cannot read packed rows."""
    prompt, size, offset, start, row = _paths(rows)
    ids, positions = _flat(rows)
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
        rows=rows,
    )


def longest(rows: Sequence[Row]) -> int:
    """Tokens of the longest prompt + response."""
    return max(len(row.prompt) + max(map(len, row.responses)) for row in rows)


def micro_batches(rows: Sequence[Row], *, budget: int) -> Iterator[list[int]]:
    """Indices of `rows`, longest first, in groups of at most `budget` packed tokens (one row at least)."""
    group: list[int] = []
    used = 0
    for index in sorted(range(len(rows)), key=lambda i: -rows[i].tokens):
        if group and used + rows[index].tokens > budget:
            yield group
            group, used = [], 0
        group.append(index)
        used += rows[index].tokens
    if group:
        yield group


def _paths(rows: Sequence[Row]) -> tuple[np.ndarray, ...]:
    """Per path: prompt length, response length, row offset, response offset, row number."""
    paths, offset = [], 0
    for number, row in enumerate(rows):
        if not len(row.prompt) or not len(row.responses):
            raise ValueError(f"packed row {number} needs at least one prompt token and one response")
        start = offset + len(row.prompt)
        for response in row.responses:
            paths.append((len(row.prompt), len(response), offset, start, number))
            start += len(response)
        offset = start
    table = np.array(paths, dtype=np.int64)
    return tuple(table[:, column] for column in range(5))


def _flat(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    positions: list[np.ndarray] = []
    for row in rows:
        ids.extend(row.prompt)
        positions.append(np.arange(len(row.prompt)))
        for response in row.responses:
            ids.extend(response)
            positions.append(np.arange(len(row.prompt), len(row.prompt) + len(response)))
    return np.array(ids, dtype=np.int64), np.concatenate(positions)


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
