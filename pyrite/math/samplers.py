"""Which two distributions the responses of a pair are drawn from: samplers are data.

An arm is a set of exponents, arm ∝ exp(policy·log π + ref·log π_ref + reward·r); a sampler is a weighted list of pairs
of arms. On a finite set a sampler is evaluated exactly (`exact`); a language model evaluates an arm token by token
(`mixed_logits`). Shi et al. 2024, "The crucial role of samplers in online direct preference optimization",
arXiv:2409.19605.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.math.ranges import NonNegative, Positive, Share, require

__all__ = ["hybrid", "mix_p", "mix_r", "mixed", "mixture", "on_policy", "reference", "uniform"]

Cap = NonNegative | Literal["range"] | None


@dataclass(frozen=True)
class Arm:
    """One distribution, ∝ exp(policy·log π + ref·log π_ref + reward·r + implied·β log π/π_ref).

    `implied` waits for the β of the loss: `Sampler.at(beta)` turns it into exponents of π and π_ref.
    """

    policy: float = 0.0
    ref: float = 0.0
    reward: float = 0.0
    implied: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(exponent) for exponent in astuple(self)):
            raise ValueError(f"{self}: an exponent is not finite; give plain numbers")

    def at(self, beta: float) -> Arm:
        """The arm with its implied reward written as exponents of π and π_ref."""
        return Arm(self.policy + self.implied * beta, self.ref - self.implied * beta, self.reward)


@dataclass(frozen=True)
class ArmPair:
    """Responses of one pair, first × second, in either order."""

    first: Arm
    second: Arm
    weight: float = 1.0


@dataclass(frozen=True)
class Sampler:
    """A weighted list of arm pairs.

    weigh "share": a weight is the share of the response pairs that these arms draw.
    weigh "mass": it multiplies Σ exp(first) · Σ exp(second), the arms' own mass, as in the theory.
    cap: largest reward difference M, in nats, that may raise a pair's weight: C ≤ 2 + e^M + e^−M; "range" takes
    each instance's own reward range. Raises ValueError for no pairs, weights or a cap that make no distribution.
    """

    pairs: tuple[ArmPair, ...]
    weigh: Literal["share", "mass"] = "share"
    cap: Cap = None

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("a sampler needs at least one pair of arms")
        for index, pair in enumerate(self.pairs):
            if not (math.isfinite(pair.weight) and pair.weight > 0):
                raise ValueError(f"arm pair {index} has weight {pair.weight}; give a positive number, or leave it out")
        if self.weigh not in ("share", "mass"):
            raise ValueError(f"weigh={self.weigh!r}; choose 'share' or 'mass'")
        if self.cap is not None and self.cap != "range":
            if isinstance(self.cap, str) or not (math.isfinite(self.cap) and self.cap >= 0):
                raise ValueError(f"cap={self.cap!r}; give the largest reward difference in nats, 'range', or None")
            if self.weigh == "share":
                raise ValueError("a cap bounds pair weights by mass; with weigh='share' there are none, leave it out")

    def at(self, beta: float) -> Sampler:
        """The sampler for a loss of strength β: implied rewards become exponents of π and π_ref."""
        pairs = tuple(replace(p, first=p.first.at(beta), second=p.second.at(beta)) for p in self.pairs)
        return replace(self, pairs=pairs)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, two a pair."""
        return tuple(arm for pair in self.pairs for arm in (pair.first, pair.second))

    @property
    def adaptive(self) -> bool:
        """Whether it changes with the policy."""
        return any(arm.policy or arm.implied for arm in self.arms)


def reference() -> Sampler:
    """Both responses from the reference, π_ref × π_ref: offline."""
    return Sampler((ArmPair(Arm(ref=1.0), Arm(ref=1.0)),))


def on_policy() -> Sampler:
    """Both responses from the policy, π × π: online."""
    return Sampler((ArmPair(Arm(policy=1.0), Arm(policy=1.0)),))


def hybrid() -> Sampler:
    """One response from the reference, one from the policy, π_ref × π."""
    return Sampler((ArmPair(Arm(ref=1.0), Arm(policy=1.0)),))


def mixed(*, kappa: Share = 0.5, on_policy: Share = 0.0) -> Sampler:
    """Past the policy and short of it, π^{1+κ} π_ref^{−κ} × π^{1−κ} π_ref^{κ}; a share `on_policy` from π × π.

    κ = 0 is `on_policy`. Raises ValueError for a share outside [0, 1].
    """
    require(mixed, kappa=kappa, on_policy=on_policy)
    apart = ArmPair(Arm(1 + kappa, -kappa), Arm(1 - kappa, kappa), 1 - on_policy)
    plain = ArmPair(Arm(policy=1.0), Arm(policy=1.0), on_policy)
    return Sampler(tuple(pair for pair in (apart, plain) if pair.weight))


