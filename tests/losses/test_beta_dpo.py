from dataclasses import replace

import pytest
import torch

from pyrite.math.logps import PairLogps, Running
from pyrite.math.losses import beta_dpo, dpo

from .fixtures import F64, pair_with, slopes


def pair_at(mean: float, margins: list[float]) -> PairLogps:
    """Pairs of these margins, when their running mean is `mean`."""
    running = Running(*torch.tensor([0.0, mean, 1.0], dtype=F64))
    return replace(pair_with(ratios=(margins, [0.0] * len(margins))), running=running)


def test_beta_follows_the_batch():
    pair = pair_at(1.0, [1.0, 4.0])  # 1.5 above the running mean
    torch.testing.assert_close(beta_dpo(pair, beta=0.1, alpha=0.6), dpo(pair, beta=0.1 * 1.9))
    pair = pair_at(4.0, [1.0, 4.0])
    torch.testing.assert_close(beta_dpo(pair, beta=0.1, alpha=0.6), dpo(pair, beta=0.1 * 0.1))


def test_beta_stays_positive():
    pair = pair_at(50.0, [1.0, 4.0])
    torch.testing.assert_close(beta_dpo(pair), dpo(pair, beta=1e-3))


def test_no_gradient_through_beta():
    pair, fixed = pair_at(1.0, [1.0, 4.0]), pair_at(1.0, [1.0, 4.0])
    beta_dpo(pair).sum().backward()
    dpo(fixed, beta=0.19).sum().backward()
    assert slopes(pair) == (pytest.approx(slopes(fixed)[0]), pytest.approx(slopes(fixed)[1]))


def test_the_farthest_pairs_are_left_out():
    pair = pair_at(1.0, [1.0, 9.0, 2.0, -8.0])
    kept = beta_dpo(pair_at(1.0, [1.0, 2.0]))
    values = beta_dpo(pair, rho=0.5)
    torch.testing.assert_close(values[[0, 2]], 2 * kept)
    assert values[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(values.mean(), kept.mean())
    assert (beta_dpo(pair, rho=0.99) != 0).sum() == 1  # one pair always stays


def test_statistics_that_nobody_keeps_are_missed():
    with pytest.raises(ValueError, match="statistics over the batches"):
        beta_dpo(pair_with(ratios=([1.0], [0.0])))
