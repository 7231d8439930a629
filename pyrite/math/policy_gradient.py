"""PPO and its simpler relatives as functions of tensors: rewards, advantages, losses.

Axes: N answers of at most T tokens, mask (N, T) True at an answer's tokens, its end token included; Q prompts with K
answers each. logp[t] and values[t] belong to the state before token t, where it is predicted. What stands off the mask
is never read, whatever it is, and outputs are 0 there. An answer is an episode: behind its last token nothing is worth
anything, cut or not. Advantages and rewards are data: no gradient flows through them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Moments --------------------------------------------------------------------------------------------------------------

# Mean and variance of values that come batch by batch, or from several processes.


EPS = 1e-8  # of a variance: what varies less is rounding


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the values seen so far, float64 tensors of one shape, so that a checkpoint can hold them.

    count; mean; square, the sum of squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def zero(cls, *shape: int, device: torch.device | str = "cpu") -> Moments:
        """Before the first value."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)))

    @property
    def var(self) -> Tensor:
        """Population variance; NaN before the first value."""
        return self.square / self.count


@torch.no_grad()
def moments(values: Tensor, mask: Tensor | None = None) -> Moments:
    """Of the last axis, of the values on the mask: values (..., N) -> Moments (...).

    What stands off the mask is never read. Raises ValueError for unequal shapes.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if values.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"moments: values {tuple(values.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) "
            "must have one shape, the mask of bools"
        )
    count = mask.sum(-1).double()
    mean = torch.where(mask, values, 0).sum(-1, dtype=torch.float64) / count.clamp(min=1)
    return Moments(count, mean, torch.where(mask, values.double() - mean[..., None], 0).square().sum(-1))


def merged(a: Moments, b: Moments) -> Moments:
    """Of the values of both, in whatever order: batch after batch, or process beside process.

    mean = m_a + δ n_b/n,   square = s_a + s_b + δ² n_a n_b/n,   δ = m_b − m_a.   Chan, Golub and LeVeque 1979.
    """
    count = a.count + b.count
    delta, share = b.mean - a.mean, b.count / count.clamp(min=1)
    return Moments(count, a.mean + delta * share, a.square + b.square + delta.square() * a.count * share)


@torch.no_grad()
def normalized(scores: Tensor, seen: Moments) -> Tensor:
    """(r − mean) / std, constants of the scores seen so far; by custom these are merged first.

    scores (..., N), seen (...) -> (..., N). Population standard deviation; 1 where they hardly varied (variance below
    1e-8), as in a first batch of equal scores.
    """
    std = torch.where(seen.var > EPS, seen.var.sqrt(), 1.0)[..., None]
    return ((scores.double() - seen.mean[..., None]) / std).to(scores.dtype)


# The price of the KL --------------------------------------------------------------------------------------------------

# How strongly the KL from the reference is priced in policy optimization: fixed, or led by the KL measured.


@dataclass(frozen=True)
class KLControl:
    """How β follows the KL from the reference, nats an answer: slowly, in proportion to the clipped error, in about
    `horizon` answers; without a target not at all. Raises ValueError for options out of range."""

    beta: float
    target: float | None = None
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf or not self.horizon > 0:
            raise ValueError(f"KLControl: beta = {self.beta}, horizon = {self.horizon}; give beta >= 0, horizon > 0")
        if self.target is not None and not (0 < self.target < math.inf and self.beta > 0):
            raise ValueError(f"KLControl: beta = {self.beta}, target = {self.target}; both must be above 0 to move")


def controlled(control: KLControl, kl: float, *, answers: int) -> KLControl:
    """The control after a batch of `answers` new answers with mean KL(π ‖ π_ref) `kl`, nats an answer.

    β ← β (1 + clip(kl/target − 1, ±0.2) · answers/horizon)

    Once for each drawn batch, not for each epoch over it. Negative estimates count as they are. Raises ValueError for a
    KL that is not finite.

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2 and its code.

    >>> controlled(KLControl(0.1, target=6.0), 9.0, answers=32).beta
    0.100064
    """
    if not math.isfinite(kl):
        raise ValueError(f"controlled: the KL is {kl}; look at the log-probabilities of policy and reference")
    if control.target is None:
        return control
    error = min(max(kl / control.target - 1, -0.2), 0.2)
    return replace(control, beta=control.beta * (1 + error * answers / control.horizon))


# Rewards, advantages, losses ------------------------------------------------------------------------------------------

# PPO and its simpler relatives as functions of tensors: rewards, advantages, losses.


FAR = 20.0  # nats; a log-ratio beyond it counts as this, so that no ratio overflows


# Rewards


@torch.no_grad()
def token_rewards(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kl: Literal["k1", "k3", "none"] = "k1",
    finished: Tensor | None = None,
    missing_eos: float | None = None,
    clip: float | None = None,
) -> Tensor:
    """The reward of every token: the price of leaving the reference, and the answer's score at its last token.

    r_t = −β k(log π(y_t)/π_ref(y_t)) + [t is the last token] · (clip(score, ±clip) − missing_eos · [not finished])

    score (N,); logp, ref_logp (N, T), nats, of the policy that drew the answers and of the reference; finished (N,)
    bool -> (N, T), float32 or better. The last token is the end token, or of a cut answer the last one drawn. A row's
    sum is the whole answer's reward, which `rloo` and its like take.
    k1 = log π/π_ref: the optimum is π ∝ π_ref e^{r/β}. k3 = π_ref/π − 1 + log π/π_ref has the same mean, KL(π ‖ π_ref),
    but as a reward it does not pull to the reference: at a position it pushes along KL(π ‖ π_ref) − KL(π_ref ‖ π), and
    tokens less likely than under the reference further down. `none` ignores β.
    Reads values: call it once for all answers. Raises ValueError for other shapes or estimators, a score that is not
    finite, an answer without tokens, a negative beta, clip or missing_eos, missing_eos without `finished`.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2; k1, k3: Schulman 2020, "Approximating KL divergence".

    >>> score, mask = torch.tensor([2.0]), torch.tensor([[True, True, False]])
    >>> logp, ref_logp = torch.tensor([[-1.0, -0.5, 9.0]]), torch.tensor([[-1.5, -0.3, 9.0]])
    >>> token_rewards(score, logp, ref_logp, mask, beta=0.1)
    tensor([[-0.0500,  2.0200,  0.0000]])
    """
    _check("token_rewards", mask, logp=logp, ref_logp=ref_logp)
    _check_scores(score, mask, finished, missing_eos)
    for name, value in (("beta", beta), ("clip", clip), ("missing_eos", missing_eos)):
        if value is not None and not value >= 0:
            raise ValueError(f"token_rewards: {name} = {value}; give 0 or more")
    final = score if clip is None else score.clamp(-clip, clip)
    if missing_eos is not None and finished is not None:
        final = final - missing_eos * (~finished).to(final.dtype)
    ratio = _only(logp, mask) - _only(ref_logp, mask)
    rewards = torch.where(mask, -beta * _kl(ratio, kl), 0)  # no -0.0
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1, keepdim=True)
    return rewards.scatter_add(1, last, final[:, None].to(rewards.dtype))


# Advantages


class Estimates(NamedTuple):
    """advantages (N, T) of the drawn tokens, and returns (N, T), what the values should have been."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Estimates:
    """Generalized advantage estimation, and the returns that the values are taught.

    A_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s,   δ_t = r_t + γ V_{t+1} − V_t,   R_t = A_t + V_t

    rewards, values (N, T) -> Estimates, (N, T) each, float32 or better. V behind an answer's last token is 0. λ = 1 is
    the reward to go less the value, without bias whatever the values; λ = 0 is the TD error δ. In a mask with holes the
    next token is the next real one. Raises ValueError for unequal shapes, γ or λ outside [0, 1].

    Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> gae(rewards, values, torch.tensor([[True, True]]), lam=0.5).advantages
    tensor([[0.2500, 0.5000]])
    """
    _check("gae", mask, rewards=rewards, values=values)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma = {gamma}, lam = {lam}; give shares from 0 to 1")
    rewards, values = (_only(x, mask).T.contiguous() for x in (rewards, values))
    advantages = torch.zeros_like(values)
    following, carry = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for t in range(len(values) - 1, -1, -1):
        here = mask[:, t]
        step = rewards[t] + gamma * following - values[t] + gamma * lam * carry
        carry, following = torch.where(here, step, carry), torch.where(here, values[t], following)
        advantages[t] = torch.where(here, step, 0)
    return Estimates(advantages.T, (advantages + values).T)


