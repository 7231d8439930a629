"""How far two judges agree, and how a judge leans: agreement, Cohen's kappa, position bias, ties, no verdicts.

Axes: Q prompts, B resamples. Pairs of one prompt are not independent, so prompts are resampled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrite.data.files import DataError, Row, Source, read
from pyrite.data.rows import prompt_id
from pyrite.feedback.judges.questions import pair_id
from pyrite.math import winrates

NEEDED = ("prompt", "a", "b", "preference")


class Measured(NamedTuple):
    """A share or coefficient with its interval over prompts, and on how many verdicts it rests."""

    value: float
    lo: float
    hi: float
    n: int


class Opinion(NamedTuple):
    """A verdict as it counts here: prompt; pair and criterion; preference 1 for the answer whose text sorts first, 2
    for the other, 0 for a tie; P(a beats b) by the order in which the answers were shown."""

    prompt: str
    pair: tuple[str, str]
    preference: int | None
    p_ab: float | None
    p_ba: float | None


def opinions(path: str) -> list[Opinion]:
    """The verdicts of a file as `pyrite judge` writes it. Raises DataError, naming file and row."""
    source = read(path)
    found = [_opinion(row, source, i) for i, row in enumerate(source.rows)]
    seen: dict[tuple[str, str], int] = {}
    for i, one in enumerate(found):
        if seen.setdefault(one.pair, i) != i:
            first = source.at(seen[one.pair])
            raise DataError(f"{source.at(i)}: the pair has a verdict already, in {first}; give one judge's file")
    return found


def agreement(
    first: Sequence[Opinion], second: Sequence[Opinion], *, n_boot: int, level: float, generator: torch.Generator
) -> dict[str, Any]:
    """How two judges agree on the pairs that both have a verdict on, joined by texts and criterion, never by place.

    agreement: share of equal verdicts of three, A, B or tie. kappa: (agreement − chance) / (1 − chance), chance =
    Σ_c p₁(c) p₂(c) of their own shares (Cohen 1960); NaN where chance is 1. decided: agreement where neither sees a
    tie. Raises ValueError where no pair has both verdicts.
    """
    theirs = {one.pair: one for one in second}
    both = [(one, theirs[one.pair]) for one in first if one.pair in theirs]
    judged = [(mine, other) for mine, other in both if mine.preference is not None and other.preference is not None]
    if not judged:
        common = f"{len(both)} of {len(first)} and {len(second)} pairs are the same texts by the same criterion"
        raise ValueError(f"no pair has a verdict of both judges: {common}")
    table = torch.zeros(len(judged), 3, 3, dtype=torch.float64)
    for i, (mine, other) in enumerate(judged):
        table[i, mine.preference or 0, other.preference or 0] = 1
    boot = _Boot([mine.prompt for mine, _ in judged], n_boot, level, generator)
    return {
        "pairs": len(judged),
        "only_first": len(first) - len(both),
        "only_second": len(second) - len(both),
        "without_a_verdict": len(both) - len(judged),
        "agreement": boot(table, _equal, len(judged)),
        "kappa": boot(table, kappa, len(judged)),
        "decided": boot(table[:, 1:, 1:], _equal, int(table[:, 1:, 1:].sum())),
        "confusion": table.sum(0).int().tolist(),
    }


def kappa(table: Tensor) -> Tensor:
    """Cohen's kappa of confusion tables, (..., C, C) counts -> (...).

    >>> round(kappa(torch.tensor([[20.0, 5.0], [10.0, 15.0]])).item(), 6)
    0.4
    """
    share = table / table.sum((-2, -1), keepdim=True)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    return (_equal(table) - chance) / (1 - chance)


def _equal(table: Tensor) -> Tensor:
    """Share of equal verdicts."""
    return table.diagonal(dim1=-2, dim2=-1).sum(-1) / table.sum((-2, -1))


def leaning(judged: Sequence[Opinion], *, n_boot: int, level: float, generator: torch.Generator) -> dict[str, Any]:
    """How one judge leans.

    first_shown: share of decided answers that went to the answer shown first, ½ without position bias. consistency:
    share of pairs asked in both orders on which both said the same. ties and no_verdict: shares of pairs.
    """
    boot = _Boot([one.prompt for one in judged], n_boot, level, generator)
    rows = torch.tensor([_counts(one) for one in judged], dtype=torch.float64)

    def share(part: int, whole: int) -> Measured:
        return boot(rows, lambda t: t[..., part] / t[..., whole], int(rows[:, whole].sum()))

    return {
        "pairs": len(judged),
        "first_shown": share(0, 1),
        "consistency": share(2, 3),
        "ties": share(4, 5),
        "no_verdict": share(6, 7),
    }


class _Boot:
    """Statistics of sums over pairs, with percentile intervals from resampled prompts."""

    def __init__(self, prompts: Sequence[str], n_boot: int, level: float, generator: torch.Generator) -> None:
        names = {name: i for i, name in enumerate(dict.fromkeys(prompts))}
        self.of = torch.tensor([names[prompt] for prompt in prompts], dtype=torch.long)
        self.counts = winrates.resamples(len(names), n_boot=n_boot, generator=generator)
        self.level = level

    def __call__(self, rows: Tensor, statistic: Callable[[Tensor], Tensor], n: int) -> Measured:
        """Rows (N, ...) of N pairs; the statistic is of their sum (..., ...)."""
        flat = rows.flatten(1)
        sums = torch.zeros(self.counts.shape[1], flat.shape[1], dtype=flat.dtype).index_add_(0, self.of, flat)
        value = statistic(rows.sum(0))
        boot = statistic((self.counts @ sums).unflatten(1, rows.shape[1:]))
        found = winrates.interval(value, boot, level=self.level)
        return Measured(found.mean.item(), found.lo.item(), found.hi.item(), n)


def _counts(one: Opinion) -> tuple[float, ...]:
    """(first shown won, decided), (same in both orders, asked in both), (tie, verdict), (none, pair)."""
    wins = [one.p_ab] if one.p_ab is not None else []
    wins += [1 - one.p_ba] if one.p_ba is not None else []
    decided = [p for p in wins if p != 0.5]
    both = one.p_ab is not None and one.p_ba is not None
    same = both and _side(one.p_ab) == _side(one.p_ba)
    verdict = one.preference is not None
    leaning = (sum(p > 0.5 for p in decided), len(decided), float(same), float(both))
    return (*leaning, float(one.preference == 0), float(verdict), float(not verdict), 1.0)


def _side(p: float | None) -> int:
    return 0 if p is None or p == 0.5 else 1 if p > 0.5 else -1


def _opinion(row: Row, source: Source, i: int) -> Opinion:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        raise DataError(f"{source.at(i)}: verdicts need {', '.join(NEEDED)}; missing {', '.join(missing)}")
    preference = row["preference"]
    if preference not in (0, 1, 2, None):
        raise DataError(f"{source.at(i)}: preference is {preference!r:.40}; it must be 1, 2, 0 for a tie, or null")
    if row["a"] > row["b"] and preference:
        preference = 3 - preference
    named = pair_id(row["prompt"], row["a"], row["b"])
    place = (named, str(row.get("criterion") or ""))
    return Opinion(
        str(row.get("prompt_id") or prompt_id(row["prompt"])), place, preference, row.get("p_ab"), row.get("p_ba")
    )