def uniform() -> Sampler:
    """Every pair alike, 1 × 1; for a finite set. Linear convergence.

    Its pair weight is 4 = 1/σ'(0), what `mix_r` and `mix_p` give two responses of equal reward.
    """
    return Sampler((ArmPair(Arm(), Arm(), 2.0),), "mass")


def mix_r(*, share: Share | None = None) -> Sampler:
    """Uniform pairs and pairs apart in reward, 1 × 1 and e^r × e^−r; for a finite set. Quadratic convergence.

    C_ab = 2 + e^{r_a−r_b} + e^{r_b−r_a} = 1/σ'(r_a − r_b): the weights undo the slope of the sigmoid. `share` sets
    the share of the second kind by hand (1: only those), None takes the masses that make C.
    """
    require(mix_r, share=share)
    return _apart(Arm(reward=1.0), Arm(reward=-1.0), share, None)


def mix_p(*, beta: Positive | None = None, cap: Cap = None, share: Share | None = None) -> Sampler:
    """`mix_r` by the policy's own reward, 1 × 1 and (π/π_ref)^β × (π/π_ref)^−β; for a finite set. Quadratic.

    beta: None takes that of the loss. cap: largest reward difference believed, nats, or "range". share: as in `mix_r`.
    """
    require(mix_p, beta=beta, cap=cap, share=share)
    if beta is None:
        return _apart(Arm(implied=1.0), Arm(implied=-1.0), share, cap)
    return _apart(Arm(beta, -beta), Arm(-beta, beta), share, cap)


def mixture(*, arms: Sequence[Sequence], weigh: Literal["share", "mass"] = "share", cap: Cap = None) -> Sampler:
    """Any sampler, from rows (weight, first, second), an arm being its exponents (policy, ref, reward).

    Raises ValueError, naming the row, for anything else.

    >>> mixture(arms=[(1, (1.5, -0.5), (0.5, 0.5))]) == mixed(kappa=0.5)
    True
    """
    return Sampler(tuple(_arm_pair(row, index) for index, row in enumerate(arms)), weigh, cap)


def _apart(high: Arm, low: Arm, share: float | None, cap: Cap) -> Sampler:
    """Uniform pairs and pairs of high and low."""
    if share is None:
        return Sampler((ArmPair(Arm(), Arm()), ArmPair(high, low)), "mass", cap)
    pairs = ArmPair(Arm(), Arm(), 1 - share), ArmPair(high, low, share)
    return Sampler(tuple(pair for pair in pairs if pair.weight), "share", cap)


def _arm_pair(row: Sequence, index: int) -> ArmPair:
    try:
        weight, first, second = row
        high, low = (Arm(*(float(exponent) for exponent in arm)) for arm in (first, second))
        return ArmPair(high, low, float(weight))
    except (TypeError, ValueError):
        raise ValueError(
            f"mixture: row {index} is {row!r}; write (weight, first, second), an arm as (policy, ref, reward), "
            "such as (1, (1.5, -0.5), (0.5, 0.5))"
        ) from None


class Exact(NamedTuple):
    """A sampler on a finite set of n responses.

    joint (..., n, n): probability of each ordered pair, symmetric.   weights (..., M): share of each arm pair.
    mass (...): Z = Σ_ab C_ab with C the pair weights by mass; None where weights are shares.
    """

    joint: Tensor
    weights: Tensor
    mass: Tensor | None


def exact(sampler: Sampler, policy: Tensor, ref: Tensor, reward: Tensor) -> Exact:
    """Pair probabilities, weights and normalizer of a sampler on a finite set.

    J = Σ_i w_i · ½(s1_i s2_iᵀ + s2_i s1_iᵀ),   by mass C_ab = Σ_i c_i (u_i(a) v_i(b) + v_i(a) u_i(b)),   J = C / Z

    with u, v the arms before normalization and c their weights. policy, ref (..., n) log-probabilities and reward
    (..., n) broadcast. Raises ValueError for a sampler that still waits for β.
    """
    if any(arm.implied for arm in sampler.arms):
        raise ValueError("this sampler waits for the loss's beta: take sampler.at(beta), or name it, mix_p(beta=0.1)")
    policy, ref, reward = torch.broadcast_tensors(policy, ref, reward)
    tilts = torch.stack([arm.policy * policy + arm.ref * ref + arm.reward * reward for arm in sampler.arms], -2)
    log_mass = tilts.logsumexp(-1, keepdim=True)
    first, second = (tilts - log_mass).exp().unflatten(-2, (-1, 2)).unbind(-2)  # (..., M, n) each
    weight = tilts.new_tensor([pair.weight for pair in sampler.pairs])
    log_weight = weight.log().expand(first.shape[:-1])
    if sampler.weigh == "mass":
        log_weight = log_weight + log_mass.squeeze(-1).unflatten(-1, (-1, 2)).sum(-1)
    weights = log_weight.softmax(-1)
    sides = weights[..., None] / 2 * first, second
    joint = sides[0].mT @ sides[1]
    joint = joint + joint.mT
    mass = 2 * log_weight.logsumexp(-1).exp() if sampler.weigh == "mass" else None
    if sampler.cap is not None and mass is not None:
        joint, mass = _capped(joint, mass, sampler.cap, reward)
    return Exact(joint, weights, mass)


