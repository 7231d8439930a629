"""The exact world: softmax policies over a finite set of responses, learned from pairs by any direct loss.

I instances of n responses each run side by side in float64, with the losses and samplers that train language models.
With δ_ab = (r_a − r_b) − β(log π_a/π_ref,a − log π_b/π_ref,b), the distance from the optimum π ∝ π_ref e^{r/β}, uniform
pairs make DPO converge linearly and `mix_r`, `mix_p` quadratically, at the matched rate η* = Z/(2β²n).
Shi et al. 2024, "The crucial role of samplers in online direct preference optimization", arXiv:2409.19605.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.math import losses
from pyrite.math.logps import Logps, PairLogps
from pyrite.math.ranges import Count, Half, Natural, Positive, require
from pyrite.math.samplers import Exact, Sampler, exact

F64 = torch.float64
ROUNDING = 3e-15  # of max |δ|, where rewards and implied rewards are a few nats
BOUNDS = {"uniform": (0.588, 1), "mix_r": (0.5, 2), "mix_p": (0.611, 2)}  # constant, order

PairLoss = Callable[[PairLogps], Tensor]
Rate = Positive | Literal["matched", "best"]


class World(NamedTuple):
    """I instances: reward (I, n); ref (I, n), log π_ref; beta, strength of the KL. Made by `world`."""

    reward: Tensor
    ref: Tensor
    beta: float

    @property
    def optimum(self) -> Tensor:
        """Logits (I, n) of π ∝ π_ref e^{r/β}, where every δ is 0."""
        return self.ref + self.reward / self.beta

    @property
    def best_value(self) -> Tensor:
        """The value at the optimum, β log Σ π_ref e^{r/β}, (I,)."""
        return self.beta * self.optimum.logsumexp(-1)


def world(reward: Tensor, *, beta: float, ref: Tensor | None = None) -> World:
    """Instances from rewards (I, n) or (n,), and logits of the reference, the same shape; None is uniform.

    Raises ValueError for another shape, fewer than 2 responses, values that are not finite, beta not above 0.
    """
    reward = torch.atleast_2d(torch.as_tensor(reward, dtype=F64))
    ref = torch.zeros_like(reward) if ref is None else torch.atleast_2d(torch.as_tensor(ref, dtype=F64))
    if reward.ndim != 2 or reward.shape != ref.shape or reward.shape[1] < 2:
        raise ValueError(
            f"world: reward {tuple(reward.shape)} and ref {tuple(ref.shape)} must both be (instances, responses), "
            "with at least 2 responses"
        )
    for name, values in (("reward", reward), ("ref", ref)):
        if not values.isfinite().all():
            row, column = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"world: {name} of instance {row}, response {column} is {values[row, column].item()}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"world: beta = {beta}; give a positive number")
    return World(reward, ref.log_softmax(-1), beta)


class Trajectory(NamedTuple):
    """What `descend` saw before each of T updates and after the last.

    error (T+1, I): max |δ|.   mean_error (T+1, I): mean |δ| over all n² pairs.   reward (T+1, I): E_π r.
    kl (T+1, I): KL(π ‖ π_ref), nats.   rate (T, I): learning rates.   logps (I, n): log π at the end.
    """

    error: Tensor
    mean_error: Tensor
    reward: Tensor
    kl: Tensor
    rate: Tensor
    logps: Tensor


def descend(
    world: World,
    sampler: Sampler,
    *,
    steps: Natural,
    loss: PairLoss | None = None,
    rate: Rate = "matched",
    scale: Positive = 1.0,
    samples: Count | None = None,
    noise: Half = 0.0,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] | None = None,
) -> Trajectory:
    """Gradient descent from the reference on Σ_ab J_ab [p_ab ℓ(a, b) + (1 − p_ab) ℓ(b, a)], p_ab = σ(r_a − r_b).

    loss: ready, of pairs with sums, a reference and strength r_a − r_b; DPO at the world's β by default.
    rate: "matched" to the sampler (`matched_rate`), "best" constant rate at the optimum, or a number; times `scale`.
    samples: None for the exact gradient, or the number of pairs drawn and labeled anew each step.
    noise: share of labels flipped. start: logits (I, n) in place of the reference.
    generator: of the draws, on the rewards' device. advance is told the number of instances after each step.
    Raises ValueError for options out of range and for a loss that needs more, or one value from many pairs.

    >>> from pyrite.math.samplers import mix_p, uniform
    >>> here = world(torch.tensor([0.0, 0.5, 1.0]), beta=1.0)
    >>> [f"{error:.0e}" for error in descend(here, uniform(), steps=3).error[:, 0].tolist()]
    ['1e+00', '6e-02', '9e-03', '1e-03']
    >>> [f"{error:.0e}" for error in descend(here, mix_p(), steps=3).error[:, 0].tolist()]
    ['1e+00', '6e-02', '5e-04', '5e-08']
    """
    loss = partial(losses.dpo, beta=world.beta) if loss is None else loss
    check_loss(loss)
    require(descend, steps=steps, rate=rate, scale=scale, samples=samples, noise=noise)
    sampler = sampler.at(world.beta)
    reward, other = world.reward[:, :, None], world.reward[:, None, :]
    twice = 2 * (noise + (1 - 2 * noise) * (reward - other).sigmoid())  # a pair is drawn in either order
    constant = None if rate == "matched" and sampler.weigh == "mass" else _constant_rate(world, sampler, rate)
    every, logps = every_pair(world), (world.ref if start is None else start.to(F64)).log_softmax(-1)
    seen, rates = [_look(world, logps)], []
    pairs, shares = _shares(world, sampler, logps, twice)
    for _ in range(steps):
        rates.append(scale * (matched_rate(pairs, world.beta) if constant is None else constant))
        drawn = shares if samples is None else multinomial(shares, samples, generator=generator) / samples
        logps = (logps - rates[-1][:, None] * gradient(every, logps, drawn, loss)).log_softmax(-1)
        seen.append(_look(world, logps))
        if sampler.adaptive:
            pairs, shares = _shares(world, sampler, logps, twice)
        if advance:
            advance(len(logps))
    error, mean_error, reward, kl = (torch.stack(column) for column in zip(*seen, strict=True))
    rate_table = torch.stack(rates) if rates else logps.new_empty(0, len(logps))
    return Trajectory(error, mean_error, reward, kl, rate_table, logps)


def every_pair(world: World) -> PairLogps:
    """The I·n² ordered pairs (a chosen, b rejected) with the policy at the reference; strength r_a − r_b."""
    chosen, rejected = _sides(world.ref)
    reward, other = _sides(world.reward)
    return pair_logps((chosen, rejected), (chosen, rejected), reward - other)


def gradient(pairs: PairLogps, logps: Tensor, shares: Tensor, loss: PairLoss) -> Tensor:
    """∂/∂logits of Σ_ab shares_ab ℓ(chosen a, rejected b) at log-probabilities (I, n): shares (I, n, n) -> (I, n).

    pairs: `every_pair`. The shares are constants: a sampler is held fixed. The gradient sums to 0 over the responses.
    """
    sides = _sides(logps)
    for side in sides:
        side.requires_grad_()
    chosen, rejected = (replace(pairs.chosen, sum=side) for side in sides)
    values = loss(replace(pairs, chosen=chosen, rejected=rejected))
    slopes = torch.autograd.grad(values, sides, shares.flatten(), materialize_grads=True)
    on_chosen, on_rejected = (slope.view_as(shares) for slope in slopes)
    slope = on_chosen.sum(-1) + on_rejected.sum(-2)
    return slope - logps.exp() * slope.sum(-1, keepdim=True)


def multinomial(shares: Tensor, samples: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Counts of `samples` draws from each distribution: shares (I, ...) summing to 1 -> the same shape, float64.

    By halving: how many fall into the left half is binomial, and so on down; the work does not grow with `samples`.
    """
    cells = shares[0].numel()
    depth = max(cells - 1, 0).bit_length()
    levels = [torch.nn.functional.pad(shares.flatten(1), (0, 2**depth - cells))]
    while levels[-1].shape[1] > 1:
        levels.append(levels[-1].unflatten(1, (-1, 2)).sum(-1))
    counts = torch.full_like(levels.pop(), float(samples))
    for parts in reversed(levels):
        halves = parts.unflatten(1, (-1, 2))
        share = (halves[..., 0] / halves.sum(-1)).nan_to_num_(0.0)  # an empty branch is never reached
        left = torch.binomial(counts, share, generator=generator)
        counts = torch.stack([left, counts - left], -1).flatten(1)
    return counts[:, :cells].view_as(shares)


