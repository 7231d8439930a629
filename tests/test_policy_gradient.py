"""Rewards, advantages and losses of policy optimization: worked numbers, plain loops, padding, exact gradients."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyrite.math.policy_gradient
from pyrite.math import tabular
from pyrite.math.policy_gradient import (
    explained_variance,
    gae,
    group_normalized,
    moments,
    policy_loss,
    reinforce,
    rloo,
    token_rewards,
    value_loss,
    whiten,
)

F64 = torch.float64
GARBAGE = (0.0, math.nan, math.inf, -math.inf, 1e30)
seeds = given(st.integers(0, 10_000))


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(found: Tensor, expected: Tensor | list[Any] | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


class Batch(NamedTuple):
    """Random answers of random lengths."""

    score: Tensor
    logp: Tensor
    ref_logp: Tensor
    old_logp: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    advantages: Tensor
    mask: Tensor
    finished: Tensor


def drawn(seed: int, *, rows: int = 5, width: int = 6, garbage: float = 0.0, holes: bool = False) -> Batch:
    g = stream(seed)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=g)
    if holes:  # anywhere, also at the front
        mask = (torch.rand(rows, width, generator=g) < 0.6) | (torch.arange(width) == seed % width)
    tokens = torch.randn(7, rows, width, dtype=F64, generator=g)
    tokens[:3] = -tokens[:3].abs() / 2
    tokens = torch.where(mask, tokens, garbage)
    score, finished = torch.randn(rows, dtype=F64, generator=g), torch.rand(rows, generator=g) < 0.5
    return Batch(score, *tokens, mask, finished)


def every(batch: Batch) -> dict[str, Tensor]:
    """All that is made of a batch, by name: (N, T), or 0-dim."""
    score, logp, ref_logp, old_logp, values, old_values, returns, advantages, mask, finished = batch
    kinds = {kl: token_rewards(score, logp, ref_logp, mask, beta=0.3, kl=kl) for kl in ("k1", "k3", "none")}
    options: dict[str, Any] = {"finished": finished, "missing_eos": 1.5, "clip": 0.7}
    estimates = gae(advantages, values, mask, gamma=0.9, lam=0.8)
    return {
        **kinds,
        "options": token_rewards(score, logp, ref_logp, mask, beta=0.3, **options),
        "advantages": estimates.advantages,
        "returns": estimates.returns,
        "whiten": whiten(advantages, mask),
        **{f"policy {k}": v for k, v in policy_loss(logp, old_logp, advantages, mask)._asdict().items()},
        "policy, one an answer": policy_loss(logp, old_logp, score[:, None], mask).loss,
        **{f"value {k}": v for k, v in value_loss(values, old_values, returns, mask, clip=0.4)._asdict().items()},
        "explained": explained_variance(values, returns, mask),
    }


def test_examples() -> None:
    result = doctest.testmod(pyrite.math.policy_gradient, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


# Worked numbers


def test_worked_kl_estimators() -> None:
    """log-ratios .5 and −.2: k1 .3, k3 .127933; the inverted k3 of other trainers would give .167452."""
    logp, ref_logp, mask = tensor([0.0, 0.0]), tensor([-0.5, 0.2]), torch.ones(1, 2, dtype=torch.bool)
    found = {kl: token_rewards(tensor(0.0), logp, ref_logp, mask, beta=1.0, kl=kl).sum().item() for kl in ("k1", "k3")}
    assert -found["k1"] == pytest.approx(0.3)
    assert -found["k3"] == pytest.approx(0.127933, abs=5e-7)


def test_score_is_at_the_last_real_token() -> None:
    """Neither at the end of the matrix nor at the pad behind the end token."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    zeros = torch.zeros(3, 5, dtype=F64)
    close(
        token_rewards(tensor(1.0, 2.0, 3.0), zeros, zeros, mask, beta=0.1),
        [[0, 0, 1, 0, 0], [0, 0, 0, 0, 2], [3, 0, 0, 0, 0]],
    )