def _capped(joint: Tensor, mass: Tensor, cap: float | Literal["range"], reward: Tensor) -> tuple[Tensor, Tensor]:
    """min(C, 2 + e^M + e^−M) as a distribution and its mass: what rejecting the heaviest pairs leaves."""
    most = reward.amax(-1) - reward.amin(-1) if cap == "range" else reward.new_tensor(cap)
    joint = torch.minimum(joint, ((2 + 2 * most.cosh()) / mass)[..., None, None])
    kept = joint.sum((-2, -1))
    return joint / kept[..., None, None], mass * kept


def check_decodable(sampler: Sampler) -> None:
    """Refuse what a language model cannot draw token by token; warn where policy + ref ≠ 1.

    Raises ValueError for a reward or β in an arm, weights by mass, and a cap: those need a finite set.
    """
    if sampler.weigh == "mass" or sampler.cap is not None or any(arm.reward or arm.implied for arm in sampler.arms):
        raise ValueError(
            "this sampler needs a finite set of responses (it weighs pairs by mass, caps them, or tilts by reward); "
            "for a language model choose reference, on_policy, hybrid, mixed or a mixture of shares"
        )
    for arm in sampler.arms:
        if not math.isclose(arm.policy + arm.ref, 1.0, abs_tol=1e-9):
            warnings.warn(
                f"arm π^{arm.policy:g} π_ref^{arm.ref:g}: exponents sum to {arm.policy + arm.ref:g}, not 1, so at "
                "policy = reference it is that model sharpened or flattened, not the model itself",
                stacklevel=2,
            )


def pick(sampler: Sampler, uniform: Tensor) -> Tensor:
    """Which arm pair draws each of N pairs of responses, from uniforms (N,) in [0, 1): -> (N,) indices."""
    weight = torch.tensor([pair.weight for pair in sampler.pairs], dtype=torch.float64, device=uniform.device)
    edges = weight.cumsum(0) / weight.sum()
    return torch.searchsorted(edges, uniform.double(), right=True).clamp_max(len(weight) - 1)


def exponents(arms: Sequence[Arm]) -> Tensor:
    """The exponents of N arms as `mixed_logits` takes them, (N, 2) float32: of the policy, of the reference."""
    return torch.tensor([(arm.policy, arm.ref) for arm in arms], dtype=torch.float32)


def mixed_logits(policy: Tensor, ref: Tensor, exponents: Tensor) -> Tensor:
    """Logits of the arms' next token, policy·l + ref·l_ref, in float32; temperature and truncation come after.

    policy, ref (N, V) logits, exponents (N, 2) or (1, 2), best on the CPU -> (N, V). Equal to mixing log-probabilities,
    up to a constant a row. An exponent of 0 leaves a model out entirely, and 1 beside it leaves the other's logits as
    they are, bit by bit. A token that a model rules out (−inf) stays out.

    >>> mixed_logits(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]), exponents([Arm(1.5, -0.5)]))
    tensor([[2.5000, 1.0000]])
    """
    policy_exponent, ref_exponent = exponents.unsqueeze(-1).unbind(-2)
    policy, ref = _unless_left_out(policy.float(), policy_exponent), _unless_left_out(ref.float(), ref_exponent)
    mixed = policy * policy_exponent.to(policy.device)
    mixed.addcmul_(ref, ref_exponent.to(ref.device))
    out = policy.isneginf()
    out |= ref.isneginf()
    return mixed.masked_fill_(out, -math.inf)  # else inf − inf, or a negative power of 0


def _unless_left_out(logits: Tensor, exponent: Tensor) -> Tensor:
    """Logits (N, V), zeros in rows of exponent (N, 1) 0, where even −inf must not count."""
    none = exponent == 0
    return torch.where(none.to(logits.device), 0.0, logits) if bool(none.any()) else logits