def matched_rate(pairs: Exact, beta: float) -> Tensor:
    """η* = Z/(2β²n), (I,): the rate at which a sampler that weighs by mass cancels the sigmoid's slope.

    2n/β² for `uniform`. Raises ValueError if weights are shares. arXiv:2409.19605, in the normalized convention.
    """
    if pairs.mass is None:
        raise ValueError("matched_rate: this sampler has no mass; choose a number, or the best rate at the optimum")
    return pairs.mass / (2 * beta**2 * pairs.joint.shape[-1])


class Spectrum(NamedTuple):
    """Curvature at the optimum: values (I, n−1) ascending and vectors (I, n, n−1) of the Laplacian of J_ab σ'(r_a−r_b).

    One DPO step at rate η multiplies an error along vector k by 1 − 2ηβ² value_k.
    """

    values: Tensor
    vectors: Tensor


def spectrum(world: World, sampler: Sampler) -> Spectrum:
    """The curvature of DPO under a sampler at the optimum; labels as the reward gives them."""
    pairs = exact(sampler.at(world.beta), world.optimum.log_softmax(-1), world.ref, world.reward)
    slope = (world.reward[:, :, None] - world.reward[:, None, :]).sigmoid()
    edges = pairs.joint * slope * slope.mT
    values, vectors = torch.linalg.eigh(edges.sum(-1).diag_embed() - edges)
    return Spectrum(values[:, 1:], vectors[:, :, 1:])  # the first is 0, the constant


