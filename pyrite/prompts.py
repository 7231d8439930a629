"""Prompts of a run of rounds: those to learn from, those to measure on, and whose turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyrite import data, seeds, text, train
from pyrite.evaluation import Evaluation
from pyrite.models import Policy
from pyrite.progress import say


@dataclass(frozen=True)
class Turns:
    """Which of n prompts a round takes: the same `size` ones in every round, or the next ones of shuffled orders."""

    n: int
    size: int
    fresh: bool
    seed: int

    def __call__(self, number: int) -> list[int]:
        """Indices of the prompts of a round."""
        if not self.fresh:
            return self._order(0)[: self.size]
        flat = range(number * self.size, (number + 1) * self.size)
        orders = {p // self.n: self._order(p // self.n) for p in (flat[0], flat[-1])}
        return [orders[p // self.n][p % self.n] for p in flat]

    def _order(self, epoch: int) -> list[int]:
        return train.order(self.n, epoch, seed=seeds.derive(self.seed, "prompts"))


def split(
    path: str, evaluation: Evaluation, *, columns: str | None, held_out: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to learn from and prompts to measure on; none in both, under whatever preferences.

    Raises ValueError where one of them is empty.
    """
    rows = data.load(path, "prompts", columns=columns, note=say)
    if evaluation.eval_prompts:
        test = data.load(evaluation.eval_prompts, "prompts", columns=columns)
        kept = {key for row in test for key in data.origin(row)}
        asked = [row for row in rows if kept.isdisjoint(data.origin(row))]
    else:
        asked, test = data.split(rows, fraction=held_out, seed=seeds.derive(seed, "held out"))
    if not asked or not test:
        raise ValueError(f"{path}: {len(asked)} prompts to learn from and {len(test)} to measure on")
    return asked, test


def encoded(policy: Policy, rows: Sequence[dict[str, Any]], *, new: int, source: str) -> list[list[int]]:
    """Token ids of prompts, with room for `new` tokens behind. Raises ValueError for a prompt that is too long."""
    return text.encode_prompts(
        policy.tokenizer,
        [row["prompt"] for row in rows],
        max_length=policy.context - new,
        where=lambda i: data.place(rows[i], f"{source}: prompt {rows[i]['prompt_id']}"),
    )
