"""Packed rows: every index points where it says; buckets and micro-batches lose nothing."""

from __future__ import annotations

import pytest
import torch
from families import Row
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrite.data.responses import Responses
from pyrite.models.forward import Packed, longest, micro_batches, pack, sizes

tokens = st.lists(st.integers(0, 99), max_size=12)
rows_of = st.lists(
    st.builds(Row, st.lists(st.integers(0, 99), min_size=1, max_size=12), st.lists(tokens, min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


def tokens_of(row: Row) -> int:
    return len(row.prompt) + sum(map(len, row.responses))


def paths_of(batch: Packed) -> list[torch.Tensor]:
    """Packed indices of every segment with its prefix, as attention sees it."""
    found, at = [], 0
    for bucket in batch.buckets:
        for prefix, length in zip(bucket.prefix.tolist(), bucket.lengths.tolist(), strict=True):
            found.append(batch.key[at : at + prefix + length])
            at += bucket.keys
    return found


def test_worked_example() -> None:
    batch = pack(Responses.of([Row([1, 2], [[3, 4], [5]]), Row([6], [[7]])]))
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert batch.predictor.tolist() == [1, 2, 1, 5]
    assert batch.target.tolist() == [3, 4, 5, 7]
    assert batch.owner.tolist() == [0, 0, 1, 2]
    assert batch.response.tolist() == [2, 3, 4, 6]
    assert batch.last.tolist() == [3, 4, 6]
    assert batch.lengths.tolist() == [2, 1, 1]
    assert batch.n == 3


@settings(deadline=None, max_examples=60)
@given(rows_of, st.booleans())
def test_every_path_can_be_read_back(rows: list[Row], padded: bool) -> None:
    batch = pack(Responses.of(rows), padded=padded)
    assert len(batch.ids) == sum(tokens_of(row) for row in rows)
    paths = [(row.prompt, response) for row in rows for response in row.responses]
    assert batch.n == len(paths)
    assert batch.padded == padded
    found = sorted(tuple(batch.ids[path].tolist()) for path in paths_of(batch))
    whole = [(*prompt, *response) for prompt, response in paths]
    parts = [tuple(row.prompt) for row in rows] + [path for path, (_, r) in zip(whole, paths, strict=True) if r]
    assert found == sorted(whole if padded else parts)
    for k, (prompt, response) in enumerate(paths):
        mine = batch.owner == k
        assert batch.target[mine].tolist() == list(response)
        assert batch.ids[batch.response[mine]].tolist() == list(response)
        assert batch.ids[batch.predictor[mine]].tolist() == [*prompt, *response][len(prompt) - 1 : -1][: len(response)]
        assert batch.positions[batch.response[mine]].tolist() == list(range(len(prompt), len(prompt) + len(response)))
        assert batch.ids[batch.last[k]] == [*prompt, *response][-1]


@settings(deadline=None, max_examples=60)
@given(rows_of, st.booleans())
def test_buckets_own_every_token_once(rows: list[Row], padded: bool) -> None:
    batch = pack(Responses.of(rows), padded=padded)
    assert torch.equal(batch.query[batch.restore], torch.arange(len(batch.ids)))
    assert len(batch.query) == sum(len(bucket.lengths) * bucket.queries for bucket in batch.buckets)
    assert len(batch.key) == sum(len(bucket.lengths) * bucket.keys for bucket in batch.buckets)


def test_buckets_waste_little_and_stay_few() -> None:
    g = torch.Generator().manual_seed(0)
    rows = [Row([1] * int(torch.randint(1, 200, (), generator=g)), [[2] * 30]) for _ in range(200)]
    batch = pack(Responses.of(rows))
    padded = sum(len(bucket.lengths) * bucket.queries * bucket.keys for bucket in batch.buckets)
    exact = sum(len(row.prompt) ** 2 + 30 * (len(row.prompt) + 30) for row in rows)
    assert padded < 1.3 * exact
    assert len(batch.buckets) < 40


@settings(deadline=None, max_examples=60)
@given(rows_of, st.integers(1, 60))
def test_micro_batches_hold_every_row_once_within_the_budget(rows: list[Row], budget: int) -> None:
    size = [tokens_of(row) for row in rows]
    read = Responses.of(rows)
    assert sizes(read, read.groups()) == size
    groups = list(micro_batches(size, budget=budget))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(len(group) == 1 or sum(size[i] for i in group) <= budget for group in groups)
    flat = [size[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)


def test_longest_path() -> None:
    read = Responses.of([Row([1, 2], [[3], [4, 5, 6]]), Row([1, 2, 3], [[4]])])
    assert longest(read, read.groups()) == 5


@pytest.mark.parametrize(("row", "groups"), [(Row([], [[1]]), [[0], [1]]), (Row([1], [[1]]), [[0, 1], []])])
def test_a_group_needs_a_response_and_its_prompt_a_token(row: Row, groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="a packed group needs at least one response, and its prompt one token"):
        pack(Responses.of([Row([1], [[2]]), row]), groups)


def test_to_moves_every_tensor() -> None:
    moved = pack(Responses.of([Row([1], [[2], [3, 4]])])).to("meta")
    assert isinstance(moved, Packed)
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    held = [value for bucket in moved.buckets for value in (bucket.prefix, bucket.lengths)]
    assert {value.device.type for value in held} == {"meta"}
