"""Losses with one term for each response, which reads only that response's log π/π_ref."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import PairLogps, log_ratios, running, strength
from pyrite.math.ranges import NonNegative, Positive, Real, part


@part
def kto_pair(
    pair: PairLogps,
    *,
    beta: Positive = 0.1,
    z0: NonNegative = 0.0,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization on both responses of a pair.

    loss = λ_D (1 − σ(β(u − z₀))) + λ_U (1 − σ(β(z₀ − v))),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 1 at policy = reference, z₀ = 0 and λ = 1. `desirable` is λ_D, `undesirable` λ_U.
    z₀ in nats stands for KL(π ‖ π_ref), which the paper estimates from mismatched prompts and responses; pairs hold
    none, so it is a constant here: 0, the estimate's floor, or a value measured before. Raises ValueError without
    a reference.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    chosen, rejected = log_ratios(pair)
    return desirable * (beta * (z0 - chosen)).sigmoid() + undesirable * (beta * (rejected - z0)).sigmoid()


@part
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


@part
def nca(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Noise contrastive alignment on pairs: each response against the reference, so the chosen one stays likely.

    loss = −log σ(βu) − ½ log σ(−βu) − ½ log σ(−βv),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 2 ln 2 at policy = reference. Past σ(βu) = ⅔ the chosen response is pulled back.
    Raises ValueError without a reference.

    Chen et al. 2024, arXiv:2402.05369, section 4.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@part
def apo_zero(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Anchored preference optimization for chosen responses better than the policy's: chosen up, rejected down.

    loss = 1 − σ(βu) + σ(βv),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), in (0, 2); 1 at policy = reference. Raises ValueError without a reference.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return (-chosen).sigmoid() + rejected.sigmoid()


@part
def apo_down(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Anchored preference optimization for chosen responses worse than the policy's: both down, rejected more.

    loss = σ(βu) + 1 − σ(β(u − v)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), in (0, 2); 1 at policy = reference, where the two pulls on chosen cancel.
    Raises ValueError without a reference.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


@part
def sppo(pair: PairLogps, *, beta: Positive = 0.1, soft: bool = False) -> Tensor:
    """Self-play preference optimization: each log-ratio is fitted to its response's win probability.

    loss = (u − (P−½)/β)² + (v + (P−½)/β)²,   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), nats²; 1/(2β²) at policy = reference for P = 1. P is 1, or with `soft` the
    probability σ(strength) that chosen wins. Raises ValueError without a reference, or with `soft` without strengths.

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with η = 1/β.
    """
    chosen, rejected = log_ratios(pair)
    target = ((strength(pair).sigmoid() if soft else 1.0) - 0.5) / beta
    return (chosen - target) ** 2 + (rejected + target) ** 2