def test_without_beta_only_the_end_is_rewarded() -> None:
    batch = drawn(0)
    found = token_rewards(batch.score, batch.logp, batch.ref_logp, batch.mask, beta=0.0)
    assert torch.equal(found != 0, batch.mask & (batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True)))
    close(found.sum(1), batch.score)


def test_an_answer_without_end_pays_after_the_clip() -> None:
    """Were the penalty clipped as well, the worst answers would not feel it."""
    mask, zeros = torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=F64)
    finished = torch.tensor([True, False, False])
    options: dict[str, Any] = {"beta": 0.0, "finished": finished, "missing_eos": 3.0, "clip": 10.0}
    close(token_rewards(tensor(20.0, 1.0, -20.0), zeros, zeros, mask, **options), [[10.0], [-2.0], [-13.0]])


def test_worked_advantages() -> None:
    """δ = (1 + 3 − 2, 2 + 0 − 3) = (2, −1); the pad's value, 100, is not bootstrapped from."""
    mask = torch.tensor([[True, True, False]])
    found = gae(tensor([1.0, 2.0, 50.0]), tensor([2.0, 3.0, 100.0]), mask, lam=0.5)
    close(found.advantages, [[1.5, -1.0, 0.0]])
    close(found.returns, [[3.5, 2.0, 0.0]])
    close(
        gae(tensor([1.0, 2.0, 50.0]), tensor([2.0, 3.0, 100.0]), mask, gamma=0.5, lam=0.5).advantages, [[0.25, -1, 0]]
    )


def test_worked_whitening() -> None:
    """Of 1, 2, 3: mean 2, population variance 2/3; padding would have moved both."""
    values, mask = tensor([1.0, 2.0, 3.0, 0.0, 0.0]), torch.tensor([[True, True, True, False, False]])
    close(whiten(values, mask), [[-math.sqrt(1.5), 0, math.sqrt(1.5), 0, 0]], 1e-7)


def test_whitening_of_equal_values_makes_nothing_of_rounding() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert whiten(torch.full((1, 3), 0.1) + torch.tensor([0.0, 1e-8, 0.0]), mask).abs().max() < 1e-3


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [(1.5, 1.0, -1.2, 1), (1.5, -1.0, 1.5, 0), (0.5, 1.0, -0.5, 0), (0.5, -1.0, 0.8, 1), (1.1, 1.0, -1.1, 0)],
)
def test_worked_policy_loss(ratio: float, advantage: float, loss: float, clipped: float) -> None:
    logp = tensor([math.log(ratio)]).requires_grad_()
    found = policy_loss(logp, tensor([0.0]), tensor([advantage]), torch.ones(1, 1, dtype=torch.bool))
    assert found.loss.item() == pytest.approx(loss)
    assert found.clip_fraction == clipped
    found.loss.backward()
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)  # what the fraction counts
    assert found.kl.item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert found.ratio.item() == pytest.approx(ratio)


def test_at_the_old_policy_nothing_has_moved() -> None:
    batch = drawn(3)
    found = policy_loss(batch.logp, batch.logp, batch.advantages, batch.mask)
    assert (found.ratio, found.kl, found.clip_fraction) == (1, 0, 0)
    close(found.loss, -batch.advantages[batch.mask].mean())


@pytest.mark.parametrize(
    "value, old, target, loss, stopped",
    [(2.0, 1.0, 3.0, 0.5 * 1.8**2, 1), (2.0, 1.0, 0.0, 0.5 * 4, 0), (1.1, 1.0, 3.0, 0.5 * 1.9**2, 0)],
)
def test_worked_value_loss(value: float, old: float, target: float, loss: float, stopped: float) -> None:
    """Too far towards the return: held at 1.2. Too far away from it, or near the old value: the error itself."""
    values = tensor([value]).requires_grad_()
    found = value_loss(values, tensor([old]), tensor([target]), torch.ones(1, 1, dtype=torch.bool))
    assert found.loss.item() == pytest.approx(loss)
    assert found.clip_fraction == stopped
    found.loss.backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(0.0 if stopped else value - target)


