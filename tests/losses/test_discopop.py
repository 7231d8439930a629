import pytest
import torch

from pyrite.math.losses import discopop, dpo

from .fixtures import pair_with, slopes


def test_reversed_at_zero_as_published():
    pair = pair_with(ratios=([0.0], [0.0]))
    discopop(pair, beta=0.1, tau=0.05).sum().backward()
    (chosen,), (rejected,) = slopes(pair)
    assert chosen == pytest.approx(0.078426, abs=1e-6) and rejected == -chosen


def test_logistic_on_the_wrong_side_exponential_on_the_right():
    pair = pair_with(ratios=([-2.0, 2.0], [0.0, 0.0]))
    wrong, right = discopop(pair, beta=1.0)
    torch.testing.assert_close(wrong, dpo(pair, beta=1.0)[0])
    torch.testing.assert_close(right, torch.tensor(-2.0).double().exp())


def test_far_margins_stay_finite():
    pair = pair_with(ratios=([-1e4, 1e4], [0.0, 0.0]))
    values = discopop(pair, beta=1.0)
    values.sum().backward()
    assert values.tolist() == pytest.approx([1e4, 0.0])
    assert slopes(pair)[0] == pytest.approx([-1.0, 0.0])


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.05])
def test_refuses_a_temperature_that_explodes(tau):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        discopop(pair_with(ratios=([0.0], [0.0])), tau=tau)
