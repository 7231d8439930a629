"""Weighted preference optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrite.logps import Logps, PairLogps
from pyrite.losses.dpo import dpo
from pyrite.options import Positive

__all__ = ["wpo"]


def wpo(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Weighted preference optimization: pairs count as much as the policy would have written them itself.

    loss = −w(y_w) w(y_l) log σ(βΔ),   w(y) = sg exp(mean_t [log π(y_t) − log Σ_v π(v)²])

    Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l), sg stops the gradient; a token as likely as the policy's own
    samples are on average weighs 1. PairLogps of B pairs -> (B,); w(y_w) w(y_l) ln 2 at policy = reference.
    Raises ValueError without a reference, or without the policy's collision.

    Zhou et al. 2024, arXiv:2406.11827, eq. 2.
    """
    return _weight(pair.chosen) * _weight(pair.rejected) * dpo(pair, beta=beta)


@torch.no_grad()
def _weight(logps: Logps) -> Tensor:
    if logps.collision is None:
        raise ValueError(
            "wpo reads the policy's whole distribution at every position, and these pairs lack it: "
            "fill collision of Logps, or choose a loss of log-probabilities, such as dpo"
        )
    return ((logps.sum - logps.collision) / logps.length).exp()