@torch.no_grad()
def rloo(scores: Tensor) -> Tensor:
    """REINFORCE, each answer's baseline the mean of the prompt's other answers.

    A_k = r_k − 1/(K−1) Σ_{j ≠ k} r_j

    Scores (Q, K), KL included -> (Q, K), one advantage for all tokens of an answer. Unbiased. Raises ValueError for
    another shape, or fewer than 2 answers.

    Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.

    >>> rloo(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3.0000, -1.5000,  4.5000]])
    """
    answers = _answers("rloo", scores)
    return (scores - scores.mean(1, keepdim=True)) * (answers / (answers - 1))


@torch.no_grad()
def group_normalized(scores: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages: how far an answer stands from the prompt's average, in standard deviations.

    A_k = (r_k − mean) / (std + eps),   std with K − 1 in the denominator

    Scores (Q, K), KL included -> (Q, K). Biased: a prompt whose answers score nearly alike weighs as much as any other.
    Raises ValueError as rloo does.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.
    """
    _answers("group_normalized", scores)
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + eps)


@torch.no_grad()
def reinforce(scores: Tensor, *, baseline: Literal["mean"] | float | Tensor = "mean") -> Tensor:
    """REINFORCE: scores less a baseline.

    A_n = r_n − b

    Scores (N,), KL included -> (N,). baseline: a number, such as the mean of earlier batches (`Moments.mean` before
    this one is merged), without bias; or "mean", of this batch, which leaves (N−1)/N of the gradient.

    Williams 1992.
    """
    if scores.ndim != 1:
        raise ValueError(f"reinforce: scores have shape {tuple(scores.shape)}; give (N,), one number an answer")
    return scores - (scores.mean() if isinstance(baseline, str) else baseline)


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Advantages (or rewards) with mean 0 and variance 1 over the real tokens.

    w = (v − mean) / √(var + 1e-8),   population variance

    values (N, T) -> (N, T). Raises ValueError for unequal shapes.
    """
    _check("whiten", mask, values=values)
    clean = _only(values, mask)
    over = moments(clean.flatten(), mask.flatten())
    scaled = (clean - over.mean.to(clean.dtype)) * (over.var + EPS).rsqrt().to(clean.dtype)
    return torch.where(mask, scaled, 0)


# Losses


class PolicyLoss(NamedTuple):
    """Of `policy_loss`, 0-dim each: loss; clip_fraction, of tokens held by the clip; kl, nats a token; mean ratio."""

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    ratio: Tensor


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    total: float | Tensor | None = None,
) -> PolicyLoss:
    """The clipped policy gradient, token by token.

    loss = −1/total Σ_t min(ρ_t A_t, clip(ρ_t, 1 ± clip) A_t),   ρ_t = π(y_t)/π_old(y_t)

    logp, old_logp (N, T), nats, or (R,) as they come packed, with a mask of their shape; advantages likewise, or
    (N, 1), one for all tokens of an answer. clip=inf is the plain policy gradient. total: what the sum is divided by,
    the mask's tokens by default; the parts of a batch add up to it where all are given the batch's total.
    A token counts in clip_fraction where the clip stops its gradient. kl estimates KL(π_old ‖ π) by ρ − 1 − log ρ, at
    least 0. Log-ratios beyond 20 nats count as 20 and have no gradient (`clamped` counts them). At π = π_old: ratio 1,
    kl 0, clip_fraction 0. Raises ValueError for shapes that do not fit or a clip not above 0.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    >>> old, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    >>> policy_loss(torch.tensor([[0.5, -0.1]]), old, torch.tensor([[1.0, 1.0]]), mask).loss
    tensor(-1.0524)
    """
    _check("policy_loss", mask, logp=logp, old_logp=old_logp)
    if advantages.ndim != mask.ndim or torch.broadcast_shapes(advantages.shape, mask.shape) != mask.shape:
        raise ValueError(
            f"policy_loss: advantages {tuple(advantages.shape)} do not fit {tuple(mask.shape)}; "
            "give one a token, or (N, 1), one an answer"
        )
    if not clip > 0:
        raise ValueError(f"policy_loss: clip = {clip}; give a number above 0, or inf for no clip")
    change = (_only(logp, mask) - _only(old_logp, mask).detach()).clamp(max=FAR)
    ratio, gain = change.exp(), _only(advantages.expand_as(mask), mask).detach()
    free, held = ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain
    count = mask.sum() if total is None else total
    with torch.no_grad():
        seen = (held < free).to(ratio.dtype), torch.expm1(change) - change, _only(ratio, mask)
        clipped, kl, mean_ratio = (_sum(x) / count for x in seen)
    return PolicyLoss(-_sum(torch.minimum(free, held)) / count, clipped, kl, mean_ratio)


