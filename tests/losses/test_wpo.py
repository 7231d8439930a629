from dataclasses import replace

import pytest
import torch

from pyrite.math.logps import PairLogps
from pyrite.math.losses import dpo, wpo

from .fixtures import F64, pair_with, slopes


def pair_of_collisions(chosen: list[float], rejected: list[float]) -> PairLogps:
    """Responses of -20 nats over 10 tokens, chosen 1 nat more."""
    n = len(chosen)
    pair = pair_with(ratios=([1.0] * n, [0.0] * n), lengths=([10] * n, [10] * n))
    first, second = (
        replace(side, collision=torch.tensor(values, dtype=F64))
        for side, values in ((pair.chosen, chosen), (pair.rejected, rejected))
    )
    return replace(pair, chosen=first, rejected=second)


def test_the_policy_s_own_responses_weigh_1():
    pair = pair_of_collisions([-19.0, -29.0, -19.0], [-20.0, -20.0, -10.0])
    weight = torch.tensor([0.0, 1.0, -1.0], dtype=F64).exp()  # a nat a token more or less likely
    torch.testing.assert_close(wpo(pair), weight * dpo(pair))


def test_no_gradient_through_the_weight():
    pair, plain = pair_of_collisions([-12.0], [-15.0]), pair_of_collisions([-12.0], [-15.0])
    weighted = wpo(pair)
    weighted.sum().backward()
    dpo(plain).sum().backward()
    weight = weighted.item() / dpo(plain).item()
    assert weight == pytest.approx(torch.tensor(-0.7 - 0.5).exp().item())
    assert slopes(pair) == (
        pytest.approx([weight * x for x in slopes(plain)[0]]),
        pytest.approx([-weight * slopes(plain)[0][0]]),
    )


def test_a_missing_collision_is_explained():
    with pytest.raises(ValueError, match="wpo reads the policy's whole distribution"):
        wpo(pair_with(ratios=([0.0], [0.0])))
