import torch

from pyrite.math.losses import bco, dpo, dpo_nll, mpo

from .fixtures import pair_of, random_rows


def test_the_likelihood_weighs_every_pair_the_same():
    sides = random_rows(3, seed=0)
    pair = pair_of(sides)
    mean = torch.stack([row.mean() for row in sides[0]])
    torch.testing.assert_close(dpo_nll(pair, alpha=0.7), dpo(pair) - 0.7 * mean)


def test_mixed_is_the_weighted_sum():
    pair = pair_of(random_rows(3, seed=0))
    want = 0.8 * dpo(pair, beta=0.3) + 0.2 * bco(pair, beta=0.3, delta=0.1) - pair.chosen.mean
    torch.testing.assert_close(mpo(pair, beta=0.3, delta=0.1), want)
