import pytest

from pyrite.math.losses import hinge, slic

from .fixtures import pair_with, slopes


def test_hinge_rests_once_the_margin_is_reached():
    pair = pair_with(ratios=([0.5, 1.5, -2.0], [0.0, 0.0, 0.0]))
    values = hinge(pair, beta=1.0)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.5, 0.0, 3.0])
    assert slopes(pair) == ([-1.0, 0.0, -1.0], [1.0, 0.0, 1.0])


def test_slic_goes_on_imitating():
    pair = pair_with(ratios=([0.5, 1.5], [0.0, 0.0]))  # log-probabilities -19.5, -18.5 and -20, -20
    values = slic(pair, delta=1.0, lam=0.1)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.5 + 1.95, 1.85])
    chosen, rejected = slopes(pair)
    assert chosen == pytest.approx([-1.1, -0.1]) and rejected == pytest.approx([1.0, 0.0])
