import pytest

from pyrite.math.losses import ipo

from .fixtures import pair_with, slopes


def test_the_margin_is_to_reach_not_to_exceed():
    pair = pair_with(ratios=([4.0, 5.0, 6.0], [0.0, 0.0, 0.0]))
    value = ipo(pair, tau=0.1)
    value.sum().backward()
    assert value.tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert slopes(pair)[0] == pytest.approx([-2.0, 0.0, 2.0])


def test_length_norm_asks_for_nats_a_token():
    pair = pair_with(ratios=([8.0], [-6.0]), lengths=([4], [2]))
    assert ipo(pair, tau=0.1, length_norm=True).item() == pytest.approx(0.0)
