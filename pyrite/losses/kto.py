"""Kahneman-Tversky optimization on pairs."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import log_ratios
from pyrite.options import NonNegative, Positive

__all__ = ["kto_pair"]


def kto_pair(
    pair: PairLogps,
    *,
    beta: Positive = 0.1,
    z0: NonNegative = 0.0,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization, both responses of a pair at once.

    loss = λ_D (1 − σ(β(u − z₀))) + λ_U (1 − σ(β(z₀ − v))),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 1 at policy = reference, z₀ = 0 and λ = 1. `desirable` is λ_D, `undesirable` λ_U.
    z₀ in nats stands for KL(π ‖ π_ref), which the paper estimates from mismatched prompts and responses; pairs hold
    none, so it is a constant here: 0, the estimate's floor, or a value measured before. Raises ValueError without
    a reference.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    chosen, rejected = log_ratios(pair)
    return desirable * (beta * (z0 - chosen)).sigmoid() + undesirable * (beta * (rejected - z0)).sigmoid()
