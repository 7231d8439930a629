"""The published claims about personalized soups, each a number for every chain, a t interval over chains, a verdict.

Source: Jang et al. 2023, "Personalized Soups", arXiv:2310.11564. A win rate counts a tie as one half; a unit is one
prompt under one combination, decided by the sum of its options' verdicts. With one chain nothing is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyrite.math import statistics

SOURCE = "arXiv:2310.11564"
OWN = f"not in {SOURCE}"
PUBLISHED = ("vb", "rlhf", "pp", "mt", "pmorl", "psoups")
NAMES = {
    "vb": "the policy as it is",
    "pp": "prompting",
    "mt": "multitask tuning",
    "rlhf": "RLHF on a general reward",
    "pmorl": "P-MORL",
    "psoups": "personalized soups",
    "psoups_factor": "soups of averaged factors",
    "psoups_dpo": "soups of DPO policies",
}


@dataclass(frozen=True)
class Duels:
    """The results of one chain: all combinations, those that came with an added option, general quality."""

    main: Mapping[str, Any]
    added: Mapping[str, Any] | None = None
    general: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """What is claimed, and a number of one chain that is above 0 where it is so; KeyError where it was not run."""

    id: str
    source: str
    statement: str
    value: Callable[[Duels], float]


def ahead(first: str, second: str, duels: Mapping[str, Any] | None) -> float:
    """Win rate of one method against another, ties one half, less one half."""
    rows = {(row["first"], row["second"]): row["half"] for row in (duels or {"matrix": []})["matrix"]}
    return rows[first, second] - 0.5


def best(method: str, duels: Mapping[str, Any]) -> float:
    """Average win rate among the published methods above that of the best other one."""
    rows = {(row["first"], row["second"]): row["half"] for row in duels["matrix"]}
    means = {m: sum(rows[m, o] for o in PUBLISHED if o != m) / (len(PUBLISHED) - 1) for m in PUBLISHED}
    return means[method] - max(value for name, value in means.items() if name != method)


def _over(first: str, second: str, source: str) -> Claim:
    said = f"{NAMES[first]} win" if first.startswith("psoups") else f"{NAMES[first]} wins"
    statement = f"Over all combinations {said} against {NAMES[second]} (win rate less one half)"
    return Claim(f"{first}-over-{second}".replace("_", "-"), source, statement, lambda d: ahead(first, second, d.main))


TABLE = f"{SOURCE}, table 3"
CLAIMS = [
    Claim(
        "psoups-best",
        TABLE,
        "Personalized soups have the highest average win rate of the published methods (published 55.23 %)",
        lambda d: best("psoups", d.main),
    ),
    Claim(
        "pmorl-best",
        f"{SOURCE}, table 4 (people)",
        "P-MORL has the highest average win rate of the published methods (published 58.70 %)",
        lambda d: best("pmorl", d.main),
    ),
    *(_over("psoups", other, TABLE) for other in ("vb", "rlhf", "pp", "mt", "pmorl")),
    *(_over("pmorl", other, TABLE) for other in ("vb", "rlhf", "pp", "mt")),
    Claim(
        "psoups-over-pmorl-added",
        f"{SOURCE}, section 4.4",
        "With an option added later soups win against P-MORL, here not trained again (published 59.06 %)",
        lambda d: ahead("psoups", "pmorl", d.added),
    ),
    Claim(
        "no-free-lunch",
        f"{SOURCE}, section 5",
        "In general quality RLHF on a general reward wins against personalized soups",
        lambda d: ahead("rlhf", "psoups", d.general),
    ),
    _over("psoups", "psoups_factor", OWN),
    _over("psoups", "psoups_dpo", OWN),
]


def check(chains: Sequence[Duels]) -> list[dict[str, Any]]:
    """Every claim whose methods were run."""
    rows = []
    for claim in CLAIMS:
        try:
            points = [claim.value(chain) for chain in chains]
        except KeyError:  # a method that was not run
            continue
        known: dict[str, Any] = {"id": claim.id, "source": claim.source, "statement": claim.statement}
        known["by_seed"] = points
        if len(points) < 2:
            rows.append(known | {"measured": points[0], "interval": None, "holds": None})
            continue
        interval = statistics.t_interval(torch.tensor(points, dtype=torch.float64))
        mean, lo, hi = (value.item() for value in interval)
        holds = True if lo > 0 else False if hi < 0 else None
        rows.append(known | {"measured": mean, "interval": [lo, hi], "holds": holds})
    return rows
