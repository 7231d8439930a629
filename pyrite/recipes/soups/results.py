"""results.json: win matrices, scores by option, the Pareto front, what each method costs, claims, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions
from pyrite.math import statistics
from pyrite.recipes.soups import claims
from pyrite.recipes.soups.chain import Chain
from pyrite.recipes.soups.settings import Settings

Row = dict[str, Any]
SHOWN = 3  # prompts in the browser of samples


def collect(chains: Sequence[Chain], settings: Settings) -> Row:
    """Everything the report shows, from finished chains."""
    every = [duels(chain) for chain in chains]
    first = chains[0]
    return {
        "duels": together([d.main for d in every]),
        "added": together([d.added for d in every if d.added]),
        "general": together([d.general for d in every if d.general]),
        "kl": _kl(chains),
        "costs": costs(settings),
        "claims": claims.check(every),
        "reward_models": [row for chain in chains for row in _accuracies(chain)],
        "policies": _policies(chains),
        "samples": _samples(first, settings),
        "stages": [{"stage": n, "seconds": (r.results or {})["seconds"]} for n, r in first.runs.items()],
    }


def duels(chain: Chain) -> claims.Duels:
    """The results of a chain's duels."""
    main, added, general = (run.results if run else None for run in (chain.duels, chain.added, chain.general))
    return claims.Duels(main or {}, added, general)


def together(every: Sequence[Mapping[str, Any]]) -> Row:
    """The duels of several chains as those of one: counts summed, rates and scores averaged, intervals over chains."""
    if not every:
        return {}
    keys = {
        "matrix": ("first", "second"),
        "by_combination": ("first", "second", "combination"),
        "by_criterion": ("first", "second", "option"),
        "averages": ("method",),
        "scores": ("method", "combination", "option", "by"),
        "pareto": ("method",),
    }
    merged = {name: _mean([chain[name] for chain in every], names) for name, names in keys.items()}
    over = "chains" if len(every) > 1 else "prompts"
    return {"methods": every[0]["methods"], "calls": sum(chain["calls"] for chain in every), "over": over, **merged}


def _mean(tables: Sequence[Sequence[Row]], keys: Sequence[str]) -> list[Row]:
    """Rows of equal keys averaged; of one chain as they are."""
    if len(tables) == 1:
        return [dict(row) for row in tables[0]]
    by_key: dict[tuple[Any, ...], list[Row]] = {}
    for table in tables:
        for row in table:
            by_key.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [_averaged(rows, keys) for rows in by_key.values() if len(rows) == len(tables)]


def _averaged(rows: Sequence[Row], keys: Sequence[str]) -> Row:
    found: Row = {key: rows[0][key] for key in keys}
    for name, value in rows[0].items():
        if name in keys or isinstance(value, str | bool) or name.endswith(("_lo", "_hi")):
            continue
        values = [row[name] for row in rows]
        counts = name in ("wins", "losses", "ties", "missing")
        known = [v for v in values if v is not None]
        found[name] = sum(values) if counts else sum(known) / len(known) if known else None
    for name in ("half", "without"):
        values = [row.get(name) for row in rows]
        if all(value is not None for value in values):
            spread = statistics.t_interval(torch.tensor(values, dtype=torch.float64))
            found |= {f"{name}_lo": spread.lo.item(), f"{name}_hi": spread.hi.item()}
    if "mean" in found:
        values = torch.tensor([row["mean"] for row in rows], dtype=torch.float64)
        found["se"] = values.std().item() / len(rows) ** 0.5
    if "front" in rows[0]:
        found["front"] = sum(row["front"] for row in rows) * 2 > len(rows)  # in most chains
    return found


def costs(settings: Settings) -> list[Row]:
    """What has to be trained for all combinations, and for one more option: policies, and answers drawn to learn from.

    P-MORL gets as many answers for each option as the soups' policies do; for one more option it is trained again.
    """
    dimensions = Dimensions.load(settings.dimensions)
    first = [option.id for option in dimensions.options if not option.later]
    combinations, each = len(dimensions.combinations()), settings.steps * settings.prompts_per_step
    more = len(dimensions.combinations([*first, settings.added])) if settings.added else combinations
    soups = {"policies": len(first), "combinations": combinations, "answers": each * len(first)}
    return [
        {"method": "psoups", **soups, "policies_more": 1, "combinations_more": more, "answers_more": each},
        {
            "method": "pmorl",
            **soups,
            "policies": 1,
            "policies_more": 1,
            "combinations_more": more,
            "answers_more": each * (len(first) + 1),
        },
    ]


def _kl(chains: Sequence[Chain]) -> list[Row]:
    """KL (k1, nats) of each method's answers from the start, with an interval over chains; or of one, its error."""
    rows = []
    for method in chains[0].kl:
        ratios = [torch.tensor(chain.kl[method], dtype=torch.float64) for chain in chains]
        means = torch.stack([values.mean() for values in ratios])
        row: Row = {"method": method, "kl": means.mean().item()}
        if len(chains) > 1:
            spread = statistics.t_interval(means)
            row |= {"kl_lo": spread.lo.item(), "kl_hi": spread.hi.item()}
        else:
            row["kl_se"] = (ratios[0].std() / len(ratios[0]) ** 0.5).item()
        rows.append(row)
    return rows


def _accuracies(chain: Chain) -> list[Row]:
    rows = []
    for name in ("reward model", "reward model in general"):
        for member in (chain.runs[name].results or {})["members"]:
            kept = {key: member[key] for key in ("accuracy", "accuracy_lo", "accuracy_hi")}
            rows.append({"seed": chain.seed, "kind": name, **kept})
    return rows


def _policies(chains: Sequence[Chain]) -> list[Row]:
    """KL from the start of every policy trained by PPO, where it ended, averaged over chains."""
    names = [name for name in chains[0].runs if name in ("rlhf", "pmorl") or name.startswith("ppo ")]
    found = []
    for name in names:
        lasts = [(chain.runs[name].results or {})["last"] for chain in chains]
        row: Row = {"policy": name}
        for column in ("kl_k1", "kl_k1_se", "length", "missing_eos", "score"):
            row[column] = sum(last[column] for last in lasts) / len(lasts)
        found.append(row)
    return found


def _samples(chain: Chain, settings: Settings) -> list[Row]:
    """Answers of some methods to the first prompts under two opposite combinations."""
    combinations = [("technical", "brief", "curt"), ("plain", "detailed", "kind")]
    folder = chain.runs["sft"].folder.parent / "answers"
    rows = []
    for name in ("pp", "pmorl", "psoups"):
        for combination in combinations:
            told = "+".join(combination)
            path = folder / (f"{name}_{told}" if name == "psoups" else name) / "candidates.parquet"
            if name not in settings.methods or not path.exists():
                continue
            given = [r for r in data.load(path, "candidates") if r["preferences"] == list(combination)]
            rows += [
                {"method": name, "combination": told, "prompt": r["asked"], "response": r["response"]}
                for r in given[:SHOWN]
            ]
    return rows
