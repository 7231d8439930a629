import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrite.math.reward_losses
from pyrite.core.specs import members
from pyrite.math.reward_losses import bradley_terry
from pyrite.math.statistics import wins

LOSSES = [getattr(pyrite.math.reward_losses, member.name) for member in members(pyrite.math.reward_losses)]

scores = st.lists(st.floats(-20, 20), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_examples():
    result = doctest.testmod(pyrite.math.reward_losses, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    "chosen, rejected, options, value",
    [
        (1.0, 0.0, {}, 0.313262),
        (0.5, 0.5, {}, 0.693147),
        (1.0, 0.0, {"center": 0.001}, 0.313762),
        (0.0, 0.0, {"center": 0.001}, 0.693147),
        (2.0, 0.0, {}, 0.126928),
        (2.0, 1.0, {"center": 0.001}, 0.315762),
        (2.0, 1.0, {"margin": 1.0}, 0.693147),
        (1.0, 0.0, {"label_smoothing": 0.1}, 0.9 * 0.313262 + 0.1 * 1.313262),
        (1.2, 0.7, {}, 0.474077),
        (1.2, 0.7, {"margin": 0.3}, 0.598139),
    ],
)
def test_worked_values(chosen, rejected, options, value):
    assert bradley_terry(one(chosen), one(rejected), **options).item() == pytest.approx(value, abs=1e-6)


def test_equal_scores_are_a_tie_and_not_correct():
    scores = torch.tensor([1.0, 0.5, -0.5])
    assert wins(scores, torch.tensor([0.0, 0.5, 0.0])).tolist() == [1.0, 0.5, 0.0]


def test_mean_over_the_pairs_of_a_ranking():
    replies = [2.0, 1.0, 0.0]
    pairs = [(a, b) for i, a in enumerate(replies) for b in replies[i + 1 :]]
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    assert bradley_terry(chosen, rejected, center=0.001).mean().item() == pytest.approx(0.252817, abs=1e-6)


def test_a_margin_for_each_pair():
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    loss = bradley_terry(chosen, rejected, margin=torch.tensor([0.0, 1.0]))
    assert loss.tolist() == pytest.approx([0.313262, math.log(2)], abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@given(chosen=scores, rejected=scores, shift=st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_properties(loss, chosen, rejected, shift):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    values = loss(chosen, rejected)
    values.sum().backward()
    assert values.shape == (3,)
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad <= 0).all() and (rejected.grad >= 0).all()
    torch.testing.assert_close(loss(chosen + shift, rejected + shift), values)
    torch.testing.assert_close(loss(chosen, chosen), torch.full_like(chosen, math.log(2)))


def test_only_the_center_fixes_the_offset():
    offset = torch.tensor([5.0], requires_grad=True)
    bradley_terry(1 + offset, offset).backward()
    assert offset.grad is not None and offset.grad.item() == pytest.approx(0.0, abs=1e-7)
    bradley_terry(1 + offset, offset, center=0.001).backward()
    assert offset.grad.item() == pytest.approx(0.001 * (6 + 5))


def test_far_scores_stay_finite():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(chosen, torch.zeros(2), label_smoothing=0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and chosen.grad is not None and torch.isfinite(chosen.grad).all()
