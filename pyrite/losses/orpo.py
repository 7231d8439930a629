"""Odds ratio preference optimization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.clamps import at_most
from pyrite.options import NonNegative

__all__ = ["orpo"]


def orpo(pair: PairLogps, *, lam: NonNegative = 0.1) -> Tensor:
    """Odds ratio preference optimization: imitation of the chosen response, and better odds for it, in one stage.

    loss = −ā − λ log σ(lo(ā) − lo(b̄)),   lo(z) = z − log(1 − e^z),   ā, b̄ = log π(y)/|y| of chosen, rejected

    PairLogps of B pairs -> (B,); what the policy makes of the pair, whatever the reference. The likelihood −ā is
    the response's; some trainers take the prompt's tokens in.

    Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    chosen, rejected = pair.chosen.mean, pair.rejected.mean
    return -chosen - lam * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    below = at_most(logp, -torch.finfo(logp.dtype).eps)  # a certain response has infinite odds
    return below - (-below.expm1()).log()
