import doctest
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pyrite.math.statistics
from pyrite.math.statistics import fit_best_of_n, fit_rl

F64 = torch.float64


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_examples():
    result = doctest.testmod(pyrite.math.statistics, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_fit_best_of_n_worked():
    d = torch.linspace(0, 4, 30, dtype=F64)
    fit = fit_best_of_n(d, d * (0.6 - 0.1 * d))
    assert (fit.a, fit.b) == pytest.approx((0.6, 0.1), abs=1e-9)
    assert (fit.peak, fit.peak**2, fit.peak_gold) == pytest.approx((3, 9, 0.9), abs=1e-8)


def test_fit_rl_worked():
    d = torch.linspace(0, 5, 30, dtype=F64)
    fit = fit_rl(d, d * 0.35 - 0.15 * torch.xlogy(d, d))
    assert (fit.a, fit.b) == pytest.approx((0.35, 0.15), abs=1e-9)
    assert (fit.peak, fit.peak**2, fit.peak_gold) == pytest.approx((3.793668, 14.391916, 0.569050), abs=1e-6)


@given(st.floats(-2, 2), st.floats(0.01, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_point_of_a_fit_lies_above_its_peak(a, b, rl):
    assume(abs(a / b) < 8)
    d = torch.linspace(0.1, 6, 25, dtype=F64)
    bend = d.log() if rl else d
    fit = (fit_rl if rl else fit_best_of_n)(d, d * (a - b * bend))
    assert (fit.a, fit.b) == pytest.approx((a, b), abs=1e-8)
    at = torch.linspace(0, 1, 2001, dtype=F64) * (2 * fit.peak + 1)
    curve = fit.a * at - fit.b * (torch.xlogy(at, at) if rl else at * at)
    assert curve.max().item() == pytest.approx(fit.peak_gold, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("fit", [fit_best_of_n, fit_rl])
def test_a_curve_that_never_turns_has_no_peak(fit):
    d = tensor(1.0, 2.0, 3.0)
    assert fit(d, d * d).peak == math.inf


@pytest.mark.parametrize("fit", [fit_best_of_n, fit_rl])
def test_fits_refuse(fit):
    with pytest.raises(ValueError, match="two different positive"):
        fit(tensor(0.0, 1.0, 1.0), tensor(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="none negative"):
        fit(tensor(-1.0, 1.0, 2.0), tensor(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="finite"):
        fit(tensor(1.0, 2.0), tensor(0.0, math.nan))
    with pytest.raises(ValueError, match="\\(M,\\) each"):
        fit(tensor(1.0, 2.0), torch.zeros(3))