def test_values_without_clip_ignore_the_old_ones() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = value_loss(tensor([1.0, 3.0]), tensor([math.nan, math.nan]), tensor([0.0, 0.0]), mask, clip=None)
    assert (found.loss, found.clip_fraction) == (2.5, 0)


def test_worked_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = tensor([1.0, 2.0, 3.0, 99.0])
    assert explained_variance(returns, returns, mask) == 1
    close(explained_variance(torch.full((1, 4), 2.0, dtype=F64), returns, mask), 0.0)
    close(explained_variance(returns + 1, returns, mask), -0.5)  # an offset is an error
    assert explained_variance(returns, torch.ones(1, 4), mask).isnan()


def test_worked_baselines() -> None:
    close(rloo(tensor([1.0, 3.0], [0.0, 0.0])), [[-2, 2], [0, 0]])
    close(reinforce(tensor(1.0, 2.0, 6.0)), [-2, -1, 3])
    close(reinforce(tensor(1.0, 2.0, 6.0), baseline=1.0), [0, 1, 5])
    close(reinforce(tensor(1.0, 2.0, 6.0), baseline=moments(tensor(1.0, 3.0)).mean), [-1, 0, 4])
    close(group_normalized(tensor([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]), eps=0.0)[0], [-1, 0, 1])
    close(group_normalized(tensor([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])), [[-1 / 1.0001, 0, 1 / 1.0001], [0, 0, 0]])


# Plain loops


def loop_rewards(b: Batch, kl: str, *, beta: float, missing_eos: float, clip: float) -> list[list[float]]:
    table = []
    for n in range(len(b.score)):
        row, last = [0.0] * b.mask.shape[1], None
        for t in range(b.mask.shape[1]):
            if b.mask[n, t]:
                lr = (b.logp[n, t] - b.ref_logp[n, t]).item()
                row[t] = -beta * {"k1": lr, "k3": math.exp(-lr) - 1 + lr, "none": 0.0}[kl]
                last = t
        assert last is not None
        row[last] += max(-clip, min(clip, b.score[n].item())) - (0.0 if b.finished[n] else missing_eos)
        table.append(row)
    return table


def loop_advantages(b: Batch, gamma: float, lam: float) -> list[list[float]]:
    """From the definition, a double sum over the real tokens."""
    table = []
    for n in range(len(b.mask)):
        real = [t for t in range(b.mask.shape[1]) if b.mask[n, t]]
        r, v = ([x[n, t].item() for t in real] for x in (b.advantages, b.values))
        delta = [r[i] + gamma * (v[i + 1] if i + 1 < len(v) else 0.0) - v[i] for i in range(len(v))]
        row = [0.0] * b.mask.shape[1]
        for i, t in enumerate(real):
            row[t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta)))
        table.append(row)
    return table


def loop_losses(b: Batch, clip: float) -> tuple[float, ...]:
    """Policy loss, clip fraction, KL, ratio, value loss, its clip fraction."""
    sums, n = [0.0] * 6, 0
    for i, t in b.mask.nonzero().tolist():
        n += 1
        ratio, a = math.exp(b.logp[i, t] - b.old_logp[i, t]), b.advantages[i, t].item()
        free, held = ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a
        v, old, target = (x[i, t].item() for x in (b.values, b.old_values, b.returns))
        near = min(max(v, old - clip), old + clip)
        error, other = (v - target) ** 2, (near - target) ** 2
        parts = -min(free, held), held < free, ratio - 1 - math.log(ratio), ratio, max(error, other) / 2, other > error
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    return tuple(total / n for total in sums)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["k1", "k3", "none"]))
def test_against_plain_loops(seed: int, holes: bool, kl: Any) -> None:
    b = drawn(seed, holes=holes)
    options: dict[str, float] = {"beta": 0.3, "missing_eos": 1.5, "clip": 0.7}
    found = token_rewards(b.score, b.logp, b.ref_logp, b.mask, kl=kl, finished=b.finished, **options)
    close(found, loop_rewards(b, kl, **options))
    close(gae(b.advantages, b.values, b.mask, gamma=0.9, lam=0.8).advantages, loop_advantages(b, 0.9, 0.8))
    losses = policy_loss(b.logp, b.old_logp, b.advantages, b.mask, clip=0.3)
    values = value_loss(b.values, b.old_values, b.returns, b.mask, clip=0.3)
    close(torch.stack([*losses, *values]), list(loop_losses(b, 0.3)))
    real = b.advantages[b.mask].tolist()
    mean = sum(real) / len(real)
    std = math.sqrt(sum((x - mean) ** 2 for x in real) / len(real) + 1e-8)
    close(whiten(b.advantages, b.mask)[b.mask], [(x - mean) / std for x in real])


