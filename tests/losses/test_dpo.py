import math

import pytest
import torch
import torch.nn.functional as F

from pyrite.math.logps import Logps, PairLogps
from pyrite.math.losses import dpo, posterior, robust, soft_dpo

from .fixtures import F64, pair_of, pair_with, random_rows, slopes


def test_far_margins_stay_finite():
    pair = pair_with(ratios=([-1e4, 200.0], [0.0, 0.0]))
    loss = dpo(pair, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e4, 0.0], abs=1e-12)
    assert slopes(pair)[0] == pytest.approx([-1.0, 0.0])


@pytest.mark.parametrize("beta, value", [(1.0, 1.387335), (10.0, 1.100002), (100.0, 1.100000)])
def test_a_large_beta_is_a_hinge(beta, value):
    assert dpo(pair_with(ratios=([-1.1], [0.0])), beta=beta).item() / beta == pytest.approx(value, abs=1e-6)


def test_smoothing_turns_where_the_label_is_believed_enough():
    turn = math.log(0.9 / 0.1)
    pair = pair_with(ratios=([1.0, turn, 3.0], [0.0, 0.0, 0.0]))
    dpo(pair, beta=1.0, label_smoothing=0.1).sum().backward()
    assert slopes(pair)[0] == pytest.approx([-0.168941, 0.0, 0.052574], abs=1e-6)


def one(nats: float) -> Logps:
    return Logps.from_sums(torch.tensor([nats], dtype=F64), torch.ones(1))


def test_only_the_reference_margin_enters():
    loss = dpo(PairLogps(one(-3.3), one(-5.4), one(-3.0), one(-3.8)))
    torch.testing.assert_close(loss, dpo(PairLogps(one(-3.3), one(-5.4), one(0.8), one(0.0))))
    torch.testing.assert_close(loss, F.softplus(torch.tensor([-0.13], dtype=F64)))


def test_posterior_is_dpo_with_a_reference_that_likes_all_alike():
    loss = posterior(PairLogps(one(-3.3), one(-5.4)), beta=0.3)
    torch.testing.assert_close(loss, dpo(PairLogps(one(-3.3), one(-5.4), one(-7.0), one(-7.0)), beta=0.3))


def turned(pair: PairLogps) -> PairLogps:
    """The same pairs with the labels flipped."""
    strength = None if pair.strength is None else -pair.strength
    return PairLogps(pair.rejected, pair.chosen, pair.ref_rejected, pair.ref_chosen, strength)


def test_robust_is_dpo_on_the_clean_labels_on_average():
    pair = pair_of(random_rows(5, seed=0))
    seen = 0.8 * robust(pair, label_smoothing=0.2) + 0.2 * robust(turned(pair), label_smoothing=0.2)
    torch.testing.assert_close(seen, dpo(pair))


@pytest.mark.parametrize("share", [-0.1, 0.5, 0.9])
def test_robust_refuses_labels_that_say_nothing(share):
    with pytest.raises(ValueError, match=r"at least 0 and below 0\.5"):
        robust(pair_of(random_rows(1, seed=0)), label_smoothing=share)


def test_soft_labels_do_not_care_which_response_is_called_chosen():
    pair = pair_of(random_rows(5, seed=0))
    torch.testing.assert_close(soft_dpo(turned(pair)), soft_dpo(pair))


def test_soft_labels_are_met_where_the_margin_is_the_strength():
    pair = pair_with(ratios=([4.0, 2.0], [0.0, 0.0]), strength=[0.4, 0.4])
    value = soft_dpo(pair, beta=0.1)
    value.sum().backward()
    p = torch.tensor(0.4, dtype=F64).sigmoid()
    assert value[0].item() == pytest.approx((-p * p.log() - (1 - p) * (1 - p).log()).item())
    assert slopes(pair)[0][0] == pytest.approx(0.0, abs=1e-12) and slopes(pair)[0][1] < -1e-3


def test_a_strength_without_end_is_a_label():
    pair = pair_with(ratios=([1.0], [3.0]), strength=[float("inf")])
    torch.testing.assert_close(soft_dpo(pair), dpo(pair))


def test_missing_strengths_are_explained():
    with pytest.raises(ValueError, match="how strongly chosen is preferred"):
        soft_dpo(pair_with(ratios=([0.0], [0.0])))
