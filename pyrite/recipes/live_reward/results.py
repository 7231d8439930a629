"""results.json: every round of every method in every task, labels to fixed levels of gold, claims and timing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.data import rows as data
from pyrite.math import statistics
from pyrite.recipes.live_reward import claims
from pyrite.recipes.live_reward.chain import Chain, Trained
from pyrite.recipes.live_reward.settings import Settings

COLUMNS = ("gold", "proxy", "kl", "length", "labels", "live_accuracy", "proxy_accuracy", "policy_accuracy", "win_rate")
LEVELS = (0.5, 1.0, 1.5)  # of what labels alone gain with all of them


def collect(chains: list[Chain], settings: Settings) -> dict[str, Any]:
    """Everything the report shows, from finished chains."""
    rounds = [row for chain in chains for one in chain.trained for row in _rounds(chain, one)]
    measured = {task: [_measured(chain, task) for chain in chains] for task in settings.tasks}
    return {
        "rounds": rounds,
        "curves": _curves(rounds),
        "ends": _ends(rounds),
        "levels": [row for task, some in measured.items() for row in _levels(task, some)],
        "books": [_books(chain, one) for chain in chains for one in chain.trained],
        "rewards": [_reward(chain, name) for chain in chains for name in chain.runs if "reward model" in name],
        "claims": claims.check(measured),
        "samples": _samples(chains[0], settings),
        "stages": [
            *({"stage": name, "seconds": (run.results or {})["seconds"]} for name, run in chains[0].runs.items()),
            *(
                {"stage": f"{t.task}: {t.method}", "seconds": (t.run.results or {})["seconds"]}
                for t in chains[0].trained
            ),
        ],
    }


def _rounds(chain: Chain, trained: Trained) -> list[dict[str, Any]]:
    """A row for the start and each measured round; of offline DPO for the start and the end."""
    rows = [row for row in runs.read_metrics(trained.run.folder) if "gold" in row]
    rows = rows if trained.method != "offline" else [rows[0], rows[-1]]
    found = []
    for number, row in enumerate(rows):
        labels = trained.before + row.get("labels", 0)
        row = {**row, "kl": row["kl_k1"], "labels": labels}
        shown = {name: row[name] for name in COLUMNS if name in row}
        errors = {f"{name}_se": row[key] for name, key in (("gold", "gold_se"), ("kl", "kl_k1_se")) if key in row}
        where = {"seed": chain.seed, "task": trained.task, "method": trained.method, "round": number}
        found.append({**where, **shown, **errors})
    return found


def _curves(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over chains by task, method and round, with t intervals where there are several."""
    keys = dict.fromkeys((row["task"], row["method"], row["round"]) for row in rounds)
    return [
        {"task": task, "method": method, "round": number, **_over_seeds([row for row in rounds if _key(row) == key])}
        for key in keys
        for task, method, number in [key]
    ]


def _ends(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last round of every method, over chains."""
    keys = dict.fromkeys((row["task"], row["method"]) for row in rounds)
    last = {key: max(row["round"] for row in rounds if _key(row)[:2] == key) for key in keys}
    return [
        {"task": task, "method": method, **_over_seeds([r for r in rounds if _key(r) == (task, method, number)])}
        for (task, method), number in last.items()
    ]


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["method"], row["round"]


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"chains": len(rows)}
    for name in COLUMNS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            interval = statistics.t_interval(torch.tensor(values, dtype=torch.float64))
            found |= {name: interval.mean.item(), f"{name}_lo": interval.lo.item(), f"{name}_hi": interval.hi.item()}
        elif values:
            half = 1.96 * rows[0].get(f"{name}_se", math.nan)
            band = {f"{name}_lo": values[0] - half, f"{name}_hi": values[0] + half} if half == half else {}
            found |= {name: values[0], **band}
    return found


def _levels(task: str, chains: list[claims.Measured]) -> list[dict[str, Any]]:
    """Labels each method needs to reach fixed levels of gold: shares of what labels alone gain with all of them."""
    rows = []
    for share in LEVELS:
        for method in chains[0].curves:
            needed = []
            for chain in chains:
                start, end = chain.first("gold", "gold"), chain.last("gold")
                needed.append(chain.labels_to(method, start + share * (end - start)) if end > start else math.nan)
            reached = [value for value in needed if not math.isnan(value)]
            row = {"task": task, "method": method, "share": share, "reached": len(reached), "chains": len(chains)}
            if len(reached) > 1:
                found = statistics.t_interval(torch.tensor(reached, dtype=torch.float64))
                row |= {"labels": found.mean.item(), "labels_lo": found.lo.item(), "labels_hi": found.hi.item()}
            elif reached:
                row |= {"labels": reached[0]}
            rows.append(row)
    return rows


def _measured(chain: Chain, task: str) -> claims.Measured:
    curves: dict[str, dict[str, Tensor]] = {}
    for trained in chain.trained:
        if trained.task == task:
            rows = _rounds(chain, trained)
            names = [name for name in COLUMNS if all(name in row for row in rows)]
            curves[trained.method] = {name: torch.tensor([row[name] for row in rows]).double() for name in names}
    return claims.Measured(curves)


def _books(chain: Chain, trained: Trained) -> dict[str, Any]:
    """What was paid and what was learned, over all rounds."""
    rows = runs.read_metrics(trained.run.folder)
    sums = {name: sum(row.get(name, 0) for row in rows) for name in ("pairs", "ties", "gold_pairs", "silver_pairs")}
    where = {"seed": chain.seed, "task": trained.task, "method": trained.method, "before": trained.before}
    return {**where, "labels": (trained.run.results or {}).get("labels", 0), **sums}


def _reward(chain: Chain, name: str) -> dict[str, Any]:
    """How well a reward model knows gold before the rounds."""
    task, kind = name.split(": reward model, ")
    found = chain.runs[name].results or {}
    accuracy = [member["accuracy"] for member in found["members"]]
    mean = sum(accuracy) / len(accuracy)
    return {"seed": chain.seed, "task": task, "kind": kind, "pairs": found["pairs"], "accuracy": mean}


def _samples(chain: Chain, settings: Settings, *, pairs: int = 2) -> list[dict[str, Any]]:
    """In each task, what the live policy was taught in its last round."""
    found = []
    for task in settings.tasks:
        run = next((one.run for one in chain.trained if (one.task, one.method) == (task, "live")), None)
        files = sorted((run.folder / "rounds").glob("*.parquet")) if run else []
        if files:
            rows = data.load(str(files[-1]), "pairs")[:pairs]
            shown = ("prompt", "chosen", "rejected", "source")
            found.append({"task": task, "pairs": [{name: row.get(name) for name in shown} for row in rows]})
    return found
