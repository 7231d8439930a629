"""When labels are bought: sums, carried over labels, options refused."""

from __future__ import annotations

import pytest

from pyrite.core import specs
from pyrite.feedback import schedules
from pyrite.feedback.schedules import Schedule


def plan(spec: str, *, rounds: int, budget: int | None, pairs: int = 64) -> list[int]:
    schedule: Schedule = specs.part(spec, schedules).function  # type: ignore[assignment]
    used, bought = 0, []
    for number in range(rounds):
        bought.append(schedule.allotment(number, rounds=rounds, budget=budget, used=used, pairs=pairs))
        used += bought[-1]
    return bought


@pytest.mark.parametrize("member", [m.name for m in specs.members(schedules)])
@pytest.mark.parametrize("budget", [0, 7, 100, None])
def test_no_schedule_exceeds_budget_or_pairs(member: str, budget: int | None) -> None:
    bought = plan(f"{member}()", rounds=9, budget=budget, pairs=6)
    assert all(0 <= n <= 6 for n in bought)
    assert budget is None or sum(bought) <= budget


def test_even_spends_all_of_it_in_equal_parts() -> None:
    assert plan("even()", rounds=4, budget=10) == [2, 3, 2, 3]
    assert plan("even()", rounds=3, budget=300) == [64, 64, 64]  # there are no more pairs
    assert plan("even()", rounds=3, budget=None) == [64, 64, 64]
    assert sum(plan("even()", rounds=7, budget=100)) == 100


def test_what_could_not_be_bought_is_bought_later() -> None:
    schedule: Schedule = schedules.even()
    assert schedule.allotment(1, rounds=2, budget=10, used=1, pairs=64) == 9


def test_never_buys_nothing() -> None:
    assert plan("never()", rounds=3, budget=100) == [0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("even(window=0)", "window=0: give at least 1"),
        ("even(replay=-1)", "replay=-1: give at least 0"),
        ("even(selector='confident()')", "did you mean confidence"),
        ("even(widow=2)", "did you mean window"),
    ],
)
def test_refusals(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        specs.part(spec, schedules)
