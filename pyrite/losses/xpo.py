"""Exploratory preference optimization."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.dpo import dpo
from pyrite.options import NonNegative, Positive

__all__ = ["xpo"]


def xpo(
    pair: PairLogps,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1e-3,
    from_ref: Literal["rejected", "chosen", "both"] = "rejected",
) -> Tensor:
    """Exploratory preference optimization: DPO that makes the reference's own responses a little less likely.

    loss = −log σ(βΔ) + α log π(ỹ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    ỹ, a response drawn from the reference, is the one `from_ref` names; for "both" their mean log-probability counts.
    PairLogps of B pairs -> (B,); ln 2 + α log π_ref(ỹ) at policy = reference. Raises ValueError without a reference.

    Xie et al. 2024, arXiv:2405.21046, algorithm 1.
    """
    chosen, rejected = pair.chosen.sum, pair.rejected.sum
    drawn = {"rejected": rejected, "chosen": chosen, "both": (chosen + rejected) / 2}[from_ref]
    return dpo(pair, beta=beta) + alpha * drawn
