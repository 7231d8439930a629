"""DPO with an offset."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin, strength
from pyrite.options import NonNegative, Positive

__all__ = ["odpo"]


def odpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """DPO with an offset: the stronger the preference, the larger the margin to reach.

    loss = −log σ(βΔ − α log strength),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); log(1 + strength^α) at policy = reference. Strengths are positive score
    differences: 0 asks for nothing, a negative one gives NaN. Raises ValueError without a reference or strengths.

    Amini et al. 2024, arXiv:2402.10571.
    """
    return -F.logsigmoid(beta * margin(pair) - alpha * strength(pair).log())
