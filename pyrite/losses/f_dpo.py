"""DPO under other divergences than the reverse KL."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.clamps import at_most
from pyrite.losses.ratios import log_ratios
from pyrite.options import Positive, Share

__all__ = ["f_dpo"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
LARGEST = 80.0  # e^80 is still a float32


def f_dpo(
    pair: PairLogps, *, beta: Positive = 0.1, divergence: Divergence = "reverse_kl", alpha: Share = 0.5
) -> Tensor:
    """f-DPO: the KL that holds the policy to the reference replaced by another f-divergence.

    loss = −log σ(β(f′(e^u) − f′(e^v))),   u, v = log π/π_ref of chosen, rejected

    f′(t) is log t for reverse_kl (dpo), 1 − 1/t for forward_kl, log(2t/(1+t)) for js, (t^{α−1} − 1)/(α − 1) for
    alpha, which is reverse_kl at α = 1 and forward_kl at α = 0. PairLogps of B pairs -> (B,); ln 2 at policy =
    reference. Exponents stop at 80, where a response has no gradient; such pairs are counted (`clamped`). Raises
    ValueError without a reference or for an unknown divergence.

    Wang et al. 2023, arXiv:2309.16240, theorem 1 and table 1.
    """
    chosen, rejected = (_slope(ratio, divergence, alpha) for ratio in log_ratios(pair))
    return -F.logsigmoid(beta * (chosen - rejected))


def _slope(ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f′(e^ratio), 0 at ratio 0."""
    match divergence:
        case "reverse_kl":
            return ratio
        case "forward_kl":
            return _power(ratio, -1.0)
        case "js":
            return math.log(2) + F.logsigmoid(ratio)
        case "alpha":
            return _power(ratio, alpha - 1)
    raise ValueError(f"f_dpo: unknown divergence {divergence!r}; give reverse_kl, forward_kl, js or alpha")


def _power(ratio: Tensor, exponent: float) -> Tensor:
    """(t^p − 1)/p of t = e^ratio, log t at p = 0."""
    return at_most(exponent * ratio, LARGEST).expm1() / exponent if exponent else ratio
