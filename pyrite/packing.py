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
    """Causal paths (prompt + one response) of similar length, padded to the longest.

    `gather` (B, L) packed index of each position; `lengths` (B,); `keep` (M,) flat indices into B*L that own a
    packed token (a shared prompt is owned by its first path).
    """

    gather: Tensor
    lengths: Tensor
    keep: Tensor

    def to(self, device: torch.device | str) -> Bucket:
        return Bucket(self.gather.to(device), self.lengths.to(device), self.keep.to(device))


@dataclass(frozen=True)
class Packed:
    """N responses of B rows in one flat sequence of T tokens, R of them response tokens.

    `ids`, `positions` (T,); `predictor` (R,) packed index of the hidden state that predicts each response token,
    `target` (R,) that token, `owner` (R,) its response; `last` (N,) packed index of each path's last token.
    `response` (R,) packed index of each response token; `lengths` (N,) response lengths.
    `buckets` and `restore` (T,) describe attention: concatenated `keep` outputs, reordered by `restore`.
    `padded` says that there is one bucket of whole paths, for models that cannot read packed rows.
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
    restore: Tensor
    padded: bool

    @property
    def n(self) -> int:
        """Number of responses."""
        return len(self.last)

    def to(self, device: torch.device | str) -> Packed:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, buckets=tuple(b.to(device) for b in self.buckets), **tensors)


def pack(rows: Sequence[Row], *, padded: bool = False) -> Packed:
    """Lay rows flat; `padded=True` puts every path in one bucket, for models that cannot read packed rows."""
    prompt, first, size, offset, start = _paths(rows)
    ids, positions = _flat(rows)
    owner = np.repeat(np.arange(len(size)), size)
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    response = np.repeat(start, size) + within
    predictor = np.where(within == 0, np.repeat(offset + prompt - 1, size), response - 1)
    groups = [np.arange(len(size))] if padded else _bucket_slices(prompt + size)
    made = [_bucket(prompt[g], first[g], size[g], offset[g], start[g]) for g in groups]
    kept = np.concatenate([gather.reshape(-1)[keep] for gather, _, keep in made])
    restore = np.empty(len(ids), dtype=np.int64)
    restore[kept] = np.arange(len(ids))
    return Packed(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        predictor=torch.from_numpy(predictor),
        target=torch.from_numpy(ids[response]),
        owner=torch.from_numpy(owner),
        response=torch.from_numpy(response),
        last=torch.from_numpy(np.where(size > 0, start + size - 1, offset + prompt - 1)),
        lengths=torch.from_numpy(size),
        buckets=tuple(Bucket(*(torch.from_numpy(part) for part in parts)) for parts in made),
        restore=torch.from_numpy(restore),
        padded=padded,
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
    """Per path: prompt length, whether it owns the prompt, response length, row offset, response offset."""
    paths, offset = [], 0
    for number, row in enumerate(rows):
        if not len(row.prompt) or not len(row.responses):
            raise ValueError(f"packed row {number} needs at least one prompt token and one response")
        start = offset + len(row.prompt)
        for k, response in enumerate(row.responses):
            paths.append((len(row.prompt), k == 0, len(response), offset, start))
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


def _bucket_slices(lengths: np.ndarray, *, waste: float = 0.15, small: int = 512) -> list[np.ndarray]:
    """Paths sorted by length and cut where padding would exceed `waste`; tiny buckets are not worth a kernel call."""
    order = np.argsort(-lengths, kind="stable")
    groups, begin, real = [], 0, 0
    for i, index in enumerate(order):
        padded = (i - begin + 1) * lengths[order[begin]]
        if padded > small and real + lengths[index] < (1 - waste) * padded:
            groups.append(order[begin:i])
            begin, real = i, 0
        real += lengths[index]
    return [*groups, order[begin:]]


def _bucket(prompt, first, size, offset, start) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = prompt + size
    j = np.arange(lengths.max())[None]
    prompt_, length_ = prompt[:, None], lengths[:, None]
    gather = np.where(j < prompt_, offset[:, None] + j, start[:, None] + j - prompt_)
    real = j < length_
    gather = np.where(real, gather, gather[:, :1])  # a pad repeats the path's own first token
    keep = np.flatnonzero(real & ((j >= prompt_) | (first[:, None] > 0)))
    return gather, lengths, keep