def best_rate(curvature: Spectrum, beta: float) -> Tensor:
    """The constant rate of fastest convergence near the optimum, 1/(β²(λ_min + λ_max)), (I,)."""
    return 1 / (beta**2 * (curvature.values[:, 0] + curvature.values[:, -1]))


def contraction(curvature: Spectrum, beta: float, rate: Tensor) -> Tensor:
    """max_k |1 − 2ηβ²λ_k|, (I,): what one exact step leaves of a small error; at 1 and above it diverges."""
    return (1 - 2 * beta**2 * rate[:, None] * curvature.values).abs().amax(-1)


def noise_floor(curvature: Spectrum, beta: float, rate: Tensor, samples: int) -> Tensor:
    """Where sampled DPO stops: the stationary mean |δ| over all n² pairs near the optimum, (I,); ∞ if it diverges.

    logits vary by Σ_k η/(2N(1 − ηβ²λ_k)) v_k v_kᵀ,   so mean |δ| ≈ (1 − 1/n) √(2/π) β √(η/N) at small rates η

    N samples a step, labels drawn as the reward gives them. From θ' = θ − η(2β²Lθ + noise of covariance 2β²L/N).
    """
    slack = 1 - beta**2 * rate[:, None] * curvature.values
    spread = (rate[:, None] / (2 * samples * slack)).sqrt()
    coordinates = curvature.vectors * spread[:, None, :].nan_to_num(math.inf)
    return beta * math.sqrt(2 / math.pi) * torch.cdist(coordinates, coordinates).mean((-2, -1)).nan_to_num(math.inf)


def bound(name: str, steps: int) -> Tensor:
    """The theorem's bound on max |δ| at t = 0..steps, (steps+1,): 0.588^t for `uniform`, 0.5^{2^t−1} for `mix_r`,
    0.611^{2^t−1} for `mix_p`; for rewards in [0, 1], a uniform reference, exact gradients and the matched rate.

    Raises ValueError for another sampler. Constants as quoted from arXiv:2409.19605, theorems on exact DPO.
    """
    if name not in BOUNDS:
        raise ValueError(f"bound: no theorem for {name!r}; there are bounds for {', '.join(BOUNDS)}")
    constant, order = BOUNDS[name]
    time = torch.arange(steps + 1, dtype=F64)
    return constant ** (time if order == 1 else 2**time - 1)


def trajectory_order(error: Tensor, *, floor: float = ROUNDING) -> Tensor:
    """Order of convergence seen in the tails of trajectories: error (T+1, I) -> (I,), NaN if there is no tail.

    q_t = log(e_{t+1}/e_t) / log(e_t/e_{t−1}),   1 linear, 2 quadratic

    at the last t that rounding (`floor`, an absolute error) can move by less than 2 %.
    """
    error = error.to(F64)
    if len(error) < 3:
        return error.new_full(error.shape[1:], math.nan)
    fall = (error[1:] / error[:-1]).log()
    q = fall[1:] / fall[:-1]
    blur = floor / error[2:] / fall[:-1].abs()
    good = (fall < 0)[1:] & (fall < 0)[:-1] & (blur < 0.02) & (error[2:] < 0.1)
    last = torch.where(good, torch.arange(len(q), device=q.device)[:, None], -1).amax(0)
    return torch.where(last >= 0, q.gather(0, last.clamp(min=0)[None])[0], math.nan)


