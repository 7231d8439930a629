"""Token-level DPO."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pyrite.logps import Logps, PairLogps
from pyrite.losses.ratios import margin
from pyrite.options import NonNegative, Positive

__all__ = ["tdpo"]


def tdpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.5, version: Literal[1, 2] = 2) -> Tensor:
    """Token-level DPO: the forward KL at every position of the rejected response is held down as well.

    loss = −log σ(β(Δ − α(K_l − sg K_w))),   K(y) = Σ_t KL(π_ref(· | x, y_<t) ‖ π(· | x, y_<t))

    Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l), sg stops the gradient. `version=1` has K_l − K_w, whatever α,
    and a gradient through both. PairLogps of B pairs -> (B,); ln 2 at policy = reference. Raises ValueError without
    a reference, or without the policy's kl.

    Zeng et al. 2024, arXiv:2404.11999, TDPO1 and TDPO2.
    """
    chosen, rejected = _kl(pair.chosen), _kl(pair.rejected)
    excess = rejected - chosen if version == 1 else alpha * (rejected - chosen.detach())
    return -F.logsigmoid(beta * (margin(pair) - excess))


def _kl(logps: Logps) -> Tensor:
    if logps.kl is None:
        raise ValueError(
            "tdpo reads the reference's whole distribution at every position, and these pairs lack it: "
            "fill kl of Logps, or choose a loss of log-probabilities, such as dpo"
        )
    return logps.kl
