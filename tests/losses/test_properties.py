"""What every direct preference loss must satisfy, for all that pyrite.losses exports."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrite import losses
from pyrite.logps import PairLogps
from pyrite.parts import members

from .fixtures import at_reference, pair_of, random_rows

LOSSES = [(member.name, getattr(losses, member.name)) for member in members(losses)]

AT_REFERENCE = {"dpo": math.log(2), "ipo": 25.0}  # with default options; a new loss states its own here
NEEDS_NO_REFERENCE: set[str] = set()
CHANGED_BY_PROMPT_SHIFT: set[str] = set()  # losses that read log-ratios one by one, not their difference
NOT_DECREASING_AT_REFERENCE: set[str] = set()

every_loss = pytest.mark.parametrize("name, loss", LOSSES, ids=[name for name, _ in LOSSES])
seeds = st.integers(0, 10_000)


def test_all_exported_losses_are_found():
    assert sorted(losses.__all__) == [name for name, _ in LOSSES]


@every_loss
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=15, deadline=None)
def test_values_and_gradients_are_finite(name, loss, seed, scale):
    sides = random_rows(5, seed, scale)
    for row in sides[0] + sides[1]:
        row.requires_grad_()
    values = loss(pair_of(sides))
    values.sum().backward()
    assert values.shape == (5,) and torch.isfinite(values).all()
    assert all(row.grad is not None and torch.isfinite(row.grad).all() for row in sides[0] + sides[1])


@every_loss
def test_value_at_policy_equal_to_reference(name, loss):
    assert name in AT_REFERENCE, f"state what {name} is at policy = reference"
    pair = at_reference(pair_of(random_rows(6, seed=1)))
    torch.testing.assert_close(loss(pair), torch.full((6,), AT_REFERENCE[name], dtype=torch.float64))


@every_loss
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_neither_padding_nor_batch_order_matters(name, loss, seed):
    sides = random_rows(4, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    together = loss(pair_of(sides))
    alone = torch.cat([loss(pair_of([[rows[i]] for rows in sides])) for i in range(4)])
    moved = loss(pair_of([[rows[int(i)] for i in order] for rows in sides]))
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved, together[order], rtol=1e-12, atol=1e-12)


@every_loss
@given(seed=seeds, shift=st.floats(-50, 50))
@settings(max_examples=15, deadline=None)
def test_a_shift_of_the_reference_per_prompt(name, loss, seed, shift):
    pair = pair_of(random_rows(3, seed))
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    by = shift * torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)  # a constant a prompt
    moved = replace(
        pair,
        ref_chosen=replace(pair.ref_chosen, sum=pair.ref_chosen.sum + by),
        ref_rejected=replace(pair.ref_rejected, sum=pair.ref_rejected.sum + by),
    )
    same = torch.allclose(loss(moved), loss(pair), rtol=1e-9, atol=1e-9)
    if name not in CHANGED_BY_PROMPT_SHIFT:
        assert same
    elif abs(shift) > 1:
        assert not same, f"{name} is listed as changed by a shift, but is not"


@every_loss
def test_decreasing_in_the_margin_at_the_reference(name, loss):
    pair = at_reference(pair_of(random_rows(5, seed=2)))
    loss(pair).sum().backward()
    chosen, rejected = pair.chosen.sum.grad, pair.rejected.sum.grad
    assert chosen is not None and rejected is not None
    decreasing = bool((chosen < 0).all() and (rejected > 0).all())
    assert decreasing == (name not in NOT_DECREASING_AT_REFERENCE)


@every_loss
def test_a_missing_reference_is_explained(name, loss):
    pair = pair_of(random_rows(2, seed=3))
    without = PairLogps(pair.chosen, pair.rejected)
    if name in NEEDS_NO_REFERENCE:
        assert torch.equal(loss(without), loss(pair))
    else:
        with pytest.raises(ValueError, match="compares the policy with a reference"):
            loss(without)


@every_loss
def test_documented_with_formula_shape_and_source(name, loss):
    assert loss.__doc__ and "loss =" in loss.__doc__ and "(B,)" in loss.__doc__ and "arXiv" in loss.__doc__
