"""Worked values and gradients of every loss: fixtures of one pair, of a batch, of masks; values at the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.math import losses
from pyrite.math.logps import Logps, PairLogps, Running
from pyrite.math.logps import update_running as update

from .fixtures import F64, POLICY_CHOSEN, POLICY_REJECTED, tokens, worked_pair

PRIOR = (-4.1, -7.3)  # log-probabilities of the two responses without the prompt

# spec, value, d loss / d every chosen token, every rejected token
WORKED = [
    ("dpo()", 0.630258, -0.046755, 0.046755),
    ("dpo(beta=0.01)", 0.686668, -0.004968, 0.004968),
    ("dpo(beta=1.0)", 0.241008, -0.214165, 0.214165),
    ("dpo(label_smoothing=0.1)", 0.643258, -0.036755, 0.036755),
    ("posterior()", 0.593650, -0.044769, 0.044769),
    ("robust(label_smoothing=0.1)", 0.614008, -0.059255, 0.059255),
    ("ipo(tau=0.1)", 13.690000, -7.400000, 7.400000),
    ("ipo(tau=0.1,length_norm=True)", 23.120069, -2.404167, 1.602778),
    ("hinge()", 0.870000, -0.100000, 0.100000),
    ("slic(delta=1.0,lam=0.1)", 0.330000, -0.100000, 0.0),
    ("exo(label_smoothing=1e-3)", 2.539185, -0.168705, 0.168705),
    ("nca()", 1.355561, -0.026125, 0.023004),
    ("bco(delta=0.0)", 1.324603, -0.050750, 0.046009),
    ("bco(delta=-0.05)", 1.322856, -0.049500, 0.047253),
    ("sppo()", 39.650000, -10.600000, 6.800000),
    ("apo_zero()", 0.967585, -0.024994, 0.024841),
    ("apo_down()", 0.960046, 0.000100, 0.024895),
    ("discopop(tau=0.05)", 0.860960, -0.053070, 0.053070),
    ("kto_pair(z0=0.2)", 0.967619, -0.024984, 0.024799),
    ("ln_dpo(beta=5.0)", 0.324639, -0.346515, 0.231010),
    ("r_dpo(alpha=0.01)", 0.639659, -0.047253, 0.047253),
    ("ld_dpo(alpha=0.5)", 0.634946, -0.047004, [0.047004] * 4 + [0.023502] * 2),
    ("dpop(lam=5.0)", 0.703197, -0.303000, 0.050500),
    ("dpo_nll(alpha=1.0)", 1.455258, -0.296755, 0.046755),
    ("mpo()", 1.594127, -0.297554, 0.046606),  # 0.8 dpo + 0.2 bco + likelihood, from the rows above
    ("cpo(alpha=1.0)", 1.418650, -0.294769, 0.044769),
    ("simpo(beta=2.0,gamma=1.0)", 1.205865, -0.350284, 0.233522),
    ("alphapo(beta=2.0,gamma=1.0,alpha=0.25)", 1.180713, -0.425833, 0.289262),
    ("orpo(lam=0.1)", 0.888033, -0.270809, 0.013132),
    ("f_dpo(divergence='forward_kl')", 0.529130, -0.055463, 0.203512),
    ("f_dpo(divergence='js')", 0.647750, -0.027388, 0.039669),
    ("f_dpo(divergence='alpha',alpha=0.5)", 0.592423, -0.051936, 0.099485),
    ("tdpo(version=1)", 0.644397, -0.047502, 0.047502),
    ("tdpo(version=2,alpha=0.5)", 0.637299, -0.047128, 0.047128),
    ("xpo(alpha=1e-3)", 0.624858, -0.046755, 0.047755),
    ("cal_dpo()", 1.026758, -0.152755, 0.114755),
    ("odpo(alpha=1.0)", 1.013850, -0.063718, 0.063718),
    ("simper()", -0.031665, -0.109559, 0.067762),
]
BATCH = [  # spec, mean over the three pairs of fixture b
    ("dpo()", 0.656558),
    ("aot()", 0.656417),
    ("aot(paired=False)", 0.655934),
    ("ln_dpo(beta=2.0)", 0.601605),
    ("bco(delta=None)", 1.350105),
    ("beta_dpo(alpha=0.6)", 0.642429),
]
BY_THEMSELVES = {"rebel", "soft_dpo", "wpo"}  # in tests of their own below
AT_REFERENCE = {
    **dict.fromkeys(["dpo()", "dpo(label_smoothing=0.1)", "ln_dpo()", "ld_dpo()", "dpop()"], math.log(2)),
    **{f"f_dpo(divergence='{name}')": math.log(2) for name in ("reverse_kl", "forward_kl", "js", "alpha")},
    **{"ipo()": 25.0, "hinge()": 1.0, "exo()": 2.761231, "nca()": 1.386294, "bco(delta=0.0)": 1.386294},
    **{"sppo()": 50.0, "apo_zero()": 1.0, "apo_down()": 1.0, "kto_pair()": 1.0, "r_dpo()": 0.703197},
    "discopop()": 0.846574,
}


def test_every_loss_has_worked_values() -> None:
    assert {row[0].split("(")[0] for row in WORKED + BATCH} | BY_THEMSELVES == set(losses.__all__)


def loss(spec: str) -> specs.ReadyPart:
    return specs.part(spec, losses)


def fixture_a(chosen: list[Tensor], rejected: list[Tensor]) -> PairLogps:
    """One pair: lengths 4 and 6, sums -3.3 and -5.4, under the reference -3.0 and -3.8; strength 2; KL .3 and .6."""
    pair = worked_pair(chosen, rejected)
    return replace(
        pair,
        chosen=replace(pair.chosen, kl=torch.tensor([0.3], dtype=F64)),
        rejected=replace(pair.rejected, kl=torch.tensor([0.6], dtype=F64)),
        strength=torch.tensor([2.0], dtype=F64),
    )


@pytest.mark.parametrize(("spec", "value", "chosen_slope", "rejected_slope"), WORKED, ids=[row[0] for row in WORKED])
def test_worked_values_and_gradients(spec: str, value: float, chosen_slope: Any, rejected_slope: Any) -> None:
    chosen, rejected = tokens(POLICY_CHOSEN), tokens(POLICY_REJECTED)
    for row in chosen + rejected:
        row.requires_grad_()
    found = loss(spec)(fixture_a(chosen, rejected))
    found.sum().backward()
    assert found.item() == pytest.approx(value, abs=1e-6)
    for row, slope in ((chosen[0], chosen_slope), (rejected[0], rejected_slope)):
        want = torch.as_tensor(slope, dtype=F64).expand_as(row)
        torch.testing.assert_close(torch.zeros_like(row) if row.grad is None else row.grad, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("beta", "value", "slope"), [(0.1, 0.749659, 0.052747), (0.01, 0.698662, 0.005027)])
def test_likelihood_is_dpo_with_the_prior(beta: float, value: float, slope: float) -> None:
    chosen, rejected = tokens(POLICY_CHOSEN), tokens(POLICY_REJECTED)
    chosen[0].requires_grad_()
    pair = fixture_a(chosen, rejected)
    prior = [Logps.from_sums(torch.tensor([nats], dtype=F64), torch.ones(1)) for nats in PRIOR]
    found = losses.dpo(replace(pair, ref_chosen=prior[0], ref_rejected=prior[1]), beta=beta)
    found.sum().backward()
    assert found.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(chosen[0].grad, torch.full((4,), -slope, dtype=F64), atol=1e-6, rtol=0)


def test_rebel_with_strength_1() -> None:
    chosen, rejected = tokens(POLICY_CHOSEN), tokens(POLICY_REJECTED)
    chosen[0].requires_grad_()
    pair = replace(fixture_a(chosen, rejected), strength=torch.ones(1, dtype=F64))
    found = losses.rebel(pair, eta=1.0)
    found.sum().backward()
    assert found.item() == pytest.approx(0.09, abs=1e-9)
    torch.testing.assert_close(chosen[0].grad, torch.full((4,), 0.6, dtype=F64))


@pytest.mark.parametrize(
    ("strength", "scale", "value", "slope"),
    [(0.8, 4.0, 0.626832, -0.0423404), (0.8, 1.0, 0.667461, -0.0152545), (0.0, 1.0, 0.695957, None)],
)
def test_soft_labels(strength: float, scale: float, value: float, slope: float | None) -> None:
    """Policy (-10, -12), reference (-11, -11.5): Δ = 1.5."""
    sums = [torch.tensor([nats], dtype=F64) for nats in (-10.0, -12.0, -11.0, -11.5)]
    sums[0].requires_grad_()
    sides = [Logps.from_sums(one, torch.ones(1)) for one in sums]
    found = losses.soft_dpo(PairLogps(*sides, torch.tensor([strength], dtype=F64)), scale=scale)
    found.sum().backward()
    assert found.item() == pytest.approx(value, abs=1e-6)
    if slope is not None:
        assert sums[0].grad is not None
        assert sums[0].grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(("spec", "value"), AT_REFERENCE.items(), ids=list(AT_REFERENCE))
def test_values_at_the_start(spec: str, value: float) -> None:
    pair = worked_pair()
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    start = replace(pair, chosen=pair.ref_chosen, rejected=pair.ref_rejected)
    assert loss(spec)(start).item() == pytest.approx(value, abs=1e-6)


def fixture_b() -> PairLogps:
    """Three pairs: u = (-.3, 1, .5), v = (-1.6, -.5, 1)."""

    def side(sums: list[float], lengths: list[int]) -> Logps:
        return Logps.from_sums(torch.tensor(sums, dtype=F64), torch.tensor(lengths))

    first, second = [4, 10, 25], [6, 12, 20]
    return PairLogps(
        side([-3.3, -10, -20], first),
        side([-5.4, -9, -22], second),
        side([-3, -11, -20.5], first),
        side([-3.8, -8.5, -23], second),
    )


@pytest.mark.parametrize(("spec", "value"), BATCH)
def test_means_of_a_batch(spec: str, value: float) -> None:
    pair = fixture_b()
    pair = replace(pair, running=update(Running.zero(), pair))
    assert loss(spec)(pair).mean().item() == pytest.approx(value, abs=1e-6)


def test_running_statistics_of_the_first_batches() -> None:
    pair, running = fixture_b(), Running.zero()
    assert update(running, pair) is running
    assert 0.1 * running.ratio.item() == pytest.approx(0.001667, abs=1e-6)
    assert running.margin.item() == pytest.approx(0.076667, abs=1e-6)
    update(running, worked_pair())
    assert running.ratio.item() == pytest.approx((0.016667 - 0.95) / 2, abs=1e-6)
    assert running.margin.item() == pytest.approx(0.9 * 0.0766667 + 0.1 * 1.3, abs=1e-6)
    assert running.count.item() == 2


def fixture_c() -> PairLogps:
    """Log-probabilities, KL and collision from logits with masks; the reference's logits are 0.8 times them."""
    r, t, k = torch.meshgrid(torch.arange(2), torch.arange(6), torch.arange(4), indexing="ij")
    logits = (0.3 * (t + 1) * ((k * (r + 1)) % 3) - 0.2 * k).to(F64)
    ids = torch.tensor([[1, 2, 3, 0, 2, 3], [1, 2, 1, 3, 3, 0]])
    masks = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]]).bool()
    logp, ref = (x.log_softmax(-1)[:, :-1] for x in (logits, 0.8 * logits))
    target, mask = ids[:, 1:], masks[:, 1:]

    def side(row: int, scores: Tensor) -> Logps:
        picked = scores[row].gather(1, target[row, :, None]).squeeze(1)
        kl = (ref[row].exp() * (ref[row] - logp[row])).sum(-1)
        square = (2 * logp[row]).logsumexp(-1)
        made = Logps.from_tokens([picked[mask[row]]])
        return replace(made, kl=kl[mask[row]].sum()[None], collision=square[mask[row]].sum()[None])

    return PairLogps(side(0, logp), side(1, logp), side(0, ref), side(1, ref))


