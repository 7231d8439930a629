"""When the proxy has parted from gold: worked cases, noise, and how often it cries wolf."""

from __future__ import annotations

import doctest
import math
import random
from typing import Any

import pytest

import pyrite.training.rounds
from pyrite.training.evaluation import Evaluation
from pyrite.training.rounds import best, check_stopping, fitted, parted


def rows(gold: list[float], proxy: list[float], se: float = 0.1) -> list[dict[str, Any]]:
    every = zip(gold, proxy, strict=True)
    return [{"step": i, "gold": g, "proxy": p, "gold_se": se, "kl_k1": float(i)} for i, (g, p) in enumerate(every)]


def test_example() -> None:
    assert doctest.testmod(pyrite.training.rounds).failed == 0


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


def test_gold_may_be_asked_seldom() -> None:
    """Between its measurements are others with proxy and KL alone; patience counts those that gold was asked in."""
    some = rows([0, 1, 2, 1, 1], [0, 1, 2, 3, 4])
    bare = [{name: value for name, value in row.items() if "gold" not in name} for row in some]
    mixed = [row for pair in zip(some, bare, strict=True) for row in pair]
    assert parted(mixed) == some[2] and best(mixed) == some[2]
    assert parted([*mixed[:7], *bare]) is None


def test_patience() -> None:
    some = rows([0, 2, 1, 1, 1], [0, 1, 2, 3, 4])
    assert [parted(some, patience=n) is not None for n in (1, 2, 3, 4)] == [True, True, True, False]


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


def curve(d: float, a: float, b: float) -> float:
    return d * (a - b * math.log(d))


def test_fits_recover_a_noiseless_run() -> None:
    """The worked numbers of a = .35, b = .15; the exact KL is read in place of k1; gold may be asked seldom."""
    every: list[dict[str, Any]] = [{"step": 0, "gold": 2.0, "proxy": -1.0, "kl_k1": -1e-7}]
    for i, d in enumerate((0.5, 1.0, 1.5, 2.0, 2.5)):
        every.append({"step": i, "loss": 1.0})
        every.append({"gold": 2.0 + curve(d, 0.35, 0.15), "proxy": -1.0 + curve(d, 0.9, 0.01), "kl_k1": d * d})
    found = fitted(every)
    assert found == pytest.approx(
        {
            **{"gold_fit_a": 0.35, "gold_fit_b": 0.15, "proxy_fit_a": 0.9, "proxy_fit_b": 0.01},
            **{"gold_peak_kl": 14.391916, "gold_peak": 2.569050},
        },
        abs=1e-6,
    )
    seldom = [dict(row) for row in every]
    for row in seldom[4:8]:
        row.pop("gold", None)
    assert fitted(seldom) == pytest.approx(found, abs=1e-6)
    noisy = [row | {"kl_exact": row["kl_k1"], "kl_k1": row["kl_k1"] + 1.0} for row in every if "kl_k1" in row]
    assert fitted(noisy) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "names"),
    [
        ([0.0, 1.0, 4.0], set()),  # two measurements beside the start
        ([0.0, 1.0, 4.0, 4.0], set()),
        ([0.0, -0.1, 1.0, 4.0], set()),  # below 0 there is no square root
        ([0.0, -0.1, 1.0, 4.0, 9.0], {"gold_fit_a", "gold_fit_b", "gold_peak_kl", "gold_peak"}),
    ],
)
def test_fits_need_three_measurements(kl: list[float], names: set[str]) -> None:
    assert fitted([{"gold": 1.0 + max(k, 0) * (1 - 0.1 * k), "kl_k1": k} for k in kl]).keys() == names


def test_a_peak_that_is_not_there_is_not_told() -> None:
    """Gold that only rises, and gold that would turn far beyond what was measured."""
    for a, b in ((0.5, -0.1), (1.0, 0.1)):
        rising = [{"gold": curve(d, a, b) if d else 0.0, "kl_k1": d * d} for d in (0.0, 0.5, 1.0, 1.5)]
        assert fitted(rising).keys() == {"gold_fit_a", "gold_fit_b"}
        assert fitted(rising)["gold_fit_b"] == pytest.approx(b)
    assert fitted([]) == {} == fitted([{"kl_k1": 1.0}] * 5)


def test_a_stop_that_nothing_could_cause_is_refused() -> None:
    for gold, proxy in ((None, "runs/reward"), ("length()", None)):
        with pytest.raises(ValueError, match="--early-stopping-patience compares gold with a proxy"):
            check_stopping(2, Evaluation(gold=gold, proxy=proxy))
        check_stopping(None, Evaluation(gold=gold, proxy=proxy))
    check_stopping(2, Evaluation(gold="length()", proxy="runs/reward"))
