"""Binary classifier optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import log_ratios, running
from pyrite.options import Positive, Real

__all__ = ["bco"]


def bco(pair: PairLogps, *, beta: Positive = 0.1, delta: Real | None = 0.0) -> Tensor:
    """Binary classifier optimization: chosen above, rejected below a common reward δ.

    loss = −log σ(βu − δ) − log σ(−(βv − δ)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 2 ln 2 at policy = reference and δ = 0. With `delta=None`, as in the paper, δ is
    the mean reward β · running.ratio of all batches so far; a number stays as it is, and 0 is what trainers of
    pairs use. Raises ValueError without a reference, or with `delta=None` without running statistics.

    Jung et al. 2024, arXiv:2404.04656, section 4.
    """
    shift = beta * running(pair).ratio if delta is None else delta
    chosen, rejected = (beta * ratio - shift for ratio in log_ratios(pair))
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
