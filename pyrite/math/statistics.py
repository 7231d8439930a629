"""Statistics of runs: overoptimization curves, what optimization bought, what training did to a policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from statistics import median
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from pyrite.math.logps import Logps, PairLogps

# Curves ---------------------------------------------------------------------------------------------------------------

# Overoptimization curves: how gold rises and falls with d = √KL, the KL in nats.


class Fit(NamedTuple):
    """Coefficients of a gold curve and its peak: d* in √nats and the gold there (inf: it never turns)."""

    a: float
    b: float
    peak: float
    peak_gold: float


def fit_best_of_n(d: Tensor, gold: Tensor) -> Fit:
    """Least squares of R(d) = d (a − b d), the shape of best-of-n; peak d* = a/2b, R* = a²/4b.

    d (M,) √nats from the initial policy and gold (M,) relative to it (R(0) = 0, so no intercept).
    Raises ValueError for fewer than two different positive d.

    >>> d = torch.linspace(0, 6, 20)
    >>> round(fit_best_of_n(d, d * (0.6 - 0.1 * d)).peak, 4)
    3.0
    """
    d = torch.as_tensor(d, dtype=torch.float64)
    a, b = _least_squares(d, d * d, gold)
    if b <= 0:
        return Fit(a, b, math.inf, math.inf)
    peak = max(a, 0.0) / (2 * b)
    return Fit(a, b, peak, peak * (a - b * peak))


def fit_rl(d: Tensor, gold: Tensor) -> Fit:
    """Least squares of R(d) = d (a − b ln d), the shape of reinforcement learning.

    The peak is at d* = e^{a/b − 1}, R* = b d*. Arguments and errors as in `fit_best_of_n`.
    """
    d = torch.as_tensor(d, dtype=torch.float64)
    a, b = _least_squares(d, torch.xlogy(d, d), gold)
    if b <= 0 or a / b > 700:  # beyond, the exponential leaves float64
        return Fit(a, b, math.inf, math.inf)
    peak = math.exp(a / b - 1)
    return Fit(a, b, peak, b * peak)


def _least_squares(d: Tensor, bend: Tensor, gold: Tensor) -> tuple[float, float]:
    """a, b of gold ≈ a d − b bend."""
    gold = torch.as_tensor(gold, dtype=torch.float64)
    if d.ndim != 1 or d.shape != gold.shape or not torch.isfinite(torch.stack([d, gold])).all():
        raise ValueError(
            f"fit: d {tuple(d.shape)} and gold {tuple(gold.shape)} must be finite, (M,) each; drop missing points"
        )
    if (d < 0).any() or len(d[d > 0].unique()) < 2:
        raise ValueError("fit: needs at least two different positive values of d = √KL, and none negative")
    return _solved(d.tolist(), (-bend).tolist(), gold.tolist())


def _solved(first: list[float], second: list[float], wanted: list[float]) -> tuple[float, float]:
    """The least squares a, b of wanted ≈ a first + b second, the second made orthogonal to the first.

    Exact sums: a library's solver may change its last bits with the place of its memory, and a resumed run must not.
    """

    def dot(x: list[float], y: list[float]) -> float:
        return math.fsum(map(mul, x, y))

    shared = dot(first, second) / dot(first, first)
    rest = [y - shared * x for x, y in zip(first, second, strict=True)]
    b = dot(wanted, rest) / dot(rest, rest)
    return (dot(wanted, first) - b * dot(first, second)) / dot(first, first), b


# Estimates ------------------------------------------------------------------------------------------------------------

# What optimization against a proxy bought: best-of-n curves, KL from the reference, wins, intervals.


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
    means = [
        sums @ times.T.to(values.device) / (times @ counts).to(values.device)
        for times in resamples(len(counts), n_boot=n_boot, generator=generator)
    ]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=values.device)
    lo, hi = torch.cat(means, -1).quantile(tails, dim=-1)
    return Interval(values.mean(-1), lo, hi)


def resamples(units: int, *, n_boot: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """How often each of Q units was drawn, Q draws with replacement, in each of B resamples: (B, Q) float64, some rows
    at a time. `generator` is a CPU generator; without one, a fixed seed."""
    generator = generator or torch.Generator().manual_seed(0)
    for some in torch.arange(n_boot).split(max(1, CHUNK // units)):
        drawn = torch.randint(units, (len(some), units), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(counts))


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


# Log-probabilities ----------------------------------------------------------------------------------------------------

# What training did to a policy, seen in its log-probabilities: rankings, single tokens, end tokens, positions.
# Axes: B pairs, N answers, T positions, C target tokens in all, U different ones. r_t = log π(y_t) − log π_ref(y_t) in
# nats, over response tokens only, the end token included. The analyses are those of Liu, Liu and Cohan 2024,
# arXiv:2407.13709; equations and figures are numbered as there.


ENDLESS = 0.2  # a larger share of answers that hit the limit without an end token is degenerate,
REPETITIVE = 0.5  # and so is a larger median share of repeated 4-grams
FAR = -10.0  # nats: below, a token's probability was divided by more than 22,000


class Mean(NamedTuple):
    """A mean and its standard error, over prompts where these are known."""

    mean: float
    se: float


@dataclass(frozen=True, eq=False)
class TokenRatios:
    """r̂ by vocabulary token: the U tokens that occur, how often each is a target, the mean of its r_t; (U,) each."""

    token: Tensor
    count: Tensor
    mean: Tensor


class Histogram(NamedTuple):
    """`counts[i]` values from `edges[i]` to `edges[i+1]`, and their decimal logarithms, None at 0."""

    edges: list[float]
    counts: list[int]
    log10: list[float | None]


class Degeneration(NamedTuple):
    """Whether a policy's answers have degenerated, and the two numbers that say so."""

    degenerate: bool
    missing_eos: float
    repetition: float


