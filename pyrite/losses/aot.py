"""Alignment via optimal transport."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.dpo import logistic
from pyrite.losses.ratios import log_ratios, references
from pyrite.options import Half, Positive

__all__ = ["aot"]


def aot(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Half = 0.0, paired: bool = True) -> Tensor:
    """Alignment via optimal transport: the batch's distribution of margins, not each margin, must rise.

    loss = −(1−ε) log σ(βδ) − ε log σ(−βδ),   δ = difference of equal ranks within the batch

    Paired: the k-th smallest log π(y_w) − log π(y_l) less the k-th smallest of the same under the reference.
    Otherwise: the k-th smallest log π/π_ref of the chosen responses less that of the rejected ones. PairLogps of B
    pairs -> (B,), in the pairs' order, paired by the policy's (the chosen) side; ln 2 at policy = reference; dpo
    for a batch of one. The value of a pair depends on its batch. Raises ValueError without a reference.

    Melnyk et al. 2024, arXiv:2406.05882, section 3.
    """
    if paired:
        ref_chosen, ref_rejected = references(pair)
        above, below = pair.chosen.sum - pair.rejected.sum, ref_chosen.sum - ref_rejected.sum
    else:
        above, below = log_ratios(pair)
    rank = above.argsort().argsort()
    return logistic(beta * (above - below.sort().values[rank]), label_smoothing)
