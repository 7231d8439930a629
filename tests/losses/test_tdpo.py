from dataclasses import replace

import pytest
import torch

from pyrite.math.losses import dpo, tdpo

from .fixtures import F64, pair_with


@pytest.mark.parametrize("version, through_chosen", [(1, True), (2, False)])
def test_the_gradient_goes_through_both_divergences_or_one(version, through_chosen):
    chosen, rejected = (torch.tensor([x], dtype=F64, requires_grad=True) for x in (0.3, 0.6))
    pair = pair_with(ratios=([0.0], [0.0]))
    pair = replace(pair, chosen=replace(pair.chosen, kl=chosen), rejected=replace(pair.rejected, kl=rejected))
    tdpo(pair, version=version).sum().backward()
    assert rejected.grad is not None and rejected.grad.item() > 0
    assert (chosen.grad is not None) == through_chosen


def test_divergences_shift_the_margin():
    kl = torch.tensor([3.0], dtype=F64)
    pair = pair_with(ratios=([1.0], [0.0]))
    pair = replace(pair, chosen=replace(pair.chosen, kl=kl), rejected=replace(pair.rejected, kl=2 * kl))
    torch.testing.assert_close(tdpo(pair, version=1), dpo(pair_with(ratios=([1.0], [3.0]))))
    torch.testing.assert_close(tdpo(pair, alpha=0.2), dpo(pair_with(ratios=([1.0], [0.6]))))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_missing_divergence_is_explained(side):
    pair = pair_with(ratios=([0.0], [0.0]))
    other = "rejected" if side == "chosen" else "chosen"
    half = replace(pair, **{other: replace(getattr(pair, other), kl=torch.zeros(1, dtype=F64))})
    with pytest.raises(ValueError, match="tdpo reads the reference's whole distribution"):
        tdpo(half)
