"""Anchored preference optimization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import PairLogps, Running, log_ratios, running
from pyrite.math.ranges import NonNegative, Positive, Real

# kto: Kahneman-Tversky optimization on pairs.


def kto_pair(
    pair: PairLogps,
    *,
    beta: Positive = 0.1,
    z0: NonNegative = 0.0,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization, both responses of a pair at once.

    loss = λ_D (1 − σ(β(u − z₀))) + λ_U (1 − σ(β(z₀ − v))),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 1 at policy = reference, z₀ = 0 and λ = 1. `desirable` is λ_D, `undesirable` λ_U.
    z₀ in nats stands for KL(π ‖ π_ref), which the paper estimates from mismatched prompts and responses; pairs hold
    none, so it is a constant here: 0, the estimate's floor, or a value measured before. Raises ValueError without
    a reference.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    chosen, rejected = log_ratios(pair)
    return desirable * (beta * (z0 - chosen)).sigmoid() + undesirable * (beta * (rejected - z0)).sigmoid()


# bco: Binary classifier optimization.


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


# running: Statistics that a few losses keep over the batches.


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


# nca: Noise contrastive alignment.


def nca(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Noise contrastive alignment on pairs: each response against the reference, so that the chosen one cannot sink.

    loss = −log σ(βu) − ½ log σ(−βu) − ½ log σ(−βv),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); 2 ln 2 at policy = reference. Past σ(βu) = ⅔ the chosen response is pulled back.
    Raises ValueError without a reference.

    Chen et al. 2024, arXiv:2402.05369, section 4.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


# apo: Anchored preference optimization.


def apo_zero(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Anchored preference optimization where chosen is better than the policy: chosen up, rejected down.

    loss = 1 − σ(βu) + σ(βv),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), in (0, 2); 1 at policy = reference. Raises ValueError without a reference.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Anchored preference optimization where chosen is worse than the policy: chosen down, rejected further down.

    loss = σ(βu) + 1 − σ(β(u − v)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,), in (0, 2); 1 at policy = reference, where the two pulls on chosen cancel.
    Raises ValueError without a reference.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair))
    return chosen.sigmoid() + (rejected - chosen).sigmoid()
