"""Candidates to preference pairs: who is asked about which two answers, and what is made of the verdicts.

No label is invented: a cut or empty answer, equal answers, a tie or a missing verdict makes no pair, and each is
counted.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.core.processes import progress
from pyrite.data.files import Row
from pyrite.data.rows import PROBABILITY_FLOOR
from pyrite.math import seeds

Judge = Callable[[list[str], list[str], list[str]], Tensor]
Pairing = Literal["consecutive", "all", "best_worst"]
Labels = Literal["soft", "hard", "sampled"]
LabelSource = Literal["judge", "gold", "silver"]
Ties = Literal["drop", "keep"]


@dataclass(frozen=True)
class Pair:
    """The indices of the chosen and the rejected answer; the strength ln(p / (1 − p)) of the verdict for the chosen
    one, in nats; and who gave the verdict."""

    chosen: int
    rejected: int
    strength: float
    source: LabelSource = "judge"


@dataclass(frozen=True)
class Labelled:
    """Pairs, the number of verdicts, and how many couples made no pair: ties, and couples without a verdict."""

    pairs: list[Pair]
    labels: int
    ties: int
    missing: int


def check_verdicts(verdicts: Tensor | Sequence[float], n: int, *, name: str) -> Tensor:
    """The verdicts of `name` as a (N,) tensor of probabilities or NaN. Raises ValueError for anything else."""
    values = torch.as_tensor(verdicts).float()
    if values.shape != (n,):
        raise ValueError(f"{name} returned verdicts of shape {tuple(values.shape)}; {n} pairs need ({n},)")
    wrong = ((values < 0) | (values > 1)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{name} judged pair {row + 1} as {values[row].item()}; P(a beats b) lies in [0, 1]")
    return values


def label(
    judge: Judge,
    prompts: Sequence[str],
    answers: Sequence[str],
    groups: Sequence[Sequence[int]],
    *,
    pairing: Pairing = "best_worst",
    labels: Labels = "soft",
    min_margin: float = 0.0,
    seed: int = 0,
    name: str = "judge",
    names: Sequence[object] | None = None,
) -> Labelled:
    """Pairs of N answers (with the prompt of each), by groups of indices that answer the same prompt.

    pairing: consecutive (0 1, 2 3, ...); all; best_worst, by mean probability of winning against the group's others.
    labels: soft and hard take the likelier answer as chosen; sampled draws it by the verdict, one draw a pair from the
    stream (seed, names of the two answers). names: of the answers, their places by default; a pair of the same names
    is drawn alike in whatever batch it stands. min_margin: log-odds, nats, that a pair must exceed, or it is a tie.
    Equal texts are not asked about. Raises ValueError if the judge's verdicts are no probabilities.
    """
    couples = paired(groups, pairing)
    asked = [(a, b) for a, b in couples if answers[a] != answers[b]]
    first, second = [a for a, _ in asked], [b for _, b in asked]
    texts = [[side[i] for i in where] for side, where in ((prompts, first), (answers, first), (answers, second))]
    verdicts = check_verdicts(judge(*texts), len(asked), name=name) if asked else torch.empty(0)
    known = dict(zip(asked, verdicts.double().tolist(), strict=True))
    if pairing == "best_worst":
        couples = [couple for group in groups if (couple := _ends(group, known))]
    wanted = [known.get(couple, 0.5) for couple in couples]
    pairs = decided(couples, wanted, len(answers), labels=labels, min_margin=min_margin, seed=seed, names=names)
    missing = sum(map(math.isnan, wanted))
    return Labelled(pairs, int((~verdicts.isnan()).sum()), len(couples) - len(pairs) - missing, missing)


def paired(groups: Sequence[Sequence[int]], pairing: Pairing, scores: Tensor | None = None) -> list[tuple[int, int]]:
    """Which answers are compared: indices (a, b) of answers in the same group.

    best_worst gives every couple of a group or, with scores (N,), only the highest and the lowest.
    """
    if pairing == "consecutive":
        return [couple for group in groups for couple in zip(group[::2], group[1::2], strict=False)]
    if pairing == "best_worst" and scores is not None:
        value = scores.tolist()
        several = [group for group in groups if len(group) > 1]
        ends = [(min(g, key=lambda i: (-value[i], i)), min(g, key=lambda i: (value[i], -i))) for g in several]
        return [(min(couple), max(couple)) for couple in ends]
    return [couple for group in groups for couple in itertools.combinations(group, 2)]


def decided(
    couples: Sequence[tuple[int, int]],
    verdicts: Sequence[float],
    n: int,
    *,
    labels: Labels = "soft",
    min_margin: float = 0.0,
    seed: int = 0,
    sources: Sequence[LabelSource] | None = None,
    names: Sequence[object] | None = None,
) -> list[Pair]:
    """The pairs that verdicts P(a beats b) make of couples among n answers. A tie or a missing verdict makes none.

    names: of the n answers, by default their indices. A sampled label is drawn from the stream (seed, both names).
    """
    known = range(n) if names is None else names
    whose: list[LabelSource] = list(sources) if sources else ["judge" for _ in couples]
    found = []
    for (a, b), p, source in zip(couples, verdicts, whose, strict=True):
        uniform = seeds.uniform(seed, "label", str(known[a]), str(known[b])) if labels == "sampled" else 0.5
        found.append(_decided(a, b, p, uniform, source))
    return [pair for pair in found if pair and abs(pair.strength) > min_margin]


def _ends(group: Sequence[int], known: dict[tuple[int, int], float]) -> tuple[int, int] | None:
    """The answers of a group that win most and least often against the others; None if no two were judged."""
    wins: dict[int, list[float]] = {}
    for a, b in itertools.combinations(group, 2):
        p = known.get((a, b), 0.5)
        if not math.isnan(p):
            wins.setdefault(a, []).append(p)
            wins.setdefault(b, []).append(1 - p)
    if not wins:
        return (group[0], group[1]) if len(group) > 1 else None
    means = {index: sum(values) / len(values) for index, values in wins.items()}
    best, worst = max(means, key=lambda i: (means[i], -i)), min(means, key=lambda i: (means[i], -i))
    return (best, worst) if best < worst else (worst, best)


def _decided(a: int, b: int, p: float, uniform: float, source: LabelSource) -> Pair | None:
    """The pair of a verdict P(a beats b): a wins if `uniform` lies below it. None for a tie or a missing verdict."""
    if math.isnan(p) or p == 0.5:
        return None
    a_wins = p > uniform
    sure = min(max(p, PROBABILITY_FLOOR), 1 - PROBABILITY_FLOOR)
    odds = math.log(sure / (1 - sure))
    return Pair(a, b, odds, source) if a_wins else Pair(b, a, -odds, source)


# Rows of candidates ---------------------------------------------------------------------------------------------------


Rows = tuple[Row, Row]


def consecutive(rows: Sequence[Row]) -> list[Rows]:
    """Candidates 0 and 1, 2 and 3, ... of each prompt."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return [couple for group in groups.values() for couple in zip(group[::2], group[1::2], strict=False)]