# Properties


@pytest.mark.parametrize("garbage", GARBAGE[1:])
@pytest.mark.parametrize("holes", [False, True])
def test_padding_is_never_read(garbage: float, holes: bool) -> None:
    clean, dirty = (every(drawn(11, garbage=g, holes=holes)) for g in (0.0, garbage))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
        assert value.isfinite().all(), name
        assert value.ndim == 0 or (value[~drawn(11, holes=holes).mask] == 0).all(), name


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_has_no_gradient(garbage: float) -> None:
    b = drawn(12, garbage=garbage)
    logp, values = b.logp.clone().requires_grad_(), b.values.clone().requires_grad_()
    policy_loss(logp, b.old_logp, b.advantages, b.mask).loss.backward()
    value_loss(values, b.old_values, b.returns, b.mask).loss.backward()
    for grad in (logp.grad, values.grad):
        assert grad is not None
        assert (grad[~b.mask] == 0).all() and grad.isfinite().all() and grad[b.mask].any()


@settings(max_examples=20, deadline=None)
@seeds
def test_more_padding_and_another_order_change_nothing(seed: int) -> None:
    b = drawn(seed)
    order = torch.randperm(len(b.score), generator=stream(seed))
    wide = [torch.nn.functional.pad(x, (0, 3)) if x.ndim == 2 else x for x in b]
    shuffled = every(Batch(*(x[order] for x in wide)))
    for name, value in every(b).items():
        expected = torch.nn.functional.pad(value, (0, 3))[order] if value.ndim else value
        close(shuffled[name], expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_parts_of_a_batch_add_up(seed: int, cut: int) -> None:
    """Losses given the whole batch's tokens: of two processes, or micro-batches."""
    b = drawn(seed)
    whole, parts = every(b), [Batch(*(x[:cut] for x in b)), Batch(*(x[cut:] for x in b))]
    total = b.mask.sum()
    policies = [policy_loss(p.logp, p.old_logp, p.advantages, p.mask, total=total) for p in parts]
    for name, found in zip(policies[0]._fields, map(sum, zip(*policies, strict=True)), strict=True):
        close(torch.as_tensor(found), whole[f"policy {name}"])
    values = [value_loss(p.values, p.old_values, p.returns, p.mask, clip=0.4, total=total) for p in parts]
    for name, found in zip(values[0]._fields, map(sum, zip(*values, strict=True)), strict=True):
        close(torch.as_tensor(found), whole[f"value {name}"])


@settings(max_examples=20, deadline=None)
@seeds
def test_packed_tokens_give_the_padded_losses(seed: int) -> None:
    b = drawn(seed)
    flat = Batch(b.score, *(x[b.mask] for x in b[1:8]), b.mask[b.mask], b.finished)
    policy = policy_loss(flat.logp, flat.old_logp, flat.advantages, flat.mask)
    close(torch.stack(policy), torch.stack(policy_loss(b.logp, b.old_logp, b.advantages, b.mask)))
    value = value_loss(flat.values, flat.old_values, flat.returns, flat.mask)
    close(torch.stack(value), torch.stack(value_loss(b.values, b.old_values, b.returns, b.mask)))


@settings(max_examples=20, deadline=None)
@seeds
def test_both_ends_of_lambda(seed: int) -> None:
    """λ = 1: what is still to come less the value; the returns then owe nothing to the values. λ = 0: TD errors."""
    b = drawn(seed)
    rewards = torch.where(b.mask, b.advantages, 0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * b.mask
    found = gae(b.advantages, b.values, b.mask, gamma=1.0, lam=1.0)
    close(found.advantages, to_go - b.values * b.mask)
    close(found.returns, to_go)
    following = torch.nn.functional.pad(torch.where(b.mask, b.values, 0), (0, 1))[:, 1:]
    close(gae(b.advantages, b.values, b.mask, lam=0.0).advantages, (rewards + following - b.values) * b.mask)


def test_float32_and_bfloat16() -> None:
    b = drawn(5)
    half = {name: value.bfloat16() for name, value in b._asdict().items() if value.is_floating_point()}
    loss = policy_loss(half["logp"], half["old_logp"], half["advantages"], b.mask)
    assert loss.loss.dtype == torch.float32
    assert gae(half["advantages"], half["values"], b.mask).returns.dtype == torch.float32
    assert policy_loss(b.logp, b.old_logp, b.advantages, b.mask).loss.dtype == F64


def test_a_ratio_without_bounds_stays_finite() -> None:
    logp = torch.tensor([[500.0, -500.0], [500.0, -500.0]], requires_grad=True)  # float32 ends at e^88
    mask = torch.ones(2, 2, dtype=torch.bool)
    found = policy_loss(logp, torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), mask)
    found.loss.backward()
    assert logp.grad is not None and logp.grad.isfinite().all() and found.loss.isfinite()
    assert found.loss > 1e8  # and says so


def test_nothing_learns_through_rewards_or_advantages() -> None:
    b = drawn(6)
    logp, values, score = (x.clone().requires_grad_() for x in (b.logp, b.values, b.score))
    rewards = token_rewards(score, logp, b.ref_logp, b.mask, beta=0.1)
    made = [rewards, *gae(rewards, values, b.mask), whiten(values, b.mask), rloo(score[None]), reinforce(score)]
    assert not any(x.requires_grad for x in made)
    loss = policy_loss(b.logp, logp, values, b.mask).loss + value_loss(b.values, values, logp, b.mask).loss
    assert not loss.requires_grad


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("one shape", lambda: gae(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 3).bool())),
    ("one shape", lambda: whiten(torch.zeros(2, 3), torch.ones(2, 3))),
    ("shares from 0 to 1", lambda: gae(*[torch.zeros(1, 1)] * 2, torch.ones(1, 1).bool(), lam=1.1)),
    ("at least 2 answers", lambda: rloo(torch.zeros(3, 1))),
    ("at least 2 answers", lambda: group_normalized(torch.zeros(3))),
    ("one number an answer", lambda: reinforce(torch.zeros(3, 2))),
    ("do not fit", lambda: policy_loss(*[torch.zeros(2, 2)] * 2, torch.zeros(2), torch.ones(2, 2).bool())),
    ("above 0", lambda: policy_loss(*[torch.zeros(1, 1)] * 3, torch.ones(1, 1).bool(), clip=0.0)),
    ("above 0", lambda: value_loss(*[torch.zeros(1, 1)] * 3, torch.ones(1, 1).bool(), clip=-0.2)),
]


