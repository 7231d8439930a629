"""Noise contrastive alignment."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import log_ratios
from pyrite.options import Positive

__all__ = ["nca"]


def nca(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Noise contrastive alignment on pairs: each response against the reference, so that the chosen one cannot sink.

    loss = −log σ(βu) − ½ log σ(−βu) − ½ log σ(−βv),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 2 ln 2 at policy = reference. Past σ(βu) = ⅔ the chosen response is pulled back.
    Raises ValueError without a reference.

    Chen et al. 2024, arXiv:2402.05369, section 4.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
