"""DPO-positive."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import log_ratios
from pyrite.options import NonNegative, Positive

__all__ = ["dpop"]


def dpop(pair: PairLogps, *, beta: Positive = 0.1, lam: NonNegative = 5.0) -> Tensor:
    """DPO-positive: the chosen response may not become less likely than under the reference.

    loss = −log σ(β(u − v − λ[−u]₊)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. Raises ValueError without a reference.

    Pal et al. 2024, arXiv:2402.13228, eq. 3.
    """
    chosen, rejected = log_ratios(pair)
    return -F.logsigmoid(beta * (chosen - rejected - lam * (-chosen).relu()))