def sound(couples: Iterable[Rows], left_out: Counter[str]) -> list[Rows]:
    """The couples that can carry a preference. The others are counted in `left_out`, by reason."""
    kept = []
    for a, b in couples:
        if not (a["finished"] and b["finished"]):
            left_out["cut"] += 1  # an answer cut before its end says nothing about how it would end
        elif a["response"] == b["response"]:
            left_out["equal"] += 1
        elif not (a["response"] and b["response"]):
            left_out["empty"] += 1
        else:
            kept.append((a, b))
    return kept


def counted(left_out: Counter[str]) -> str:
    """How many couples made no pair, by reason, as words."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none"


def preferred(
    couples: Sequence[Rows], strengths: Sequence[float], left_out: Counter[str], *, ties: Ties
) -> Iterator[tuple[Row, Row, float]]:
    """(chosen, rejected, strength) for each couple, given the strength with which its first answer is preferred.

    A missing verdict (NaN) makes no pair. A tie makes none either, unless ties are kept, with strength 0.
    """
    for (a, b), strength in zip(couples, strengths, strict=True):
        if math.isnan(strength):
            left_out["no_verdict"] += 1
        elif strength == 0 and ties == "drop":
            left_out["tie"] += 1
        else:
            yield (a, b, strength) if strength >= 0 else (b, a, -strength)


def judged(
    folder: Path, judge: Judge, prompts: Sequence[str], couples: Sequence[Rows], *, name: str, title: str
) -> list[float]:
    """P(a beats b) of couples of candidates, NaN without a verdict. What is judged is kept in parts in `folder`, so
    that an interrupted run goes on.

    Raises ValueError if a verdict is no probability.
    """
    with progress(title, len(couples), unit="pairs") as advance:

        def ask(begin: int, end: int) -> dict[str, list]:
            sides = ([couple[side]["response"] for couple in couples[begin:end]] for side in (0, 1))
            given = judge(list(prompts[begin:end]), *sides)
            advance(end - begin)
            return {"verdict": check_verdicts(given, end - begin, name=name).tolist()}

        return runs.in_parts(folder, len(couples), ask, size=64)["verdict"].to_pylist()


def log_odds(verdicts: Sequence[float]) -> list[float]:
    """ln(p / (1 − p)) of verdicts, in nats. Verdicts are kept away from 0 and 1; NaN stays NaN."""
    return torch.logit(torch.tensor(verdicts, dtype=torch.float64), eps=PROBABILITY_FLOOR).tolist()
