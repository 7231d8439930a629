"""What optimization against a proxy bought: best-of-n curves, KL from the reference, wins, intervals.

Axes: Q prompts, N answers a prompt, M values of n. Estimates are float64; KL is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from pyrite.fits import Fit, fit_best_of_n, fit_rl
from pyrite.logps import Logps

__all__ = [
    "Fit",
    "Interval",
    "best_of_n",
    "best_of_n_kl",
    "best_of_n_weights",
    "bootstrap",
    "effective_samples",
    "fit_best_of_n",
    "fit_rl",
    "kl",
    "t_interval",
    "where",
    "win_rate",
    "wins",
]

Counts: TypeAlias = int | Sequence[int] | Tensor

# the 97.5 % quantile of Student's t with 1, 2, ... 30 degrees of freedom; beyond, the last is a little wide
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
CHUNK = 1 << 20  # elements worked on at once: bounds memory, and stays near the cache


class Interval(NamedTuple):
    """A mean over prompts and its interval."""

    mean: Tensor
    lo: Tensor
    hi: Tensor


def best_of_n(proxy: Tensor, gold: Tensor, n: Counts) -> Tensor:
    """Expected gold score of the answer a proxy likes best among n, without bias and without sampling.

    R_n = Σ_i w_i G_(i),   w_i = C(i−1, n−1) / C(N, n),   G_(i) the gold score of the i-th lowest proxy

    is the average over all n-subsets of the N answers; among answers tied at the top each wins equally
    often. proxy (Q, N), gold (Q, N), n (M,) -> (M, Q); without its axis, an int n or a single prompt (N,)
    drops it from the result. `best_of_n(proxy, proxy, n)` is the curve of the proxy itself. Beyond
    n = N/4 few answers carry the estimate (`effective_samples`): only more prompts help there.

    Raises ValueError for unequal shapes, scores that are not finite, n below 1 or above N.

    Nakano et al. 2021, arXiv:2112.09332, appendix I; Coste et al. 2023, arXiv:2310.02743, appendix B.

    >>> proxy, gold = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([4.0, 0.0, 2.0, 1.0])
    >>> best_of_n(proxy, gold, [1, 2, 3, 4])
    tensor([1.7500, 1.0000, 1.0000, 1.0000], dtype=torch.float64)
    """
    proxy, gold = torch.as_tensor(proxy), torch.as_tensor(gold)
    _check_scores(proxy, gold)
    weights = best_of_n_weights(proxy.shape[-1], n).to(proxy.device)
    means = [weights @ chunk.T for chunk in _gold_by_rank(*torch.atleast_2d(proxy, gold))]
    return torch.cat(means, -1).reshape(weights.shape[:-1] + proxy.shape[:-1])


def best_of_n_weights(answers: int, n: Counts) -> Tensor:
    """w_i = C(i−1, n−1) / C(N, n), the share of n-subsets whose best answer has rank i of N, lowest first.

    N answers, n (M,) -> (M, N), or an int n -> (N,); each row sums to 1. By w_N = n/N and
    w_{i−1} = w_i (i−n)/(i−1), with a relative error below 1e-12 at N = 12,600.
    """
    counts = _counts(n, answers)[..., None]
    rank = torch.arange(answers, 1, -1, dtype=torch.float64)
    steps = torch.cat([counts / answers, (rank - counts).clamp(min=0) / (rank - 1)], -1)
    return steps.cumprod(-1).flip(-1)


@overload
def best_of_n_kl(n: int) -> float: ...
@overload
def best_of_n_kl(n: Sequence[int] | Tensor) -> Tensor: ...
def best_of_n_kl(n: Counts) -> Tensor | float:
    """KL of best-of-n from the policy it samples, ln n − (n−1)/n, in nats; int -> float, (M,) -> (M,).

    Exact where no two answers tie; with duplicate answers an upper bound (Beirami et al. 2024,
    arXiv:2401.01879).

    >>> round(best_of_n_kl(12500), 6)
    8.433564
    """
    counts = _counts(n)
    nats = counts.log() - (counts - 1) / counts
    return nats.item() if isinstance(n, int) else nats


def effective_samples(answers: int, n: Counts) -> Tensor:
    """1/Σ w², how many of N answers carry the best-of-n estimate: N at n = 1, 1 at n = N. n (M,) -> (M,)."""
    return 1 / best_of_n_weights(answers, n).square().sum(-1)


def bootstrap(
    values: Tensor,
    *,
    prompts: Sequence[int] | Tensor | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """Mean over units with its percentile interval, whole prompts resampled.

    values (..., N) -> Interval(mean, lo, hi), each (...). prompts (N,): the number, from 0, of the prompt that each
    unit belongs to, as several pairs may share one; each unit its own by default. The points of a curve share their
    resamples, as they share their prompts. `generator` is a CPU generator; without one, a fixed seed. The interval is
    NaN if all units belong to one prompt. Raises ValueError for fewer than 2 units, values that are not finite, or a
    level outside (0, 1).

    >>> mean, lo, hi = bootstrap(torch.arange(100.0))
    >>> bool(lo < mean < hi)
    True
    """
    values = torch.as_tensor(values).double()
    units = values.shape[-1]
    if units < 2 or not torch.isfinite(values).all():
        what = "prompts" if prompts is None else "units"
        raise ValueError(f"bootstrap: needs finite values of at least 2 {what}, got {units}; drop bad ones")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: level = {level} must lie between 0 and 1, as 0.95")
    of = torch.arange(units) if prompts is None else torch.as_tensor(prompts, dtype=torch.long)
    if of.shape != (units,):
        raise ValueError(f"bootstrap: {tuple(of.shape)} prompts for {units} units; give one each")
    counts = torch.bincount(of).double()
    sums = torch.zeros(*values.shape[:-1], len(counts), dtype=torch.float64, device=values.device)
    sums.index_add_(-1, of.to(values.device), values)
    if len(counts) < 2:
        nan = torch.full_like(values.mean(-1), math.nan)
        return Interval(values.mean(-1), nan, nan)
    generator = generator or torch.Generator().manual_seed(0)
    means = []
    for size in torch.arange(n_boot).split(max(1, CHUNK // len(counts))):
        drawn = torch.randint(len(counts), (len(size), len(counts)), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
        )
        means.append(sums @ times.T.to(values.device) / (times @ counts).to(values.device))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=values.device)
    lo, hi = torch.cat(means, -1).quantile(tails, dim=-1)
    return Interval(values.mean(-1), lo, hi)


def t_interval(values: Tensor) -> Interval:
    """Mean over S independent repetitions with Student's 95 % interval, mean ± t s/√S.

    values (..., S) -> Interval(mean, lo, hi), each (...). Raises ValueError for fewer than 2 repetitions.

    >>> [round(x.item(), 3) for x in t_interval(torch.tensor([1.0, 2.0, 3.0]))]
    [2.0, -0.484, 4.484]
    """
    values = torch.as_tensor(values).double()
    repetitions = values.shape[-1]
    if repetitions < 2:
        raise ValueError(f"t_interval: {repetitions} repetition has no spread; give at least 2")
    t = T975[min(repetitions - 1, len(T975)) - 1]
    mean, half = values.mean(-1), t * values.std(-1) / repetitions**0.5
    return Interval(mean, mean - half, mean + half)


def kl(policy: Logps, ref: Logps, *, estimator: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """KL(π ‖ π_ref) estimated on each response sampled from the policy, (N,), in nats.

    With r_t = log π(y_t) − log π_ref(y_t), summed over the response's tokens:
    k1 = r_t (unbiased);   k2 = ½ r_t² (biased, low variance);   k3 = e^{−r_t} − 1 + r_t (unbiased, ≥ 0).

    k2 and k3 need token log-probabilities of both. Raises ValueError without them, where the responses
    differ in length, or for another estimator. Schulman 2020, "Approximating KL divergence".
    """
    if not torch.equal(policy.length, ref.length):
        raise ValueError("kl: policy and ref differ in the length of a response; score the same tokens with both")
    if estimator == "k1":
        return policy.sum - ref.sum
    if estimator not in ("k2", "k3"):
        raise ValueError(f"kl: unknown estimator {estimator!r}; choose k1, k2 or k3")
    if policy.tokens is None or ref.tokens is None:
        raise ValueError(f"kl: {estimator} needs token log-probabilities of policy and ref; use k1 with sums")
    ratio = policy.tokens - ref.tokens  # 0 off the mask, where k2 and k3 are 0 too
    terms = 0.5 * ratio**2 if estimator == "k2" else torch.expm1(-ratio) + ratio
    return terms.sum(-1, dtype=torch.float64).to(policy.sum.dtype)


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where ours scores higher, 0 where lower, ½ at a tie. Scores (..., Q) each -> (..., Q) float64."""
    if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise ValueError("wins: a score is not finite; drop the prompts without both scores")
    return (ours > theirs).double() + 0.5 * (ours == theirs).double()


