"""Hinges: nothing is learned from a pair once its margin is reached."""

from __future__ import annotations

from torch import Tensor

from pyrite.math.logps import PairLogps, margin
from pyrite.math.ranges import NonNegative, Positive

__all__ = ["hinge", "slic"]


def hinge(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """DPO with a hinge in place of the logistic loss; elsewhere called SLiC or RSO.

    loss = [1 − βΔ]₊,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); 1 at policy = reference. Raises ValueError without a reference.

    Liu et al. 2023, arXiv:2309.06657, its hinge loss on normalized log-probabilities.
    """
    return (1 - beta * margin(pair)).relu()


def slic(pair: PairLogps, *, delta: NonNegative = 1.0, lam: NonNegative = 0.1) -> Tensor:
    """Sequence likelihood calibration: a margin between the log-probabilities, and imitation of the chosen response.

    loss = [δ − log π(y_w) + log π(y_l)]₊ − λ log π(y_w)

    PairLogps of B pairs -> (B,); what the policy makes of the pair, whatever the reference. The response to
    imitate, a free choice in the paper, is the chosen one.

    Zhao et al. 2023, arXiv:2305.10425, section 2.
    """
    chosen, rejected = pair.chosen.sum, pair.rejected.sum
    return (delta - chosen + rejected).relu() - lam * chosen
