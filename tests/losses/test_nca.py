import math

import pytest

from pyrite.math.losses import nca

from .fixtures import pair_with, slopes


@pytest.mark.parametrize("more, sign", [(-0.1, -1), (0.0, 0), (0.1, 1)])
def test_chosen_is_pulled_back_past_two_thirds(more, sign):
    pair = pair_with(ratios=([math.log(2) + more], [0.0]))
    nca(pair, beta=1.0).sum().backward()
    (chosen,), (rejected,) = slopes(pair)
    assert (chosen > 1e-12) - (chosen < -1e-12) == sign and rejected == pytest.approx(0.25)
