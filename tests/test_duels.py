"""Outcomes of units, rates by both tie rules, intervals over prompts, averages, fronts."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from pyrite.math import duels, statistics
from pyrite.math.duels import average, mirrored, outcomes, pareto, rates

NAN = math.nan


def drawn(size: int, *, seed: int = 0, prompts: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Outcomes with gaps, and whose they are."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-1, 3, (size,), generator=g).double()
    return torch.where(values == 2, NAN, values), torch.randint(prompts, (size,), generator=g)


def test_examples() -> None:
    result = doctest.testmod(duels, extraglobs={"torch": torch})
    assert result.attempted == 3 and not result.failed


def test_a_unit_goes_to_the_method_that_wins_more_criteria() -> None:
    verdicts = torch.tensor([[1, 1, -1], [1, 0, -1], [0, 0, -1], [1, -1, -1], [0, 0, 0]]).T
    assert outcomes(verdicts).tolist() == [1, 0, -1, -1, 0]
    assert outcomes(-verdicts).tolist() == [-1, 0, 1, 1, 0]


def test_a_missing_verdict_drops_the_unit_or_is_a_tie() -> None:
    verdicts = torch.tensor([[1, 1, NAN], [-1, NAN, NAN], [1, -1, NAN], [1, 1, -1]]).T
    torch.testing.assert_close(outcomes(verdicts), torch.tensor([NAN, NAN, NAN, 1.0]).double(), equal_nan=True)
    assert outcomes(verdicts, missing="tie").tolist() == [1, -1, 0, 1]


@pytest.mark.parametrize("bad", [[[0.5]], [[2.0]], [1.0], [[math.inf]]], ids=str)
def test_other_verdicts_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="verdicts must be"):
        outcomes(torch.tensor(bad))
    with pytest.raises(ValueError, match="choose drop or tie"):
        outcomes(torch.zeros(1, 1), missing="half")  # type: ignore[arg-type]


def test_worked_numbers() -> None:
    """27 wins, 15 losses, 8 ties of 50: 62.0 % ± 6.318 with ties one half, 64.2857 % without."""
    values = torch.tensor([1.0] * 27 + [-1.0] * 15 + [0.0] * 8 + [NAN] * 3)
    found = rates(values, torch.arange(53))
    assert (found.wins, found.losses, found.ties, found.missing) == (27, 15, 8, 3)
    assert 100 * found.half == pytest.approx(62.0)
    assert 100 * found.sem == pytest.approx(6.318, abs=1e-3)
    assert 100 * found.without == pytest.approx(64.2857, abs=1e-4)
    # one unit a prompt: the bootstrap agrees with the standard error
    assert (found.half_hi - found.half_lo) / 2 == pytest.approx(1.96 * found.sem, rel=0.08)
    assert found.half_lo < found.half < found.half_hi and found.without_lo < found.without < found.without_hi


def test_the_interval_draws_whole_prompts() -> None:
    """Eight units that always agree are one: the interval is that of the prompts, not that of 8 times as many."""
    values, prompt = torch.tensor([1.0, -1.0]).repeat(10), torch.arange(20)
    once, often = rates(values, prompt), rates(values.repeat(8), prompt.repeat(8))
    assert often.sem < 0.4 * once.sem
    assert once[4:10] == often[4:10]
    alone = rates(values.repeat(8), torch.arange(160))
    assert alone.half_hi - alone.half_lo < 0.5 * (often.half_hi - often.half_lo)


def test_the_interval_equals_a_plain_bootstrap() -> None:
    values, prompt = drawn(60)
    found = rates(values, prompt, times=400, seed=3)
    g = duels.seeds.generator(3, "duels")
    halves, without = [], []
    for picks in torch.randint(10, (400, 10), generator=g).tolist():
        some = torch.cat([values[(prompt == p) & ~values.isnan()] for p in picks])
        won, lost, tied = ((some == kind).sum().item() for kind in (1, -1, 0))
        halves.append((won + tied / 2) / len(some))
        without.append(won / (won + lost))
    for name, values in (("half", halves), ("without", without)):
        expected = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double())
        assert [getattr(found, f"{name}_lo"), getattr(found, f"{name}_hi")] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_swapping_mirrors_everything(seed: int) -> None:
    values, prompt = drawn(40, seed=seed)
    one, other = rates(values, prompt), rates(-values, prompt)
    assert mirrored(one) == pytest.approx(other)
    assert mirrored(mirrored(one)) == pytest.approx(one)
    assert one.half + other.half == pytest.approx(1)


def test_units_may_come_in_any_order() -> None:
    values, prompt = drawn(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert rates(values[order], 7 * prompt[order]) == pytest.approx(rates(values, prompt))


def test_long_tables_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, prompt = drawn(40)
    whole = rates(values, prompt, times=50)
    monkeypatch.setattr(statistics, "CHUNK", 33)
    assert rates(values, prompt, times=50) == pytest.approx(whole)


def test_nothing_is_made_up_where_nothing_was_decided() -> None:
    none = rates(torch.full((4,), NAN), torch.arange(4))
    assert none.missing == 4 and all(math.isnan(value) for value in none[4:])
    ties = rates(torch.zeros(4), torch.arange(4))
    assert (ties.half, ties.half_lo, ties.half_hi, ties.sem) == (0.5, 0.5, 0.5, 0.0)
    assert all(map(math.isnan, (ties.without, ties.without_lo, ties.without_hi)))
    one = rates(torch.tensor([1.0, -1.0]), torch.tensor([0, 0]))
    assert one.half == 0.5 and math.isnan(one.half_lo)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must both be \(N,\)"):
        rates(torch.zeros(3), torch.arange(2))
    with pytest.raises(ValueError, match="at least 2 resamples"):
        rates(torch.zeros(3), torch.arange(3), times=1)


def test_the_average_is_over_the_five_opponents() -> None:
    g = torch.Generator().manual_seed(0)
    half = torch.rand(6, 6, generator=g, dtype=torch.float64).triu(1)
    matrix = half + (1 - half.T).tril(-1)
    matrix = matrix.fill_diagonal_(NAN)
    expected = [sum(matrix[i, j].item() for j in range(6) if j != i) / 5 for i in range(6)]
    assert average(matrix).tolist() == pytest.approx(expected)
    assert average(matrix).mean().item() == pytest.approx(0.5)
    matrix[0, 1] = NAN
    assert average(matrix)[0].item() == pytest.approx(matrix[0, 2:].mean().item())
    with pytest.raises(ValueError, match="methods by methods"):
        average(torch.zeros(2, 3))


def test_the_front_by_brute_force() -> None:
    points = torch.randint(4, (30, 3), generator=torch.Generator().manual_seed(0)).double()
    points = torch.cat([points, points])  # equals do not dominate each other
    rows = points.tolist()

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    expected = [not any(beats(other, row) for other in rows) for row in rows]
    assert pareto(points).tolist() == expected and 0 < sum(expected) < 60
    with pytest.raises(ValueError, match="finite"):
        pareto(torch.tensor([[NAN, 1.0]]))
