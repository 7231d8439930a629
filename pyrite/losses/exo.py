"""Efficient exact optimization."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin
from pyrite.options import Inside, Positive, require

__all__ = ["exo"]


def exo(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Inside = 1e-3) -> Tensor:
    """Efficient exact optimization on pairs: KL(preference of the policy ‖ label), where DPO has the two exchanged.

    loss = q log(q/(1−ε)) + (1−q) log((1−q)/ε),   q = σ(βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), nats; −ln 2 − ½ ln(ε(1−ε)) at policy = reference (2.761 for ε = 0.001), 0 at
    q = 1−ε. Raises ValueError without a reference, or for ε outside (0, 1), where the KL is infinite.

    Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    require(exo, label_smoothing=label_smoothing)  # else the loss is infinite
    logits = beta * margin(pair)
    kept = F.logsigmoid(logits) - math.log1p(-label_smoothing)
    flipped = F.logsigmoid(-logits) - math.log(label_smoothing)
    return logits.sigmoid() * kept + (-logits).sigmoid() * flipped
