from dataclasses import replace

import pytest
import torch

from pyrite.math.logps import Running
from pyrite.math.logps import update_running as update
from pyrite.math.losses import bco

from .fixtures import pair_of, pair_with, random_rows, slopes


def test_the_running_mean_is_the_shift():
    pair = pair_of(random_rows(4, seed=0))
    pair = replace(pair, running=update(Running.zero(), pair))
    assert pair.running is not None
    shift = 0.3 * pair.running.ratio.item()
    assert abs(shift) > 0.01
    torch.testing.assert_close(bco(pair, beta=0.3, delta=None), bco(pair, beta=0.3, delta=shift))


def test_statistics_that_nobody_keeps_are_missed_only_where_they_are_read():
    pair = replace(pair_of(random_rows(2, seed=0)), running=None)
    assert bco(pair).shape == (2,)
    with pytest.raises(ValueError, match="statistics over the batches"):
        bco(pair, delta=None)


def test_each_response_is_classified_against_the_shift():
    pair = pair_with(ratios=([2.0], [2.0]))
    bco(pair, beta=1.0, delta=2.0).sum().backward()
    assert slopes(pair) == ([-0.5], [0.5])