@torch.no_grad()
def clamped(logp: Tensor, old_logp: Tensor, mask: Tensor, *, total: float | Tensor | None = None) -> Tensor:
    """The share of tokens whose log-ratio `policy_loss` counts as 20 nats, so that they have no gradient; 0-dim.

    Shapes and total as there.
    """
    _check("clamped", mask, logp=logp, old_logp=old_logp)
    far = (_only(logp, mask) - _only(old_logp, mask)) > FAR
    return _sum(far.to(torch.float32)) / (mask.sum() if total is None else total)


class ValueLoss(NamedTuple):
    """Of `value_loss`, 0-dim each: loss; clip_fraction, of tokens whose gradient the clip stops."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    total: float | Tensor | None = None,
) -> ValueLoss:
    """The squared error of the values, of which a move beyond `clip` from the old ones is not rewarded.

    loss = ½ 1/total Σ_t max((V_t − R_t)², (clip(V_t, V_old,t ± clip) − R_t)²)

    values, old_values, returns (N, T), or (R,) packed, with a mask of their shape. clip is in units of the reward, so
    0.2 is a lot or nothing; None is the plain squared error, and `old_values` are not read. total as in `policy_loss`.
    Raises ValueError for unequal shapes or a clip not above 0.

    Ziegler et al. 2019, arXiv:1909.08593, its code.
    """
    _check("value_loss", mask, values=values, old_values=old_values, returns=returns)
    if clip is not None and not clip > 0:
        raise ValueError(f"value_loss: clip = {clip}; give a number above 0, or None")
    now, target = _only(values, mask), _only(returns, mask).detach()
    free = held = (now - target).square()
    if clip is not None:
        old = _only(old_values, mask).detach()
        held = (now.clamp(old - clip, old + clip) - target).square()
    count = mask.sum() if total is None else total
    return ValueLoss(0.5 * _sum(torch.maximum(free, held)) / count, _sum((held > free).to(now.dtype)) / count)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns the values foretell: 1 − mean (R − V)² / var R over the real tokens, 0-dim.

    1: all; 0: no more than their mean would; below: less. An offset counts against the values, as it does in training.
    NaN where the returns do not vary. values, returns (N, T).
    """
    _check("explained_variance", mask, values=values, returns=returns)
    error = (_only(returns, mask) - _only(values, mask)).double().square().sum() / mask.sum()
    var = moments(returns.flatten(), mask.flatten()).var
    return torch.where(var > 0, 1 - error / var, torch.nan)


