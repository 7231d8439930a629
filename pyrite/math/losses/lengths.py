"""DPO that does not pay for length: averages, a price a token, or a discount on the longer response's tail."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import Logps, PairLogps, margin, references
from pyrite.math.ranges import NonNegative, Positive, Share

__all__ = ["ld_dpo", "ln_dpo", "r_dpo"]


def ln_dpo(pair: PairLogps, *, beta: Positive = 5.0) -> Tensor:
    """Length-normalized DPO: each log-ratio an average over its response's tokens.

    loss = −log σ(β(u/|y_w| − v/|y_l|)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. β is per token, so larger than dpo's by about a
    response's length. Raises ValueError without a reference, or for one of another tokenizer.

    Lambert et al. 2024, arXiv:2411.15124, eq. 6.
    """
    return -F.logsigmoid(beta * margin(pair, length_norm=True))


def r_dpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.01) -> Tensor:
    """Length-regularized DPO: chosen must win by less where it is longer, by more where it is shorter.

    loss = −log σ(βΔ + α(|y_w| − |y_l|)),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); −log σ(α(|y_w| − |y_l|)) at policy = reference. α in nats a token of the policy's
    tokenizer. Raises ValueError without a reference.

    Park et al. 2024, arXiv:2403.19159.
    """
    longer = (pair.chosen.length - pair.rejected.length).to(pair.chosen.sum.dtype)
    return -F.logsigmoid(beta * margin(pair) + alpha * longer)


def ld_dpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: Share = 0.5) -> Tensor:
    """Length-desensitized DPO: tokens beyond the shorter response's length count α.

    loss = −log σ(β(Δ − (1−α)(tail(y_w) − tail(y_l)))),   tail(y) = Σ_{t > min(|y_w|, |y_l|)} log π(y_t)/π_ref(y_t)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. α = 1 is dpo, α = 0 cuts both responses to the shorter
    one's length. Policy and reference are discounted alike. Raises ValueError without a reference, without the
    tokens' log-probabilities on all sides, or for a reference of another tokenizer.

    Liu et al. 2024, arXiv:2409.06411.
    """
    ref_chosen, ref_rejected = references(pair, aligned=True)
    common = pair.chosen.length.minimum(pair.rejected.length)
    chosen = _tail(pair.chosen, common) - _tail(ref_chosen, common)
    rejected = _tail(pair.rejected, common) - _tail(ref_rejected, common)
    return -F.logsigmoid(beta * (margin(pair) - (1 - alpha) * (chosen - rejected)))


def _tail(logps: Logps, common: Tensor) -> Tensor:
    """Summed log-probability of the tokens after the first `common`, (B,)."""
    if logps.tokens is None or logps.mask is None:
        raise ValueError(
            "ld_dpo reads log-probabilities token by token, and these pairs have sums only: "
            "build them with Logps.from_tokens, from a reference stored with its tokens"
        )
    late = logps.mask.cumsum(1) > common[:, None]
    return (logps.tokens * late).sum(1, dtype=logps.sum.dtype)
