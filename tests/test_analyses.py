"""Analyses: worked numbers, brute force, ties, and the exact edges of `degenerate`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyrite.math import statistics
from pyrite.math.logps import Logps, PairLogps

SEEDS = st.integers(0, 10_000)
TOKENS = st.lists(st.integers(0, 3), max_size=30)


def sums(*values: float) -> Logps:
    return Logps.from_sums(torch.tensor(values, dtype=torch.float32), torch.ones(len(values)))


def tokens(g: torch.Generator, lengths: list[int]) -> Logps:
    return Logps.from_tokens([-torch.rand(length, generator=g) for length in lengths])


def test_ranking_worked() -> None:
    """Three pairs worked by hand: policy 2 of 3, reward 2 of 3."""
    pair = PairLogps(sums(-3.3, -10, -20), sums(-5.4, -9, -22), sums(-3, -11, -20.5), sums(-3.8, -8.5, -23))
    found = statistics.ranking(pair)
    assert found["policy_accuracy"].mean == found["accuracy"].mean == pytest.approx(2 / 3)
    assert found["accuracy"].se == pytest.approx(1 / 3)  # the deviation of (1, 1, 0) is 1/sqrt(3)
    assert found["margin"].mean == pytest.approx((1.3 + 1.5 - 0.5) / 3, abs=1e-6)


def test_ranking_counts_ties_half() -> None:
    at_ref = PairLogps(sums(-1, -2, -4), sums(-2, -1, -4), sums(-1, -2, -4), sums(-2, -1, -4))
    found = statistics.ranking(at_ref)
    assert (found["accuracy"].mean, found["margin"].mean, found["policy_accuracy"].mean) == (0.5, 0, 0.5)
    assert set(statistics.ranking(PairLogps(sums(-1.0), sums(-2.0)))) == {"policy_accuracy"}
    assert statistics.ranking(PairLogps(sums(-1.0), sums(-2.0)))["policy_accuracy"] == (1.0, 0.0)


@given(SEEDS)
def test_swapped_sides_rank_the_other_way(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sides = [sums(*(-torch.randint(1, 4, (9,), generator=g)).tolist()) for _ in range(4)]
    there = statistics.ranking(PairLogps(*sides))
    back = statistics.ranking(PairLogps(sides[1], sides[0], sides[3], sides[2]))
    for name in ("accuracy", "policy_accuracy"):
        assert there[name].mean + back[name].mean == pytest.approx(1)
        assert there[name].se == pytest.approx(back[name].se)
    assert there["margin"].mean == pytest.approx(-back["margin"].mean)


@given(SEEDS)
def test_token_table_against_a_dictionary(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    ids, ratios = torch.randint(0, 6, (40,), generator=g), torch.randn(40, generator=g)
    by_hand = defaultdict(list)
    for token, ratio in zip(ids.tolist(), ratios.tolist(), strict=True):
        by_hand[token].append(ratio)
    table = statistics.by_token(ids, ratios)
    assert table.token.tolist() == sorted(by_hand)
    assert table.count.tolist() == [len(by_hand[token]) for token in sorted(by_hand)]
    assert table.mean.tolist() == pytest.approx([sum(v) / len(v) for _, v in sorted(by_hand.items())], abs=1e-6)
    order = torch.randperm(40, generator=g)
    assert torch.allclose(statistics.by_token(ids[order], ratios[order]).mean, table.mean)
    assert (table.count * table.mean).sum().item() == pytest.approx(ratios.sum().item(), abs=1e-5)


def test_extremes_need_enough_occurrences() -> None:
    table = statistics.TokenRatios(
        torch.tensor([5, 6, 7, 8]), torch.tensor([100, 99, 200, 150]), torch.tensor([0.5, -9.0, -2.0, 1.0])
    )
    down, up = statistics.extremes(table, k=2)
    assert (down.token.tolist(), down.mean.tolist(), down.count.tolist()) == ([7, 5], [-2, 0.5], [200, 100])
    assert up.token.tolist() == [8, 5]
    assert statistics.extremes(table, k=1, at_least=99)[0].token.tolist() == [6]
    assert all(not len(end.token) for end in statistics.extremes(table, at_least=1000))


def test_histogram_worked() -> None:
    found = statistics.histogram(torch.tensor([-3.2, -0.5, 0.0, 0.9, 1.0]))
    assert found.edges == [-4, -3, -2, -1, 0, 1, 2]
    assert found.counts == [1, 0, 0, 1, 2, 1]
    assert found.log10 == [0, None, None, 0, math.log10(2), 0]
    assert statistics.histogram(torch.tensor([0.3, 0.6]), width=0.5).edges == [0, 0.5, 1]


@given(SEEDS)
def test_histogram_counts_everything_where_it_lies(seed: int) -> None:
    values = 5 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    found = statistics.histogram(values)
    for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True):
        assert ((values >= low) & (values < high)).sum() == count
    assert sum(found.counts) == 50


def test_tail_mass_is_strict() -> None:
    assert statistics.tail_mass(torch.tensor([-10.0, -10.001, 3, -50])) == 0.5


def test_log_ratios_in_order() -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = tokens(g, [3, 1, 2]), tokens(g, [3, 1, 2])
    assert ours.tokens is not None and theirs.tokens is not None
    difference = (ours.tokens - theirs.tokens).tolist()
    want = [difference[i][t] for i, length in enumerate((3, 1, 2)) for t in range(length)]
    assert statistics.log_ratios(ours, theirs).tolist() == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="differ in the length"):
        statistics.log_ratios(ours, tokens(g, [3, 2, 2]))
    with pytest.raises(ValueError, match="not their sums alone"):
        statistics.log_ratios(ours, sums(-1, -2, -3))


def test_end_tokens() -> None:
    def side(*rows: list[float]) -> Logps:
        return Logps.from_tokens([torch.tensor(row) for row in rows])

    pair = PairLogps(side([-1, -2.0], [-5.0], [-1, -1, -9.0]), side([-4.0], [-1, -7.0], [-3, -3.0]))
    assert statistics.end_logp(pair.chosen).tolist() == [-2, -5, -9]
    found = statistics.ends(pair, torch.tensor([True, True, False]))
    assert {name: value.mean for name, value in found.items()} == {"chosen": -3.5, "rejected": -5.5, "gap": 2}
    assert found["gap"].se == 0  # 2 and 2
    assert statistics.ends(pair, torch.tensor([False] * 3)) == {}
    with pytest.raises(ValueError, match="token log-probabilities are needed"):
        statistics.end_logp(sums(-1.0))


def test_by_position_worked() -> None:
    rows = [torch.tensor([1.0, 2, 3]), torch.tensor([3.0]), torch.tensor([5.0, 4])]
    values, reached = statistics.by_position(rows)
    assert (values.tolist(), reached.tolist()) == ([3, 3, 3], [3, 2, 1])
    with pytest.raises(ValueError, match="no answers"):
        statistics.by_position([])


def test_repetition_worked() -> None:
    assert statistics.repetition([1, 2, 3, 4]) == 0
    assert statistics.repetition([1, 2, 3]) == 0  # no 4-gram
    assert statistics.repetition([7] * 13) == pytest.approx(0.9)
    assert statistics.repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


@given(TOKENS)
def test_repetition_against_counting(answer: list[int]) -> None:
    grams = Counter(zip(answer, answer[1:], answer[2:], answer[3:], strict=False))
    repeats = sum(count - 1 for count in grams.values())
    assert statistics.repetition(answer) == pytest.approx(repeats / grams.total() if grams else 0)
    assert statistics.repetition([token + 5 for token in answer]) == statistics.repetition(answer)


def test_distinct_worked() -> None:
    assert statistics.distinct([[1, 2, 1], [1, 2]], 1) == pytest.approx(2 / 5)
    assert statistics.distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)
    assert statistics.distinct([[1]], 2) == 0.0


@pytest.mark.parametrize(
    ("endless", "want"), [(0, False), (2, False), (3, True), (10, True)], ids=["none", "20 %", "30 %", "all"]
)
def test_degenerate_by_missing_end_tokens(endless: int, want: bool) -> None:
    found = statistics.degeneration([[1, 2, 3, 4, 5]] * 10, [i >= endless for i in range(10)])
    assert found == (want, endless / 10, 0.0)


def test_degenerate_by_repetition() -> None:
    half, more, fresh = [1, 2, 1, 2, 1, 2, 1], [1] * 7, [1, 2, 3, 4, 5]
    done = [True] * 3
    assert statistics.degeneration([half, half, more], done) == (False, 0.0, 0.5)  # not above a half
    assert statistics.degeneration([fresh, more, more], done) == (True, 0.0, 0.75)
    assert statistics.degeneration([fresh, fresh, more], done) == (False, 0.0, 0.0)  # the median, not the mean
    assert statistics.degeneration([half, more], done[:2]) == (True, 0.0, 0.625)
    for answers, flags in (([], []), ([fresh], [True, False])):
        with pytest.raises(ValueError, match="give as many, at least one"):
            statistics.degeneration(answers, flags)


def test_refusals_of_shapes() -> None:
    empty: Tensor = torch.empty(0)
    with pytest.raises(ValueError, match="by_token"):
        statistics.by_token(torch.tensor([1, 2]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="by_token"):
        statistics.by_token(empty.long(), empty)