def win_rate(ours: Tensor, theirs: Tensor) -> Tensor:
    """Share of prompts on which ours scores higher, ties ½. Scores (..., Q) each -> (...) in [0, 1]."""
    return wins(ours, theirs).mean(-1)


def _counts(n: Counts, answers: int | None = None) -> Tensor:
    """n as float64, refused unless whole numbers from 1 to `answers`."""
    counts = torch.as_tensor(n)
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.numel() == 0 or counts.ndim > 1:
        raise ValueError(f"best-of-n: n must be an int or a list of ints, got {n!r}")
    if counts.min() < 1:
        raise ValueError(f"best-of-n: n = {int(counts.min())}, but at least 1 answer is needed to choose from")
    if answers is not None and counts.max() > answers:
        raise ValueError(
            f"best-of-n: n = {int(counts.max())} is larger than the {answers} answers a prompt has; "
            "generate more answers or leave that n out"
        )
    return counts.to("cpu", torch.float64)


def _check_scores(proxy: Tensor, gold: Tensor) -> None:
    if proxy.shape != gold.shape or proxy.ndim not in (1, 2) or not proxy.numel():
        raise ValueError(
            f"best_of_n: proxy {tuple(proxy.shape)} and gold {tuple(gold.shape)} must both be (Q, N), or (N,)"
        )
    for name, scores in (("proxy", proxy), ("gold", gold)):
        for start, rows in _row_chunks(torch.atleast_2d(scores)):
            bad = ~torch.isfinite(rows)
            if bad.any():
                row, answer = (int(i) for i in bad.nonzero()[0])
                raise ValueError(
                    f"best_of_n: {name} score of prompt {start + row}, answer {answer} is "
                    f"{rows[row, answer].item()}; score it again or drop the prompt"
                )