def ranking(pair: PairLogps, prompts: Tensor | None = None) -> dict[str, Mean]:
    """How often chosen is ranked first: by the policy, log π(y), and by its reward, log π(y)/π_ref(y); ties ½.

    policy_accuracy, and with a reference accuracy and margin Δ = (a − a_R) − (b − b_R), nats; means over B pairs.
    At π = π_ref accuracy is ½ and Δ = 0. prompts (B,): the number of each pair's prompt, as in `mean`.
    """
    chosen, rejected = pair.chosen.sum, pair.rejected.sum
    found = {"policy_accuracy": wins(chosen, rejected)}
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        chosen, rejected = chosen - pair.ref_chosen.sum, rejected - pair.ref_rejected.sum
        found |= {"accuracy": wins(chosen, rejected), "margin": (chosen - rejected).double()}
    return {name: mean(values, prompts) for name, values in found.items()}


def mean(values: Tensor, prompts: Tensor | None = None) -> Mean:
    """Mean and its standard error, (N,) -> two numbers; the error from a single prompt is given as 0.

    prompts (N,): the number of the prompt that each value belongs to; each its own by default. Values of one prompt are
    not independent, so with e_i = x_i − mean and G prompts the error is √(G/(G−1) Σ_g (Σ_{i in g} e_i)²) / N.

    >>> mean(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])).se
    0.5
    """
    values = values.double()
    _, of = (torch.arange(len(values)) if prompts is None else prompts).unique(return_inverse=True)
    of = of.to(values.device)
    sums = values.new_zeros(int(of.max()) + 1).index_add(0, of, values - values.mean())
    groups = len(sums)
    error = (groups / (groups - 1) * sums.square().sum()).sqrt().item() / len(values) if groups > 1 else 0.0
    return Mean(values.mean().item(), error)


def log_ratios(policy: Logps, ref: Logps) -> Tensor:
    """r_t of all target tokens, answer by answer, (C,) float64.

    Raises ValueError without token log-probabilities, or where the two count tokens differently.
    """
    if policy.tokens is None or policy.mask is None or ref.tokens is None or ref.mask is None:
        raise ValueError("log_ratios: token log-probabilities of policy and ref are needed, not their sums alone")
    if not torch.equal(policy.mask, ref.mask):
        raise ValueError(
            "log_ratios: policy and ref differ in the length of an answer; score the same tokens with both"
        )
    return policy.tokens[policy.mask].double() - ref.tokens[policy.mask].double()


