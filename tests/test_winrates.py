"""Win rates: the published definition, independent fits, symmetries, and intervals that cover what they promise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from pyrite.math import statistics, winrates
from pyrite.math.winrates import FREE, GAMED, Comparisons, Prior

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "winrates.json"
SEEDS = st.integers(0, 10_000)


def world(seed: int, models: int = 3, prompts: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Wins in [0, 1], gaps and difficulties in which length and difficulty matter."""
    g = torch.Generator().manual_seed(seed)
    gap = winrates.length_gap(*(200 + 400 * torch.rand(models, prompts, generator=g) for _ in range(2)))
    gamma = torch.randn(prompts, generator=g).double()
    skill = torch.randn(models, 1, generator=g).double()
    chance = torch.sigmoid(-1.5 * gap + 0.8 * gamma + skill)
    wins = (torch.rand(chance.shape, generator=g) < chance).double()
    return torch.where(torch.rand(chance.shape, generator=g) < 0.1, 0.5, wins), gap, gamma


def lc(wins: Tensor, gap: Tensor, gamma: Tensor | None = None, **options) -> float:
    coefficients = winrates.fit(wins, gap, gamma, **options)
    return winrates.controlled(coefficients, torch.zeros_like(gap) if gamma is None else gamma).mean().item()


def scipy_fit(design: Tensor, y: Tensor, weight: Tensor, mean: list[float], precision: list[float]) -> np.ndarray:
    x, t, w = (value.double().numpy() for value in (design, y, weight))

    def loss(b: np.ndarray) -> float:
        z = x @ b
        return float((w * (np.logaddexp(0, z) - t * z)).sum() + 0.5 * (np.array(precision) * (b - mean) ** 2).sum())

    return minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-8}).x


def test_preferences_and_raw_rate_worked() -> None:
    wins = winrates.from_preferences(torch.tensor([1.0, 2.0, 0.0, 1.5, 1.25, math.nan]))
    assert wins[:5].tolist() == [0, 1, 0.5, 0.5, 0.25] and wins[5].isnan()
    rate, error = winrates.win_rate(wins)
    seen = [0, 100, 50, 50, 25]
    assert rate.item() == pytest.approx(45) == np.mean(seen)
    assert error.item() == pytest.approx(np.std(seen, ddof=1) / 5**0.5)


def test_length_gap_worked() -> None:
    baseline, model = torch.tensor([[10.0, 20, 30, 7]]), torch.tensor([[6.0, 22, 20, math.nan]])
    d = np.array([4.0, -2, 10])
    gap = winrates.length_gap(baseline, model)
    assert gap[0, :3].tolist() == pytest.approx(np.tanh(d / d.std(ddof=1)).tolist())  # not centered
    assert gap[0, 3].isnan()
    same = winrates.length_gap(torch.tensor([5.0, 9, 9]), torch.tensor([2.0, 6, math.nan]))
    assert same[:2].tolist() == [0, 0] and same[2].isnan()
    assert winrates.length_gap(torch.tensor([5.0]), torch.tensor([3.0])).tolist() == [0]


def test_controlled_worked() -> None:
    """The worked value theta = -2, psi = 1, gamma = (-1, 0, 1)."""
    gamma = torch.tensor([-1.0, 0, 1]).double()
    value = winrates.controlled(torch.tensor([-1.3, 1, -2]).double(), gamma).mean().item()
    assert value == pytest.approx(14.519007, abs=1e-6)
    assert winrates.controlled(torch.zeros(3).double(), gamma).tolist() == [50, 50, 50]


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_fit_is_the_maximum_another_optimizer_finds(seed: int) -> None:
    wins, gap, gamma = (value[0] if value.ndim == 2 else value for value in world(seed))
    design = torch.stack([gap, gamma, torch.ones_like(gap)], 1)
    want = scipy_fit(design, wins, torch.ones_like(wins), [GAMED.mean, 0, 0], [GAMED.precision, 1e-3, 1e-3])
    assert winrates.fit(wins, gap, gamma).tolist() == pytest.approx(want.tolist(), abs=1e-4)


