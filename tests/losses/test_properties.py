"""What every direct preference loss must satisfy, for all of pyrite.losses and the options that change it."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrite.core.specs import members, part
from pyrite.math import losses
from pyrite.math.logps import PairLogps
from pyrite.math.losses.needs import needs

from .fixtures import F64, at_reference, pair_of, random_rows, tokens

NAMES = [member.name for member in members(losses)]
VARIANTS = [
    "ipo(length_norm=True)",
    "bco(delta=None)",
    "sppo(soft=True)",
    "f_dpo(divergence='forward_kl')",
    "f_dpo(divergence='js')",
    "f_dpo(divergence='alpha')",
    "tdpo(version=1)",
    "aot(paired=False)",
    "beta_dpo(rho=0.5)",
    "xpo(from_ref='both')",
]
LOSSES = [(spec, part(spec, losses)) for spec in NAMES + VARIANTS]
LN2 = math.log(2)
Value = float | Callable[[PairLogps], Tensor]

# Every loss states its own: the value at policy = reference, a number or what it is of the pair.
AT_REFERENCE: dict[str, Value] = {
    **dict.fromkeys(["dpo", "soft_dpo", "robust", "ln_dpo", "ld_dpo", "dpop", "f_dpo", "tdpo", "aot", "beta_dpo"], LN2),
    **dict.fromkeys(["f_dpo(divergence='forward_kl')", "f_dpo(divergence='js')", "f_dpo(divergence='alpha')"], LN2),
    **dict.fromkeys(["tdpo(version=1)", "aot(paired=False)"], LN2),
    **dict.fromkeys(["ipo", "ipo(length_norm=True)"], 25.0),
    **dict.fromkeys(["hinge", "apo_zero", "apo_down", "kto_pair"], 1.0),
    **dict.fromkeys(["nca", "bco", "bco(delta=None)"], 2 * LN2),
    "exo": -LN2 - 0.5 * math.log(1e-3 * 0.999),
    "sppo": 50.0,
    "sppo(soft=True)": lambda pair: 2 * ((strength(pair).sigmoid() - 0.5) / 0.1) ** 2,
    "cal_dpo": LN2 + 0.5,
    "discopop": (1 + LN2) / 2,
    "r_dpo": lambda pair: -F.logsigmoid(0.01 * (pair.chosen.length - pair.rejected.length).double()),
    "dpo_nll": lambda pair: LN2 - pair.chosen.mean,
    "mpo": lambda pair: 1.2 * LN2 - pair.chosen.mean,
    "wpo": lambda pair: LN2 * (pair.chosen.mean + pair.rejected.mean).exp(),
    "odpo": lambda pair: (1 + strength(pair)).log(),
    "rebel": lambda pair: strength(pair) ** 2,
    "xpo": lambda pair: LN2 + 1e-3 * pair.rejected.sum,
    "xpo(from_ref='both')": lambda pair: LN2 + 5e-4 * (pair.chosen.sum + pair.rejected.sum),
    "beta_dpo(rho=0.5)": lambda pair: LN2 * torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0, 0.0], dtype=F64),
}
NEEDS_NO_REFERENCE = {"posterior", "slic", "cpo", "simpo", "alphapo", "orpo", "simper"}  # nor a value at it

# Whether adding one number to both log-probabilities of the reference changes a pair's value.
ONLY_THE_DIFFERENCE = {
    *("dpo", "soft_dpo", "robust", "ipo", "hinge", "exo", "discopop", "r_dpo", "ld_dpo", "dpo_nll", "f_dpo"),
    *("tdpo", "tdpo(version=1)", "aot", "beta_dpo", "beta_dpo(rho=0.5)", "wpo", "odpo", "rebel"),
    *("xpo", "xpo(from_ref='both')"),
}
EACH_LOG_RATIO = {
    *("nca", "bco", "bco(delta=None)", "mpo", "sppo", "sppo(soft=True)", "apo_zero", "apo_down", "kto_pair", "cal_dpo"),
    *("ipo(length_norm=True)", "ln_dpo", "dpop", "aot(paired=False)"),
    *("f_dpo(divergence='forward_kl')", "f_dpo(divergence='js')", "f_dpo(divergence='alpha')"),
}

# Chosen up and rejected down from the start?
NOT_AT_ONCE = {
    "discopop",  # reversed at 0, as published
    "apo_down",  # leaves the chosen response where it is at first
    "beta_dpo(rho=0.5)",  # leaves half of the pairs out
}

every_loss = pytest.mark.parametrize("name, loss", LOSSES, ids=[name for name, _ in LOSSES])
seeds = st.integers(0, 10_000)


def strength(pair: PairLogps) -> Tensor:
    assert pair.strength is not None
    return pair.strength


def of_batch(name: str) -> bool:
    return name.startswith(("aot", "beta_dpo"))


def learning(sides: list[list[Tensor]]) -> list[list[Tensor]]:
    """The policy's rows as leaves that gather gradients."""
    return [[row.clone().requires_grad_() for row in rows] for rows in sides[:2]] + sides[2:]


