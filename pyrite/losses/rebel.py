"""Regression to relative rewards."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin, strength
from pyrite.options import Positive

__all__ = ["rebel"]


def rebel(pair: PairLogps, *, eta: Positive = 1.0) -> Tensor:
    """Regression to relative rewards: the margin is a prediction of the reward difference, to be made exact.

    loss = (Δ/η − strength)²,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), in squared units of the reward; strength² at policy = reference. strength is the
    reward difference and may be negative; 1/η is the strength of the KL. Raises ValueError without a reference
    or strengths.

    Gao et al. 2024, arXiv:2404.16767, algorithm 1.
    """
    return (margin(pair) / eta - strength(pair)) ** 2
