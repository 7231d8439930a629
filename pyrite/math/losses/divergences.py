"""Losses with a divergence other than the reverse KL."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import Logps, PairLogps, at_most, log_ratios, margin
from pyrite.math.ranges import Inside, NonNegative, Positive, Share, part, require

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


LARGEST = 80.0  # e^80 is still a float32


@part
def f_dpo(
    pair: PairLogps, *, beta: Positive = 0.1, divergence: Divergence = "reverse_kl", alpha: Share = 0.5
) -> Tensor:
    """f-DPO: another f-divergence in place of the KL to the reference.

    loss = −log σ(β(f′(e^u) − f′(e^v))),   u, v = log π/π_ref of chosen, rejected

    f′(t) is log t for reverse_kl (dpo), 1 − 1/t for forward_kl, log(2t/(1+t)) for js, (t^{α−1} − 1)/(α − 1) for
    alpha, which is reverse_kl at α = 1 and forward_kl at α = 0. PairLogps of B pairs -> (B,); ln 2 at policy =
    reference. Exponents stop at 80, where a response has no gradient; such pairs are counted (`clamped`). Raises
    ValueError without a reference or for an unknown divergence.

    Wang et al. 2023, arXiv:2309.16240, theorem 1 and table 1.
    """
    chosen, rejected = (_slope(ratio, divergence, alpha) for ratio in log_ratios(pair))
    return -F.logsigmoid(beta * (chosen - rejected))


def _slope(ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f′(e^ratio), 0 at ratio 0."""
    match divergence:
        case "reverse_kl":
            return ratio
        case "forward_kl":
            return _power(ratio, -1.0)
        case "js":
            return math.log(2) + F.logsigmoid(ratio)
        case "alpha":
            return _power(ratio, alpha - 1)
    raise ValueError(f"f_dpo: unknown divergence {divergence!r}; give reverse_kl, forward_kl, js or alpha")


def _power(ratio: Tensor, exponent: float) -> Tensor:
    """(t^p − 1)/p of t = e^ratio, log t at p = 0."""
    return at_most(exponent * ratio, LARGEST).expm1() / exponent if exponent else ratio


@part
def tdpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.5, version: Literal[1, 2] = 2) -> Tensor:
    """Token-level DPO: also limits the forward KL at every position of the rejected response.

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


@part
def exo(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Inside = 1e-3) -> Tensor:
    """Efficient exact optimization on pairs: KL(policy's preference ‖ label); DPO has KL(label ‖ preference).

    loss = q log(q/(1−ε)) + (1−q) log((1−q)/ε),   q = σ(βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), nats; −ln 2 − ½ ln(ε(1−ε)) at policy = reference (2.761 for ε = 0.001), 0 at
    q = 1−ε. Raises ValueError without a reference, or for ε outside (0, 1), where the KL is infinite.

    Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    require(exo, label_smoothing=label_smoothing)  # else the loss is infinite
    logits = beta * margin(pair)
    kept = F.logsigmoid(logits) - math.log1p(-label_smoothing)
    flipped = F.logsigmoid(-logits) - math.log(label_smoothing)
    return logits.sigmoid() * kept + (-logits).sigmoid() * flipped
