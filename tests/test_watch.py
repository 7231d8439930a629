"""When the proxy has parted from gold: worked cases, noise, and how often it cries wolf."""

from __future__ import annotations

import doctest
import random
from typing import Any

import pytest

import pyrite.watch
from pyrite.watch import Stopping, best, parted


def rows(gold: list[float], proxy: list[float], se: float = 0.1) -> list[dict[str, Any]]:
    every = zip(gold, proxy, strict=True)
    return [{"step": i, "gold": g, "proxy": p, "gold_se": se, "kl_k1": float(i)} for i, (g, p) in enumerate(every)]


def test_example() -> None:
    assert doctest.testmod(pyrite.watch).failed == 0


@pytest.mark.parametrize(
    ("gold", "proxy", "step"),
    [
        ([0, 1, 2, 1, 1], [0, 1, 2, 3, 4], 2),
        ([0, 1, 2, 1], [0, 1, 2, 3], None),  # one measurement is not two
        ([0, 1, 2, 1.8, 1.8], [0, 1, 2, 3, 4], None),  # within the errors
        ([0, 1, 2, 1, 1], [0, 1, 2, 1, 1], None),  # the proxy fell too: no overoptimization
        ([0, 1, 2, 1, 3], [0, 1, 2, 3, 4], None),  # gold came back
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], None),
        ([], [], None),
    ],
)
def test_worked(gold: list[float], proxy: list[float], step: int | None) -> None:
    found = parted(rows(gold, proxy))
    assert (found and found["step"]) == step


def test_rows_without_a_measurement_are_passed_over() -> None:
    some = rows([0, 1, 2, 1, 1], [0, 1, 2, 3, 4])
    mixed = [row for one in some for row in (one, {"step": 99, "loss": 0.5})]
    assert parted(mixed) == some[2]
    assert best(mixed) == some[2]
    assert best([{"loss": 1.0}]) is None


def test_patience() -> None:
    some = rows([0, 2, 1, 1, 1], [0, 1, 2, 3, 4])
    assert [parted(some, patience=n) is not None for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert Stopping().parted(some) is None
    assert Stopping(stop_when_parted=True, patience=3).parted(some) == some[1]
    with pytest.raises(ValueError, match="patience is 0"):
        Stopping(patience=0)


def test_it_seldom_cries_wolf_and_does_see_a_fall() -> None:
    """Gold that has reached its plateau, measured with error, against gold that falls by five errors a measurement."""
    stream = random.Random(0)

    def cries(fall: float) -> float:
        found = 0
        for _ in range(400):
            gold = [stream.gauss(1 - fall * i, 0.1) for i in range(10)]
            found += any(parted(rows(gold[:n], [float(i) for i in range(n)])) for n in range(1, 11))
        return found / 400

    assert cries(0.0) < 0.15
    assert cries(0.5) > 0.95