def test_gamed_rows_take_the_place_of_the_prior() -> None:
    wins, gap, gamma = world(5)
    rows = wins[1:], gap[1:]
    design = torch.cat(
        [torch.stack([x, gamma, torch.full_like(x, own)], 1) for x, own in zip(gap, (1, 0, 0), strict=True)]
    )
    weight = torch.cat([torch.ones(120), torch.full((240,), 0.1)])
    want = scipy_fit(design, wins.flatten(), weight, [0, 0, 0], [1e-3] * 3)
    got = winrates.fit(wins[0], gap[0], gamma, gamed=rows)
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-4)
    assert not torch.allclose(got, winrates.fit(wins[0], gap[0], gamma, prior=FREE), atol=1e-2)


@settings(max_examples=5, deadline=None)
@given(SEEDS)
def test_difficulty_is_the_joint_maximum(seed: int) -> None:
    wins, gap, _ = world(seed, models=3, prompts=25)
    wins[0, 3], gap[1, 4] = math.nan, math.nan
    rows = [(m, i) for m in range(3) for i in range(25) if not (wins[m, i].isnan() or gap[m, i].isnan())]
    design = torch.zeros(len(rows), 6 + 25).double()
    for row, (m, i) in enumerate(rows):
        design[row, m], design[row, 3 + m], design[row, 6 + i] = gap[m, i], 1, 1
    y = torch.stack([wins[m, i] for m, i in rows])
    precision = [GAMED.precision] * 3 + [1e-3] * 3 + [1] * 25
    want = scipy_fit(design, y, torch.ones(len(rows)), [GAMED.mean] * 3 + [0] * 28, precision)
    assert winrates.difficulty(wins, gap).tolist() == pytest.approx(want[6:].tolist(), abs=1e-4)


def test_difficulty_needs_several_models() -> None:
    with pytest.raises(ValueError, match="one model alone"):
        winrates.difficulty(torch.rand(1, 9), torch.rand(1, 9))


def test_the_baseline_against_itself() -> None:
    """Ties of equal length: 50, whatever prior and difficulties are."""
    tied, gamma = torch.full((40,), 0.5).double(), torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    assert lc(tied, torch.zeros(40).double(), gamma) == 50
    found = winrates.rates(Comparisons(tied[None], torch.zeros(1, 40), gamma), n_boot=10)
    assert (found.raw.item(), found.lc.item(), found.lc_error.item()) == (50, 50, 0)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.booleans(), st.sampled_from([GAMED, FREE, Prior(-1.0, 3.0)]))
