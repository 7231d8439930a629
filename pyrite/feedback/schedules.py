"""When paid labels are bought and when a discriminator learns from them: each function here makes a Schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pyrite.core import specs
from pyrite.feedback import selectors
from pyrite.feedback.selectors import Selector
from pyrite.math.ranges import Count, Natural, NonNegative, require

__all__ = ["even", "never", "original"]

Ties = Literal["drop", "silver"]


@dataclass(frozen=True)
class Schedule:
    """Labels over rounds.

    labels: bought in every `period` rounds, as soon as pairs are there; None spreads the budget evenly over rounds.
    window: rounds whose pairs compete for labels. patient: learn once the labels of a period are complete.
    replay: earlier labels learned again beside each new one. relabel: silver labels come after learning.
    ties: what becomes of a pair that gold finds equal.
    """

    selector: Selector
    labels: int | None = None
    period: int = 1
    window: int = 1
    patient: bool = False
    replay: float = 1.0
    relabel: bool = True
    ties: Ties = "drop"

    def allotment(self, number: int, *, rounds: int, budget: int | None, used: int, in_period: int, pairs: int) -> int:
        """Labels for round `number` (from 0), of `pairs` that compete; `used` so far, `in_period` since it began."""
        left = math.inf if budget is None else budget - used
        if self.labels is not None:
            due: float = self.labels - in_period
        else:
            due = math.inf if budget is None else (number + 1) * budget // rounds - used
        return int(max(min(due, left, pairs), 0))


def even(
    *, selector: str = "confidence()", window: Count = 1, replay: NonNegative = 1.0, ties: Ties = "drop"
) -> Schedule:
    """The budget in equal parts over the rounds; the discriminator learns in each, then labels the rest of the round.

    Raises ValueError for a window of no round, negative replay, or an unknown selector.

    >>> even().allotment(0, rounds=4, budget=10, used=0, in_period=0, pairs=64)
    2
    """
    require(even, window=window, replay=replay, ties=ties)
    return Schedule(specs.part(selector, selectors), window=window, replay=replay, ties=ties)


def original(*, labels: Natural = 5, period: Count = 5, selector: str = "confidence()") -> Schedule:
    """As published: a period's labels are bought from its first rounds, chosen within each round alone; learned once.

    Nothing is replayed, a round's silver labels are those from before learning, and a pair that gold finds equal
    keeps its silver order. Requests of the original are rounds here: SAMPN texts / texts a request = `period`, RELABELS
    = `labels`. Its dropout while scoring is not repeated. arXiv:2405.01511 and its code.
    """
    require(original, labels=labels, period=period)
    chosen = specs.part(selector, selectors)
    return Schedule(chosen, labels=labels, period=period, patient=True, replay=0.0, relabel=False, ties="silver")


def never() -> Schedule:
    """No label is bought: the discriminator stays what it is."""
    return Schedule(specs.part("random()", selectors), labels=0)
