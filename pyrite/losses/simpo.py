"""Simple preference optimization: average log-probabilities as rewards, and its reshaped relative."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.clamps import at_most
from pyrite.options import NonNegative, Positive, Real

__all__ = ["alphapo", "simpo"]
LARGEST = 80.0  # e^80 is still a float32


def simpo(pair: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """Simple preference optimization: no reference; average log-probabilities must differ by a margin γ.

    loss = −log σ(β(ā − b̄) − γ),   ā = log π(y_w)/|y_w|,   b̄ = log π(y_l)/|y_l|

    PairLogps of B pairs -> (B,); what the policy makes of the pair, whatever the reference.

    Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * (pair.chosen.mean - pair.rejected.mean) - gamma)


def alphapo(pair: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, alpha: Real = 0.25) -> Tensor:
    """SimPO with a reshaped reward: α > 0 presses on unlikely responses, α < 0 on likely ones, α = 0 is simpo.

    loss = −log σ(β(r(ā) − r(b̄)) − γ),   r(z) = (1 − e^{−αz})/α,   ā, b̄ = log π(y)/|y| of chosen, rejected

    PairLogps of B pairs -> (B,); what the policy makes of the pair, whatever the reference. Exponents stop at 80,
    where a response has no gradient; such pairs are counted (`clamped`).

    Gupta et al. 2025, arXiv:2501.03884.
    """
    chosen, rejected = (_reward(side.mean, alpha) for side in (pair.chosen, pair.rejected))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def _reward(mean: Tensor, alpha: float) -> Tensor:
    return -at_most(-alpha * mean, LARGEST).expm1() / alpha if alpha else mean
