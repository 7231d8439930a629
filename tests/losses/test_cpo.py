import torch

from pyrite.math.losses import cpo, posterior

from .fixtures import pair_of, random_rows


def test_the_likelihood_is_a_mean_over_tokens():
    sides = random_rows(3, seed=0)
    pair = pair_of(sides)
    mean = torch.stack([row.mean() for row in sides[0]])
    torch.testing.assert_close(cpo(pair, alpha=0.7), posterior(pair) - 0.7 * mean)
