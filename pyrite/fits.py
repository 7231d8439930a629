"""Overoptimization curves: how gold rises and falls with d = √KL, the KL in nats.

Gao, Schulman and Hilton 2022, arXiv:2210.10760, section 1.
"""

from __future__ import annotations

import math
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """Coefficients of a gold curve and its peak: d* in √nats and the gold there (inf: it never turns)."""

    a: float
    b: float
    peak: float
    peak_gold: float


def fit_best_of_n(d: Tensor, gold: Tensor) -> Fit:
    """Least squares of R(d) = d (a − b d), the shape of best-of-n; peak d* = a/2b, R* = a²/4b.

    d (M,) √nats from the initial policy and gold (M,) relative to it (R(0) = 0, so no intercept).
    Raises ValueError for fewer than two different positive d.

    >>> d = torch.linspace(0, 6, 20)
    >>> round(fit_best_of_n(d, d * (0.6 - 0.1 * d)).peak, 4)
    3.0
    """
    d = torch.as_tensor(d, dtype=torch.float64)
    a, b = _least_squares(d, d * d, gold)
    if b <= 0:
        return Fit(a, b, math.inf, math.inf)
    peak = max(a, 0.0) / (2 * b)
    return Fit(a, b, peak, peak * (a - b * peak))


def fit_rl(d: Tensor, gold: Tensor) -> Fit:
    """Least squares of R(d) = d (a − b ln d), the shape of reinforcement learning.

    The peak is at d* = e^{a/b − 1}, R* = b d*. Arguments and errors as in `fit_best_of_n`.
    """
    d = torch.as_tensor(d, dtype=torch.float64)
    a, b = _least_squares(d, torch.xlogy(d, d), gold)
    if b <= 0 or a / b > 700:  # beyond, the exponential leaves float64
        return Fit(a, b, math.inf, math.inf)
    peak = math.exp(a / b - 1)
    return Fit(a, b, peak, b * peak)


def _least_squares(d: Tensor, bend: Tensor, gold: Tensor) -> tuple[float, float]:
    """a, b of gold ≈ a d − b bend."""
    gold = torch.as_tensor(gold, dtype=torch.float64)
    if d.ndim != 1 or d.shape != gold.shape or not torch.isfinite(torch.stack([d, gold])).all():
        raise ValueError(
            f"fit: d {tuple(d.shape)} and gold {tuple(gold.shape)} must be finite, (M,) each; drop missing points"
        )
    if (d < 0).any() or len(d[d > 0].unique()) < 2:
        raise ValueError("fit: needs at least two different positive values of d = √KL, and none negative")
    return _solved(d.tolist(), (-bend).tolist(), gold.tolist())


def _solved(first: list[float], second: list[float], wanted: list[float]) -> tuple[float, float]:
    """The least squares a, b of wanted ≈ a first + b second, the second made orthogonal to the first.

    Exact sums: a library's solver may change its last bits with the place of its memory, and a resumed run must not.
    """

    def dot(x: list[float], y: list[float]) -> float:
        return math.fsum(map(mul, x, y))

    shared = dot(first, second) / dot(first, first)
    rest = [y - shared * x for x, y in zip(first, second, strict=True)]
    b = dot(wanted, rest) / dot(rest, rest)
    return (dot(wanted, first) - b * dot(first, second)) / dot(first, first), b
