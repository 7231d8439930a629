"""Counter-based randomness and the inverse CDF: reference values, uniformity, independence, truncation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pyrite.models.generation import draw, streams, truncate, uniforms

SCORES = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]]))


def p_uniform(u: Tensor, bins: int = 64) -> float:
    return float(stats.chisquare(torch.histc(u, bins, 0, 1).numpy()).pvalue)


def test_splitmix64_reference_values() -> None:
    # the first outputs of Java's SplittableRandom for seeds 0 and 1234567
    first = uniforms(torch.tensor([0, 1234567]), 0)
    second = uniforms(torch.tensor([1234567]), 1)
    expected = [0xE220A8397B1DCDAF, 6457827717110365317, 3203168211198807973]
    assert torch.cat([first, second]).tolist() == [(word >> 16) * 2.0**-48 for word in expected]


@pytest.mark.parametrize("axis", ["seed", "key", "sample", "step"])
def test_uniform_along_every_axis_and_neighbours_unrelated(axis: str) -> None:
    n, zero = 60_000, torch.zeros(60_000, dtype=torch.int64)
    index = torch.arange(n)
    if axis == "seed":
        u = torch.cat([uniforms(streams(seed, zero[:1], zero[:1]), 0) for seed in range(6000)])
    elif axis == "step":
        u = torch.cat([uniforms(streams(3, index[:30], zero[:30]), step) for step in range(2000)])
    else:
        u = uniforms(streams(3, *((index, zero) if axis == "key" else (zero, index))), 0)
    assert u.min() >= 0 and u.max() < 1
    assert p_uniform(u) > 1e-3
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 4 / math.sqrt(len(u))
    pairs = torch.floor(u[: len(u) // 2 * 2].view(-1, 2) * 16) @ torch.tensor([16.0, 1.0], dtype=torch.float64)
    assert p_uniform(pairs / 256 + 1e-9, 256) > 1e-3


def test_uniformity_checks_can_fail() -> None:
    u = uniforms(streams(0, torch.arange(60_000), torch.zeros(60_000, dtype=torch.int64)), 0)
    assert p_uniform(u**1.05) < 1e-3
    counter = torch.arange(60_000) / 60_000
    assert abs(torch.corrcoef(torch.stack([counter[1:], counter[:-1]]))[0, 1]) > 4 / math.sqrt(60_000)


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1])
def test_any_integer_seeds(seed: int) -> None:
    assert 0 <= uniforms(streams(seed, torch.tensor([5]), torch.tensor([2])), 10**6).item() < 1


def test_draw_is_the_inverse_cdf() -> None:
    u = torch.tensor([0.0, 0.099, 0.101, 0.599, 0.601, 0.649, 0.651, 1 - 2.0**-48], dtype=torch.float64)
    drawn = draw(SCORES.expand(8, -1) + 7, u)
    assert drawn.token.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(drawn.logp, SCORES[0][drawn.token])
    assert drawn.policy_logp is drawn.logp


def test_greedy_takes_the_largest() -> None:
    drawn = draw(SCORES, torch.tensor([0.99], dtype=torch.float64), temperature=0)
    assert (drawn.token.item(), drawn.logp.item()) == (1, 0.0)
    assert drawn.policy_logp.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {1: 0.5, 3: 0.35}),
        ({"top_k": 9}, {0: 0.1, 1: 0.5, 2: 0.05, 3: 0.35}),
        ({"top_p": 0.4}, {1: 0.5}),
        ({"top_p": 0.6}, {1: 0.5, 3: 0.35}),
        ({"top_p": 0.9}, {1: 0.5, 3: 0.35, 0: 0.1}),
        ({"top_p": 1e-9}, {1: 0.5}),
        ({"top_k": 2, "top_p": 0.55}, {1: 0.5}),  # 0.5 of 0.85 is 0.588, which covers 0.55
    ],
)
def test_truncation_by_hand(options: dict[str, float], kept: dict[int, float]) -> None:
    cut = truncate(SCORES, **options)[0]
    assert {i for i in range(4) if cut[i] > -math.inf} == set(kept)
    total = sum(kept.values())
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = draw(SCORES.expand(1000, -1), grid, **options)
    assert {i: round(float((drawn.token == i).double().mean()), 2) for i in kept} == {
        i: pytest.approx(p / total, abs=0.01) for i, p in kept.items()
    }
    expected = torch.tensor([math.log(kept[int(i)] / total) for i in drawn.token])
    torch.testing.assert_close(drawn.logp, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.policy_logp, SCORES[0][drawn.token], atol=1e-5, rtol=0)


def test_equal_logits_at_the_kth_place_stay() -> None:
    assert (truncate(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), top_k=2) > -math.inf).tolist() == [[True, True, True, False]]


def test_temperature_comes_before_truncation() -> None:
    # squared: .01, .25, .0025, .1225 of .385: the largest is .649 and alone covers .6
    drawn = draw(SCORES, torch.tensor([0.999], dtype=torch.float64), temperature=0.5, top_p=0.6)
    assert drawn.token.item() == 1
    assert drawn.logp.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_the_policy_may_have_other_logits(temperature: float) -> None:
    policy = torch.tensor([[0.3, -1.0, 2.0, 0.5]])
    u = torch.linspace(0, 0.999, 9, dtype=torch.float64)
    own = draw(SCORES.expand(9, -1), u, temperature=temperature)
    mixed = draw(SCORES.expand(9, -1), u, policy=policy.expand(9, -1), temperature=temperature)
    assert torch.equal(mixed.token, own.token) and torch.equal(mixed.logp, own.logp)
    torch.testing.assert_close(mixed.policy_logp, policy.log_softmax(-1)[0, own.token])
