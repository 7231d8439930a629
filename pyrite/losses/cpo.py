"""Contrastive preference optimization."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.dpo import posterior
from pyrite.options import NonNegative, Positive

__all__ = ["cpo"]


def cpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """Contrastive preference optimization: no reference, but imitation of the chosen response.

    loss = −log σ(β(log π(y_w) − log π(y_l))) − α log π(y_w)/|y_w|

    PairLogps of B pairs -> (B,); what the policy makes of the pair, whatever the reference. α = 0 is posterior.

    Xu et al. 2024, arXiv:2401.08417, eq. 3 with its likelihood term.
    """
    return posterior(pair, beta=beta) - alpha * pair.chosen.mean
