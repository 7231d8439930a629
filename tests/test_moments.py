"""Running mean and variance: any split of the values, checkpoints, offsets, masks."""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyrite.math.policy_gradient import Moments, merged, moments, normalized

F64 = torch.float64


def test_worked() -> None:
    found = moments(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (found.count, found.mean, found.square, found.var) == (4, 2.5, 5, 1.25)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_split_gives_the_whole(sizes: list[int], seed: int) -> None:
    values = 3 * torch.randn(sum(sizes), dtype=F64, generator=torch.Generator().manual_seed(seed)) + 1e4
    parts = [moments(part) for part in values.split(sizes)]
    for order in (parts, parts[::-1]):
        found = reduce(merged, order, Moments.zero())
        assert found.count == len(values)
        torch.testing.assert_close(found.mean, values.mean(), rtol=1e-13, atol=0)
        torch.testing.assert_close(found.var, values.var(correction=0), rtol=1e-7, atol=1e-9)


def test_an_offset_does_not_eat_the_variance() -> None:
    """E x² − (E x)² in float32 would give 0 or a negative number."""
    values = 1e6 + torch.tensor([0.0, 1.0, 2.0] * 100)
    found = reduce(merged, (moments(part) for part in values.split(7)))
    assert found.var.item() == pytest.approx(2 / 3, rel=1e-9)


def test_each_row_has_its_own() -> None:
    """Several rewards, or members, side by side."""
    rows = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    found = merged(Moments.zero(2), moments(rows))
    assert found.mean.tolist() == [2, 10] and found.var.tolist() == [1, 0]
    assert normalized(rows, found).tolist() == [[-1, 1], [0, 0]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_is_masked_is_not_read(garbage: float) -> None:
    found = moments(torch.tensor([1.0, garbage, 3.0]), torch.tensor([True, False, True]))
    assert (found.count, found.mean, found.var) == (2, 2, 1)


def test_nothing_seen_is_no_number() -> None:
    assert Moments.zero().var.isnan()
    nothing = moments(torch.ones(2), torch.zeros(2, dtype=torch.bool))
    some = moments(torch.tensor([1.0, 3.0]))
    for both in (merged(nothing, some), merged(some, nothing)):
        assert (both.count, both.mean, both.var) == (2, 2, 1)
    assert normalized(torch.tensor([5.0]), some).item() == 3


def test_a_first_batch_of_equal_scores_is_left_alone() -> None:
    scores = torch.tensor([0.3, 0.3])
    assert normalized(scores, moments(scores)).abs().max() < 1e-7


def test_a_checkpoint_holds_it(tmp_path: Path) -> None:
    first, second = moments(torch.tensor([1.0, 2.0])), moments(torch.tensor([5.0]))
    save_file(dict(vars(first)), tmp_path / "state.safetensors")
    read = Moments(**load_file(tmp_path / "state.safetensors"))
    assert vars(merged(read, second)) == vars(merged(first, second))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one shape"):
        moments(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask of bools"):
        moments(torch.zeros(3), torch.ones(3))


def test_published_running_moments() -> None:
    """Personalized soups' running scores: [1, 2, 3], then [4, 4, 4]; there the deviation is the unbiased one."""
    first = moments(torch.tensor([1.0, 2.0, 3.0]))
    both = merged(first, moments(torch.tensor([4.0, 4.0, 4.0])))
    unbiased = [math.sqrt(found.square.item() / (found.count.item() - 1)) for found in (first, both)]
    assert (first.mean.item(), both.mean.item()) == (2.0, 3.0)
    assert unbiased == pytest.approx([1.0, 1.26491], abs=1e-5)
    assert 1.0 / unbiased[1] == pytest.approx(0.79057, abs=1e-5)
    ours = normalized(torch.tensor([4.0]), both).item()
    assert ours == pytest.approx(0.79057 * math.sqrt(6 / 5), abs=1e-5)  # population deviation over six values
