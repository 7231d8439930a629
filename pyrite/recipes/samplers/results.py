"""results.json: the races, every round of every method, the last policies, claims and timing."""

from __future__ import annotations

import csv
import math
from typing import Any

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.math import statistics
from pyrite.recipes.samplers import claims
from pyrite.recipes.samplers.chain import Chain, Trained
from pyrite.recipes.samplers.settings import Settings

NUMBERS = ("gold", "proxy", "kl", "length", "missing_eos", "win_rate", "agreement", "loss")
COLUMNS = {  # of instances.csv: how tables become one number, and what an empty cell means
    "order": (torch.nanmedian, math.nan),
    "steps_to_1e-06": (torch.median, math.inf),
    "last_mean_error": (torch.mean, math.inf),
}
SHOWN = ("order", "step_order", "rate", "contraction", "steps_to_1e-06", "error", "diverged", "bound", "floor")


def collect(races: dict[str, Run], chains: list[Chain], settings: Settings) -> dict[str, Any]:
    """Everything the report shows, from finished runs."""
    budgets = [_budget(chain, settings) for chain in chains]
    rounds = [row for chain in chains for trained in chain.trained for row in _rounds(chain, trained)]
    return {
        "races": {name: _race(run) for name, run in races.items()},
        "budget": budgets[0],
        "rounds": rounds,
        "curves": _curves(rounds),
        "ends": {name: _end(chains, i) for i, name in enumerate(["start", *settings.methods])},
        "scorer": [_scorer(chain) for chain in chains],
        "claims": claims.check(_exact(races), [_measured(chain) for chain in chains]),
        "samples": _samples(chains[0]),
        "stages": [
            *({"stage": f"race: {name}", "seconds": (r.results or {})["seconds"]} for name, r in races.items()),
            *({"stage": name, "seconds": (r.results or {})["seconds"]} for name, r in chains[0].runs.items()),
            *({"stage": t.method, "seconds": (t.run.results or {})["seconds"]} for t in chains[0].trained),
        ],
    }


# The exact world ---------------------------------------------------------------------------------------------


def _race(run: Run) -> dict[str, Any]:
    """What the page shows of a race; its curves are those of results.json of the job."""
    found = runs.read_json(run.folder / "results.json")
    samplers = {name: {key: row[key] for key in SHOWN} for name, row in found["samplers"].items()}
    options = {key: found["config"][key] for key in ("rate", "scale", "rewards", "samples", "steps", "instances")}
    return {"options": options, "samplers": samplers, "curves": found["curves"]}


def _exact(races: dict[str, Run]) -> claims.Exact:
    return claims.Exact({name: _by_repetition(run) for name, run in races.items()})


