"""Running statistics: in place, a cumulative mean and an exponential average; worked numbers are in test_fixtures."""

from dataclasses import replace

import pytest
import torch

from pyrite.math.logps import Running
from pyrite.math.logps import update_running as update

from .fixtures import F64, pair_of, random_rows


def test_statistics_over_batches():
    batches = [pair_of(random_rows(n, seed)) for seed, n in ((0, 3), (1, 5), (2, 4))]
    running = Running.zero()
    tensors = list(vars(running).values())
    means, margin = [], 0.0
    for pair in batches:
        assert pair.ref_chosen is not None and pair.ref_rejected is not None
        assert update(running, pair) is running
        u, v = pair.chosen.sum - pair.ref_chosen.sum, pair.rejected.sum - pair.ref_rejected.sum
        means.append(torch.cat([u, v]).mean())
        margin = 0.9 * margin + 0.1 * (u - v).mean()
    torch.testing.assert_close(running.ratio, torch.stack(means).mean())
    torch.testing.assert_close(running.margin, torch.as_tensor(margin))
    assert running.count.item() == 3
    assert all(a is b for a, b in zip(tensors, vars(running).values(), strict=True))


def test_statistics_are_double_whatever_the_pairs_are():
    sides = [[row.float() for row in rows] for rows in random_rows(3, 0)]
    running = update(Running.zero(), pair_of(sides))
    assert all(value.dtype == F64 and value.shape == () for value in vars(running).values())


def test_no_gradient_flows_through_them():
    sides = random_rows(3, 0)
    for row in sides[0]:
        row.requires_grad_()
    assert not update(Running.zero(), pair_of(sides)).ratio.requires_grad


def test_pairs_without_a_reference_are_refused():
    pair = replace(pair_of(random_rows(1, 0)), ref_chosen=None, ref_rejected=None)
    with pytest.raises(ValueError, match="compares the policy with a reference"):
        update(Running.zero(), pair)
