import pytest
import torch

from pyrite.losses import ipo

from .fixtures import F64, POLICY_CHOSEN, POLICY_REJECTED, tokens, worked_pair


@pytest.mark.parametrize(
    "length_norm, value, chosen_gradient, rejected_gradient",
    [(False, 13.69, -7.4, 7.4), (True, 23.120069, -2.404167, 1.602778)],
)
def test_worked_values_and_gradients(length_norm, value, chosen_gradient, rejected_gradient):
    chosen, rejected = tokens(POLICY_CHOSEN), tokens(POLICY_REJECTED)
    for row in chosen + rejected:
        row.requires_grad_()
    loss = ipo(worked_pair(chosen, rejected), tau=0.1, length_norm=length_norm)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(chosen[0].grad, torch.full((4,), chosen_gradient, dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rejected[0].grad, torch.full((6,), rejected_gradient, dtype=F64), atol=1e-6, rtol=0)


def test_zero_where_the_margin_is_reached():
    assert ipo(worked_pair(), tau=1 / 2.6).item() == pytest.approx(0.0, abs=1e-12)
