"""Who wins between two methods whose answers are judged by several criteria: outcomes, rates with intervals, the front.

A unit is one prompt under one combination of preferences; a verdict on it is 1 (the first method is better), 0 (a tie),
-1 (the second is), or NaN. Rates are shares of units in [0, 1] under one of two tie rules: `half` counts a tie for half
a win, `without` leaves ties out. Estimates are float64.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.math import seeds
from pyrite.math.statistics import resamples

NONE = (math.nan, math.nan)
Missing = Literal["drop", "tie"]


class DuelRates(NamedTuple):
    """Units by outcome, and the first method's share of wins by both tie rules, each with a 95 % interval.

    half = (W + T/2) / (W + L + T) and its standard error over units, sem;   without = W / (W + L).
    NaN where nothing was decided; an interval is NaN where fewer than 2 prompts have an outcome.
    """

    wins: int
    losses: int
    ties: int
    missing: int
    half: float
    half_lo: float
    half_hi: float
    without: float
    without_lo: float
    without_hi: float
    sem: float


def outcomes(verdicts: Tensor, *, missing: Missing = "drop") -> Tensor:
    """The sign of the sum over criteria: verdicts (C, N) -> (N,) of 1, 0, -1, NaN where a unit is dropped.

    missing: what one criterion without a verdict makes of its unit; dropped, or that criterion a tie. Raises
    ValueError for verdicts that are something else.

    >>> outcomes(torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, -1.0], [-1.0, -1.0, -1.0, -1.0]]))
    tensor([ 1.,  0., -1., -1.], dtype=torch.float64)
    """
    verdicts = torch.as_tensor(verdicts).double()
    if verdicts.ndim != 2 or not (verdicts.isnan() | torch.isin(verdicts, verdicts.new_tensor([-1, 0, 1]))).all():
        raise ValueError("outcomes: verdicts must be (C, N) of 1, 0, -1 or NaN")
    if missing not in ("drop", "tie"):
        raise ValueError(f"outcomes: missing is {missing!r}; choose drop or tie")
    total = (verdicts.nan_to_num() if missing == "tie" else verdicts).sum(0)
    return torch.where(total.isnan(), total, total.sign())  # the sign of NaN is 0


def rates(outcomes: Tensor, prompt: Tensor, *, times: int = 2000, seed: int = 0) -> DuelRates:
    """What N outcomes come to, with percentile intervals by a bootstrap over prompts.

    outcomes (N,) of 1, 0, -1, NaN; prompt (N,) whole numbers from 0, whose units are drawn together. Equal prompts and
    seeds draw alike. Raises ValueError for unequal shapes, and for fewer than 2 resamples.
    """
    if outcomes.shape != prompt.shape or outcomes.ndim != 1:
        raise ValueError(f"rates: outcomes {tuple(outcomes.shape)} and prompt {tuple(prompt.shape)} must both be (N,)")
    if times < 2:
        raise ValueError(f"rates: times = {times}; give at least 2 resamples")
    known = ~outcomes.isnan()
    kinds = torch.stack([outcomes == 1, outcomes == -1, outcomes == 0], -1).double()[known]  # (K, 3)
    prompts, place = prompt[known].unique(return_inverse=True)
    counts = torch.zeros(len(prompts), 3, dtype=torch.float64).index_add_(0, place, kinds)
    wins, losses, ties = (int(count) for count in counts.sum(0))
    half, without = (rate.item() for rate in _rates(counts.sum(0)))
    spread = [NONE, NONE]
    if len(prompts) > 1:
        drawn = resamples(len(counts), n_boot=times, generator=seeds.generator(seed, "duels"))
        spread = [_interval(draws) for draws in _rates(torch.cat([often @ counts for often in drawn]))]
    points = kinds @ torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    sem = points.std().item() / len(points) ** 0.5 if len(points) > 1 else math.nan
    return DuelRates(wins, losses, ties, int((~known).sum()), half, *spread[0], without, *spread[1], sem)


def mirrored(rates: DuelRates) -> DuelRates:
    """The same units seen from the second method."""
    return rates._replace(
        wins=rates.losses,
        losses=rates.wins,
        half=1 - rates.half,
        half_lo=1 - rates.half_hi,
        half_hi=1 - rates.half_lo,
        without=1 - rates.without,
        without_lo=1 - rates.without_hi,
        without_hi=1 - rates.without_lo,
    )


def average(matrix: Tensor) -> Tensor:
    """The unweighted mean over opponents: rates (M, M) -> (M,); the diagonal does not count, nor does NaN.

    >>> average(torch.tensor([[0.0, 0.6, 0.8], [0.4, 0.0, 0.5], [0.2, 0.5, 0.0]]))
    tensor([0.7000, 0.4500, 0.3500], dtype=torch.float64)
    """
    matrix = torch.as_tensor(matrix).double()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"average: a matrix of methods by methods is needed, not {tuple(matrix.shape)}")
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), math.nan).nanmean(-1)


def pareto(points: Tensor) -> Tensor:
    """Which of M points no other one dominates: at least as high in all D objectives, higher in one. (M, D) -> (M,).

    Raises ValueError for coordinates that are not finite.

    >>> pareto(torch.tensor([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]]))
    tensor([ True,  True, False])
    """
    if points.ndim != 2 or not points.isfinite().all():
        raise ValueError(f"pareto: points must be (M, D) and finite, not {tuple(points.shape)} of any kind")
    one, other = points[:, None], points
    return ~((one >= other).all(-1) & (one > other).any(-1)).any(0)


def _rates(counts: Tensor) -> tuple[Tensor, Tensor]:
    """half and without of wins, losses and ties (..., 3), NaN where there is nothing to divide by."""
    wins, losses, ties = counts.unbind(-1)
    return (wins + ties / 2) / (wins + losses + ties), wins / (wins + losses)


def _interval(draws: Tensor) -> tuple[float, float]:
    lo, hi = draws.nanquantile(draws.new_tensor([0.025, 0.975]))
    return lo.item(), hi.item()