def _by_repetition(run: Run) -> dict[str, dict[str, Tensor]]:
    """Medians or means over the reward tables of each repetition; whether each table kept to its bound."""
    with (run.folder / "instances.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, Tensor]] = {}
    for sampler, summary in (run.results or {})["samplers"].items():
        tables: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if row["sampler"] == sampler:
                tables.setdefault(row["seed"], []).append(row)
        found[sampler] = {
            name: torch.stack([middle(_column(some, name, absent)) for some in tables.values()])
            for name, (middle, absent) in COLUMNS.items()
        }
        if summary["bound"]:
            n = sum(map(len, tables.values()))
            found[sampler]["bound"] = (torch.arange(n) < round(n * summary["bound"]["holds"])).double()
    return found


def _column(rows: list[dict[str, str]], name: str, absent: float) -> Tensor:
    return torch.tensor([float(row[name] or absent) for row in rows], dtype=torch.float64)


# The language model ------------------------------------------------------------------------------------------


def _budget(chain: Chain, settings: Settings) -> dict[str, Any]:
    """What every method was given. Raises ValueError where one had more than another."""
    found = {}
    for trained in chain.trained:
        rows = runs.read_metrics(trained.run.folder)[1:]
        couples = sum(row["pairs"] + row["ties"] + row["no_verdict"] for row in rows)
        found[trained.method] = {"answers": rows[-1]["answers"], "couples": couples, "labels": rows[-1]["labels"]}
    for name in ("answers", "couples"):
        if len({row[name] for row in found.values()}) > 1:
            given = ", ".join(f"{method} {row[name]}" for method, row in found.items())
            raise ValueError(f"seed {chain.seed}: methods differ in {name} ({given}); their rewards do not compare")
    first = next(iter(found.values()))
    labels = {method: row["labels"] for method, row in found.items()}  # two equal answers need none
    return {"answers": first["answers"], "couples": first["couples"], "labels": labels, "rounds": settings.rounds}


def _rounds(chain: Chain, trained: Trained) -> list[dict[str, Any]]:
    """A row for the start and each round."""
    rows = []
    for row in runs.read_metrics(trained.run.folder):
        found = {"seed": chain.seed, "method": trained.method, "round": row["step"]}
        row = {**row, "kl": row["kl_k1"], "kl_se": row["kl_k1_se"]}
        found |= {name: row[name] for name in NUMBERS if name in row}
        rows.append(found | {f"{name}_se": row[f"{name}_se"] for name in ("gold", "proxy", "kl")})
    return rows


def _curves(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over chains by method and round; intervals over chains, or over prompts of one chain."""
    keys = dict.fromkeys((row["method"], row["round"]) for row in rounds)
    return [
        {"method": method, "round": number, **_over_seeds([r for r in rounds if (r["method"], r["round"]) == key])}
        for key in keys
        for method, number in [key]
    ]


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"chains": len(rows)}
    for name in NUMBERS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            found |= dict(zip((name, f"{name}_lo", f"{name}_hi"), _floats(_t(values)), strict=True))
        elif values:
            half = 1.96 * rows[0].get(f"{name}_se", math.nan)
            found |= {
                name: values[0],
                **({f"{name}_lo": values[0] - half, f"{name}_hi": values[0] + half} if half == half else {}),
            }
    return found


def _t(values: list[float]) -> statistics.Interval:
    return statistics.t_interval(torch.tensor(values, dtype=torch.float64))


def _floats(interval: statistics.Interval) -> tuple[float, ...]:
    return tuple(value.item() for value in interval)


def _end(chains: list[Chain], index: int) -> dict[str, Any]:
    """The last policy of a method (0: the start): means, and how often its answers beat the start's."""
    found: dict[str, list[Tensor]] = {}
    for chain in chains:
        run = [chain.start, *(trained.evaluation for trained in chain.trained)][index]
        mine, start = _grids(run), _grids(chain.start)
        for name in ("gold", "proxy", "kl", "length", "missing_eos"):
            found.setdefault(name, []).append(mine[name].mean(1))
        for name in ("gold", "proxy"):
            pairs = statistics.wins(mine[name][:, :, None], start[name][:, None, :])
            found.setdefault(f"win_{name}", []).append(pairs.mean((1, 2)))
    return {name: _summary(values) for name, values in found.items()}


def _summary(values: list[Tensor]) -> dict[str, float]:
    """Mean and interval: over prompts of one chain, over whole chains of several."""
    found = statistics.bootstrap(values[0]) if len(values) == 1 else _t([v.mean().item() for v in values])
    return dict(zip(("mean", "lo", "hi"), _floats(found), strict=True))


def _measured(chain: Chain) -> claims.Measured:
    end, rounds = {}, {}
    for trained in chain.trained:
        grids = _grids(trained.evaluation)
        end[trained.method] = {name: grids[name].mean(1) for name in ("gold", "proxy", "kl")}
        rows = _rounds(chain, trained)
        rounds[trained.method] = {
            name: torch.tensor([row[name] for row in rows]).double() for name in end[trained.method]
        }
    return claims.Measured(end, rounds)


def _grids(run: Run) -> dict[str, Tensor]:
    """(Q, K) values of the answers to each prompt, in the prompts' order."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for row in _answers(run):
        by_prompt.setdefault(row["prompt_id"], []).append(row | {"kl": row["kl_exact"]})
    return {
        name: torch.tensor([[float(row[name]) for row in rows] for rows in by_prompt.values()], dtype=torch.float64)
        for name in ("gold", "proxy", "kl", "length", "missing_eos")
    }


def _answers(run: Run) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(run.folder / "answers.parquet").to_pylist()


def _scorer(chain: Chain) -> dict[str, Any]:
    """How well the scorer that labels knows gold."""
    member = (chain.runs["scorer"].results or {})["members"][0]
    pairs = (chain.runs["pairs"].results or {})["pairs"]
    return {"seed": chain.seed, "pairs": pairs, **{k: member[k] for k in ("accuracy", "accuracy_lo", "accuracy_hi")}}


def _samples(chain: Chain, *, prompts: int = 4) -> list[dict[str, Any]]:
    """The first answer of every policy to the same prompts."""
    shown = {"start": chain.start, **{trained.method: trained.evaluation for trained in chain.trained}}
    first = {name: [row for row in _answers(run) if row["sample"] == 0][:prompts] for name, run in shown.items()}
    return [
        {
            "prompt": data.plain(first["start"][i]["prompt"]),
            "answers": [
                {"policy": name, **{k: rows[i][k] for k in ("response", "gold", "proxy")}}
                for name, rows in first.items()
            ],
        }
        for i in range(len(first["start"]))
    ]
