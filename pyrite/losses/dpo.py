"""Direct preference optimization, with labels that may be wrong or soft, and without a reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin, strength
from pyrite.options import Half, Minority, Positive, require

__all__ = ["dpo", "posterior", "robust", "soft_dpo"]


def dpo(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Half = 0.0) -> Tensor:
    """Direct preference optimization; with label smoothing ε, conservative DPO.

    loss = −(1−ε) log σ(βΔ) − ε log σ(−βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. ε in [0, ½] is the share of labels
    believed flipped: past βΔ = ln((1−ε)/ε) the loss pulls back. Raises ValueError without a reference.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ε: Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3.
    """
    return logistic(beta * margin(pair), label_smoothing)


def soft_dpo(pair: PairLogps, *, beta: Positive = 0.1, scale: Positive = 1.0) -> Tensor:
    """DPO towards a probability instead of a label: the cross-entropy to p = σ(scale · strength).

    loss = −p log σ(βΔ) − (1−p) log σ(−βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference, least (the entropy of p) at βΔ = scale · strength,
    dpo's value for a strength without end. Raises ValueError without a reference or strengths.

    Shi et al. 2024, arXiv:2409.19605, the loss `rev_kl` of its code.
    """
    return logistic(beta * margin(pair), (-scale * strength(pair)).sigmoid())


def robust(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Minority = 0.1) -> Tensor:
    """DPO that is unbiased where a share ε of the labels is flipped at random.

    loss = (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. Averaged over flips, it is dpo on the clean labels.
    Raises ValueError without a reference, or for ε outside [0, ½).

    Chowdhury et al. 2024, arXiv:2403.00409, section 3.1.
    """
    require(robust, label_smoothing=label_smoothing)
    logits = beta * margin(pair)
    kept, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def posterior(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """DPO without a reference: entropy instead of a KL, the optimum ∝ exp(reward/β).

    loss = −log σ(β(log π(y_w) − log π(y_l)))

    PairLogps of B pairs -> (B,); what the policy makes of the pair, whatever the reference.

    Liu et al. 2024, arXiv:2407.13709, eq. 9 and 10.
    """
    return -F.logsigmoid(beta * (pair.chosen.sum - pair.rejected.sum))


def logistic(logits: Tensor, flipped: float | Tensor) -> Tensor:
    """−(1−ε) log σ(z) − ε log σ(−z): cross-entropy of a preference z with a label flipped with probability ε."""
    return flipped * logits - F.logsigmoid(logits)  # as log σ(−z) = log σ(z) − z
