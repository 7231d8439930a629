"""The exact world: published trajectories, orders, bounds, stability, the repository's figure, and noise."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.core import specs
from pyrite.math import losses, samplers, tabular
from pyrite.math.logps import PairLogps
from pyrite.math.samplers import Sampler, exact
from pyrite.math.tabular import World, descend, every_pair, world

F64 = torch.float64
LN2 = math.log(2)
TWO, THREE = [0.0, LN2], [0.0, LN2, 2 * LN2]
# rewards of the published figure: seed 1234567
FIGURE = [-1.462022, -0.282396, 2.455863, 1.610924, -1.221372, 0.360827, -2.276941, -0.568186, 0.449364, -0.679287]
FIGURE += [-0.013018, -0.271159, -0.063012, -0.047575, -0.196766, 0.618166, -2.185448, 1.006185, 0.066296, 0.159153]

THEORY = {"uniform": samplers.uniform(), "mix_r": samplers.mix_r(), "mix_p": samplers.mix_p()}
ZOO = THEORY | {
    "reference": samplers.reference(),
    "on_policy": samplers.on_policy(),
    "hybrid": samplers.hybrid(),
    "mixed": samplers.mixed(),
    "enhancer": samplers.mix_r(share=1.0),
    "half": samplers.mix_p(share=0.5),
    "capped": samplers.mix_p(cap="range"),
    "own": samplers.mixture(arms=[(1, (0.5, 0.5), (0, 0, 1)), (2, (1, 0), (0, 1))]),
}
every_sampler = pytest.mark.parametrize("sampler", ZOO.values(), ids=ZOO)


def instances(rewards: list[float], beta: float = 1.0, copies: int = 1) -> World:
    return world(torch.tensor([rewards] * copies, dtype=F64), beta=beta)


def drawn(count: int, n: int = 6, *, beta: float = 2.0, seed: int = 0, spread: float = 0.5) -> World:
    """Normal rewards and a reference that is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    reward, ref = torch.randn(2, count, n, dtype=F64, generator=generator)
    return world(reward, beta=beta, ref=spread * ref)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WORKED = [
    (THREE, "uniform", [1.386294, 0.1418499, 3.623341e-2, 9.837613e-3, 2.710607e-3]),
    (THREE, "mix_r", [1.386294, 0.3637056, 2.988055e-2, 2.033628e-4, 9.420074e-9]),
    (THREE, "mix_p", [1.386294, 0.1418499, 4.233088e-3, 4.072081e-6, 3.777201e-12]),
    (TWO, "mix_r", [0.6931472, 5.685282e-2, 5.486732e-4, 5.018288e-8]),
    (TWO, "mix_p", [0.6931472, 2.648051e-2, 1.137816e-4, 2.157462e-9]),
]


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("rewards, name, expected", WORKED)
def test_worked_trajectories_whatever_beta(rewards: list[float], name: str, expected: list[float], beta: float) -> None:
    found = descend(instances(rewards, beta), THEORY[name], steps=len(expected) - 1).error[:, 0]
    for step, value in enumerate(expected):
        # the smallest value is 1.5e4 times rounding, which beta = 0.1 moves
        assert found[step].item() == pytest.approx(value, rel=1e-6 if value > 1e-11 else 1e-3)


def test_the_third_value_of_uniform_pairs() -> None:
    assert descend(instances(TWO), THEORY["uniform"], steps=2).error[2].item() == pytest.approx(2.839322e-3, rel=1e-6)


