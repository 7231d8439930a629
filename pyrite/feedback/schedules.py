"""How many labels are bought in each round, and which pairs compete for them: each function here makes a Schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyrite.core import specs
from pyrite.feedback import selection
from pyrite.feedback.selection import Selector
from pyrite.math.ranges import Count, NonNegative, require

__all__ = ["even", "never"]


@dataclass(frozen=True)
class Schedule:
    """How many labels are bought in each round.

    selector: which pairs get them. window: rounds whose pairs compete for labels. replay: how many earlier labels are
    learned again beside each new one. buys: whether any are bought.
    """

    selector: Selector
    window: int = 1
    replay: float = 1.0
    buys: bool = True

    def allotment(self, number: int, *, rounds: int, budget: int | None, used: int, pairs: int) -> int:
        """How many labels to buy in round `number` (from 0), if `pairs` compete and `used` were bought before. Without
        a budget: one for every pair."""
        due = math.inf if budget is None else (number + 1) * budget // rounds - used
        return int(max(min(due, pairs), 0)) if self.buys else 0


def even(*, selector: str = "confidence()", window: Count = 1, replay: NonNegative = 1.0) -> Schedule:
    """Spend the budget evenly over the rounds. The annotator learns in each round, then labels the round's other pairs.

    Raises ValueError for a window below 1, a negative replay, or an unknown selector.

    >>> even().allotment(0, rounds=4, budget=10, used=0, pairs=64)
    2
    """
    require(even, window=window, replay=replay)
    return Schedule(specs.part(selector, selection), window=window, replay=replay)


def never() -> Schedule:
    """Buy no labels: the annotator stays as it is."""
    return Schedule(specs.part("random()", selection), buys=False)
