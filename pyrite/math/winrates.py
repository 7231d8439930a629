"""Win rates against a baseline: raw, and with the lengths of the answers controlled for, by a logistic model.

Axes: M models, Q prompts, B resamples. `wins` is the judge's P(model beats baseline) in [0, 1], ½ at a tie, NaN
without a verdict. `gap` is tanh(d/sd(d)), d the baseline's length minus the model's; NaN where a model has no row.
Rates are percentages, as leaderboards print them. Estimates are float64.

Dubois et al. 2024, arXiv:2404.04475, section 3; the settings of AlpacaEval's `length_controlled_v1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrite.math.statistics import Interval, resamples

CHUNK = 1 << 20  # resamples x rows worked on at once: bounds memory
RIDGE = 1e-3  # precision of the coefficients that have no prior: separable data then have a (far) solution
NODES = 15  # of the integral over unknown difficulties
GAMED_WEIGHT = 0.2  # of the rows of all gamed baselines together, each of the model's own rows weighing 1


class Rate(NamedTuple):
    """A rate and its standard error over prompts, in percent."""

    rate: Tensor
    error: Tensor


class Prior(NamedTuple):
    """What is known of the length coefficient φ before a model's own rows: Normal(mean, 1/precision)."""

    mean: float
    precision: float


# For when the rows of AlpacaEval's two gamed baselines are not at hand: the information Σ 0.1 x² p(1 − p) about φ in
# their 2 x 805 rows, centered where the published length-controlled rates come out without bias. That is at -2.0 where
# the difficulties of the prompts are known, and at -1.8 where they are estimated from a few models. The mean of the two
# baselines' own φ, -1.61, is too weak for other models: their rates came out .60 points too low on average.
KNOWN = Prior(-2.0, 13.6)
GAMED = Prior(-1.8, 13.6)
FREE = Prior(0.0, 0.0)
# Standard deviation of the log-odds of prompts of which nobody says how hard they are: the value at which 50 models of
# the public leaderboard, each by itself, come out best, and two that bound what is not known.
SPREAD, SPREADS = 3.5, (2.0, 5.0)


@dataclass(frozen=True, eq=False)
class Comparisons:
    """M models judged on Q prompts against one baseline.

    wins, gap (M, Q); difficulty (Q,) of the prompts, None where unknown. gamed: (wins, gap), each (G, Q), of the
    baseline told to be brief or long-winded, against itself; their rows then take the place of the prior. spread: the
    standard deviation, in log-odds, of unknown difficulties that are integrated out; without difficulties only.
    """

    wins: Tensor
    gap: Tensor
    difficulty: Tensor | None = None
    gamed: tuple[Tensor, Tensor] | None = None
    spread: float = 0.0


@dataclass(frozen=True, eq=False)
class Rates:
    """Of M models, in percent: raw and lc with `..._error`; coefficients (M, 3) φ, ψ, θ; B resamples (B, M) of each.

    raw_error is the standard error of a mean. lc_error is the deviation over the resamples: with the coefficients'
    uncertainty, unlike the standard error of the predictions' mean that leaderboards print.
    """

    raw: Tensor
    raw_error: Tensor
    lc: Tensor
    lc_error: Tensor
    coefficients: Tensor
    raw_boot: Tensor
    lc_boot: Tensor


def from_preferences(preference: Tensor) -> Tensor:
    """Wins of preferences in [1, 2], 2 where the model wins: y = preference − 1, and ½ for 0, a judge's tie."""
    preference = torch.as_tensor(preference).double()
    return torch.where(preference == 0, 0.5, preference - 1)


def win_rate(wins: Tensor) -> Rate:
    """100 · mean y, with the standard error of that mean; prompts without a verdict are left out. (..., Q) -> (...).

    >>> rate, error = win_rate(torch.tensor([1.0, 0.0, 0.5, float("nan")]))
    >>> round(rate.item(), 3), round(error.item(), 3)
    (50.0, 28.868)
    """
    wins = wins.double()
    count = wins.isfinite().sum(-1)
    mean = wins.nanmean(-1)
    spread = (wins - mean[..., None]).square().nansum(-1) / (count - 1)
    return Rate(100 * mean, 100 * (spread / count).sqrt())


