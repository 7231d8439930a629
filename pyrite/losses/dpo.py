"""Direct preference optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin


def dpo(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization; with label smoothing ε, conservative DPO.

    loss = −(1−ε) log σ(βΔ) − ε log σ(−βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. ε in [0, ½] is the share of labels
    believed flipped: past βΔ = ln((1−ε)/ε) the loss pulls back. Raises ValueError without a reference.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ε: Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3.
    """
    logits = beta * margin(pair)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
