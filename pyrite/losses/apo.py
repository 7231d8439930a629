"""Anchored preference optimization."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import log_ratios
from pyrite.options import Positive

__all__ = ["apo_down", "apo_zero"]


def apo_zero(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Anchored preference optimization where chosen is better than the policy: chosen up, rejected down.

    loss = 1 − σ(βu) + σ(βv),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), in (0, 2); 1 at policy = reference. Raises ValueError without a reference.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Anchored preference optimization where chosen is worse than the policy: chosen down, rejected further down.

    loss = σ(βu) + 1 − σ(β(u − v)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), in (0, 2); 1 at policy = reference, where the two pulls on chosen cancel.
    Raises ValueError without a reference.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return chosen.sigmoid() + (rejected - chosen).sigmoid()
