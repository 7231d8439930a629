"""The loss a language model found."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin
from pyrite.options import Inside, Positive, require

__all__ = ["discopop"]


def discopop(pair: PairLogps, *, beta: Positive = 0.1, tau: Inside = 0.05) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: logistic on the wrong side, exponential on the right one.

    loss = −(1−s) log σ(βΔ) + s e^{−βΔ},   s = σ(βΔ/τ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ½ (1 + ln 2) at policy = reference, where the gradient points the wrong way: this
    is the published loss, not convex and with a hump near Δ = 0. Raises ValueError without a reference, or for τ
    outside (0, 1).

    Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    require(discopop, tau=tau)  # else the exponential wins on the wrong side
    logits = beta * margin(pair)
    logistic = -(-logits / tau).sigmoid() * F.logsigmoid(logits)
    return logistic + (F.logsigmoid(logits / tau) - logits).exp()  # s e^{−βΔ}, without 0 · ∞
