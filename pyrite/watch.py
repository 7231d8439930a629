"""Watching a run for overoptimization: has the proxy parted from gold, and where?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyrite.fits import fit_rl
from pyrite.options import Count, check

NEEDS = ("gold", "gold_se", "proxy", "kl_k1")
SURE = 2.0  # standard errors of the difference
FAR = 10.0  # times the largest d measured: a peak beyond is not told


@dataclass(frozen=True)
class Stopping:
    """Whether a run stops by itself where its proxy is worth following no longer."""

    stop_when_parted: bool = False
    """Stop once gold has fallen from its best while the proxy has not; the best policy by gold is kept in best/."""
    patience: Count = 2
    """Measurements in a row that must say so."""

    def __post_init__(self) -> None:
        check(self)

    def check(self, *, gold: object, proxy: object) -> None:
        """Raises ValueError where a run is to be stopped by numbers that nobody measures."""
        if self.stop_when_parted and not (gold and proxy):
            raise ValueError("--stop-when-parted compares gold with a proxy: give --gold, and --rewards for the proxy")

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


def fitted(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Least squares of gold and proxy, relative to the first row, as d (a − b ln d) of d = √KL, with gold's peak.

    gold_fit_a, gold_fit_b, proxy_fit_a, proxy_fit_b, each where 3 later rows or more have it at different positive KL;
    gold_peak_kl in nats and gold_peak, the gold there, where gold turns within 10 times the largest d. KL is the exact
    one where it was measured, else k1; rows without both are passed over. Gao et al. 2022, arXiv:2210.10760, section 1.

    >>> rows = [{"gold": 1.0, "kl_k1": 0.0}]
    >>> rows += [{"gold": 1.0 + d * (0.35 - 0.15 * math.log(d)), "kl_k1": d * d} for d in (1.0, 2.0, 3.0)]
    >>> {name: round(value, 6) for name, value in fitted(rows).items()}
    {'gold_fit_a': 0.35, 'gold_fit_b': 0.15, 'gold_peak_kl': 14.391916, 'gold_peak': 1.56905}
    """
    found: dict[str, float] = {}
    for name in ("gold", "proxy"):
        points = [(_nats(row) ** 0.5, row[name]) for row in rows[1:] if name in row and _nats(row) > 0]
        if not rows or name not in rows[0] or len({d for d, _ in points}) < 3:
            continue
        d, values = torch.tensor(points, dtype=torch.float64).unbind(1)
        fit = fit_rl(d, values - rows[0][name])
        found |= {f"{name}_fit_a": fit.a, f"{name}_fit_b": fit.b}
        if name == "gold" and fit.peak <= FAR * d.max().item():
            found |= {"gold_peak_kl": fit.peak**2, "gold_peak": rows[0]["gold"] + fit.peak_gold}
    return found


def _nats(row: Mapping[str, Any]) -> float:
    """KL of a measurement; 0 of a row without."""
    return row.get("kl_exact", row.get("kl_k1", 0.0))
