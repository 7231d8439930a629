import torch

from pyrite.math.losses import cal_dpo, dpo

from .fixtures import pair_with


def test_calibrated_rewards_cost_nothing_more():
    pair = pair_with(ratios=([5.0, 6.0], [-5.0, -4.0]))
    extra = cal_dpo(pair, beta=0.1) - dpo(pair, beta=0.1)
    torch.testing.assert_close(extra, torch.tensor([0.0, 0.02]).double())
