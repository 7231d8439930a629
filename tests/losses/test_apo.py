import pytest
import torch

from pyrite.math.losses import apo_down, apo_zero

from .fixtures import pair_with, slopes


def test_down_lowers_a_chosen_response_that_is_likely_already():
    """Both are pushed down, the rejected one further."""
    pair = pair_with(ratios=([1.0], [-3.0]))
    apo_down(pair, beta=1.0).sum().backward()
    (chosen,), (rejected,) = slopes(pair)
    assert chosen > 0 and rejected > 0


def test_the_pulls_on_chosen_cancel_at_the_start():
    pair = pair_with(ratios=([0.0], [0.0]))
    apo_down(pair, beta=1.0).sum().backward()
    assert slopes(pair) == ([0.0], [0.25])


@pytest.mark.parametrize(
    "loss, best, worst",
    [(apo_zero, ([40.0], [-40.0]), ([-40.0], [40.0])), (apo_down, ([-40.0], [-80.0]), ([40.0], [80.0]))],
)
def test_between_0_and_2(loss, best, worst):
    values = torch.cat([loss(pair_with(ratios=sides), beta=1.0) for sides in (best, worst)])
    torch.testing.assert_close(values, torch.tensor([0.0, 2.0]).double(), atol=1e-12, rtol=0)