def by_token(tokens: Tensor, ratios: Tensor) -> TokenRatios:
    """r̂_v = mean of r_t where y_t = v (paper eq. 8, figure 1), for every v that occurs. tokens (C,), ratios (C,).

    >>> by_token(torch.tensor([7, 2, 7]), torch.tensor([-1.0, 0.5, -3.0])).mean
    tensor([ 0.5000, -2.0000], dtype=torch.float64)
    """
    if tokens.shape != ratios.shape or tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"by_token: {tuple(tokens.shape)} tokens and {tuple(ratios.shape)} ratios; give (C,) of both")
    token, place, count = tokens.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(token), dtype=torch.float64).index_add(0, place, ratios.double())
    return TokenRatios(token, count, total / count)


def extremes(table: TokenRatios, *, k: int = 10, at_least: int = 100) -> tuple[TokenRatios, TokenRatios]:
    """The k tokens moved down most and the k moved up most (figure 2), among those that occur `at_least` times."""
    often = (table.count >= at_least).nonzero().squeeze(1)
    order = often[table.mean[often].argsort(stable=True)]
    ends = order[:k], order.flip(0)[:k]
    down, up = (TokenRatios(table.token[end], table.count[end], table.mean[end]) for end in ends)
    return down, up


def histogram(values: Tensor, *, width: float = 1.0) -> Histogram:
    """Counts of values (U,) in bins of `width`, whole multiples of it being the edges."""
    place = (values.double() / width).floor().long()
    low = int(place.min())
    counts = torch.bincount(place - low).tolist()
    edges = [(low + i) * width for i in range(len(counts) + 1)]
    return Histogram(edges, counts, [math.log10(count) if count else None for count in counts])


def tail_mass(ratios: Tensor, *, below: float = FAR) -> float:
    """P(r_t < below), the share of target tokens moved down further than that. (C,) -> a number."""
    return (ratios < below).double().mean().item()


def end_logp(logps: Logps) -> Tensor:
    """Log-probability of each answer's last token, (N,): of the end token, where the answer has one."""
    if logps.tokens is None:
        raise ValueError("end_logp: token log-probabilities are needed, not their sums alone")
    return logps.tokens.gather(1, logps.length[:, None] - 1).squeeze(1)


def ends(pair: PairLogps, finished: Tensor, prompts: Tensor | None = None) -> dict[str, Mean]:
    """Mean log-probability of the end token on both sides, nats, and the gap chosen − rejected (figure 3).

    finished (B,) bool: both answers have their end token; the others are left out. Nothing, where none has. prompts
    (B,): the number of each pair's prompt, as in `mean`.
    """
    if not finished.any():
        return {}
    chosen, rejected = end_logp(pair.chosen)[finished], end_logp(pair.rejected)[finished]
    sides = {"chosen": chosen, "rejected": rejected, "gap": chosen - rejected}
    return {name: mean(values, None if prompts is None else prompts[finished]) for name, values in sides.items()}


def by_position(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over the answers that reach each position, and how many do: N rows (T_i,) -> (T,), (T,).

    For rows of KL(π ‖ π_ref) at each position: where in an answer the policy leaves its reference.
    """
    if not rows:
        raise ValueError("by_position: no answers; give one tensor of values each")
    length = torch.tensor([len(row) for row in rows])
    values = torch.nn.utils.rnn.pad_sequence([row.double() for row in rows], batch_first=True)
    count = (torch.arange(values.shape[1]) < length[:, None]).sum(0)
    return values.sum(0) / count, count


def repetition(tokens: Sequence[int], *, n: int = 4) -> float:
    """1 − different n-grams / n-grams of one answer, in [0, 1); 0 for an answer shorter than n.

    >>> repetition([1, 2, 1, 2, 1, 2, 1])
    0.5
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of the answers (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(tokens[i : i + n]) for tokens in answers for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def degeneration(answers: Sequence[Sequence[int]], finished: Sequence[bool]) -> Degeneration:
    """Degenerate: more than 20 % of the answers hit the limit without an end token, or the median 4-gram repetition
    is above ½.

    Token ids of N answers, and whether each ended by itself. Raises ValueError for none, or unequal numbers.
    """
    if not len(answers) or len(answers) != len(finished):
        raise ValueError(f"degeneration: {len(answers)} answers and {len(finished)} flags; give as many, at least one")
    endless = sum(not done for done in finished) / len(finished)
    repeated = float(median(repetition(tokens) for tokens in answers))
    return Degeneration(endless > ENDLESS or repeated > REPETITIVE, endless, repeated)
