"""The published claims about live rewards, each as a number with an interval and a verdict, task by task.

Source: Singhal et al. 2024, "D2PO: discriminator-guided DPO with response evaluation models", arXiv:2405.01511; its
abstract, and the curves of its figures. An interval is over whole chains (Student's t); one chain has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.math import statistics

SOURCE = "arXiv:2405.01511"
OWN = f"not in {SOURCE}"


@dataclass(frozen=True)
class Measured:
    """One task of one chain: method -> column -> (rounds + 1,), column `labels` counting those before the rounds."""

    curves: dict[str, dict[str, Tensor]]

    def last(self, method: str, column: str = "gold") -> float:
        return self.curves[method][column][-1].item() if column in self.curves[method] else math.nan

    def first(self, method: str, column: str) -> float:
        return self.curves[method][column][0].item() if column in self.curves[method] else math.nan

    def ahead(self, first: str, second: str) -> float:
        """Gold of the last policy of one method above that of another."""
        return self.last(first) - self.last(second)

    def labels_to(self, method: str, gold: float) -> float:
        """Labels after which a method first has that gold; nan where it never has."""
        curve = self.curves[method]
        return statistics.where(curve["gold"], curve["labels"], gold)

    def at_equal_kl(self, first: str, second: str) -> float:
        """Gold of one method above another's at the KL where the shorter of both curves ends."""
        curves = [self.curves[method] for method in (first, second)]
        kl = min(curve["kl"].max().item() for curve in curves)
        ours, theirs = (statistics.where(curve["kl"], curve["gold"], kl) for curve in curves)
        return ours - theirs


@dataclass(frozen=True)
class Claim:
    """What is claimed, the methods it needs, a number of one chain; it holds where the mean is surely above 0."""

    id: str
    source: str
    statement: str
    needs: tuple[str, ...]
    value: Callable[[Measured], float]


def _ahead(first: str, second: str, statement: str, source: str = SOURCE) -> Claim:
    name = f"{first}-over-{second}".replace("_", "-")
    return Claim(name, source, statement, (first, second), lambda m: m.ahead(first, second))


ABSTRACT = f"{SOURCE}, abstract"
CLAIMS = [
    _ahead(
        "live", "gold", "With the same labels a live reward brings more gold than learning from them alone", ABSTRACT
    ),
    Claim(
        "fewer-labels",
        ABSTRACT,
        "A live reward reaches with fewer labels what labels alone reach with all of them (labels saved)",
        ("live", "gold"),
        lambda m: m.last("gold", "labels") - m.labels_to("live", m.last("gold")),
    ),
    _ahead("live", "static", "A live reward brings more gold than a static one trained on as many labels", ABSTRACT),
    _ahead(
        "static",
        "offline",
        "Rounds with a static reward bring more gold than DPO on the labeled pairs",
        f"{SOURCE}, figure",
    ),
    Claim(
        "static-decays",
        f"{SOURCE}, figure of reward accuracy",
        "A static reward ranks the answers of its policy worse after the rounds than before (accuracy lost)",
        ("static",),
        lambda m: m.first("static", "live_accuracy") - m.last("static", "live_accuracy"),
    ),
    Claim(
        "live-holds",
        f"{SOURCE}, figure of reward accuracy",
        "After the rounds a live reward ranks its policy's answers better than a static one ranks its own's",
        ("live", "static"),
        lambda m: m.last("live", "live_accuracy") - m.last("static", "live_accuracy"),
    ),
    _ahead(
        "live_random",
        "implicit",
        "A reward model is a better discriminator than a second policy",
        f"{SOURCE}, ablation",
    ),
    _ahead("live_random", "self_reward", "A separate discriminator is better than the policy itself", ABSTRACT),
    _ahead("live", "gold_matched", "It still does where labels alone are learned in as many updates", OWN),
    Claim(
        "equal-kl",
        OWN,
        "It still does at equal KL: a live reward against as many updates on labels alone",
        ("live", "gold_matched"),
        lambda m: m.at_equal_kl("live", "gold_matched"),
    ),
    _ahead("live", "live_random", "Labels for the least certain pairs bring more gold than labels for any", OWN),
    _ahead(
        "live_disagreement",
        "live_random",
        "Labels where reward models disagree bring more gold than labels for any",
        OWN,
    ),
]


def check(tasks: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Every claim in every task that has its methods, as a row: what was measured, its interval, the verdict."""
    return [
        _row(claim, task, [claim.value(chain) for chain in chains])
        for claim in CLAIMS
        for task, chains in tasks.items()
        if all(name in chains[0].curves for name in claim.needs)
    ]


def _row(claim: Claim, task: str, values: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"{claim.id}-{task}", "claim": claim.id, "task": task, "source": claim.source}
    row |= {"statement": f"{task}: {claim.statement}", "by_seed": [v if math.isfinite(v) else None for v in values]}
    found = torch.tensor(values, dtype=torch.float64)
    if not found.isfinite().all():  # a level that some chain never reached
        return row | {"over": None, "measured": None, "interval": None, "holds": None}
    if len(values) < 2:
        return row | {"over": None, "measured": values[0], "interval": None, "holds": None}
    mean, lo, hi = (value.item() for value in statistics.t_interval(found))
    holds = True if lo > 0 else False if hi < 0 else None
    return row | {"over": "chains", "measured": mean, "interval": [lo, hi], "holds": holds}
