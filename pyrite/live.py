"""Labels of a discriminator that learns, round by round, from the few pairs the judge is paid for.

    scores  = discriminator(answers)
    gold    = judge(the pairs most worth it, as many as the schedule allows)
    discriminator learns gold, and earlier labels again
    verdict = gold where it was asked, σ(r(a) − r(b)) of the discriminator elsewhere

Singhal et al. 2024, arXiv:2405.01511.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrite import seeds, text
from pyrite.discriminators import Better, Discriminator
from pyrite.judges import Judge, check_verdicts
from pyrite.labels import Labelled, Labels, Pairing, Source, decided, paired
from pyrite.rounds import Answer
from pyrite.schedules import Schedule
from pyrite.selectors import pick

Couple = tuple[int, int]


@dataclass(frozen=True)
class Judged:
    """A round's pairs, as indices into `answers` (which may be of earlier rounds too), and what else was seen."""

    answers: list[Answer]
    labelled: Labelled
    found: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """How pairs are made of answers."""

    pairing: Pairing = "best_worst"
    labels: Labels = "soft"
    gap: float = 0.0
    seed: int = 0
    judge: str = "judge"
    """Its name, for messages."""

    def stream(self, *names: Any) -> int:
        return seeds.derive(self.seed, *names)


@dataclass
class Shelf:
    """What lasts from round to round: labels so far, those not learned yet, pairs that still compete, counts."""

    learned: list[Better] = field(default_factory=list)
    fresh: list[Better] = field(default_factory=list)
    pool: list[tuple[int, Answer, Answer]] = field(default_factory=list)
    """(round, a, b) of pairs that no label was bought for."""
    used: int = 0
    in_period: int = 0

    def rows(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def read(cls, rows: dict[str, Any]) -> Shelf:
        """What `rows` gave."""
        pairs = {name: [(Answer(**a), Answer(**b)) for a, b in rows[name]] for name in ("learned", "fresh")}
        pool = [(number, Answer(**a), Answer(**b)) for number, a, b in rows["pool"]]
        return cls(**pairs, pool=pool, used=rows["used"], in_period=rows["in_period"])


@dataclass
class Live:
    """Silver labels from a discriminator, gold ones from the judge as the schedule says."""

    discriminator: Discriminator
    schedule: Schedule
    rules: Rules
    rounds: int
    budget: int | None = None
    shelf: Shelf = field(default_factory=Shelf)

    def __call__(self, judge: Judge, answers: Sequence[Answer], number: int) -> Judged:
        """The verdicts of one round."""
        self.shelf.in_period *= number % self.schedule.period != 0
        pool = [row for row in self.shelf.pool if number - row[0] < self.schedule.window]
        every = [*answers, *(answer for _, a, b in pool for answer in (a, b))]
        scores = self.discriminator.scores(every)
        drawn = paired(groups(answers), self.rules.pairing, scores[:, : len(answers)].mean(0))
        own = [couple for couple in drawn if every[couple[0]].response != every[couple[1]].response]
        couples = own + [(i, i + 1) for i in range(len(answers), len(every), 2)]
        gold = self._buy(judge, every, couples, _margins(scores, couples), number)
        learned = self._learn(number)
        if learned and self.schedule.relabel:
            scores = self.discriminator.scores(every)
        verdicts, sources = self._verdicts(gold, torch.sigmoid(_margins(scores, couples).double().mean(0)), len(own))
        pairs = decided(
            couples,
            verdicts,
            len(every),
            labels=self.rules.labels,
            gap=self.rules.gap,
            seed=self.rules.stream("labels", number),
            sources=sources,
            names=[*names(answers), *(f"{begun} {i}" for i, (begun, _, _) in enumerate(pool) for _ in "ab")],
        )
        waiting = [(number, every[a], every[b]) for i, (a, b) in enumerate(own) if i not in gold]
        pool = [row for i, row in enumerate(pool, start=len(own)) if i not in gold] + waiting
        self.shelf.pool = [row for row in pool if number + 1 - row[0] < self.schedule.window]
        missing = sum(math.isnan(p) for p in gold.values())
        ties = len(drawn) - len(own) + sum(p == 0.5 for p in gold.values())
        kinds = [pair.source for pair in pairs]
        found = {"gold_pairs": kinds.count("gold"), "silver_pairs": len(kinds) - kinds.count("gold"), **learned}
        return Judged(every, Labelled(pairs, len(gold) - missing, ties, missing), found)

    def _buy(
        self, judge: Judge, answers: Sequence[Answer], couples: Sequence[Couple], margins: Tensor, number: int
    ) -> dict[int, float]:
        """The judge's verdicts on the couples that compete best, by their place; NaN where it gave none."""
        wanted = self.schedule.allotment(
            number,
            rounds=self.rounds,
            budget=self.budget,
            used=self.shelf.used,
            in_period=self.shelf.in_period,
            pairs=len(couples),
        )
        generator = seeds.generator(self.rules.seed, "select", number)
        chosen = pick(self.schedule.selector, margins, wanted, generator=generator) if wanted else []
        asked = [couples[i] for i in chosen]
        prompts = [text.plain(answers[a].prompt) for a, _ in asked]
        sides = [[answers[couple[side]].response for couple in asked] for side in (0, 1)]
        verdicts = judge(prompts, *sides) if asked else torch.empty(0)
        known = check_verdicts(verdicts, len(asked), name=self.rules.judge).double().tolist()
        given = sum(not math.isnan(p) for p in known)
        self.shelf.used += given
        self.shelf.in_period += given
        for (a, b), p in zip(asked, known, strict=True):
            if not math.isnan(p) and p != 0.5:
                self.shelf.fresh.append((answers[a], answers[b]) if p > 0.5 else (answers[b], answers[a]))
        return dict(zip(chosen, known, strict=True))

    def _learn(self, number: int) -> dict[str, float]:
        """The labels not learned yet, with earlier ones beside them."""
        shelf, new = self.shelf, self.shelf.fresh
        waiting = self.schedule.patient and shelf.in_period < (self.schedule.labels or 0)
        if not new or waiting:
            return {}
        again = min(len(shelf.learned), round(self.schedule.replay * len(new)))
        order = torch.randperm(len(shelf.learned), generator=seeds.generator(self.rules.seed, "replay", number))
        some = [shelf.learned[i] for i in order[:again].tolist()]
        found = self.discriminator.learn([*new, *some], seed=self.rules.stream("learn", number))
        shelf.learned, shelf.fresh = [*shelf.learned, *new], []
        return {f"reward_{name}": value for name, value in found.items()}

    def _verdicts(self, gold: dict[int, float], silver: Tensor, own: int) -> tuple[list[float], list[Source]]:
        """P(a beats b) of every couple of this round, and of earlier ones that were labeled just now."""
        verdicts, sources = [], []
        for i, guess in enumerate(silver.double().tolist()):
            p = gold.get(i, math.nan)
            if math.isnan(p):
                verdict, source = (guess, "silver") if i < own else (0.5, "silver")
            elif p == 0.5:
                verdict, source = (guess, "tie") if self.schedule.ties == "silver" and i < own else (0.5, "tie")
            else:
                verdict, source = p, "gold"
            verdicts.append(verdict)
            sources.append(source)
        return verdicts, sources


def groups(answers: Sequence[Answer]) -> list[list[int]]:
    """Indices of the answers to each prompt."""
    found: dict[Any, list[int]] = {}
    for i, answer in enumerate(answers):
        found.setdefault(answer.prompt_id, []).append(i)
    return list(found.values())


def names(answers: Sequence[Answer]) -> list[str]:
    """Of each answer: its prompt's id and its place among the answers to that prompt."""
    place = {i: k for group in groups(answers) for k, i in enumerate(group)}
    return [f"{answer.prompt_id} {place[i]}" for i, answer in enumerate(answers)]


def _margins(scores: Tensor, couples: Sequence[Couple]) -> Tensor:
    """r(a) − r(b) of every member, (E, C)."""
    first, second = ([couple[side] for couple in couples] for side in (0, 1))
    return scores[:, first] - scores[:, second]
