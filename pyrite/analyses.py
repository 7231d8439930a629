"""What training did to a policy, seen in its log-probabilities: rankings, single tokens, end tokens, positions.

Axes: B pairs, N answers, T positions, C target tokens in all, U different ones. With r_t = log π(y_t) − log π_ref(y_t)
in nats, over response tokens only, the end token included.

The analyses are those of Liu, Liu and Cohan 2024, arXiv:2407.13709; equations and figures are numbered as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from pyrite.estimators import wins
from pyrite.logps import Logps, PairLogps

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