@pytest.mark.parametrize("name, edge", [("uniform", 0.622222), ("mix_r", 0.875), ("mix_p", 0.622222)])
def test_logits_after_one_step(name: str, edge: float) -> None:
    after = descend(instances(THREE), THEORY[name], steps=1).logps[0]
    torch.testing.assert_close(after - after.mean(), torch.tensor([-edge, 0, edge], dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rewards, rate", [(TWO, 17 / 4), (THREE, 7.083333)])
def test_worked_matched_rates(rewards: list[float], rate: float) -> None:
    for beta in (1.0, 3.0):
        here = instances(rewards, beta)
        pairs = exact(samplers.mix_r(), here.ref, here.ref, here.reward)
        assert tabular.matched_rate(pairs, beta).item() == pytest.approx(rate / beta**2, rel=1e-6)
        uniform = exact(samplers.uniform(), here.ref, here.ref, here.reward)
        assert tabular.matched_rate(uniform, beta).item() == pytest.approx(2 * len(rewards) / beta**2)


@every_sampler
def test_gradient_is_the_closed_form_and_sums_to_zero(sampler: Sampler) -> None:
    """−2β Σ_b J_ab (σ(r_a − r_b) − σ(h_ab)), for DPO."""
    here = drawn(5)
    logps = torch.randn(here.reward.shape, dtype=F64, generator=stream(1)).log_softmax(-1)
    joint = exact(sampler.at(here.beta), logps, here.ref, here.reward).joint
    x, h = here.reward, here.beta * (logps - here.ref)
    wins, believed = ((v[:, :, None] - v[:, None, :]).sigmoid() for v in (x, h))
    expected = -2 * here.beta * (joint * (wins - believed)).sum(-1)
    found = tabular.gradient(every_pair(here), logps, 2 * joint * wins, partial(losses.dpo, beta=here.beta))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.sum(-1), torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)


def usable() -> list[tuple[str, tabular.PairLoss]]:
    found = []
    for member in specs.members(losses):
        try:
            tabular.check_loss(getattr(losses, member.name))
        except (ValueError, TypeError):
            continue
        found.append((member.name, getattr(losses, member.name)))
    return found


@pytest.mark.parametrize("name, loss", usable(), ids=[name for name, _ in usable()])
def test_gradient_of_every_loss_against_its_objective(name: str, loss: tabular.PairLoss) -> None:
    """Σ_ab shares_ab ℓ(a, b), pair by pair, differentiated through the softmax."""
    here = drawn(1, 4)
    logits = torch.randn(1, 4, dtype=F64, generator=stream(2)).requires_grad_()
    shares = torch.rand(1, 4, 4, dtype=F64, generator=stream(3))
    logps, total = logits.log_softmax(-1), torch.zeros((), dtype=F64)
    for a in range(4):
        for b in range(4):
            one = tabular.pair_logps(
                (logps[:, a], logps[:, b]), (here.ref[:, a], here.ref[:, b]), here.reward[:, a] - here.reward[:, b]
            )
            total = total + shares[0, a, b] * loss(one).sum()
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(
        tabular.gradient(every_pair(here), logits.detach().log_softmax(-1), shares, loss),
        expected,
        rtol=1e-9,
        atol=1e-11,
    )


def test_some_losses_are_usable() -> None:
    assert {"dpo", "soft_dpo", "ipo", "rebel", "simpo", "kto_pair"} <= {name for name, _ in usable()}


@every_sampler
def test_the_optimum_stays_and_a_loss_of_its_own_shape_moves(sampler: Sampler) -> None:
    here = drawn(4)
    rate = 0.05 if sampler.weigh == "share" else "matched"
    assert descend(here, sampler, steps=3, start=here.optimum, rate=rate).error.max() < 1e-13
    away = descend(here, sampler, steps=1, start=here.optimum, rate=0.05, loss=losses.ipo).error[1]
    assert away.min() > 1e-3
    noisy = descend(here, sampler, steps=1, start=here.optimum, rate=0.05, noise=0.2).error[1]
    assert noisy.min() > 1e-4


@every_sampler
def test_an_instance_does_not_depend_on_its_neighbors(sampler: Sampler) -> None:
    here = drawn(4)
    together = descend(here, sampler, steps=8)
    for i in range(4):
        alone = descend(World(here.reward[i : i + 1], here.ref[i : i + 1], here.beta), sampler, steps=8)
        torch.testing.assert_close(together.error[:, i], alone.error[:, 0], rtol=1e-9, atol=1e-13)


@every_sampler
def test_every_sampler_reaches_the_optimum(sampler: Sampler) -> None:
    here = drawn(20, beta=3.0, spread=0.3)
    path = descend(here, sampler, steps=400, rate="best")
    assert path.error[-1].max() < 1e-6
    value = path.reward - here.beta * path.kl
    torch.testing.assert_close(value[-1], here.best_value, rtol=0, atol=1e-9)
    assert (value <= here.best_value + 1e-12).all()
    torch.testing.assert_close(path.logps.exp(), here.optimum.softmax(-1), rtol=0, atol=1e-6)


def test_what_is_recorded_at_the_start() -> None:
    here = drawn(3)
    path = descend(here, samplers.uniform(), steps=2)
    gaps = (here.reward[:, :, None] - here.reward[:, None, :]).abs()
    torch.testing.assert_close(path.error[0], gaps.amax((1, 2)))
    torch.testing.assert_close(path.mean_error[0], gaps.mean((1, 2)))
    torch.testing.assert_close(path.reward[0], (here.ref.exp() * here.reward).sum(-1))
    assert path.kl[0].abs().max() < 1e-15 and (path.kl[1:] > 0).all()
    assert path.rate.shape == (2, 3) and path.logps.shape == here.reward.shape


def slope(name: str, rewards: list[float], beta: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return tabular.order_test(instances(rewards, beta, 5), ZOO[name], scale=scale, generator=stream(4))


@pytest.mark.parametrize("rewards, beta", [(THREE, 1.0), (FIGURE, 3.0)])
@pytest.mark.parametrize("name, order", [("uniform", 1.0), ("mix_r", 2.0), ("mix_p", 2.0), ("capped", 2.0)])
def test_order_of_one_step(rewards: list[float], beta: float, name: str, order: float) -> None:
    slopes, _ = slope(name, rewards, beta)
    assert (slopes - order).abs().max() < 0.01


@pytest.mark.parametrize("name", ["mix_r", "mix_p"])
def test_a_rate_that_is_not_matched_is_linear_only(name: str) -> None:
    slopes, left = slope(name, FIGURE, 3.0, scale=0.7)
    assert (slopes - 1.0).abs().max() < 0.01
    torch.testing.assert_close(left[-1] / 1e-4, torch.full((5,), 0.3, dtype=F64), rtol=1e-3, atol=0)


def test_tails_of_trajectories() -> None:
    here = instances(FIGURE, 3.0)
    for name, low, high in (("uniform", 0.95, 1.01), ("mix_r", 1.9, 2.1), ("mix_p", 1.9, 2.1)):
        order = tabular.trajectory_order(descend(here, THEORY[name], steps=80).error)
        assert low <= order.item() <= high


def test_trajectory_order_of_known_sequences() -> None:
    steps = torch.arange(40, dtype=F64)
    rows = torch.stack([0.5**steps, 0.5 ** (2.0 ** (steps / 6)), torch.full((40,), 0.5, dtype=F64), 2.0**steps], 1)
    rows = rows.clamp(min=1e-16)
    order = tabular.trajectory_order(rows)
    assert order[0].item() == pytest.approx(1.0)
    assert order[1].item() == pytest.approx(2 ** (1 / 6))
    assert order[2:].isnan().all()
    assert tabular.trajectory_order(rows[:2]).isnan().all()


@pytest.mark.parametrize("name, share", [("uniform", 0.129), ("mix_r", 0.35), ("mix_p", 0.124)])
def test_bounds_of_the_theorems(name: str, share: float) -> None:
    """On 600 instances of 2 to 30 responses; at the first step they use about the published share of the bound."""
    used = []
    for n in (2, 3, 5, 10, 20, 30):
        reward = torch.rand(100, n, dtype=F64, generator=stream(n))
        error = descend(world(reward, beta=0.7), THEORY[name], steps=4).error
        limit = tabular.bound(name, 4)[:, None]
        assert (error <= limit).all()
        used.append((error[1] / limit[1]).max().item())
    assert 0.4 * share < max(used) < 1.6 * share


def test_bounds_fail_where_they_are_not_promised() -> None:
    """A negative control: four times the range of rewards."""
    reward = 4 * torch.rand(200, 10, dtype=F64, generator=stream())
    for name, sampler in THEORY.items():
        error = descend(world(reward, beta=0.7), sampler, steps=4).error
        assert (error > tabular.bound(name, 4)[:, None]).any()


def test_bound_values_and_unknown_names() -> None:
    assert tabular.bound("uniform", 2).tolist() == pytest.approx([1, 0.588, 0.588**2])
    assert tabular.bound("mix_r", 3).tolist() == pytest.approx([1, 0.5, 0.5**3, 0.5**7])
    with pytest.raises(ValueError, match="no theorem for 'hybrid'"):
        tabular.bound("hybrid", 3)


def test_beyond_twice_the_matched_rate_it_diverges() -> None:
    here = instances(TWO, 3.0)
    grows = descend(here, THEORY["mix_p"], steps=3, rate=1.0).error[:, 0]
    assert grows.tolist() == pytest.approx([0.693, 0.807, 0.894, 1.067], abs=1e-3)
    star = 17 / (4 * 9)
    for scale, stable in ((1.9, True), (2.1, False)):
        end = descend(here, THEORY["mix_r"], steps=300, rate=star, scale=scale).error[-1].item()
        assert (end < 1e-9) == stable


def test_the_published_figure() -> None:
    here = instances(FIGURE, 3.0)
    path = {name: descend(here, sampler, steps=15, rate=10.0) for name, sampler in THEORY.items()}
    mean = {name: one.mean_error[:, 0].tolist() for name, one in path.items()}
    assert mean["uniform"][:6] == pytest.approx([1.21, 0.689, 0.267, 0.126, 0.0544, 0.0264], rel=0.02)
    assert mean["mix_p"][:6] == pytest.approx([1.21, 0.689, 0.292, 0.0487, 8.99e-4, 6.0e-6], rel=0.02)
    assert mean["mix_r"][10:14] == pytest.approx([0.0527, 0.01026, 3.62e-4, 1.99e-6], rel=0.02)
    value = path["uniform"].reward - 3 * path["uniform"].kl + 3 * math.log(20)  # the study's counts no reference
    assert value[0].item() == pytest.approx(8.860177, abs=1e-6)
    assert here.best_value.item() + 3 * math.log(20) == pytest.approx(9.068083, abs=1e-6)


def test_the_published_matched_trajectory() -> None:
    mean = descend(instances(FIGURE, 3.0), THEORY["mix_p"], steps=5).mean_error[:, 0]
    assert mean.tolist() == pytest.approx([1.21, 0.365, 0.092, 9.06e-3, 1.30e-4, 4.10e-8], rel=0.01)


def test_best_rates_of_the_published_rewards() -> None:
    here = instances(FIGURE, 3.0)
    for sampler, left in ((ZOO["uniform"], 0.495), (ZOO["enhancer"], 0.185), (samplers.mix_r(share=0.5), 0.199)):
        curvature = tabular.spectrum(here, sampler)
        rate = tabular.best_rate(curvature, 3.0)
        assert tabular.contraction(curvature, 3.0, rate).item() == pytest.approx(left, abs=1e-3)
    uniform = tabular.spectrum(here, ZOO["uniform"])
    assert tabular.best_rate(uniform, 3.0).item() == pytest.approx(8.17, abs=0.01)
    assert tabular.contraction(uniform, 3.0, torch.tensor([10.0], dtype=F64)).item() == pytest.approx(0.829, abs=1e-3)
    mix = tabular.spectrum(here, ZOO["mix_r"])
    torch.testing.assert_close(
        tabular.best_rate(mix, 3.0), tabular.matched_rate(exact(samplers.mix_r(), here.ref, here.ref, here.reward), 3.0)
    )


@every_sampler
def test_contraction_is_what_a_small_step_leaves(sampler: Sampler) -> None:
    here = drawn(3, beta=1.5)
    curvature = tabular.spectrum(here, sampler)
    rate = 0.6 * tabular.best_rate(curvature, here.beta)
    worst = curvature.vectors[:, :, 0]  # below the best rate, the flattest direction is left most
    for i in range(3):
        one = World(here.reward[i : i + 1], here.ref[i : i + 1], here.beta)
        start = one.optimum + 1e-5 * worst[i]
        path = descend(one, sampler, steps=1, rate=rate[i].item(), start=start)
        predicted = tabular.contraction(curvature, here.beta, rate)[i].item()
        assert (path.error[1] / path.error[0]).item() == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("cells", [1, 2, 9, 400])
def test_multinomial_counts(cells: int) -> None:
    """Mean and variance of every cell, chi-square of the lot; a wrong distribution fails."""
    shares = torch.rand(1, cells, dtype=F64, generator=stream(5)) + 0.05
    shares = shares / shares.sum()
    draws = tabular.multinomial(shares.expand(4000, cells), 50, generator=stream(6))
    assert (draws.sum(1) == 50).all() and (draws >= 0).all() and (draws == draws.round()).all()
    if cells == 1:
        return

    def chi_square(p: Tensor) -> float:
        """In standard deviations from its expectation, over all 200,000 draws."""
        expected = 200_000 * p[0]
        return (((draws.sum(0) - expected) ** 2 / expected).sum().item() - (cells - 1)) / math.sqrt(2 * (cells - 1))

    assert abs(chi_square(shares)) < 5
    wrong = shares * torch.where(torch.arange(cells) % 2 == 0, 1.15, 1.0)
    assert chi_square(wrong / wrong.sum()) > 10
    variance = 50 * shares[0] * (1 - shares[0])
    error = variance * ((1 / variance + 2) / 4000).sqrt()  # of a sample variance, nearly Poisson
    assert ((draws.var(0) - variance) / error).abs().max() < 5


def test_multinomial_never_draws_the_impossible() -> None:
    shares = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]], dtype=F64)
    counts = tabular.multinomial(shares, 1000, generator=stream())
    assert (counts[shares == 0] == 0).all()
    assert counts.sum((1, 2)).tolist() == [1000] * 3


