"""Watching a run for overoptimization: has the proxy parted from gold, and where?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NEEDS = ("gold", "gold_se", "proxy", "kl_k1")
SURE = 2.0  # standard errors of the difference


@dataclass(frozen=True)
class Stopping:
    """Whether a run stops by itself where its proxy is worth following no longer."""

    stop_when_parted: bool = False
    """Stop once gold has fallen from its best while the proxy has not; the best policy by gold is kept in best/."""
    patience: int = 2
    """Measurements in a row that must say so."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; give at least 1 measurement")

    def parted(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """What `parted` finds, where that is wanted."""
        return parted(rows, patience=self.patience) if self.stop_when_parted else None


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The measurement with the highest gold, the first of equal ones; None without any."""
    measured = [row for row in rows if all(name in row for name in NEEDS)]
    return max(measured, key=lambda row: row["gold"]) if measured else None


def parted(rows: Sequence[Mapping[str, Any]], *, patience: int = 2) -> Mapping[str, Any] | None:
    """The measurement at which the proxy parted from gold, once it is sure; None as long as it is not.

    Each of the last `patience` measurements has gold below the best by more than 2 √(se² + se_best²), and a proxy no
    lower than there. Rows need gold, gold_se, proxy and kl_k1; others are passed over. The errors count as independent,
    though the prompts are the same, so it is slow to say so.

    >>> row = {"gold_se": 0.1, "kl_k1": 1.0}
    >>> rows = [row | {"gold": g, "proxy": p} for g, p in ((1.0, 0.0), (2.0, 1.0), (1.5, 2.0), (1.4, 3.0))]
    >>> parted(rows)["gold"]
    2.0
    """
    top = best(rows)
    measured = [row for row in rows if all(name in row for name in NEEDS)]
    if top is None or len(measured) - measured.index(top) <= patience:
        return None
    last = measured[-patience:]
    fallen = all(top["gold"] - row["gold"] > SURE * math.hypot(top["gold_se"], row["gold_se"]) for row in last)
    return top if fallen and all(row["proxy"] >= top["proxy"] for row in last) else None