def order_test(
    world: World,
    sampler: Sampler,
    *,
    rate: Rate = "matched",
    scale: float = 1.0,
    loss: PairLoss | None = None,
    distances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Order of one step near the optimum: slope of log max|δ'| against log ε, (I,), and δ' itself, (len(distances), I).

    The start is the optimum plus ε v/β, v random with max v − min v = 1, so that max |δ| = ε.
    """
    v = torch.randn(world.reward.shape, dtype=F64, generator=generator).to(world.reward.device)
    v = v / (v.amax(-1) - v.amin(-1))[:, None]
    rows = []
    for distance in distances:
        start = world.optimum + distance / world.beta * v
        rows.append(descend(world, sampler, steps=1, loss=loss, rate=rate, scale=scale, start=start).error[1])
    left = torch.stack(rows)
    x = torch.tensor(distances, dtype=F64, device=left.device).log()
    x = x - x.mean()
    return (x[:, None] * left.log()).sum(0) / x.square().sum(), left


def check_loss(loss: PairLoss) -> None:
    """Refuse a loss that needs more than sums, a reference and a strength, or that mixes the pairs of a batch.

    Raises ValueError with the loss's own reason.
    """
    chosen, rejected = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -1.5, -2.5]], dtype=F64)
    ref = torch.tensor([[-1.2, -2.2, -3.0], [-2.0, -1.0, -3.5]], dtype=F64)
    strength = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    rows = [slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)]
    try:
        together, *alone = (
            loss(pair_logps((chosen[row], rejected[row]), (ref[0, row], ref[1, row]), strength[row])) for row in rows
        )
    except ValueError as error:
        raise ValueError(f"a loss over a finite set sees sums, a reference and a strength only: {error}") from error
    if not torch.allclose(together, torch.cat(alone), rtol=1e-9, equal_nan=True):
        raise ValueError("this loss compares the pairs of a batch, so it has no exact gradient: choose another")
    if not together.isfinite().all():
        raise ValueError(
            "this loss is not finite where the worse response is preferred (strength below 0), as labels at "
            "random sometimes have it: choose another"
        )


def _constant_rate(world: World, sampler: Sampler, rate: Rate) -> Tensor:
    """A rate (I,) that does not change with the policy."""
    if isinstance(rate, str):
        return best_rate(spectrum(world, sampler), world.beta)
    return torch.full_like(world.reward[:, 0], rate)


def _shares(world: World, sampler: Sampler, logps: Tensor, twice: Tensor) -> tuple[Exact, Tensor]:
    """A sampler at a policy, and how often it draws a and b with a preferred, (I, n, n)."""
    pairs = exact(sampler, logps, world.ref, world.reward)
    return pairs, pairs.joint * twice


def _look(world: World, logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max |δ|, mean |δ|, E_π r and KL(π ‖ π_ref) of log-probabilities (I, n), each (I,)."""
    n = logps.shape[-1]
    policy, ratio = logps.exp(), logps - world.ref
    x = (world.reward - world.beta * ratio).sort(-1).values
    rank = 2 * torch.arange(n, dtype=F64, device=x.device) + 1 - n  # Σ_ab |x_a − x_b| = 2 Σ_k rank_k x_(k)
    mean = 2 * (x * rank).sum(-1) / n**2
    return x[:, -1] - x[:, 0], mean, (policy * world.reward).sum(-1), (policy * ratio).sum(-1)


def _sides(logps: Tensor) -> tuple[Tensor, Tensor]:
    """Of (I, n), the value of a and of b for every ordered pair (a, b), flat."""
    shape = (*logps.shape, logps.shape[-1])
    return logps[:, :, None].expand(shape).flatten(), logps[:, None, :].expand(shape).flatten()


def pair_logps(policy: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor], strength: Tensor) -> PairLogps:
    """Responses of one token each, known by their log-probabilities: (chosen, rejected) of policy and reference."""
    length = torch.ones_like(strength, dtype=torch.int64)
    chosen, rejected, ref_chosen, ref_rejected = (Logps.from_sums(logps, length) for logps in (*policy, *ref))
    return PairLogps(chosen, rejected, ref_chosen, ref_rejected, strength=strength)
