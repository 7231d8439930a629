"""Prompts of a run of rounds: those to learn from, those to measure on, and whose turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyrite.core.processes import say
from pyrite.data import rows as data
from pyrite.data.files import Row
from pyrite.data.rows import Fitted, OnLong
from pyrite.math import seeds
from pyrite.models.policy import Policy
from pyrite.training import loop
from pyrite.training.evaluation import Evaluation


@dataclass(frozen=True)
class Turns:
    """Which of n prompts a round takes: the next `size` of a shuffled order, then of another one, and so on.

    No prompt is asked twice before all have been asked once, and none twice in a round.
    """

    n: int
    size: int
    seed: int

    def __call__(self, number: int) -> list[int]:
        """Indices of the prompts of a round."""
        flat = range(number * self.size, (number + 1) * self.size)
        orders = {epoch: _order(self, epoch) for epoch in {flat[0] // self.n, flat[-1] // self.n}}
        return [orders[p // self.n][p % self.n] for p in flat]


@lru_cache(maxsize=8)
def _order(turns: Turns, epoch: int) -> list[int]:
    """All prompts, shuffled. Those of the round that the last order began are moved behind its end."""
    order = loop.order(turns.n, epoch, seed=seeds.derive(turns.seed, "prompts"))
    begun = epoch * turns.n % turns.size
    if not begun:
        return order
    asked = set(_order(turns, epoch - 1)[-begun:])
    missing = turns.size - begun
    first = [i for i in order if i not in asked][:missing]
    return first + [i for i in order if i not in set(first)]


def split(
    path: str, evaluation: Evaluation, *, columns: str | None, held_out: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to learn from and prompts to measure on; none in both, under whatever preferences.

    Raises ValueError where one of them is empty.
    """
    rows = data.load(path, "prompts", columns=columns, note=say)
    if evaluation.eval_prompts:
        test = data.load(evaluation.eval_prompts, "prompts", columns=columns)
        asked = data.apart(rows, test, note=say, source=path)
    else:
        asked, test = data.split(rows, fraction=held_out, seed=seeds.derive(seed, "held out"))
    if not asked or not test:
        raise ValueError(
            f"{path}: {len(asked)} prompts to learn from and {len(test)} to measure on; give --held-out a share "
            "above 0, or --eval-prompts"
        )
    return asked, test


def encoded(
    policy: Policy,
    rows: Sequence[Row],
    *,
    new: int,
    max_prompt: int | None = None,
    on_long: OnLong | None = None,
) -> Fitted:
    """Prompts to learn from, with room for `new` tokens behind each; long ones as `pyrite.data.rows.fit` has them."""
    return data.fit(
        policy.tokenizer,
        rows,
        most=data.room(policy.context, new, max_prompt),
        context=policy.context,
        on_long=on_long,
        note=lambda words: say(f"to learn from: {words}"),
    )
