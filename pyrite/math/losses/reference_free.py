"""Losses without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import PairLogps, at_most
from pyrite.math.losses.dpo import posterior
from pyrite.math.ranges import NonNegative, Positive, Real, part

LARGEST = 80.0  # e^80 is still a float32


@part
def simpo(pair: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """Simple preference optimization: no reference; average log-probabilities must differ by a margin γ.

    loss = −log σ(β(ā − b̄) − γ),   ā = log π(y_w)/|y_w|,   b̄ = log π(y_l)/|y_l|

    PairLogps of B pairs -> (B,), at any reference.

    Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * (pair.chosen.mean - pair.rejected.mean) - gamma)


@part
def alphapo(pair: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, alpha: Real = 0.25) -> Tensor:
    """SimPO with a reshaped reward: α > 0 weighs unlikely responses more, α < 0 likely ones; α = 0 is simpo.

    loss = −log σ(β(r(ā) − r(b̄)) − γ),   r(z) = (1 − e^{−αz})/α,   ā, b̄ = log π(y)/|y| of chosen, rejected

    PairLogps of B pairs -> (B,), at any reference. Exponents stop at 80,
    where a response has no gradient; such pairs are counted (`clamped`).

    Gupta et al. 2025, arXiv:2501.03884.
    """
    chosen, rejected = (_reward(side.mean, alpha) for side in (pair.chosen, pair.rejected))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def _reward(mean: Tensor, alpha: float) -> Tensor:
    return -at_most(-alpha * mean, LARGEST).expm1() / alpha if alpha else mean


@part
def cpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """Contrastive preference optimization: no reference, but a likelihood term for the chosen response.

    loss = −log σ(β(log π(y_w) − log π(y_l))) − α log π(y_w)/|y_w|

    PairLogps of B pairs -> (B,), at any reference. α = 0 is posterior.

    Xu et al. 2024, arXiv:2401.08417, eq. 3 with its likelihood term.
    """
    return posterior(pair, beta=beta) - alpha * pair.chosen.mean


@part
def orpo(pair: PairLogps, *, lam: NonNegative = 0.1) -> Tensor:
    """Odds ratio preference optimization: supervised fine-tuning and preference in one loss.

    loss = −ā − λ log σ(lo(ā) − lo(b̄)),   lo(z) = z − log(1 − e^z),   ā, b̄ = log π(y)/|y| of chosen, rejected

    PairLogps of B pairs -> (B,), at any reference. The likelihood −ā is
    the response's; some trainers include the prompt's tokens.

    Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    chosen, rejected = pair.chosen.mean, pair.rejected.mean
    return -chosen - lam * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    below = at_most(logp, -torch.finfo(logp.dtype).eps)  # a certain response has infinite odds
    return below - (-below.expm1()).log()


@part
def simper(pair: PairLogps) -> Tensor:
    """Simple alignment with perplexity: no reference and no hyperparameter.

    loss = e^{b̄} − e^{ā},   ā = log π(y_w)/|y_w|,   b̄ = log π(y_l)/|y_l|

    PairLogps of B pairs -> (B,), in (−1, 1), at any reference. e^{ā} is
    one over the response's perplexity.

    Xiao et al. 2025, arXiv:2502.00883.
    """
    return pair.rejected.mean.exp() - pair.chosen.mean.exp()
