"""DPO with a second term: the likelihood of the chosen response, or a floor under it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import PairLogps, log_ratios
from pyrite.math.losses.dpo import dpo
from pyrite.math.losses.pointwise import bco
from pyrite.math.ranges import NonNegative, Positive, Real, part


@part
def dpo_nll(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """DPO plus the chosen response's negative log-likelihood a token; elsewhere called RPO.

    loss = −log σ(βΔ) − α log π(y_w)/|y_w|,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 − α log π(y_w)/|y_w| at policy = reference. The likelihood is a mean over each
    response, so that every pair weighs the same. Raises ValueError without a reference.

    Pang et al. 2024, arXiv:2404.19733, eq. 1.
    """
    return dpo(pair, beta=beta) - alpha * pair.chosen.mean


@part
def mpo(
    pair: PairLogps,
    *,
    beta: Positive = 0.1,
    delta: Real | None = 0.0,
    preference: NonNegative = 0.8,
    quality: NonNegative = 0.2,
    generation: NonNegative = 1.0,
) -> Tensor:
    """Mixed preference optimization: a preference, a quality and a generation term.

    loss = w_p · dpo + w_q · bco − w_g · log π(y_w)/|y_w|

    PairLogps of B pairs -> (B,); (w_p + 2 w_q) ln 2 − w_g log π(y_w)/|y_w| at policy = reference and δ = 0.
    `preference` is w_p, `quality` w_q, `generation` w_g, `delta` bco's. Raises ValueError as dpo and bco do.

    Wang et al. 2024, arXiv:2411.10442.
    """
    both = preference * dpo(pair, beta=beta) + quality * bco(pair, beta=beta, delta=delta)
    return both - generation * pair.chosen.mean


@part
def dpop(pair: PairLogps, *, beta: Positive = 0.1, lam: NonNegative = 5.0) -> Tensor:
    """DPO-positive: a penalty if the chosen response becomes less likely than under the reference.

    loss = −log σ(β(u − v − λ[−u]₊)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. Raises ValueError without a reference.

    Pal et al. 2024, arXiv:2402.13228, eq. 3.
    """
    chosen, rejected = log_ratios(pair)
    return -F.logsigmoid(beta * (chosen - rejected - lam * (-chosen).relu()))


@part
def cal_dpo(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Calibrated DPO: the implicit rewards are also pulled to +½ and −½.

    loss = −log σ(β(u − v)) + (βu − ½)² + (βv + ½)²,   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); ln 2 + ½ at policy = reference. Raises ValueError without a reference.

    Xiao et al. 2024, arXiv:2412.14516.
    """
    chosen, rejected = log_ratios(pair)
    return dpo(pair, beta=beta) + (beta * chosen - 0.5) ** 2 + (beta * rejected + 0.5) ** 2
