"""Losses with a target margin: squared losses pull back beyond it, hinges stop there."""

from __future__ import annotations

from torch import Tensor

from pyrite.math.logps import PairLogps, margin, strength
from pyrite.math.ranges import NonNegative, Positive, part


@part
def ipo(pair: PairLogps, *, tau: Positive = 0.1, length_norm: bool = False) -> Tensor:
    """Identity preference optimization: the squared distance to a target margin.

    loss = (Δ − 1/(2τ))²,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), nats²; 1/(4τ²) at policy = reference. With `length_norm` each
    log-ratio is divided by its response's length (nats a token), as some trainers do: the same τ
    then asks for a margin about a response's length times larger. Raises ValueError without a reference
    or, with `length_norm`, for one of another tokenizer.

    Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    return (margin(pair, length_norm=length_norm) - 1 / (2 * tau)) ** 2


@part
def rebel(pair: PairLogps, *, eta: Positive = 1.0) -> Tensor:
    """Regression to relative rewards: the margin should predict the reward difference.

    loss = (Δ/η − strength)²,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), in squared units of the reward; strength² at policy = reference. strength is the
    reward difference and may be negative; 1/η is the strength of the KL. Raises ValueError without a reference
    or strengths.

    Gao et al. 2024, arXiv:2404.16767, algorithm 1.
    """
    return (margin(pair) / eta - strength(pair)) ** 2


@part
def hinge(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """DPO with a hinge in place of the logistic loss; elsewhere called SLiC or RSO.

    loss = [1 − βΔ]₊,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); 1 at policy = reference. Raises ValueError without a reference.

    Liu et al. 2023, arXiv:2309.06657, its hinge loss on normalized log-probabilities.
    """
    return (1 - beta * margin(pair)).relu()


@part
def slic(pair: PairLogps, *, delta: NonNegative = 1.0, lam: NonNegative = 0.1) -> Tensor:
    """Sequence likelihood calibration: a margin between the log-probabilities, and imitation of the chosen response.

    loss = [δ − log π(y_w) + log π(y_l)]₊ − λ log π(y_w)

    PairLogps of B pairs -> (B,), at any reference. The paper leaves open which
    response is imitated; here it is the chosen one.

    Zhao et al. 2023, arXiv:2305.10425, section 2.
    """
    chosen, rejected = pair.chosen.sum, pair.rejected.sum
    return (delta - chosen + rejected).relu() - lam * chosen
