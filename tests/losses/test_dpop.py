import torch

from pyrite.math.losses import dpo, dpop

from .fixtures import pair_with


def test_dpo_where_chosen_has_not_become_less_likely():
    pair = pair_with(ratios=([0.0, 2.0, -1.0], [-1.0, 1.0, -2.0]))
    same = pair_with(ratios=([0.0, 2.0, -6.0], [-1.0, 1.0, -2.0]))  # -1 costs 5 nats more
    torch.testing.assert_close(dpop(pair, lam=5.0), dpo(same))
