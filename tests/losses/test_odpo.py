import pytest
import torch

from pyrite.math.losses import dpo, odpo

from .fixtures import pair_with


def test_strength_1_is_dpo_and_more_asks_for_more():
    ratios = ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    less, same, more = odpo(pair_with(ratios=ratios, strength=[0.5, 1.0, 2.0]))
    assert less < same < more and same == dpo(pair_with(ratios=ratios))[0]


def test_no_strength_asks_for_nothing():
    assert odpo(pair_with(ratios=([-3.0], [0.0]), strength=[0.0])).item() == 0.0
    assert torch.isnan(odpo(pair_with(ratios=([0.0], [0.0]), strength=[-1.0]))).all()


def test_missing_strengths_are_explained():
    with pytest.raises(ValueError, match="how strongly chosen is preferred"):
        odpo(pair_with(ratios=([0.0], [0.0])))