def length_gap(baseline: Tensor, model: Tensor) -> Tensor:
    """x = tanh(d / sd(d)), d = baseline − model, lengths in characters; sd over the model's rows, without centering.

    (..., Q) each, NaN where a model has no row -> (..., Q). Where all d are equal their sd is 0, and x = 0.
    """
    d = baseline.double() - model.double()
    count = d.isfinite().sum(-1, keepdim=True)
    spread = (d - d.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    sd = (spread / (count - 1).clamp(min=1)).sqrt()
    return torch.where(sd > 0, torch.tanh(d / sd), d - d)


def fit(
    wins: Tensor,
    gap: Tensor,
    difficulty: Tensor | None = None,
    *,
    prior: Prior = GAMED,
    gamed: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Coefficients (3,) of P(win) = σ(φ x + ψ γ + θ), by maximum likelihood under the prior of φ.

    No intercept besides θ, the model's own; the baseline against itself has θ = ψ = 0, whence its 50 %. wins,
    gap (Q,), difficulty γ (Q,), ψ = 0 without it. With `gamed` rows (weights 0.2/G, θ = 0 for them) there is no
    prior. weight (B, Q): how often each prompt counts in each of B resamples, -> (B, 3). `start` (3,): where to begin.
    """
    own = torch.stack([gap, gap * 0 if difficulty is None else difficulty, torch.ones_like(gap)], -1)
    seen = wins.isfinite() & gap.isfinite()
    times = seen.double() * (1.0 if weight is None else weight)
    if gamed is not None:
        rows, more = _gamed_rows(difficulty, *gamed)
        own, wins = torch.cat([own, rows]), torch.cat([wins, more])
        share = torch.full(times.shape[:-1] + more.shape, GAMED_WEIGHT / len(gamed[0]), dtype=times.dtype)
        seen = torch.cat([seen, more.isfinite() & rows[:, 0].isfinite()])
        times, prior = torch.cat([times, share], -1) * seen, FREE
    mean = torch.tensor([prior.mean, 0.0, 0.0], dtype=torch.float64)
    precision = torch.tensor([prior.precision, RIDGE, RIDGE], dtype=torch.float64).clamp(min=RIDGE)
    return newton(own[seen], wins[seen], times[..., seen], mean=mean, precision=precision, start=start)


def newton(
    design: Tensor, y: Tensor, weight: Tensor, *, mean: Tensor, precision: Tensor, start: Tensor | None = None
) -> Tensor:
    """Maximum of Σ_i w_i [y_i log p_i + (1 − y_i) log(1 − p_i)] − ½ Σ_k λ_k (b_k − m_k)², p = σ(X b).

    design X (N, K), y (N,) in [0, 1], weight (..., N) -> b (..., K). Newton's steps (iteratively reweighted least
    squares), damped by ln(1 + r)/r, r the largest change of a logit: the logistic loss being self-concordant in that
    measure, every step goes up (Sun & Tran-Dinh 2019, arXiv:1703.04599, ν = 2).
    """
    square = (design[:, :, None] * design[:, None]).flatten(1)
    b = (mean if start is None else start).expand(*weight.shape[:-1], -1).clone()
    for _ in range(200):
        p = torch.sigmoid(b @ design.T)
        slope = (weight * (y - p)) @ design - precision * (b - mean)
        bend = ((weight * p * (1 - p)) @ square).unflatten(-1, 2 * design.shape[1:]) + torch.diag(precision)
        step = torch.linalg.solve(bend, slope)
        r = (step @ design.T).abs().amax(-1, keepdim=True).clamp(min=1e-300)
        b = b + step * torch.log1p(r) / r
        if r.max() < 1e-10:
            break
    return b


def fit_spread(
    wins: Tensor,
    gap: Tensor,
    *,
    spread: float,
    prior: Prior = GAMED,
    gamed: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Coefficients (3,) of P(win) = ∫ σ(φ x + θ + spread z) dN(z): prompts of which nobody knows how hard they are.

    By Fisher scoring under the prior of φ, the integral by Gauss and Hermite; ψ = 0. Arguments as of `fit`. The gamed
    rows are of the baseline against itself, and have no spread. weight (B, Q) -> (B, 3).
    """
    seen = wins.isfinite() & gap.isfinite()
    design, y = torch.stack([gap, torch.ones_like(gap)], -1)[seen], wins[seen]
    times, deviation = (seen.double() * (1.0 if weight is None else weight))[..., seen], torch.full_like(y, spread)
    if gamed is not None:
        rows, more = _gamed_rows(None, *gamed)
        kept = more.isfinite() & rows[:, 0].isfinite()
        design, y = torch.cat([design, rows[kept][:, [0, 2]]]), torch.cat([y, more[kept]])
        share = torch.full((*times.shape[:-1], int(kept.sum())), GAMED_WEIGHT / len(gamed[0]), dtype=times.dtype)
        times, deviation, prior = torch.cat([times, share], -1), torch.cat([deviation, more[kept] * 0]), FREE
    mean = torch.tensor([prior.mean, 0.0], dtype=torch.float64)
    precision = torch.tensor([prior.precision, RIDGE], dtype=torch.float64).clamp(min=RIDGE)
    nodes, share = _normal_nodes()
    b = (mean if start is None else start[..., [0, 2]]).expand(*times.shape[:-1], -1).clone()
    for _ in range(200):
        q = torch.sigmoid((b @ design.T)[..., None] + deviation[:, None] * nodes)
        p, d = q @ share, (q * (1 - q)) @ share
        certain = (p * (1 - p)).clamp(min=1e-300)
        slope = (times * (y - p) * d / certain) @ design - precision * (b - mean)
        bend = torch.einsum("...n,ni,nj->...ij", times * d * d / certain, design, design) + torch.diag(precision)
        step = torch.linalg.solve(bend, slope)
        step = step / step.abs().amax(-1, keepdim=True).clamp(min=1.0)
        b = b + step
        if step.abs().max() < 1e-9:
            break
    return torch.stack([b[..., 0], torch.zeros_like(b[..., 0]), b[..., 1]], -1)


def controlled_spread(coefficients: Tensor, spread: float) -> Tensor:
    """The length-controlled win rate in percent over prompts of unknown difficulty, 100 ∫ σ(θ + spread z) dN(z).

    (..., 3) -> (...).

    >>> round(controlled_spread(torch.tensor([0.0, 0.0, -2.0]).double(), 0.0).item(), 6)
    11.920292
    """
    nodes, share = _normal_nodes()
    return 100 * torch.sigmoid(coefficients[..., 2:3] + spread * nodes) @ share


def controlled(coefficients: Tensor, difficulty: Tensor) -> Tensor:
    """P(win) of each prompt in percent, were both answers equally long: 100 σ(ψ γ + θ). (..., 3), (Q,) -> (..., Q).

    Their mean is the length-controlled win rate. Against another model than the baseline, give the difference of the
    two models' coefficients.

    >>> round(controlled(torch.tensor([-1.0, 1.0, -2.0]).double(), torch.tensor([-1.0, 0, 1])).mean().item(), 6)
    14.519007
    """
    return 100 * torch.sigmoid(coefficients[..., 1:2] * difficulty + coefficients[..., 2:3])


def difficulty(wins: Tensor, gap: Tensor, *, prior: Prior = GAMED) -> Tensor:
    """How much easier each prompt is than others to win, γ (Q,), from M models jointly.

    P(win) = σ(φ_m x + θ_m + γ_i) with γ ~ Normal(0, 1) and the prior of φ, at its maximum: Newton's method, the
    many γ eliminated from each step. wins, gap (M, Q). The scale of γ is of no consequence: ψ undoes it.
    Raises ValueError for fewer than 2 models, whose only answers would explain themselves.
    """
    if len(wins) < 2:
        raise ValueError("difficulty: one model alone does not tell hard prompts from its own failures; leave it out")
    seen = wins.isfinite() & gap.isfinite()
    y, x = (torch.where(seen, value, 0.0).double() for value in (wins, gap))
    own = torch.stack([x, seen.double()], 1)  # (M, 2, Q): what φ and θ are multiplied by
    mean = torch.tensor([prior.mean, 0.0], dtype=torch.float64)
    precision = torch.tensor([prior.precision, RIDGE], dtype=torch.float64).clamp(min=RIDGE)
    a, g = mean.repeat(len(y), 1), torch.zeros(y.shape[1], dtype=torch.float64)
    for _ in range(200):
        p = torch.sigmoid((a[:, None] @ own).squeeze(1) + g)
        left, bend = (y - p) * seen, p * (1 - p) * seen
        slope_a = (own @ left[..., None]).squeeze(-1) - precision * (a - mean)
        slope_g = left.sum(0) - g
        bend_g = bend.sum(0) + 1
        cross = (own * bend[:, None]).flatten(0, 1)  # (2M, Q)
        bend_a = torch.block_diag(*((own * bend[:, None]) @ own.mT + torch.diag(precision)))
        step_a = torch.linalg.solve(bend_a - cross / bend_g @ cross.T, slope_a.flatten() - cross @ (slope_g / bend_g))
        step_g = (slope_g - cross.T @ step_a) / bend_g
        step_a = step_a.view_as(a)
        r = max(((step_a[:, None] @ own).squeeze(1) + step_g).abs().max().item(), 1e-300)
        a, g = a + step_a * math.log1p(r) / r, g + step_g * math.log1p(r) / r
        if r < 1e-10:
            break
    return g


def rates(
    found: Comparisons, *, prior: Prior = GAMED, n_boot: int = 1000, generator: torch.Generator | None = None
) -> Rates:
    """Both win rates of M models, and of B resamples of whole prompts, the same for all: so models compare in pairs.

    A resample fits every model again; difficulties and the scale of lengths stay. `generator` is a CPU generator;
    without one, a fixed seed. A model must have a verdict on at least 2 prompts; raises ValueError naming its index.
    """
    verdicts = found.wins.isfinite().sum(-1)
    if (verdicts < 2).any():
        short = int((verdicts < 2).nonzero()[0])
        raise ValueError(f"win rates: too few verdicts on model {short} ({int(verdicts[short])}); give at least 2")
    counts = torch.cat([*resamples(found.wins.shape[1], n_boot=n_boot, generator=generator)])
    raw_boot = 100 * counts @ found.wins.nan_to_num().double().T / (counts @ found.wins.isfinite().double().T)
    fits = [_of_model(found, m, prior, counts) for m in range(len(found.wins))]
    coefficients, lc, lc_boot = (torch.stack(parts, -1) for parts in zip(*fits, strict=True))
    lc_error = (lc_boot - lc_boot.nanmean(0)).square().nanmean(0).sqrt()
    return Rates(*win_rate(found.wins), lc, lc_error, coefficients.T, raw_boot, lc_boot)


def interval(value: Tensor, boot: Tensor, *, level: float = 0.95) -> Interval:
    """Percentile interval of a value (...) from its resamples (B, ...).

    The difference of two models is given as the difference of their columns: they share their resamples. Resamples
    without any verdict on a model are NaN and left out. Raises ValueError for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"interval: level = {level} must lie between 0 and 1, as 0.95")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    lo, hi = boot.nanquantile(tails, dim=0)
    return Interval(value, lo, hi)


def _of_model(found: Comparisons, m: int, prior: Prior, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (3,), length-controlled win rate (), and of the resamples (B,)."""
    wins, gap = found.wins[m].double(), found.gap[m].double()
    if found.difficulty is None and found.spread:
        size = max(1, CHUNK // (NODES * len(gap)))
        whole = fit_spread(wins, gap, spread=found.spread, prior=prior, gamed=found.gamed)
        again = [
            fit_spread(wins, gap, spread=found.spread, prior=prior, gamed=found.gamed, weight=some, start=whole)
            for some in counts.split(size)
        ]
        return whole, controlled_spread(whole, found.spread), controlled_spread(torch.cat(again), found.spread)
    gamma = torch.zeros_like(gap) if found.difficulty is None else found.difficulty.double()
    has = gap.isfinite()
    whole = fit(wins, gap, gamma, prior=prior, gamed=found.gamed)
    rate = controlled(whole, gamma)[has].mean()
    boot = []
    for some in counts.split(max(1, CHUNK // len(gap))):
        again = fit(wins, gap, gamma, prior=prior, gamed=found.gamed, weight=some, start=whole)
        boot.append((controlled(again, gamma) * some)[:, has].sum(-1) / some[:, has].sum(-1))
    return whole, rate, torch.cat(boot)


def _normal_nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights of an integral over a standard normal, by Gauss and Hermite (Golub & Welsch 1969)."""
    beside = torch.arange(1, NODES, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return nodes, vectors[0].square()


def _gamed_rows(difficulty: Tensor | None, wins: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Design (G·Q, 3) and wins (G·Q,) of the gamed baselines."""
    gamma = torch.zeros_like(gap) if difficulty is None else difficulty.expand_as(gap)
    return torch.stack([gap, gamma, torch.zeros_like(gap)], -1).flatten(0, 1), wins.flatten()