def test_all_exported_losses_are_found():
    assert sorted(losses.__all__) == NAMES


def test_every_loss_is_in_every_table():
    every = {name for name, _ in LOSSES}
    assert not (set(AT_REFERENCE) | NEEDS_NO_REFERENCE) ^ every
    assert not (ONLY_THE_DIFFERENCE | EACH_LOG_RATIO | NEEDS_NO_REFERENCE) ^ every
    assert not (set(AT_REFERENCE) | ONLY_THE_DIFFERENCE) & NEEDS_NO_REFERENCE
    assert not ONLY_THE_DIFFERENCE & EACH_LOG_RATIO
    assert not NOT_AT_ONCE - every


@every_loss
@given(seed=seeds, scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]), dtype=st.sampled_from([torch.float32, F64]))
@settings(max_examples=15, deadline=None)
def test_values_and_gradients_are_finite(name, loss, seed, scale, dtype):
    sides = learning([[row.to(dtype) for row in rows] for rows in random_rows(5, seed, scale)])
    values = loss(pair_of(sides))
    values.sum().backward()
    assert values.shape == (5,) and values.dtype == dtype and torch.isfinite(values).all()
    assert all(row.grad is not None and torch.isfinite(row.grad).all() for row in sides[0] + sides[1])


@every_loss
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_float32_is_enough(name, loss, seed):
    sides = random_rows(4, seed)
    rounded = loss(pair_of([[row.float() for row in rows] for rows in sides]))
    torch.testing.assert_close(rounded.double(), loss(pair_of(sides)), rtol=2e-5, atol=2e-5)


STOPS_A_GRADIENT = ("wpo", "tdpo", "beta_dpo", "beta_dpo(rho=0.5)")  # on purpose; their own files test where


@pytest.mark.parametrize("name", [name for name, _ in LOSSES if name not in STOPS_A_GRADIENT])
def test_the_gradient_is_the_slope(name):
    loss = part(name, losses)
    pair = pair_of(random_rows(3, seed=7))

    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(
            replace(pair, chosen=replace(pair.chosen, sum=chosen), rejected=replace(pair.rejected, sum=rejected))
        )

    sums = [side.sum.detach().requires_grad_() for side in (pair.chosen, pair.rejected)]
    assert torch.autograd.gradcheck(of, sums)


@every_loss
def test_value_at_policy_equal_to_reference(name, loss):
    if name in NEEDS_NO_REFERENCE:
        return
    pair = at_reference(pair_of(random_rows(6, seed=1)))
    want = AT_REFERENCE[name]
    want = want(pair) if callable(want) else torch.full((6,), want, dtype=F64)
    found = loss(pair)
    if name == "beta_dpo(rho=0.5)":  # all margins are equally far from their mean: any half may be left out
        found, want = found.sort().values, want.sort().values
    torch.testing.assert_close(found, want)


