"""Candidates to preference pairs: who is asked about which two answers, and what is made of the verdicts.

No label is invented: a tie or a missing verdict makes no pair, and each is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyrite import seeds
from pyrite.data import PROBABILITY_FLOOR
from pyrite.judges import Judge, check_verdicts

Pairing = Literal["consecutive", "all", "best_worst"]
Labels = Literal["soft", "hard", "sampled"]


@dataclass(frozen=True)
class Pair:
    """Indices of the chosen and the rejected answer, and ln(p / (1 − p)) of the verdict for the chosen, nats."""

    chosen: int
    rejected: int
    strength: float


@dataclass(frozen=True)
class Labelled:
    """Pairs, how many verdicts were asked for, and what made no pair."""

    pairs: list[Pair]
    asked: int
    ties: int
    missing: int


def label(
    judge: Judge,
    prompts: Sequence[str],
    answers: Sequence[str],
    groups: Sequence[Sequence[int]],
    *,
    pairing: Pairing = "best_worst",
    labels: Labels = "soft",
    seed: int = 0,
    name: str = "judge",
) -> Labelled:
    """Pairs of N answers (with the prompt of each), by groups of indices that answer the same prompt.

    pairing: consecutive (0 1, 2 3, ...); all; best_worst, by mean probability of winning against the group's others.
    labels: soft and hard take the likelier answer as chosen; sampled draws it by the verdict, from its own stream
    (seed, place). Equal texts are not asked about. Raises ValueError where the judge's verdicts are no probabilities.
    """
    couples = [couple for group in groups for couple in _couples(group, pairing)]
    asked = [(a, b) for a, b in couples if answers[a] != answers[b]]
    first, second = [a for a, _ in asked], [b for _, b in asked]
    texts = [[side[i] for i in where] for side, where in ((prompts, first), (answers, first), (answers, second))]
    verdicts = check_verdicts(judge(*texts), len(asked), name=name) if asked else torch.empty(0)
    known = dict(zip(asked, verdicts.double().tolist(), strict=True))
    if pairing == "best_worst":
        couples = [couple for group in groups if (couple := _ends(group, known))]
    uniform = torch.rand(len(answers), generator=seeds.generator(seed, "labels"), dtype=torch.float64)
    decided = [_decided(a, b, known.get((a, b), 0.5), labels, uniform) for a, b in couples]
    missing = sum(math.isnan(known.get(couple, 0.5)) for couple in couples)
    pairs = [pair for pair in decided if pair]
    return Labelled(pairs, len(asked), len(couples) - len(pairs) - missing, missing)


def _couples(group: Sequence[int], pairing: Pairing) -> list[tuple[int, int]]:
    if pairing == "consecutive":
        return list(zip(group[::2], group[1::2], strict=False))
    return list(itertools.combinations(group, 2))


def _ends(group: Sequence[int], known: dict[tuple[int, int], float]) -> tuple[int, int] | None:
    """The answers that win most and least against the group's others; None where no two were judged."""
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


def _decided(a: int, b: int, p: float, labels: Labels, uniform: Tensor) -> Pair | None:
    """The pair of a verdict P(a beats b); None for a tie or no verdict."""
    if math.isnan(p) or p == 0.5:
        return None
    a_wins = p > uniform[a].item() if labels == "sampled" else p > 0.5
    sure = min(max(p, PROBABILITY_FLOOR), 1 - PROBABILITY_FLOOR)
    odds = math.log(sure / (1 - sure))
    return Pair(a, b, odds) if a_wins else Pair(b, a, -odds)
