import pytest

from pyrite.math.losses import rebel

from .fixtures import pair_with


def test_zero_where_margins_are_reward_differences():
    pair = pair_with(ratios=([1.0, -2.0], [0.0, 1.0]), strength=[2.0, -6.0])
    assert rebel(pair, eta=0.5).tolist() == pytest.approx([0.0, 0.0])
    assert rebel(pair, eta=1.0).tolist() == pytest.approx([1.0, 9.0])


def test_missing_strengths_are_explained():
    with pytest.raises(ValueError, match="how strongly chosen is preferred"):
        rebel(pair_with(ratios=([0.0], [0.0])))