@every_loss
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_neither_padding_nor_batch_order_matters(name, loss, seed):
    sides = random_rows(4, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    together = loss(pair_of(sides))
    moved = loss(pair_of([[rows[int(i)] for i in order] for rows in sides]))
    torch.testing.assert_close(moved, together[order], rtol=1e-12, atol=1e-12)
    if not of_batch(name):
        alone = torch.cat([loss(pair_of([[rows[i]] for rows in sides])) for i in range(4)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@every_loss
def test_what_depends_on_the_batch_says_so(name, loss):
    assert ("batch" in needs(loss)) == of_batch(name)


def shifted(pair: PairLogps, by: list[float]) -> PairLogps:
    """Both reference log-probabilities of every pair moved by a constant of its own, as a biased reference would."""
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    first, second = (replace(ref, sum=ref.sum + tokens(by)[0]) for ref in (pair.ref_chosen, pair.ref_rejected))
    return replace(pair, ref_chosen=first, ref_rejected=second)


@pytest.mark.parametrize("name", sorted(ONLY_THE_DIFFERENCE | NEEDS_NO_REFERENCE))
@given(seed=seeds, shift=st.floats(-50, 50))
@settings(max_examples=15, deadline=None)
def test_a_shift_of_the_reference_per_prompt_changes_nothing(name, seed, shift):
    pair, loss = pair_of(random_rows(3, seed)), part(name, losses)
    moved = shifted(pair, [shift, -0.5 * shift, 2 * shift])
    torch.testing.assert_close(loss(moved), loss(pair), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(EACH_LOG_RATIO))
def test_a_shift_of_the_reference_per_prompt_changes_every_pair(name):
    pair, loss = pair_of(random_rows(4, seed=0)), part(name, losses)
    assert (pair.chosen.length != pair.rejected.length).all()  # equal lengths would share their shift again
    change = loss(shifted(pair, [30.0, 10.0, 20.0, 15.0])) - loss(pair)
    assert (change.abs() > 1e-3).all()


@every_loss
def test_decreasing_in_the_margin_at_the_reference(name, loss):
    refs = random_rows(5, seed=2)[2:]
    sides = learning([*refs, *refs])
    loss(pair_of(sides)).sum().backward()
    down, up = (torch.cat([row.grad for row in rows if row.grad is not None]) for rows in sides[:2])
    assert bool((down < 0).all() and (up > 0).all()) == (name not in NOT_AT_ONCE)


@every_loss
def test_a_missing_reference_is_explained(name, loss):
    pair = pair_of(random_rows(2, seed=3))
    without = replace(pair, ref_chosen=None, ref_rejected=None)
    if name in NEEDS_NO_REFERENCE:
        assert torch.equal(loss(without), loss(pair))
    else:
        with pytest.raises(ValueError, match="compares the policy with a reference"):
            loss(without)


@every_loss
def test_documented_with_formula_shape_value_and_source(name, loss):
    doc = loss.function.func.__doc__
    assert doc and "loss =" in doc and "(B,)" in doc and "arXiv" in doc
    assert ("at any reference" if name in NEEDS_NO_REFERENCE else "at policy =") in doc


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_signs_that_hold_everywhere(seed):
    """These never push the chosen response down or the rejected one up."""
    for name in ("dpo", "robust", "hinge", "ln_dpo", "simpo", "cpo", "orpo", "bco", "apo_zero"):
        sides = learning(random_rows(5, seed, 5.0))
        getattr(losses, name)(pair_of(sides)).sum().backward()
        assert all((row.grad <= 1e-12).all() for row in sides[0]), name
        assert all((row.grad >= -1e-12).all() for row in sides[1]), name


REDUCTIONS = [
    ("dpo(label_smoothing=0.0)", "dpo()"),
    ("robust(label_smoothing=0.0)", "dpo()"),
    ("dpop(lam=0.0)", "dpo()"),
    ("dpo_nll(alpha=0.0)", "dpo()"),
    ("mpo(preference=1.0,quality=0.0,generation=0.0)", "dpo()"),
    ("mpo(preference=0.0,quality=1.0,generation=0.0)", "bco()"),
    ("r_dpo(alpha=0.0)", "dpo()"),
    ("ld_dpo(alpha=1.0)", "dpo()"),
    ("tdpo(alpha=0.0)", "dpo()"),
    ("xpo(alpha=0.0)", "dpo()"),
    ("odpo(alpha=0.0)", "dpo()"),
    ("beta_dpo(alpha=0.0)", "dpo()"),
    ("f_dpo(divergence='reverse_kl')", "dpo()"),
    ("f_dpo(divergence='alpha',alpha=1.0)", "dpo()"),
    ("f_dpo(divergence='alpha',alpha=0.0)", "f_dpo(divergence='forward_kl')"),
    ("cpo(alpha=0.0)", "posterior()"),
    ("alphapo(alpha=0.0)", "simpo()"),
]


@pytest.mark.parametrize("special, parent", REDUCTIONS)
def test_reductions(special, parent):
    pair = pair_of(random_rows(6, seed=4))
    torch.testing.assert_close(part(special, losses)(pair), part(parent, losses)(pair), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted({special.split("(")[0] for special, _ in REDUCTIONS} - {"dpo", "f_dpo"}))
def test_reductions_have_teeth(name):
    pair = pair_of(random_rows(6, seed=4))
    for parent in (losses.dpo, losses.posterior, losses.simpo, losses.bco):
        assert not torch.allclose(part(name, losses)(pair), parent(pair))
