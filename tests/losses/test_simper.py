import torch

from pyrite.math.losses import simper

from .fixtures import pair_of, random_rows


def test_inverse_perplexities():
    sides = random_rows(3, seed=0)
    chosen, rejected = (torch.stack([(-row.mean()).exp() for row in rows]) for rows in sides[:2])
    torch.testing.assert_close(simper(pair_of(sides)), 1 / rejected - 1 / chosen)