def where(along: Tensor, values: Tensor, at: float) -> float:
    """The value where a curve first reaches `at` along an axis, linear between its points; nan where it never does.

    Along and values (P,), in the order of the curve, which may turn back.

    >>> where(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 10.0, 20.0]), 2.0)
    15.0
    """
    x, y = along.double().tolist(), values.double().tolist()
    for i, here in enumerate(x):
        if here >= at:
            share = 0.0 if i == 0 else (at - x[i - 1]) / (here - x[i - 1])
            return y[i] if i == 0 else y[i - 1] + share * (y[i] - y[i - 1])
    return math.nan


def _gold_by_rank(proxy: Tensor, gold: Tensor) -> Iterator[Tensor]:
    """Gold scores in ascending order of proxy, float64, a chunk of prompts at a time."""
    for start, rows in _row_chunks(proxy):
        ranked, order = rows.sort(-1)
        yield _mean_over_ties(ranked, gold[start : start + len(rows)].gather(-1, order).double())


def _mean_over_ties(ranked: Tensor, gold: Tensor) -> Tensor:
    """Gold with every group of equal proxy scores replaced by the group's mean."""
    first = torch.ones_like(ranked, dtype=torch.bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    if first.all():
        return gold
    group = first.flatten().cumsum(0) - 1
    size = group.bincount()
    total = torch.zeros(len(size), dtype=gold.dtype, device=gold.device).index_add_(0, group, gold.flatten())
    return (total / size)[group].view_as(gold)


def _row_chunks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of its first row, rows) over a matrix."""
    rows = max(1, CHUNK // scores.shape[1])
    for start in range(0, len(scores), rows):
        yield start, scores[start : start + rows]
