"""What the report shows of the policies trained by PPO: curves, fits against √KL, where each ended, and bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyrite.math import statistics
from pyrite.math.statistics import fit_rl
from pyrite.recipes.overoptimization.chain import Chain, gold_at
from pyrite.recipes.overoptimization.ppo import Optimized
from pyrite.recipes.overoptimization.settings import Settings
from pyrite.training.metrics import FAR

SHOWN = ("kl", "kl_se", "kl_k3", "sqrt_kl", "gold", "gold_se", "proxy", "length", "missing_eos", "variance")


def curves(chains: Sequence[Sequence[Optimized]]) -> list[dict[str, Any]]:
    """A row for each measurement of each policy: means over chains (single: and members), and t intervals of gold and
    proxy over chains; with one chain the intervals are two standard errors over prompts either side."""
    by_policy: dict[tuple[float, float, str], list[list[Optimized]]] = {}
    for place, chain in enumerate(chains):
        for one in chain:
            runs = by_policy.setdefault((one.noise, one.beta, one.target.objective), [[] for _ in chains])
            runs[place].append(one)
    rows = []
    for (noise, beta, objective), runs in by_policy.items():
        for i, step in enumerate(row["step"] for row in runs[0][0].rows):
            points = [[one.rows[i] for one in mine] for mine in runs]
            known = {"noise": noise, "beta": beta, "objective": objective, "step": step}
            rows.append(known | _point(points))
    return rows


def _point(points: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """One measurement of one policy, from its rows by chain and member."""
    columns = {name: [[row[name] for row in mine] for mine in points] for name in SHOWN if name in points[0][0]}
    by_chain = {n: torch.tensor([sum(v) / len(v) for v in values]).double() for n, values in columns.items()}
    found = {name: values.mean().item() for name, values in by_chain.items()}
    for name in ("gold", "proxy"):
        if len(points) > 1:
            _, lo, hi = (value.item() for value in statistics.t_interval(by_chain[name]))
            found |= {f"{name}_lo": lo, f"{name}_hi": hi}
        elif name == "gold":
            found |= {"gold_lo": found["gold"] - 2 * found["gold_se"], "gold_hi": found["gold"] + 2 * found["gold_se"]}
    return found


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """R(d) = d (a − b ln d), d = √KL, of gold less that of the start, for every policy that has moved.

    A peak beyond ten times the largest d measured is left out: nothing speaks for it.
    """
    found = []
    for noise, beta, objective in dict.fromkeys((r["noise"], r["beta"], r["objective"]) for r in rows):
        line = [r for r in rows if (r["noise"], r["beta"], r["objective"]) == (noise, beta, objective)]
        moved = [(r["sqrt_kl"], r["gold"] - line[0]["gold"]) for r in line if r["sqrt_kl"] > 0]
        if len({d for d, _ in moved}) < 3:
            continue
        d, gold = torch.tensor(moved, dtype=torch.float64).unbind(1)
        fit = fit_rl(d, gold)
        peaks = fit.b > 0 and fit.peak <= FAR * d.max().item()
        known = {"noise": noise, "beta": beta, "objective": objective, "a": fit.a, "b": fit.b}
        where = {"peak_kl": fit.peak**2, "peak_gold": fit.peak_gold + line[0]["gold"]} if peaks else {}
        found.append(known | where)
    return found


def bars(chains: Sequence[Chain], settings: Settings, *, end: int) -> list[dict[str, Any]]:
    """Gold of best-of-n at the end by number of members, UWO's weight, reward-model size and number of pairs.

    Rows {group, label, objective, gold, lo, hi}, at the first level of noise; intervals over chains, none of one.
    """
    noise = settings.noise[0]
    main = [gold_at(chain.scores[noise], settings) for chain in chains]
    found = [
        _bar("members", f"{k} members", "wco", [_end(gold[name], end) for gold in main])
        for k, name in ((3, "wco of 3"), (4, "wco of 4"), (len(chains[0].scores[noise].proxy), "wco"))
        if name in main[0]
    ]
    found += [_bar("weight", w, "uwo", [_end(g[n], end) for g in main]) for w, n in _weights(settings) if n in main[0]]
    for variant in chains[0].variants:
        golds = [gold_at(chain.variants[variant], settings) for chain in chains]
        group = "size" if variant.startswith("size_") else "pairs"
        told = variant.replace("size_", "size ").replace("_", " ").replace("percent", "%")
        found += _all_objectives(group, told, golds, end)
    for group, told in (("pairs", "all pairs"), ("size", "size small")):
        if any(row["group"] == group for row in found):
            found += _all_objectives(group, told, main, end)
    return found


def _weights(settings: Settings) -> list[tuple[str, str]]:
    given = next((spec for spec in settings.objectives if spec.startswith("uwo")), "uwo(weight=0.5)")
    return [("weight 0.5", "uwo at 0.5"), (given[4:-1].replace("=", " "), "uwo")]


def _all_objectives(group: str, told: str, golds: Sequence[dict[str, torch.Tensor]], end: int) -> list[dict[str, Any]]:
    names = [name for name in ("single", "mean", "wco", "uwo") if name in golds[0]]
    return [_bar(group, told, name, [_end(gold[name], end) for gold in golds]) for name in names]


def _end(gold: torch.Tensor, end: int) -> float:
    """Of (M, Q) or (E, M, Q)."""
    return gold[..., end, :].mean().item()


def _bar(group: str, label: str, objective: str, values: Sequence[float]) -> dict[str, Any]:
    known = {"group": group, "label": label, "objective": objective, "gold": sum(values) / len(values)}
    if len(values) < 2:
        return known
    _, lo, hi = (value.item() for value in statistics.t_interval(torch.tensor(values, dtype=torch.float64)))
    return known | {"lo": lo, "hi": hi}
