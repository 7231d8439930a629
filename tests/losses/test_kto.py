import pytest
import torch

from pyrite.math.losses import apo_zero, kto_pair

from .fixtures import F64, pair_of, pair_with, random_rows


def test_worked_batch():
    """Six responses; z0 from mismatched prompts and responses, (-30, -31, -29) against (-30.4, -31.1, -29.5)."""
    mismatched = torch.tensor([-30.0, -31, -29], dtype=F64) - torch.tensor([-30.4, -31.1, -29.5], dtype=F64)
    z0 = mismatched.mean().relu().item()
    assert z0 == pytest.approx(0.333333, abs=1e-6)
    pair = pair_with(ratios=([-0.3, 1.0, 0.5], [-1.6, -0.5, 1.0]))
    assert kto_pair(pair, z0=z0).mean().item() / 2 == pytest.approx(0.490443, abs=1e-6)


def test_counting_from_zero_is_anchored_optimization():
    pair = pair_of(random_rows(4, seed=0))
    torch.testing.assert_close(kto_pair(pair), apo_zero(pair))


def test_weights_of_the_two_sides():
    pair = pair_of(random_rows(4, seed=0))
    chosen, rejected = kto_pair(pair, undesirable=0.0), kto_pair(pair, desirable=0.0)
    torch.testing.assert_close(kto_pair(pair, desirable=2.0, undesirable=3.0), 2 * chosen + 3 * rejected)
