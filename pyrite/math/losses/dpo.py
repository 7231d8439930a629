"""DPO, −log σ of a margin of log-ratios, and losses that change its labels, β, margin or batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.math.logps import Logps, PairLogps, at_least, log_ratios, margin, references, running, strength
from pyrite.math.ranges import Fraction, Half, Inside, Minority, NonNegative, Positive, Share, part, require


@part
def dpo(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Half = 0.0) -> Tensor:
    """Direct preference optimization; with label smoothing ε, conservative DPO.

    loss = −(1−ε) log σ(βΔ) − ε log σ(−βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. ε in [0, ½] is the share of labels
    believed flipped: past βΔ = ln((1−ε)/ε) the loss pulls back. Raises ValueError without a reference.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ε: Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3.
    """
    return logistic(beta * margin(pair), label_smoothing)


@part
def soft_dpo(pair: PairLogps, *, beta: Positive = 0.1, scale: Positive = 1.0) -> Tensor:
    """DPO towards a probability instead of a label: the cross-entropy to p = σ(scale · strength).

    loss = −p log σ(βΔ) − (1−p) log σ(−βΔ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference, least (the entropy of p) at βΔ = scale · strength,
    dpo's value for a strength without end. Raises ValueError without a reference or strengths.

    Shi et al. 2024, arXiv:2409.19605, the loss `rev_kl` of its code.
    """
    return logistic(beta * margin(pair), (-scale * strength(pair)).sigmoid())


@part
def robust(pair: PairLogps, *, beta: Positive = 0.1, label_smoothing: Minority = 0.1) -> Tensor:
    """DPO that stays unbiased if a share ε of the labels is flipped at random.

    loss = (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. Averaged over flips, it is dpo on the clean labels.
    Raises ValueError without a reference, or for ε outside [0, ½).

    Chowdhury et al. 2024, arXiv:2403.00409, section 3.1.
    """
    require(robust, label_smoothing=label_smoothing)
    logits = beta * margin(pair)
    kept, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@part
def posterior(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """DPO without a reference: entropy instead of a KL, the optimum ∝ exp(reward/β).

    loss = −log σ(β(log π(y_w) − log π(y_l)))

    PairLogps of B pairs -> (B,), at any reference.

    Liu et al. 2024, arXiv:2407.13709, eq. 9 and 10.
    """
    return -F.logsigmoid(beta * (pair.chosen.sum - pair.rejected.sum))


def logistic(logits: Tensor, flipped: float | Tensor) -> Tensor:
    """−(1−ε) log σ(z) − ε log σ(−z): cross-entropy of a preference z with a label flipped with probability ε."""
    return flipped * logits - F.logsigmoid(logits)  # as log σ(−z) = log σ(z) − z


@part
def odpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """DPO with an offset: stronger preferences must reach a larger margin.

    loss = −log σ(βΔ − α log strength),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); log(1 + strength^α) at policy = reference. Strengths are positive score
    differences: 0 asks for nothing, a negative one gives NaN. Raises ValueError without a reference or strengths.

    Amini et al. 2024, arXiv:2402.10571.
    """
    return -F.logsigmoid(beta * margin(pair) - alpha * strength(pair).log())


@part
def ln_dpo(pair: PairLogps, *, beta: Positive = 5.0) -> Tensor:
    """Length-normalized DPO: each log-ratio an average over its response's tokens.

    loss = −log σ(β(u/|y_w| − v/|y_l|)),   u, v = log π/π_ref of chosen, rejected

    PairLogps of B pairs -> (B,); ln 2 at policy = reference. β is per token, so larger than dpo's by about a
    response's length. Raises ValueError without a reference, or for one of another tokenizer.

    Lambert et al. 2024, arXiv:2411.15124, eq. 6.
    """
    return -F.logsigmoid(beta * margin(pair, length_norm=True))


@part
def r_dpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.01) -> Tensor:
    """Length-regularized DPO: a longer chosen response needs a smaller margin, a shorter one a larger margin.

    loss = −log σ(βΔ + α(|y_w| − |y_l|)),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); −log σ(α(|y_w| − |y_l|)) at policy = reference. α in nats a token of the policy's
    tokenizer. Raises ValueError without a reference.

    Park et al. 2024, arXiv:2403.19159.
    """
    longer = (pair.chosen.length - pair.rejected.length).to(pair.chosen.sum.dtype)
    return -F.logsigmoid(beta * margin(pair) + alpha * longer)


@part
def ld_dpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: Share = 0.5) -> Tensor:
    """Length-desensitized DPO: tokens beyond the shorter response's length are weighted by α.

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


@part
def wpo(pair: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Weighted preference optimization: a pair weighs more if the policy would have written it.

    loss = −w(y_w) w(y_l) log σ(βΔ),   w(y) = sg exp(mean_t [log π(y_t) − log Σ_v π(v)²])

    Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l), sg stops the gradient. A token that is as likely as the policy's
    own samples are on average has weight 1. PairLogps of B pairs -> (B,); w(y_w) w(y_l) ln 2 at policy = reference.
    Raises ValueError without a reference, or without the policy's collision.

    Zhou et al. 2024, arXiv:2406.11827, eq. 2.
    """
    return _weight(pair.chosen) * _weight(pair.rejected) * dpo(pair, beta=beta)


@torch.no_grad()
def _weight(logps: Logps) -> Tensor:
    if logps.collision is None:
        raise ValueError(
            "wpo reads the policy's whole distribution at every position, and these pairs lack it: "
            "fill collision of Logps, or choose a loss of log-probabilities, such as dpo"
        )
    return ((logps.sum - logps.collision) / logps.length).exp()


SMALLEST = 1e-3


@part
def beta_dpo(pair: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.6, rho: Fraction = 0.0) -> Tensor:
    """DPO with a dynamic β: larger if the batch's margins are above their running mean, smaller if below.

    loss = −log σ(β′Δ),   β′ = max(0.001, β(1 + α(mean Δ − M₀))),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    M₀ = running.margin, nats; β′ has no gradient. The share ρ of the pairs with Δ farthest from M₀ is left out, of
    the mean and of the loss (0, the others weighing B/kept); the paper leaves pairs out by chance, the likelier the
    farther. PairLogps of B pairs -> (B,); ln 2 at policy = reference. The value of a pair depends on its batch.
    Raises ValueError without a reference or running statistics.

    Wu et al. 2024, arXiv:2407.08639.
    """
    gap, usual = margin(pair), running(pair).margin
    seen = gap.detach()
    near = (seen - usual).abs().argsort()[: max(1, round((1 - rho) * len(seen)))]
    dynamic = at_least(beta * (1 + alpha * (seen[near].mean() - usual)), SMALLEST)
    weight = torch.zeros_like(seen).index_fill(0, near, len(seen) / len(near))
    return -weight * F.logsigmoid(dynamic * gap)


@part
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


@part
def xpo(
    pair: PairLogps,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1e-3,
    from_ref: Literal["rejected", "chosen", "both"] = "rejected",
) -> Tensor:
    """Exploratory preference optimization: DPO that also makes responses drawn from the reference a little less likely.

    loss = −log σ(βΔ) + α log π(ỹ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    ỹ, a response drawn from the reference, is the one `from_ref` names; for "both" their mean log-probability counts.
    PairLogps of B pairs -> (B,); ln 2 + α log π_ref(ỹ) at policy = reference. Raises ValueError without a reference.

    Xie et al. 2024, arXiv:2405.21046, algorithm 1.
    """
    chosen, rejected = pair.chosen.sum, pair.rejected.sum
    drawn = {"rejected": rejected, "chosen": chosen, "both": (chosen + rejected) / 2}[from_ref]
    return dpo(pair, beta=beta) + alpha * drawn


@part
def discopop(pair: PairLogps, *, beta: Positive = 0.1, tau: Inside = 0.05) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: logistic on the wrong side, exponential on the right one.

    loss = −(1−s) log σ(βΔ) + s e^{−βΔ},   s = σ(βΔ/τ),   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,); ½ (1 + ln 2) at policy = reference, where the gradient points the wrong way: this
    is the published loss, not convex and with a hump near Δ = 0. Raises ValueError without a reference, or for τ
    outside (0, 1).

    Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    require(discopop, tau=tau)  # else the exponential wins on the wrong side
    logits = beta * margin(pair)
    logistic = -(-logits / tau).sigmoid() * F.logsigmoid(logits)
    return logistic + (F.logsigmoid(logits / tau) - logits).exp()  # s e^{−βΔ}, without 0 · ∞
