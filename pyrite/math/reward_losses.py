"""Losses of reward models on pairs: reward_loss(chosen (B,), rejected (B,), *, options) -> (B,)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.math.ranges import Half, NonNegative, part

__all__ = ["bradley_terry"]


@part
def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | NonNegative = 0.0,
    label_smoothing: Half = 0.0,
    center: NonNegative = 0.0,
) -> Tensor:
    """Bradley-Terry likelihood of the label, P(chosen beats rejected) = σ(z).

    loss = −(1−ε) log σ(z) − ε log σ(−z) + center · ½ (r_w² + r_l²),   z = r_w − r_l − margin

    Scores r_w, r_l (B,) -> (B,); ln 2 at equal scores without margin. `margin` is one number or (B,), the
    difference a pair must exceed; ε in [0, ½] the share of labels believed flipped. Only differences
    of scores enter the likelihood: `center`, about 0.001, fixes their offset.

    Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023,
    arXiv:2307.09288, eq. 2.

    >>> bradley_terry(chosen=torch.tensor([1.0]), rejected=torch.tensor([0.0]), center=0.001)
    tensor([0.3138])
    """
    logits = chosen - rejected - margin
    likelihood = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return likelihood + center * 0.5 * (chosen**2 + rejected**2)