def test_swapping_sides_gives_the_rest(seed: int, hard: bool, prior: Prior) -> None:
    wins, gap, gamma = world(seed)
    for w, x in zip(wins, gap, strict=True):
        there, back = (lc(y, z, gamma if hard else None, prior=prior) for y, z in ((w, x), (1 - w, -x)))
        assert there + back == pytest.approx(100, abs=1e-6)
    hard_here, hard_there = (winrates.difficulty(y, z) for y, z in ((wins, gap), (1 - wins, -gap)))
    assert torch.allclose(hard_here, -hard_there, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_without_length_differences_the_rate_is_the_raw_one(seed: int) -> None:
    """By the normal equation of theta, up to the small ridge."""
    wins, gap, gamma = world(seed)
    assert lc(wins[0], 0 * gap[0], gamma) == pytest.approx(winrates.win_rate(wins[0]).rate.item(), abs=1e-2)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_order_and_scale_of_difficulty_change_nothing(seed: int) -> None:
    wins, gap, gamma = world(seed)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    value = lc(wins[0], gap[0], gamma)
    assert lc(wins[0][order], gap[0][order], gamma[order]) == pytest.approx(value, abs=1e-9)
    assert lc(wins[0], gap[0], 3 * gamma) == pytest.approx(value, abs=1e-2)
    missing = wins[0].clone()
    missing[order[:30]] = math.nan  # a prompt without a verdict is as good as absent from the fit
    kept = order[30:]
    assert torch.allclose(
        winrates.fit(missing, gap[0], gamma), winrates.fit(wins[0][kept], gap[0][kept], gamma[kept]), atol=1e-8
    )


def test_longer_answers_are_not_rewarded() -> None:
    """A model whose only merit is length: raw above, length-controlled at 50."""
    g = torch.Generator().manual_seed(0)
    gap = winrates.length_gap(1000 + 300 * torch.randn(4000, generator=g), 1400 + 300 * torch.randn(4000, generator=g))
    wins = (torch.rand(4000, generator=g) < torch.sigmoid(-2 * gap)).double()
    assert winrates.win_rate(wins).rate > 70
    assert lc(wins, gap) == pytest.approx(50, abs=3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_separable_data_have_a_rate(value: float) -> None:
    _, gap, gamma = world(2)
    always = torch.full((120,), value).double()
    for prior in (GAMED, FREE):
        assert lc(always, gap[0], gamma, prior=prior) == pytest.approx(100 * value, abs=0.2)
    by_length = (gap[0] < 0).double()  # perfectly explained by length
    assert 0 < lc(by_length, gap[0], gamma) < 100
    assert lc(by_length, gap[0], prior=FREE) == pytest.approx(50, abs=20)


def test_resamples_draw_whole_prompts() -> None:
    counts = torch.cat([*statistics.resamples(50, n_boot=400, generator=torch.Generator().manual_seed(0))])
    assert (counts.sum(1) == 50).all()
    assert counts.mean(0).tolist() == pytest.approx([1.0] * 50, abs=0.25)
    assert counts.var().item() == pytest.approx(1 - 1 / 50, abs=0.05)


def test_a_resample_is_a_fit_of_its_prompts() -> None:
    wins, gap, gamma = world(3)
    counts = torch.cat([*statistics.resamples(120, n_boot=4, generator=None)])
    found = winrates.rates(Comparisons(wins, gap, gamma), n_boot=4)
    for b in range(4):
        drawn = torch.arange(120).repeat_interleave(counts[b].long())
        for m in range(3):
            assert found.raw_boot[b, m].item() == pytest.approx(100 * wins[m, drawn].mean().item())
            again = lc(wins[m, drawn], gap[m, drawn], gamma[drawn])
            assert found.lc_boot[b, m].item() == pytest.approx(again, abs=1e-6)


def test_a_model_does_not_differ_from_itself() -> None:
    wins, gap, gamma = (value[[0, 0]] if value.ndim == 2 else value for value in world(4))
    found = winrates.rates(Comparisons(wins, gap, gamma), n_boot=50)
    for value, boot in ((found.raw, found.raw_boot), (found.lc, found.lc_boot)):
        difference = winrates.interval(value[0] - value[1], boot[:, 0] - boot[:, 1])
        assert [x.item() for x in difference] == pytest.approx([0, 0, 0], abs=1e-9)


def test_few_verdicts() -> None:
    wins, gap, _ = world(6)
    wins[1, 3:] = math.nan
    found = winrates.rates(Comparisons(wins, gap), n_boot=200)
    assert found.raw_boot[:, 1].isnan().any()  # a resample without any of its three verdicts
    lo, hi = winrates.interval(found.raw, found.raw_boot)[1:]
    assert lo.isfinite().all() and hi.isfinite().all() and found.lc_error.isfinite().all()
    wins[1, 1:] = math.nan
    with pytest.raises(ValueError, match=r"too few verdicts on model 1 \(1\)"):
        winrates.rates(Comparisons(wins, gap), n_boot=2)
    with pytest.raises(ValueError, match=r"level = 1\.0"):
        winrates.interval(found.raw, found.raw_boot, level=1.0)


def simulated(g: torch.Generator, prompts: int = 150) -> tuple[Tensor, Tensor]:
    """Two models, alike on each prompt: their raw rates differ by 10 points on average, their skills by ½."""
    hard = 2.5 * torch.randn(prompts, generator=g).double()
    gap = winrates.length_gap(*(300 * torch.rand(2, prompts, generator=g) for _ in range(2)))
    chance = torch.sigmoid(hard + torch.tensor([[1.0], [0.0]]).double())
    return (torch.rand(1, prompts, generator=g).double() < chance).double(), gap


def test_paired_intervals_cover_as_often_as_they_say() -> None:
    """The difference's interval at 90 % and at 50 %; resampled apart, as if unpaired, it is far too wide."""
    g = torch.Generator().manual_seed(0)
    hard = 2.5 * torch.randn(1_000_000, generator=g).double()
    truth = 100 * (torch.sigmoid(hard + 1) - torch.sigmoid(hard)).mean().item()
    hit = {"paired 90": 0, "paired 50": 0, "apart 50": 0}
    for _ in range(300):
        wins, gap = simulated(g)
        found = winrates.rates(Comparisons(wins, gap), n_boot=100, generator=g)
        raw, boot = found.raw[0] - found.raw[1], found.raw_boot
        apart = boot[:, 0] - boot[torch.randperm(100, generator=g), 1]
        kinds = ((boot[:, 0] - boot[:, 1], 0.9), (boot[:, 0] - boot[:, 1], 0.5), (apart, 0.5))
        for name, (one, level) in zip(hit, kinds, strict=True):
            _, lo, hi = winrates.interval(raw, one, level=level)
            hit[name] += bool(lo <= truth <= hi)
    assert 250 <= hit["paired 90"] <= 290
    assert 120 <= hit["paired 50"] <= 180
    assert hit["apart 50"] >= 210


def test_controlled_intervals_cover_the_truth() -> None:
    """Where the model holds, with the coefficients' uncertainty; the standard error of the predictions would be 0."""
    g = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(200):
        gap = winrates.length_gap(*(300 * torch.rand(1, 200, generator=g) for _ in range(2)))
        wins = (torch.rand(1, 200, generator=g) < torch.sigmoid(-1.5 * gap - 1)).double()
        found = winrates.rates(Comparisons(wins, gap), prior=FREE, n_boot=100, generator=g)
        _, lo, hi = winrates.interval(found.lc, found.lc_boot, level=0.9)
        hits += bool(lo <= 100 / (1 + math.e) <= hi)
    assert 164 <= hits <= 194


def published() -> tuple[dict, Tensor, Tensor]:
    if not PUBLISHED.exists():
        pytest.skip("no published win rates here")
    models = json.loads(PUBLISHED.read_text())["models"]
    columns = torch.tensor([one["rows"] for one in models.values()], dtype=torch.float64).unbind(-1)
    _, length, baseline, preference = columns
    stated = {
        name: [one["published"][name] for one in models.values()] for name in next(iter(models.values()))["published"]
    }
    return stated, winrates.from_preferences(preference), winrates.length_gap(baseline, length)


def test_published_raw_rates() -> None:
    stated, wins, _ = published()
    rate, error = winrates.win_rate(wins)
    assert (rate / 100).tolist() == pytest.approx([value / 100 for value in stated["win_rate"]], abs=1e-6)
    assert error.tolist() == pytest.approx(stated["standard_error"], abs=1e-6)
    assert (wins > 0.5).sum(1).tolist() == stated["n_wins"] and (wins == 0.5).sum(1).tolist() == stated["n_draws"]


def test_published_length_controlled_rates() -> None:
    """Without the original's own difficulties and gamed rows; either stand-in left out, it is worse."""
    stated, wins, gap = published()
    want = torch.tensor(stated["length_controlled_winrate"], dtype=torch.float64)

    def error(gamma: Tensor | None, prior: Prior) -> tuple[float, float]:
        got = torch.tensor([lc(w, x, gamma, prior=prior) for w, x in zip(wins, gap, strict=True)])
        return (got - want).abs().mean().item(), (got - want).abs().max().item()

    mean, most = error(winrates.difficulty(wins, gap), GAMED)
    assert mean < 1.1 and most < 3  # measured: 1.00 and 2.69 points
    assert error(None, GAMED)[0] > 4
    assert error(winrates.difficulty(wins, gap, prior=FREE), FREE)[0] > 2
