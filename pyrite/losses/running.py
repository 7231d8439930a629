"""Statistics that a few losses keep over the batches."""

from __future__ import annotations

import torch

from pyrite.logps import PairLogps, Running
from pyrite.losses.ratios import log_ratios

__all__ = ["update"]
MOMENTUM = 0.9


@torch.no_grad()
def update(running: Running, pair: PairLogps) -> Running:
    """The statistics with this batch included, in place, so that a checkpoint of the tensors is one of them.

    ratio ← mean over the batches of ½ mean(u + v),   margin ← 0.9 margin + 0.1 mean(u − v),   count ← count + 1

    u, v: log π/π_ref of the chosen and of the rejected responses, nats, without β. Returns the same object. Keep
    it where the log-probabilities are: another device waits for them. Raises ValueError without a reference.

    Jung et al. 2024, arXiv:2404.04656, section 4 (ratio); Wu et al. 2024, arXiv:2407.08639, M₀ (margin).
    """
    chosen, rejected = (ratio.double().mean().to(running.ratio.device) for ratio in log_ratios(pair))
    running.count.add_(1)
    running.ratio.add_(((chosen + rejected) / 2 - running.ratio) / running.count)
    running.margin.mul_(MOMENTUM).add_(chosen - rejected, alpha=1 - MOMENTUM)
    return running
