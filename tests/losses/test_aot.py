import pytest
import torch

from pyrite.math.losses import aot, dpo

from .fixtures import pair_of, pair_with, random_rows


@pytest.mark.parametrize("paired", [True, False])
def test_a_batch_of_one_is_dpo(paired):
    pair = pair_of(random_rows(1, seed=6))
    torch.testing.assert_close(aot(pair, paired=paired), dpo(pair))
    torch.testing.assert_close(aot(pair, paired=paired, label_smoothing=0.2), dpo(pair, label_smoothing=0.2))


def test_values_stand_where_the_ranks_put_them():
    """u = (3, 1, 2) against v = (0, 5, 1): ranks meet as 3-5, 1-0, 2-1."""
    pair = pair_with(ratios=([3.0, 1.0, 2.0], [0.0, 5.0, 1.0]))
    delta = torch.tensor([-2.0, 1.0, 1.0]).double()
    torch.testing.assert_close(aot(pair, paired=False), dpo(pair_with(ratios=(delta.tolist(), [0.0] * 3))))


def test_only_the_distributions_matter():
    first, second = [3.0, 1.0, 2.0], [0.0, 5.0, 1.0]
    value = aot(pair_with(ratios=(first, second)), paired=False)
    torch.testing.assert_close(aot(pair_with(ratios=(first, second[::-1])), paired=False), value)