def test_masks_and_shift() -> None:
    pair = fixture_c()
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    assert pair.chosen.kl is not None and pair.rejected.kl is not None and pair.chosen.collision is not None
    sums = [side.sum.item() for side in (pair.chosen, pair.rejected, pair.ref_chosen, pair.ref_rejected)]
    assert sums == pytest.approx([-8.275174, -5.847483, -7.505696, -5.096177], abs=1e-6)
    assert [pair.chosen.kl.item(), pair.rejected.kl.item()] == pytest.approx([0.045463, 0.029790], abs=1e-6)
    weight = ((pair.chosen.sum - pair.chosen.collision) / pair.chosen.length).exp()
    assert weight.item() == pytest.approx(0.303426, abs=1e-6)
    values = {"dpo()": 0.694056, "tdpo(version=1)": 0.693272, "tdpo(version=2)": 0.693664, "wpo()": 0.023590}
    for spec, value in values.items():
        assert loss(spec)(pair).item() == pytest.approx(value, abs=1e-6), spec


def sums(chosen: float, ref_chosen: float, rejected: float, ref_rejected: float) -> PairLogps:
    """One pair known by its sums."""
    values = [torch.tensor([v], dtype=F64) for v in (chosen, rejected, ref_chosen, ref_rejected)]
    return PairLogps(*(Logps.from_sums(v, torch.tensor([10])) for v in values))


def test_published_values_of_online_dpo() -> None:
    """Log-ratio 8 at beta .05: .513015; the square of 8 − 10; log-ratios 8 and −4 summed; two equal answers: ln 2."""
    eight, minus_four = sums(-40, -44, -50, -46), sums(-50, -46, -40, -40)
    dpo = specs.part("dpo(beta=0.05)", losses)
    assert dpo(eight).item() == pytest.approx(0.513015, abs=1e-6)
    assert specs.part("ipo(tau=0.05)", losses)(eight).item() == pytest.approx(4.0)
    assert (dpo(eight) + dpo(minus_four)).item() == pytest.approx(1.311154, abs=1e-6)
    logp = torch.tensor([-40.0], dtype=F64, requires_grad=True)
    same = Logps.from_sums(logp, torch.tensor([10]))
    loss = dpo(PairLogps(same, same, same, same))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logp.grad is not None and logp.grad.item() == 0
