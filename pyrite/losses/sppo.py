"""Self-play preference optimization."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import log_ratios, strength
from pyrite.options import Positive

__all__ = ["sppo"]


def sppo(pair: PairLogps, *, beta: Positive = 0.1, soft: bool = False) -> Tensor:
    """Self-play preference optimization: each log-ratio towards its response's probability to win.

    loss = (u − (P−½)/β)² + (v + (P−½)/β)²,   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), nats²; 1/(2β²) at policy = reference for P = 1. P is 1, or with `soft` the
    probability σ(strength) that chosen wins. Raises ValueError without a reference, or with `soft` without strengths.

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with η = 1/β.
    """
    chosen, rejected = log_ratios(pair)
    target = ((strength(pair).sigmoid() if soft else 1.0) - 0.5) / beta
    return (chosen - target) ** 2 + (rejected + target) ** 2
