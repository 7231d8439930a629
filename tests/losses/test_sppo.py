import pytest

from pyrite.math.losses import sppo

from .fixtures import pair_with


def test_least_where_rewards_are_half_and_minus_half():
    assert sppo(pair_with(ratios=([5.0, 6.0], [-5.0, -5.0])), beta=0.1).tolist() == pytest.approx([0.0, 1.0])


def test_soft_targets():
    pair = pair_with(ratios=([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]), strength=[0.0, 100.0, -100.0])
    tie, sure, wrong = sppo(pair, beta=0.1, soft=True).tolist()
    assert tie == pytest.approx(1 + 4)
    assert sure == pytest.approx(sppo(pair)[0].item()) and wrong == pytest.approx((1 + 5) ** 2 + (2 - 5) ** 2)


def test_missing_strengths_are_explained_where_they_are_read():
    pair = pair_with(ratios=([1.0], [0.0]))
    assert sppo(pair).shape == (1,)
    with pytest.raises(ValueError, match="how strongly chosen is preferred"):
        sppo(pair, soft=True)
