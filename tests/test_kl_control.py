"""The price of the KL: worked factors, drifts over a run, what is refused."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest

import pyrite.math.policy_gradient
from pyrite.math.policy_gradient import KLControl, controlled


def after(control: KLControl, kl: float, *, answers: int, times: int = 1) -> float:
    for _ in range(times):
        control = controlled(control, kl, answers=answers)
    return control.beta


def test_examples() -> None:
    result = doctest.testmod(pyrite.math.policy_gradient)
    assert result.attempted and not result.failed


def test_fixed_stays() -> None:
    assert after(KLControl(0.1), 1e6, answers=512, times=10) == 0.1
    assert after(KLControl(0.0), 1e6, answers=512) == 0


@pytest.mark.parametrize(
    "kl, factor", [(6, 1.0), (6.6, 1.00032), (7.2, 1.00064), (50, 1.00064), (0, 0.99936), (-9, 0.99936)]
)
def test_adaptive_moves_by_the_clipped_error(kl: float, factor: float) -> None:
    assert after(KLControl(0.1, target=6.0), kl, answers=32) == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_hardly_moves_in_a_run() -> None:
    """Published settings: 375 batches of 32 at most 1.27 times, 156 batches of 64 within .164 .. .244."""
    assert after(KLControl(1.0, target=6.0), 99, answers=32, times=375) == pytest.approx(1.27, abs=5e-3)
    start = KLControl(0.2, target=6.0)
    assert after(start, 99, answers=64, times=156) == pytest.approx(0.244, abs=5e-4)
    assert after(start, 0, answers=64, times=156) == pytest.approx(0.164, abs=5e-4)


def test_adaptive_counts_answers_not_calls() -> None:
    """Two batches of 16 are, to first order, one of 32: the horizon is in answers."""
    start = KLControl(0.1, target=6.0)
    assert after(start, 99, answers=16, times=2) == pytest.approx(after(start, 99, answers=32), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": -0.1},
        {"beta": math.nan},
        {"beta": 0.0, "target": 6.0},  # 0 cannot grow
        {"beta": 0.1, "target": 0.0},
        {"beta": 0.1, "target": 6.0, "horizon": 0.0},
    ],
)
def test_refusals(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="KLControl: ") as caught:
        KLControl(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_none_is_refused(kl: float) -> None:
    with pytest.raises(ValueError, match="the KL is"):
        controlled(KLControl(0.1, target=6.0), kl, answers=1)


@pytest.mark.parametrize(("kl", "want"), [(12.0, 0.200256), (6.0, 0.2), (3.0, 0.199744)])
def test_published_adaptive_steps(kl: float, want: float) -> None:
    """64 samples, coefficient 0.2, target 6, horizon 10,000, as Personalized Soups ran it."""
    start = KLControl(0.2, target=6.0, horizon=10_000.0)
    assert controlled(start, kl, answers=64).beta == pytest.approx(want, abs=1e-9)
