"""Regression to relative rewards."""

from __future__ import annotations

from torch import Tensor

from pyrite.math.logps import PairLogps, log_ratios, margin, strength
from pyrite.math.ranges import Positive

# ipo: Identity preference optimization.


def ipo(pair: PairLogps, *, tau: Positive = 0.1, length_norm: bool = False) -> Tensor:
    """Identity preference optimization: a margin to reach, not to exceed.

    loss = (Δ − 1/(2τ))²,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), nats²; 1/(4τ²) at policy = reference. With `length_norm` each
    log-ratio is divided by its response's length (nats a token), as some trainers do: the same τ
    then asks for a margin about a response's length times larger. Raises ValueError without a reference
    or, with `length_norm`, for one of another tokenizer.

    Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    return (margin(pair, length_norm=length_norm) - 1 / (2 * tau)) ** 2


# sppo: Self-play preference optimization.


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


# rebel: Regression to relative rewards.


def rebel(pair: PairLogps, *, eta: Positive = 1.0) -> Tensor:
    """Regression to relative rewards: the margin is a prediction of the reward difference, to be made exact.

    loss = (Δ/η − strength)²,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), in squared units of the reward; strength² at policy = reference. strength is the
    reward difference and may be negative; 1/η is the strength of the KL. Raises ValueError without a reference
    or strengths.

    Gao et al. 2024, arXiv:2404.16767, algorithm 1.
    """
    return (margin(pair) / eta - strength(pair)) ** 2