def rewarded(score: float = 0.0, tokens: int = 2, **options: Any) -> Tensor:
    zeros, mask = torch.zeros(1, 3), torch.arange(3)[None] < tokens
    return token_rewards(torch.tensor([score]), zeros, zeros, mask, **{"beta": 0.1, **options})


REFUSED += [
    ("answer 0 has score nan", lambda: rewarded(math.nan)),
    ("0 tokens", lambda: rewarded(tokens=0)),
    ("unknown kl", lambda: rewarded(kl="k2")),
    ("beta = -0.1", lambda: rewarded(beta=-0.1)),
    ("clip = -1", lambda: rewarded(clip=-1.0)),
    ("missing_eos = -1", lambda: rewarded(missing_eos=-1.0, finished=torch.tensor([True]))),
    ("by `finished`", lambda: rewarded(missing_eos=1.0)),
    ("finished", lambda: rewarded(finished=torch.ones(2, dtype=torch.bool))),
]


@pytest.mark.parametrize("message, call", REFUSED)
def test_refusals(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# An enumerable language: two words and an end token, answers of at most three tokens, 15 in all


class Language:
    """A policy is logits (7, 3): at each of 7 prefixes, over end, a, b. Expectations are sums over all answers."""

    def __init__(self, *, beta: float, missing_eos: float = 0.4, seed: int = 0) -> None:
        prefixes = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
        answers = [(*p, end) for p in prefixes for end in ((0,) if len(p) < 2 else (0, 1, 2))]
        place = {prefix: i for i, prefix in enumerate(prefixes)}
        self.state, self.token = torch.zeros(2, len(answers), 3, dtype=torch.int64)
        self.mask = torch.zeros(len(answers), 3, dtype=torch.bool)
        for n, answer in enumerate(answers):
            for t, token in enumerate(answer):
                self.state[n, t], self.token[n, t], self.mask[n, t] = place[answer[:t]], token, True
        self.finished = torch.tensor([answer[-1] == 0 for answer in answers])
        self.beta, self.missing_eos = beta, missing_eos
        self.score = torch.randn(len(answers), dtype=F64, generator=stream(seed))
        self.ref = 0.7 * torch.randn(len(prefixes), 3, dtype=F64, generator=stream(seed + 1))
        self.start = self.ref + torch.randn(self.ref.shape, dtype=F64, generator=stream(seed + 2))

    def tokens(self, policy: Tensor) -> Tensor:
        """log π of every token, with garbage behind the answers."""
        return policy.log_softmax(-1)[self.state, self.token].masked_fill(~self.mask, -123.0)

    def whole(self, policy: Tensor) -> Tensor:
        return (self.tokens(policy) * self.mask).sum(1)

    @property
    def reward(self) -> Tensor:
        return self.score - self.missing_eos * (~self.finished).double()

    def gradient(self, policy: Tensor) -> Tensor:
        """Of E r − β KL(π ‖ π_ref), exactly."""
        policy = policy.detach().requires_grad_()
        logp = self.whole(policy)
        worth = (logp.exp() * (self.reward - self.beta * (logp - self.whole(self.ref)))).sum()
        return torch.autograd.grad(worth, policy)[0]

    def rewards(self, policy: Tensor, *, kl: Any = "k1", swapped: bool = False) -> Tensor:
        logps = [self.tokens(policy), self.tokens(self.ref)]
        logps = logps[::-1] if swapped else logps
        options: dict[str, Any] = {"finished": self.finished, "missing_eos": self.missing_eos}
        return token_rewards(self.score, *logps, self.mask, beta=self.beta, kl=kl, **options)

    def values(self, policy: Tensor, rewards: Tensor) -> Tensor:
        """The mean of what is still to come at each prefix, (N, T)."""
        weight = self.whole(policy).exp()[:, None] * self.mask
        to_go = rewards.flip(1).cumsum(1).flip(1)
        flat, states = self.state.flatten(), torch.zeros(2, 7, dtype=F64)
        for table, what in zip(states, (weight * to_go, weight), strict=True):
            table.index_add_(0, flat, what.flatten())
        return (states[0] / states[1])[self.state].masked_fill(~self.mask, 55.0)

    def mean_gradient(self, policy: Tensor, advantages: Tensor, **options: Any) -> Tensor:
        """Minus the gradient of the policy loss, in expectation over the policy's answers."""
        policy = policy.detach().requires_grad_()
        logp = self.tokens(policy)
        weighted = self.whole(policy).exp()[:, None] * advantages
        loss = policy_loss(logp, logp.detach(), weighted, self.mask, total=1.0, **options).loss
        return -torch.autograd.grad(loss, policy)[0]


def bias(language: Language, advantages: Tensor) -> float:
    """Of the policy gradient, relative to the exact one's size."""
    exact = language.gradient(language.start)
    return ((language.mean_gradient(language.start, advantages) - exact).norm() / exact.norm()).item()


def test_policy_gradient_is_exact_in_expectation() -> None:
    here = Language(beta=0.3)
    rewards = here.rewards(here.start)
    right = here.values(here.start, rewards)
    wrong = torch.randn(7, dtype=F64, generator=stream(9))[here.state]
    assert bias(here, gae(rewards, wrong, here.mask, lam=1.0).advantages) < 1e-14
    for lam in (0.0, 0.5, 0.95):
        assert bias(here, gae(rewards, right, here.mask, lam=lam).advantages) < 1e-14
    assert bias(here, rewards.sum(1, keepdim=True)) < 1e-14
    assert bias(here, reinforce(rewards.sum(1), baseline=0.8)[:, None]) < 1e-14


def test_and_it_would_be_seen_if_it_were_not() -> None:
    """Negative controls."""
    here = Language(beta=0.3)
    rewards, wrong = here.rewards(here.start), torch.randn(7, dtype=F64, generator=stream(9))[here.state]
    mistakes = {
        "sign of the KL": here.rewards(here.start, swapped=True).sum(1, keepdim=True),
        "no KL": here.rewards(here.start, kl="none").sum(1, keepdim=True),
        "k3 as a reward": here.rewards(here.start, kl="k3").sum(1, keepdim=True),
        "another answer's advantage": rewards.sum(1, keepdim=True).roll(1, 0),
        "bootstrapped from wrong values": gae(rewards, wrong, here.mask, lam=0.5).advantages,
        "reward already had": rewards.cumsum(1),
        "whitened with mean": whiten(rewards.sum(1, keepdim=True).expand_as(here.mask), here.mask),
    }
    for name, advantages in mistakes.items():
        assert bias(here, advantages) > 0.05, name


def test_k3_as_a_reward_pushes_along_both_kls() -> None:
    """Towards KL(π ‖ π_ref) − KL(π_ref ‖ π), as its docstring says, though its mean is KL(π ‖ π_ref)."""
    here = Language(beta=1.0, missing_eos=0.0)
    here.score = torch.zeros_like(here.score)
    policy = here.start.detach().requires_grad_()
    p, q = here.whole(policy), here.whole(here.ref)
    rewards = here.rewards(here.start, kl="k3")
    close(-(p.exp()[:, None] * rewards).sum().detach(), (p.exp() * (p - q)).sum().detach())
    # within an answer, k3 of later tokens is a sum over prefixes: the identity is that of one token
    first = torch.where(here.state == 0, rewards, 0).sum(1, keepdim=True)
    found = here.mean_gradient(here.start, first)[0]
    root, other = policy.log_softmax(-1)[0], here.ref.log_softmax(-1)[0]
    difference = (root.exp() * (root - other)).sum() - (other.exp() * (other - root)).sum()
    close(found, -torch.autograd.grad(difference, policy)[0][0])


@pytest.mark.parametrize("answers", [2, 3])
def test_leave_one_out_is_exact_over_all_groups(answers: int) -> None:
    """Every group of K of the 15 answers, with its probability; a baseline with the answer itself leaves (K−1)/K."""
    here = Language(beta=0.3)
    groups = torch.cartesian_prod(*[torch.arange(15)] * answers)
    scores = here.rewards(here.start).sum(1)[groups]
    weight = here.whole(here.start)[groups].sum(1).exp()
    share = (answers - 1) / answers
    estimators: dict[str, tuple[Tensor, float]] = {
        "rloo": (rloo(scores), 1.0),
        "mean": (torch.stack([reinforce(row) for row in scores]), share),
    }
    exact = here.gradient(here.start)

    def expected(advantages: Tensor) -> Tensor:
        each = torch.zeros(15, dtype=F64)
        each.index_add_(0, groups.flatten(), (weight[:, None] * advantages / answers).flatten())
        return here.mean_gradient(here.start, (each / here.whole(here.start).exp())[:, None])

    for name, (advantages, factor) in estimators.items():
        torch.testing.assert_close(expected(advantages), factor * exact, rtol=0, atol=1e-13, msg=name)
    normal = expected(group_normalized(scores))
    cosine = (normal * exact).sum() / normal.norm() / exact.norm()
    assert cosine < 1 - 1e-3  # the scale of a group is another objective


def optimum_of(here: Language) -> Tensor:
    """Logits of the tilted reference: the share of each token in the mass behind its prefix."""
    mass = torch.zeros(7, 3, dtype=F64)
    weight = (here.whole(here.ref) + here.reward / here.beta).exp()[:, None].expand_as(here.mask)
    return mass.index_put_((here.state[here.mask], here.token[here.mask]), weight[here.mask], accumulate=True).log()


def natural(here: Language, policy: Tensor, *, rate: float, kl: Any = "k1", epochs: int = 4) -> Tensor:
    """One batch: all answers, advantages by GAE, a few steps on the clipped loss, each along the natural gradient."""
    rewards = here.rewards(policy, kl=kl)
    old, weight = here.tokens(policy), here.whole(policy).exp()[:, None]
    advantages = weight * gae(rewards, here.values(policy, rewards), here.mask).advantages
    visits = torch.zeros(7, dtype=F64).index_add_(0, here.state.flatten(), (weight * here.mask).flatten())
    metric = visits[:, None] * policy.softmax(-1)
    for _ in range(epochs):
        policy = policy.detach().requires_grad_()
        loss = policy_loss(here.tokens(policy), old, advantages, here.mask, clip=0.2, total=1.0).loss
        policy = policy.detach() - rate * torch.autograd.grad(loss, policy)[0] / metric
    return policy


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_ppo_converges_to_the_tilted_reference(beta: float) -> None:
    """π ∝ π_ref e^{r/β} over whole answers, every log-probability to 1e-9."""
    here = Language(beta=beta)
    optimum = (here.whole(here.ref) + here.reward / beta).log_softmax(0)
    policy = here.ref
    for _ in range(200):
        policy = natural(here, policy, rate=0.1 / beta)
    assert (here.whole(policy) - optimum).abs().max() < 1e-9
    assert here.gradient(policy).abs().max() < 1e-10


def test_with_k3_as_a_reward_it_does_not() -> None:
    """Tokens less likely than under the reference are priced as well, and leave for good."""
    here = Language(beta=1.0)
    optimum = (here.whole(here.ref) + here.reward).log_softmax(0)
    away = {}
    for kl in ("k1", "k3"):
        policy = optimum_of(here) + 0.01 * (torch.arange(3) - 1)
        begin = (here.whole(policy) - optimum).abs().max()
        for _ in range(3):
            policy = natural(here, policy, rate=0.1, kl=kl)
        away[kl] = (here.whole(policy) - optimum).abs().max() / begin
    assert away["k1"] < 0.3 and away["k3"] > 100


def test_ppo_in_the_tabular_world() -> None:
    """One token, many instances at once, plain gradient descent: the optimum of the world to 1e-7."""
    reward, ref = 0.5 * torch.randn(2, 4, 5, dtype=F64, generator=stream(3))
    here = tabular.world(reward, beta=0.5, ref=ref)
    logits, mask = here.ref.clone(), torch.ones(20, 1, dtype=torch.bool)
    for _ in range(400):
        old = logits.log_softmax(-1)
        rewards = token_rewards(reward.flatten(), old.view(-1, 1), here.ref.view(-1, 1), mask, beta=here.beta)
        value = (old.exp() * rewards.view(4, 5)).sum(-1, keepdim=True).expand(4, 5).reshape(-1, 1)
        advantages = old.exp().view(-1, 1) * gae(rewards, value, mask).advantages
        for _ in range(3):
            logits = logits.detach().requires_grad_()
            now = logits.log_softmax(-1).view(-1, 1)
            loss = policy_loss(now, old.view(-1, 1), advantages, mask, total=1.0).loss
            logits = logits.detach() - 3.0 * torch.autograd.grad(loss, logits)[0]
    assert (logits.log_softmax(-1) - here.optimum.log_softmax(-1)).abs().max() < 1e-7
