"""DPO with a β for every batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.clamps import at_least
from pyrite.losses.ratios import margin, running
from pyrite.options import Fraction, NonNegative, Positive

__all__ = ["beta_dpo"]
SMALLEST = 1e-3


def beta_dpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.6, rho: Fraction = 0.0) -> Tensor:
    """DPO whose β follows the batch: larger where margins are above their running mean, smaller where below.

    loss = −log σ(β′Δ),   β′ = max(0.001, β(1 + α(mean Δ − M₀))),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    M₀ = running.margin, nats; β′ has no gradient. The share ρ of the pairs with Δ farthest from M₀ is left out, of
    the mean and of the loss (0, the others weighing B/kept); the paper leaves pairs out by chance, the likelier the
    farther. PairLogps of B pairs -> (B,); ln 2 at policy = reference. The value of a pair depends on its batch.
    Raises ValueError without a reference or running statistics.

    Wu et al. 2024, arXiv:2407.08639.
    """
    gap, usual = margin(pair), running(pair).margin
    seen = gap.detach()
    near = (seen - usual).abs().argsort()[: max(1, round((1 - rho) * len(seen)))]
    dynamic = at_least(beta * (1 + alpha * (seen[near].mean() - usual)), SMALLEST)
    weight = torch.zeros_like(seen).index_fill(0, near, len(seen) / len(near))
    return -weight * F.logsigmoid(dynamic * gap)
