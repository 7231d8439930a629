import math

import pytest
import torch

from pyrite.math.logps import Logps, PairLogps
from pyrite.math.losses import orpo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen, rejected", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -1e4), (-1e4, -1e-9)])
def test_certain_and_impossible_responses_stay_finite(chosen, rejected, dtype):
    sums = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
    value = orpo(PairLogps(*(Logps.from_sums(x, torch.ones(1)) for x in sums)))
    value.sum().backward()
    for x in (value, *(x.grad for x in sums)):
        assert x is not None and torch.isfinite(x).all()


def test_odds():
    """Probabilities a token of ½ and ¼ have odds 1 and ⅓."""
    sides = [Logps.from_sums(2 * torch.tensor([p]).double().log(), torch.tensor([2])) for p in (0.5, 0.25)]
    want = math.log(2) - 0.7 * math.log(3 / 4)
    assert orpo(PairLogps(*sides), lam=0.7).item() == pytest.approx(want)