def _kl(ratio: Tensor, estimator: str) -> Tensor:
    if estimator not in ("k1", "k3", "none"):
        raise ValueError(f"token_rewards: unknown kl {estimator!r}; choose k1, k3 or none")
    if estimator == "none":
        return torch.zeros_like(ratio)
    return ratio if estimator == "k1" else torch.expm1(-ratio) + ratio


def _only(values: Tensor, mask: Tensor) -> Tensor:
    """Values on the mask, 0 elsewhere, in float32 or better; not a product, which would keep NaN."""
    return torch.where(mask, values, 0).to(torch.promote_types(values.dtype, torch.float32))


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64).to(values.dtype)


def _answers(name: str, scores: Tensor) -> int:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"{name}: scores have shape {tuple(scores.shape)}; give (Q, K), at least 2 answers a prompt")
    return scores.shape[1]


def _check(name: str, mask: Tensor, **tensors: Tensor) -> None:
    for what, tensor in tensors.items():
        if tensor.shape != mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}: {what} {tuple(tensor.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) "
                "must have one shape, the mask of bools"
            )


def _check_scores(score: Tensor, mask: Tensor, finished: Tensor | None, missing_eos: float | None) -> None:
    if mask.ndim != 2 or score.shape != mask.shape[:1] or (finished is not None and finished.shape != score.shape):
        raise ValueError(
            f"token_rewards: mask {tuple(mask.shape)} must be (N, T), score {tuple(score.shape)} and finished (N,)"
        )
    if missing_eos is not None and finished is None:
        raise ValueError("token_rewards: missing_eos is for answers that are not finished; say which, by `finished`")
    bad = ~score.isfinite() | ~mask.any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"token_rewards: answer {row} has score {score[row].item()} and {int(mask[row].sum())} tokens; "
            "give every answer a finite score and at least one token"
        )
