import torch

from pyrite.math.losses import dpo, xpo

from .fixtures import pair_of, random_rows


def test_the_bonus_lowers_the_response_of_the_reference():
    pair = pair_of(random_rows(3, seed=0))
    for name, nats in (("rejected", pair.rejected.sum), ("chosen", pair.chosen.sum)):
        torch.testing.assert_close(xpo(pair, alpha=0.1, from_ref=name) - dpo(pair), 0.1 * nats)
    both = 0.5 * (xpo(pair, from_ref="rejected") + xpo(pair, from_ref="chosen"))
    torch.testing.assert_close(xpo(pair, from_ref="both"), both)
