import math

import pytest
import torch

from pyrite.math.losses import exo

from .fixtures import pair_with, slopes


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.4])
def test_zero_and_flat_where_the_policy_agrees_with_the_label(epsilon):
    pair = pair_with(ratios=([math.log((1 - epsilon) / epsilon)], [0.0]))
    value = exo(pair, beta=1.0, label_smoothing=epsilon)
    value.sum().backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert slopes(pair)[0] == pytest.approx([0.0], abs=1e-12)


def test_far_margins_stay_finite():
    pair = pair_with(ratios=([-1e4, 1e4], [0.0, 0.0]))
    values = exo(pair, beta=1.0)
    values.sum().backward()
    assert values.tolist() == pytest.approx([-math.log(1e-3), -math.log1p(-1e-3)])
    assert torch.isfinite(torch.tensor(slopes(pair))).all()


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1])
def test_refuses_a_certain_label(epsilon):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        exo(pair_with(ratios=([0.0], [0.0])), label_smoothing=epsilon)
