"""Calibrated DPO."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.dpo import dpo
from pyrite.losses.ratios import log_ratios
from pyrite.options import Positive

__all__ = ["cal_dpo"]


def cal_dpo(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Calibrated DPO: rewards must differ, and be +½ and −½.

    loss = −log σ(β(u − v)) + (βu − ½)² + (βv + ½)²,   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); ln 2 + ½ at policy = reference. Raises ValueError without a reference.

    Xiao et al. 2024, arXiv:2412.14516.
    """
    chosen, rejected = log_ratios(pair)
    return dpo(pair, beta=beta) + (beta * chosen - 0.5) ** 2 + (beta * rejected + 0.5) ** 2
