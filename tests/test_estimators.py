import doctest
import itertools
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pyrite.math.statistics
from pyrite.math.logps import Logps
from pyrite.math.statistics import (
    best_of_n,
    best_of_n_kl,
    best_of_n_weights,
    bootstrap,
    effective_samples,
    kl,
    t_interval,
    where,
    win_rate,
    wins,
)

F64 = torch.float64


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def brute_force(proxy: list[float], gold: list[float], n: int) -> float:
    """Mean over all n-subsets of the mean gold of their best answers by proxy."""
    total = Fraction(0)
    subsets = list(itertools.combinations(range(len(proxy)), n))
    for subset in subsets:
        top = max(proxy[i] for i in subset)
        winners = [Fraction(gold[i]) for i in subset if proxy[i] == top]
        total += sum(winners, Fraction(0)) / len(winners)
    return float(total / len(subsets))


def test_examples():
    result = doctest.testmod(pyrite.math.statistics, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


# best-of-n


@pytest.mark.parametrize(
    "answers, n, expected",
    [
        (4, 2, [0, 1 / 6, 2 / 6, 3 / 6]),
        (4, 3, [0, 0, 1 / 4, 3 / 4]),
        (5, 3, [0, 0, 0.1, 0.3, 0.6]),
        (1, 1, [1.0]),
    ],
)
def test_weights_worked(answers, n, expected):
    assert best_of_n_weights(answers, n).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("answers, n", [(7, 3), (100, 1), (100, 17), (100, 100), (12600, 64), (12600, 12500)])
def test_weights_are_the_exact_fractions(answers, n):
    weights = best_of_n_weights(answers, n)
    whole = math.comb(answers, n)
    ranks = {1, n - 1, n, n + 1, (n + answers) // 2, answers - 1, answers} & set(range(1, answers + 1))
    for rank in ranks:
        exact = float(Fraction(math.comb(rank - 1, n - 1), whole))
        assert weights[rank - 1].item() == pytest.approx(exact, rel=1e-12, abs=1e-300)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_weights_sum_to_one_for_every_n():
    weights = best_of_n_weights(300, torch.arange(1, 301))
    torch.testing.assert_close(weights.sum(-1), torch.ones(300, dtype=F64), rtol=0, atol=1e-12)


def test_top_weight_at_large_n():
    assert best_of_n_weights(12600, 12500)[-1].item() == pytest.approx(0.9921, abs=5e-5)


@pytest.mark.parametrize(
    "proxy, gold, expected",
    [
        ([0.1, 0.4, 0.2, 0.9], [1, 2, 3, 0], [1.5, 7 / 6, 0.5, 0]),
        ([0.1, 0.4, 0.2, 0.9], [0.1, 0.4, 0.2, 0.9], [0.4, 37 / 60, 0.775, 0.9]),
        ([5, 1, 3, 2, 4], [10, 0, -2, 6, 8], [4.4, 6.6, 8.2, 9.6, 10]),
        ([5, 1, 3, 2, 4], [5, 1, 3, 2, 4], [3, 4, 4.5, 4.8, 5]),
        ([0, 1, 1, 2], [4, 0, 2, 1], [1.75, 1, 1, 1]),
        ([2, 2, 3, 3, 1], [1, 5, 0, 4, 9], [3.8, 2.3, 2.1, 2, 2]),
        ([7, 7, 7], [1, 2, 6], [3, 3, 3]),
    ],
)
def test_best_of_n_worked(proxy, gold, expected):
    ns = list(range(1, len(proxy) + 1))
    assert best_of_n(tensor(*proxy), tensor(*gold), ns).tolist() == pytest.approx(expected, abs=1e-12)
    assert [brute_force(proxy, gold, n) for n in ns] == pytest.approx(expected, abs=1e-12)


@st.composite
def prompts(draw, ties: bool = True):
    """(proxy, gold), (Q, N) each; few proxy levels, so ties abound, unless without."""
    rows, answers = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    level = st.integers(0, 3)
    proxies = [draw(st.lists(level, min_size=answers, max_size=answers)) for _ in range(rows)]
    if not ties:
        proxies = [draw(st.permutations(range(answers))) for _ in range(rows)]
    golds = [draw(st.lists(st.floats(-5, 5), min_size=answers, max_size=answers)) for _ in range(rows)]
    return torch.tensor(proxies, dtype=F64), torch.tensor(golds, dtype=F64)


@given(prompts())
@settings(max_examples=60, deadline=None)
def test_best_of_n_is_the_mean_over_subsets(scores):
    proxy, gold = scores
    ns = list(range(1, proxy.shape[1] + 1))
    expected = [[brute_force(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)] for n in ns]
    torch.testing.assert_close(best_of_n(proxy, gold, ns), tensor(*expected), rtol=0, atol=1e-12)


@given(prompts(), st.randoms(use_true_random=False), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_best_of_n_properties(scores, random, scale):
    proxy, gold = scores
    answers = proxy.shape[1]
    ns = torch.arange(1, answers + 1)
    result = best_of_n(proxy, gold, ns)
    order = list(range(answers))
    random.shuffle(order)

    def same(other: torch.Tensor, expected: torch.Tensor = result) -> None:
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-10)

    same(result[0], gold.mean(-1))
    top = (proxy == proxy.amax(-1, keepdim=True)).double()
    same(result[-1], (gold * top).sum(-1) / top.sum(-1))
    same(best_of_n(proxy[:, order], gold[:, order], ns))
    same(best_of_n(proxy.exp() * 3 - 1, gold, ns))
    same(best_of_n(proxy, scale * gold + 2, ns), scale * result + 2)
    assert (best_of_n(proxy, proxy, ns).diff(dim=0) >= -1e-12).all()


@pytest.mark.parametrize("n, expected", [(2, 8400.6667), (64, 12407.1385), (12500, 12599.9920)])
def test_best_of_ranks(n, expected):
    rank = torch.arange(1, 12601).double()
    value = best_of_n(rank, rank, n).item()
    assert value == pytest.approx(expected, abs=5e-5)
    assert value == pytest.approx(n * 12601 / (n + 1), rel=1e-12)


def test_gaussian_scores():
    """Correlation rho: gold(n) = rho * E[max of n], within its own interval over prompts."""
    generator = torch.Generator().manual_seed(5)
    proxy, noise = torch.randn(2, 400, 512, generator=generator, dtype=F64)
    gold = 0.6 * proxy + 0.8 * noise
    result = best_of_n(proxy, gold, [2, 4, 16, 64])
    interval = bootstrap(result, level=0.999)
    expected = 0.6 * tensor(0.5642, 1.0294, 1.7660, 2.3437)
    assert ((interval.lo < expected) & (expected < interval.hi)).all()
    assert not ((interval.lo < 0.9 * expected) & (0.9 * expected < interval.hi)).any()


def test_shapes_follow_the_arguments():
    proxy = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    assert best_of_n(proxy, proxy, [1, 2]).shape == (2, 3)
    assert best_of_n(proxy, proxy, 2).shape == (3,)
    assert best_of_n(proxy[0], proxy[0], torch.tensor([1, 2])).shape == (2,)
    assert best_of_n(proxy[0], proxy[0], 5).shape == ()
    torch.testing.assert_close(best_of_n(proxy, proxy, [1, 4])[:, 1], best_of_n(proxy[1], proxy[1], [1, 4]))


def test_chunks_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    proxy = torch.randint(0, 6, (11, 20), generator=generator)
    gold = torch.randn(11, 20, generator=generator)
    whole = best_of_n(proxy, gold, [1, 3, 20])
    monkeypatch.setattr(pyrite.math.statistics, "CHUNK", 45)
    torch.testing.assert_close(best_of_n(proxy, gold, [1, 3, 20]), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["proxy", "gold"])
def test_scores_that_are_not_finite_are_refused(monkeypatch, which, value):
    monkeypatch.setattr(pyrite.math.statistics, "CHUNK", 8)
    scores = {"proxy": torch.ones(5, 4), "gold": torch.ones(5, 4)}
    scores[which][3, 2] = value
    with pytest.raises(ValueError, match=f"{which} score of prompt 3, answer 2 is {value}"):
        best_of_n(scores["proxy"], scores["gold"], 2)


@pytest.mark.parametrize(
    "n, message",
    [
        ([1, 5], "n = 5 is larger than the 4 answers"),
        ([0, 1], "n = 0, but at least 1"),
        (-2, "n = -2"),
        ([1.0, 2.0], "must be an int or a list of ints"),
        ([], "must be an int or a list of ints"),
        (True, "must be an int or a list of ints"),
    ],
)
def test_wrong_n_is_refused(n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n(torch.rand(2, 4), torch.rand(2, 4), n)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (1, 3)), ((1, 1, 3), (1, 1, 3)), ((0,), (0,))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="must both be"):
        best_of_n(torch.ones(shapes[0]), torch.ones(shapes[1]), 1)


FULL_SETTING = """
import re, sys, torch
from pathlib import Path
from pyrite.math.statistics import best_of_n

def kib(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

scores = torch.empty(2, 1000, 12600).normal_(generator=torch.Generator().manual_seed(0)).mul_(1e3).round_()
before = kib("VmRSS")
best_of_n(scores[0], scores[1], [2**i for i in range(14)] + [6144, 12500])
print(before, kib("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux")
def test_memory_stays_bounded():
    """1,000 prompts of 12,600 answers at 16 values of n, with ties, need far less than 1 GiB beyond them."""
    run = subprocess.run([sys.executable, "-c", FULL_SETTING], check=True, capture_output=True, text=True)
    before, peak = (int(kib) / 1024 for kib in run.stdout.split())
    assert before > 96  # MiB: the scores themselves were in memory
    assert 0 < peak - before < 400


def test_best_of_n_kl_worked():
    worked = {1: 0, 2: 0.193147, 4: 0.636294, 8: 1.204442, 16: 1.835089, 64: 3.174508, 256: 4.549084}
    worked |= {1024: 5.932448, 4096: 7.318010, 12500: 8.433564, 60000: 10.002117}
    for n, nats in worked.items():
        value = best_of_n_kl(n)
        assert isinstance(value, float) and value == pytest.approx(nats, abs=1e-6)


def test_best_of_n_kl_of_many():
    nats = best_of_n_kl(torch.arange(1, 50))
    assert nats.shape == (49,) and (nats.diff() > 0).all()
    assert math.sqrt(best_of_n_kl(12500)) == pytest.approx(2.904060, abs=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl([2, 0])


def test_best_of_n_kl_is_the_divergence_of_a_small_policy():
    """Eight answers that never tie, drawn uniformly: KL = Σ p log(p/q) approaches the formula from below."""
    answers, n = 20_000, 8
    rank = torch.arange(1, answers + 1, dtype=F64)
    chosen = (rank / answers) ** n - ((rank - 1) / answers) ** n
    exact = torch.xlogy(chosen, chosen * answers).sum().item()
    assert exact < best_of_n_kl(n) and exact == pytest.approx(best_of_n_kl(n), abs=1e-3)


def test_effective_samples():
    ns = [64, 512, 1024, 2048, 4096, 6144, 8192, 12500]
    published = tensor(390, 48, 24, 11, 5.2, 3.1, 2.1, 1.02)
    torch.testing.assert_close(effective_samples(12600, ns), published, rtol=0.05, atol=0)
    assert effective_samples(10, 1).item() == pytest.approx(10)
    assert effective_samples(10, 10).item() == pytest.approx(1)


# intervals and wins


def coverage(level: float, repeat: int = 1) -> float:
    """How often the interval over 40 prompts holds the true mean; `repeat` counts a prompt more than once."""
    generator = torch.Generator().manual_seed(11)
    hits = 0
    for _ in range(300):
        values = torch.randn(40, generator=generator, dtype=F64).repeat(repeat)
        _, lo, hi = bootstrap(values, n_boot=400, level=level, generator=generator)
        hits += bool(lo <= 0 <= hi)
    return hits / 300


def test_bootstrap_covers_the_truth_and_the_test_can_tell():
    def covers(share: float) -> bool:
        return 0.90 <= share <= 0.98  # 0.95, four standard errors and the small-sample shortfall

    assert covers(coverage(0.95))
    assert not covers(coverage(0.80))
    assert not covers(coverage(0.95, repeat=4))  # answers of one prompt taken for independent prompts


def test_bootstrap_is_reproducible_and_shared_along_a_curve(monkeypatch):
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    first, again = bootstrap(values), bootstrap(values)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.mean.shape == first.lo.shape == first.hi.shape == (3,)
    alone = bootstrap(values[1])
    torch.testing.assert_close(torch.stack(alone), torch.stack([part[1] for part in first]))
    monkeypatch.setattr(pyrite.math.statistics, "CHUNK", 128)
    torch.testing.assert_close(torch.stack(bootstrap(values)), torch.stack(first))


def test_bootstrap_of_a_shift_moves_with_it():
    values = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=F64)
    torch.testing.assert_close(torch.stack(bootstrap(values + 7)), torch.stack(bootstrap(values)) + 7)


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([1.0], {}, "at least 2 prompts"),
        ([1.0, math.nan], {}, "finite values"),
        ([1.0, 2.0], {"level": 95}, "between 0 and 1"),
    ],
)
def test_bootstrap_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(torch.tensor(values), **options)


def test_wins():
    ours, theirs = tensor(1.0, 2.0, 3.0, 4.0), tensor(0.0, 2.0, 5.0, 1.0)
    assert wins(ours, theirs).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert win_rate(ours, theirs).item() == 0.625
    assert win_rate(ours, ours).item() == 0.5
    assert win_rate(theirs, ours).item() == 1 - 0.625
    with pytest.raises(ValueError, match="not finite"):
        wins(ours, tensor(math.nan, 1.0, 1.0, 1.0))


# KL from the reference


def test_kl_worked():
    ref = tensor(-1.0, -1.0)
    policy = ref + tensor(0.5, -0.2)
    pair = Logps.from_tokens([policy]), Logps.from_tokens([ref])
    assert kl(*pair).item() == pytest.approx(0.3)
    assert kl(*pair, estimator="k2").item() == pytest.approx(0.145)
    assert kl(*pair, estimator="k3").item() == pytest.approx(0.127933, abs=1e-6)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_kl_properties(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [-torch.rand(length, generator=generator, dtype=F64) for length in (3, 1, 6)]
    policy = Logps.from_tokens(rows)
    ref = Logps.from_tokens([row + 0.3 * torch.randn(len(row), generator=generator, dtype=F64) for row in rows])
    for estimator in ("k1", "k2", "k3"):
        assert (kl(policy, policy, estimator=estimator) == 0).all()
        alone = Logps.from_tokens([rows[0]]), Logps.from_tokens([ref.tokens[0][ref.mask[0]]])  # type: ignore
        torch.testing.assert_close(kl(*alone, estimator=estimator)[0], kl(policy, ref, estimator=estimator)[0])
    assert (kl(policy, ref, estimator="k3") >= 0).all()


def test_k1_and_k3_are_unbiased():
    """Samples of one token from a known policy; k3 of the inverted ratio is the negative control."""
    generator = torch.Generator().manual_seed(2)
    policy, ref = torch.randn(2, 6, generator=generator, dtype=F64).log_softmax(-1)
    exact = (policy.exp() * (policy - ref)).sum().item()
    drawn = torch.multinomial(policy.exp(), 40_000, replacement=True, generator=generator)
    ones = torch.ones(len(drawn))

    def logps(model: torch.Tensor) -> Logps:
        tokens = model[drawn][:, None]
        return Logps(tokens[:, 0], ones, tokens, torch.ones_like(tokens).bool())

    def off(values: torch.Tensor) -> float:
        return abs(values.mean().item() - exact) / (values.std().item() / math.sqrt(len(values)))

    assert off(kl(logps(policy), logps(ref))) < 4
    assert off(kl(logps(policy), logps(ref), estimator="k3")) < 4
    assert off(kl(logps(ref), logps(policy), estimator="k3")) > 10


def test_kl_refuses():
    policy, other = Logps.from_tokens([tensor(-1.0, -2.0)]), Logps.from_tokens([tensor(-1.0)])
    sums = Logps.from_sums(policy.sum, policy.length)
    with pytest.raises(ValueError, match="differ in the length"):
        kl(policy, other)
    with pytest.raises(ValueError, match="k2 needs token"):
        kl(policy, sums, estimator="k2")
    with pytest.raises(ValueError, match="choose k1, k2 or k3"):
        kl(policy, policy, estimator="k4")  # type: ignore
    assert kl(policy, sums).item() == 0


def test_t_interval_matches_scipy_and_covers() -> None:
    values = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, lo, hi = t_interval(values)
    want = stats.t.interval(0.95, 4, loc=values.mean(1), scale=stats.sem(values, axis=1))
    assert torch.allclose(lo, torch.as_tensor(want[0]), atol=1e-3)
    assert torch.allclose(hi, torch.as_tensor(want[1]), atol=1e-3)
    assert 0.93 < ((lo < 0) & (hi > 0)).double().mean() < 0.97
    assert ((lo < 0.5) & (hi > 0.5)).double().mean() < 0.9  # a wrong mean is found out
    with pytest.raises(ValueError, match="at least 2"):
        t_interval(torch.tensor([1.0]))


def test_where_a_curve_first_reaches_a_level():
    along, values = tensor(0.0, 2.0, 1.0, 4.0), tensor(0.0, 10.0, 20.0, 40.0)
    assert where(along, values, 1.0) == 5.0
    assert where(along, values, 2.0) == 10.0
    assert where(along, values, 3.0) == pytest.approx(20 + 20 * 2 / 3)
    assert where(along, values, -1.0) == 0.0
    assert math.isnan(where(along, values, 5.0))
