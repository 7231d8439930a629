import math

import pytest
import torch
import torch.nn.functional as F

from pyrite.logps import Logps, PairLogps
from pyrite.losses import dpo

from .fixtures import F64, POLICY_CHOSEN, POLICY_REJECTED, tokens, worked_pair


@pytest.mark.parametrize(
    "options, value, gradient",
    [
        ({}, 0.630258, -0.046755),
        ({"beta": 0.01}, 0.686668, -0.004968),
        ({"beta": 1.0}, 0.241008, -0.214165),
        ({"label_smoothing": 0.1}, 0.643258, -0.036755),
    ],
)
def test_worked_values_and_gradients(options, value, gradient):
    chosen, rejected = tokens(POLICY_CHOSEN), tokens(POLICY_REJECTED)
    for row in chosen + rejected:
        row.requires_grad_()
    loss = dpo(worked_pair(chosen, rejected), **options)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(chosen[0].grad, torch.full((4,), gradient, dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rejected[0].grad, torch.full((6,), -gradient, dtype=F64), atol=1e-6, rtol=0)


def pair_with_margins(margins: list[float]) -> PairLogps:
    zero = Logps.from_sums(torch.zeros(len(margins), dtype=F64), torch.ones(len(margins)))
    return PairLogps(Logps.from_sums(torch.tensor(margins, dtype=F64).requires_grad_(), zero.length), zero, zero, zero)


def test_far_margins_stay_finite():
    pair = pair_with_margins([-1e4, 200.0])
    loss = dpo(pair, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e4, 0.0], abs=1e-12)
    assert pair.chosen.sum.grad is not None and pair.chosen.sum.grad.tolist() == pytest.approx([-1.0, 0.0])


def test_smoothing_turns_where_the_label_is_believed_enough():
    turn = math.log(0.9 / 0.1)
    pair = pair_with_margins([1.0, turn, 3.0])
    dpo(pair, beta=1.0, label_smoothing=0.1).sum().backward()
    assert pair.chosen.sum.grad is not None
    assert pair.chosen.sum.grad.tolist() == pytest.approx([-0.168941, 0.0, 0.052574], abs=1e-6)


def test_only_the_reference_margin_enters():
    def one(nats: float) -> Logps:
        return Logps.from_sums(torch.tensor([nats], dtype=F64), torch.ones(1))

    loss = dpo(PairLogps(one(-3.3), one(-5.4), one(-3.0), one(-3.8)))
    torch.testing.assert_close(loss, dpo(PairLogps(one(-3.3), one(-5.4), one(0.8), one(0.0))))
    torch.testing.assert_close(loss, F.softplus(torch.tensor([-0.13], dtype=F64)))
