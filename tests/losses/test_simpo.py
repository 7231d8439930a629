import pytest
import torch

from pyrite.math.logps import Logps, PairLogps
from pyrite.math.losses import alphapo, simpo

from .fixtures import pair_of, random_rows


def test_the_margin_is_subtracted():
    sides = random_rows(3, seed=0)
    gap = torch.stack([a.mean() - b.mean() for a, b in zip(*sides[:2], strict=True)])
    torch.testing.assert_close(simpo(pair_of(sides), beta=3.0, gamma=0.4), -(3 * gap - 0.4).sigmoid().log())


@pytest.mark.parametrize("alpha", [-0.5, 0.25, 1.0])
def test_alphapo_bends_the_reward(alpha):
    pair = pair_of(random_rows(3, seed=0))
    chosen, rejected = ((1 - (-alpha * side.mean).exp()) / alpha for side in (pair.chosen, pair.rejected))
    torch.testing.assert_close(alphapo(pair, alpha=alpha), -(2 * (chosen - rejected) - 1).sigmoid().log())


def test_alphapo_runs_into_simpo_without_a_jump():
    pair = pair_of(random_rows(3, seed=0))
    torch.testing.assert_close(alphapo(pair, alpha=1e-8), simpo(pair), rtol=1e-6, atol=1e-6)


def test_impossible_responses_stay_finite_in_float32():
    sums = [torch.tensor([-3.0e3, -1.0], requires_grad=True), torch.tensor([-2.0, -3.0e3], requires_grad=True)]
    values = alphapo(PairLogps(*(Logps.from_sums(x, torch.ones(2)) for x in sums)))
    values.sum().backward()
    assert torch.isfinite(values).all() and values[0] > 1e30 and values[1] == 0
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in sums)