@every_sampler
def test_sampled_gradients_are_unbiased(sampler: Sampler) -> None:
    """The mean of 4,000 within 4.5 standard errors of the exact one; a biased one is far off."""
    here = drawn(1, 4)
    logps = torch.randn(1, 4, dtype=F64, generator=stream(8)).log_softmax(-1)
    joint = exact(sampler.at(here.beta), logps, here.ref, here.reward).joint
    shares = 2 * joint * (here.reward[:, :, None] - here.reward[:, None, :]).sigmoid()
    copies = World(here.reward.expand(4000, 4), here.ref.expand(4000, 4), here.beta)
    counts = tabular.multinomial(shares.expand(4000, 4, 4), 16, generator=stream(9)) / 16
    loss = partial(losses.dpo, beta=here.beta)
    sampled = tabular.gradient(every_pair(copies), logps.expand(4000, 4), counts, loss)
    error = sampled.std(0) / math.sqrt(4000)

    def off(expected: Tensor) -> float:
        return ((sampled.mean(0) - expected) / error).abs().max().item()

    exactly = tabular.gradient(every_pair(here), logps, shares, loss)[0]
    assert off(exactly) < 4.5
    assert off(1.3 * exactly) > 4.5


PUBLISHED_FLOORS = [
    (0.05, 512, {"uniform": 0.0234, "mix_r": 0.0204, "capped": 0.0210}),
    (0.05, 2048, {"uniform": 0.0113, "mix_r": 0.0109, "capped": 0.0112}),
    (0.05, 8192, {"uniform": 0.0058, "mix_r": 0.0055, "capped": 0.0052}),
    pytest.param(0.0125, 8192, {"uniform": 0.0028, "mix_r": 0.0028, "capped": 0.0028}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rate, samples, floors", PUBLISHED_FLOORS)
def test_noise_floors(rate: float, samples: int, floors: dict[str, float]) -> None:
    """From the optimum to rest: as published, as predicted."""
    here = instances(FIGURE, 3.0, copies=8)
    warm = round(25 / rate)  # the slowest direction forgets in about 16/rate steps
    for name, expected in floors.items():
        how = {"rate": rate, "samples": samples, "start": here.optimum, "generator": stream(10)}
        path = descend(here, ZOO[name], steps=2 * warm, **how)
        measured = path.mean_error[warm:].mean().item()
        assert measured == pytest.approx(expected, rel=0.15)
        predicted = tabular.noise_floor(tabular.spectrum(here, ZOO[name]), 3.0, path.rate[-1], samples)[0].item()
        assert measured == pytest.approx(predicted, rel=0.08)


def test_sampled_at_the_matched_rate_is_fast_and_then_stuck() -> None:
    here = instances(FIGURE, 3.0, copies=8)
    arrives = {}
    for name in ("mix_r", "capped"):
        path = descend(here, ZOO[name], steps=40, samples=8192, generator=stream(11))
        mean = path.mean_error.mean(1)
        predicted = tabular.noise_floor(tabular.spectrum(here, ZOO[name]), 3.0, path.rate[-1], 8192).mean().item()
        assert mean[20:].mean().item() == pytest.approx(predicted, rel=0.1) == pytest.approx(0.11, abs=0.015)
        arrives[name] = int((mean < 0.15).int().argmax())
    assert arrives["capped"] <= 3 and 9 <= arrives["mix_r"] <= 12


def test_a_floor_beyond_the_stability_limit_is_infinite() -> None:
    here = instances(FIGURE, 3.0)
    curvature = tabular.spectrum(here, ZOO["mix_r"])
    assert tabular.noise_floor(curvature, 3.0, 2.2 * tabular.best_rate(curvature, 3.0), 100).item() == math.inf


def test_one_stream_one_trajectory() -> None:
    here = drawn(3)
    a, b, c = (descend(here, ZOO["mix_p"], steps=4, samples=50, generator=stream(s)).error for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_soft_labels_have_the_gradient_of_hard_ones() -> None:
    """Of exact DPO: the cross-entropy to σ(r_a − r_b) is the mean over labels."""
    here = drawn(5)
    for sampler in THEORY.values():
        soft = partial(losses.soft_dpo, beta=here.beta)
        hard, other = (descend(here, sampler, steps=6, loss=loss).logps for loss in (None, soft))
        torch.testing.assert_close(hard, other, rtol=0, atol=1e-9)


def lopsided(pair: PairLogps) -> Tensor:
    """A loss of one side only."""
    return -pair.chosen.sum


def test_a_loss_may_read_one_side_only() -> None:
    here = drawn(1, 3)
    shares = torch.full((1, 3, 3), 1 / 9, dtype=F64)
    expected = here.ref.exp() - 1 / 3
    torch.testing.assert_close(tabular.gradient(every_pair(here), here.ref, shares, lopsided), expected)


def test_losses_that_need_more_are_refused() -> None:
    def of_tokens(pair: PairLogps) -> Tensor:
        if pair.chosen.tokens is None:
            raise ValueError("this loss reads tokens")
        return pair.chosen.tokens.sum(1)

    def of_batch(pair: PairLogps) -> Tensor:
        return pair.chosen.sum - pair.chosen.sum.mean()

    def of_sign(pair: PairLogps) -> Tensor:
        assert pair.strength is not None
        return pair.strength.log() * pair.chosen.sum

    for loss, said in (
        (of_tokens, "sums, a reference and a strength only: this loss reads tokens"),
        (of_batch, "compares the pairs of a batch"),
        (of_sign, "not finite where the worse response is preferred"),
    ):
        with pytest.raises(ValueError, match=said):
            descend(drawn(1), samplers.uniform(), steps=1, loss=loss)


def test_soft_values_through_a_margin() -> None:
    """The pair's own numbers reach the loss: sums, reference and strength in their places."""
    seen = []

    def loss(pair: PairLogps) -> Tensor:
        seen.append(pair)
        return F.softplus(-losses.dpo(pair))

    here = drawn(2, 3)
    tabular.gradient(every_pair(here), here.ref, torch.ones(2, 3, 3, dtype=F64), loss)
    (pair,) = seen
    at = 9 + 3 * 1 + 2  # instance 1, chosen 1, rejected 2
    assert pair.ref_chosen is not None and pair.ref_rejected is not None and pair.strength is not None
    assert pair.chosen.sum[at] == here.ref[1, 1] and pair.rejected.sum[at] == here.ref[1, 2]
    assert pair.ref_chosen.sum[at] == here.ref[1, 1] and pair.ref_rejected.sum[at] == here.ref[1, 2]
    assert pair.strength[at] == here.reward[1, 1] - here.reward[1, 2]


@pytest.mark.parametrize(
    "reward, ref, beta, said",
    [
        ([[0.0]], None, 1.0, "at least 2 responses"),
        ([[0.0, 1.0]], [[0.0, 1.0, 2.0]], 1.0, r"reward \(1, 2\) and ref \(1, 3\)"),
        ([[0.0, 1.0], [0.0, math.inf]], None, 1.0, "reward of instance 1, response 1 is inf"),
        ([[0.0, 1.0]], [[math.nan, 1.0]], 1.0, "ref of instance 0, response 0 is nan"),
        ([[0.0, 1.0]], None, 0.0, "beta = 0.0"),
    ],
)
def test_worlds_that_are_refused(reward: list, ref: list | None, beta: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        world(torch.tensor(reward), beta=beta, ref=None if ref is None else torch.tensor(ref))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"steps": -1}, "option steps=-1: give at least 0"),
        ({"rate": "fast"}, "rate='fast'"),
        ({"rate": 0.0}, "rate=0.0: give a number above 0"),
        ({"scale": math.nan}, "scale=nan"),
        ({"samples": 0}, "samples=0: give at least 1"),
        ({"noise": 0.6}, "noise=0.6"),
    ],
)
def test_options_that_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        descend(drawn(1), samplers.uniform(), **{"steps": 1, **options})


def test_a_sampler_of_shares_has_no_matched_rate_of_its_own() -> None:
    here = drawn(1)
    with pytest.raises(ValueError, match="has no mass"):
        tabular.matched_rate(exact(samplers.on_policy(), here.ref, here.ref, here.reward), 1.0)
    matched, best = (descend(here, samplers.on_policy(), steps=1, rate=rate).rate for rate in ("matched", "best"))
    assert torch.equal(matched, best)
