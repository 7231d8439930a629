"""results.json: every policy of every chain, curves over beta, claims and timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.math import statistics
from pyrite.models.references import load, texts_of
from pyrite.recipes.references import claims
from pyrite.recipes.references.chain import Chain, Trained

NUMBERS = ("gold", "kl", "length", "missing_eos", "repetition", "accuracy", "policy_accuracy", "best_gold")


def collect(chains: list[Chain]) -> dict[str, Any]:
    """Everything the report shows, from finished chains."""
    policies = [_policy(chain, trained) for chain in chains for trained in chain.trained]
    return {
        "policies": policies,
        "curves": _curves(policies),
        "start": _over_seeds([_answers(chain.start) for chain in chains]),
        "strong": {name: _over_seeds([_answers(chain.strong[name]) for chain in chains]) for name in chains[0].strong},
        "indicators": _indicators(chains),
        "claims": claims.check([_measured(chain) for chain in chains]),
        "samples": _samples(chains[0]),
        "stages": [{"stage": n, "seconds": (r.results or {})["seconds"]} for n, r in chains[0].runs.items()],
    }


def _policy(chain: Chain, trained: Trained) -> dict[str, Any]:
    """One policy's numbers, side by side: at the last step, and at the best checkpoint."""
    done = trained.run.results or {}
    row = {"seed": chain.seed, "ref": trained.ref, "beta": trained.beta, **_answers(trained.evaluation)}
    row |= {name: done["last"].get(name) for name in ("accuracy", "policy_accuracy", "loss")}
    best = done["best"]
    return row | {"best_step": best["step"], "last_step": done["last"]["step"], "best_gold": best["gold"]}


def _answers(run: Run) -> dict[str, Any]:
    found = run.results or {}
    row = {name: found[name]["mean"] for name in ("gold", "length", "missing_eos")}
    row["kl"] = found["kl_k1"]["mean"] if "kl_k1" in found else None
    return row | {"repetition": found["repetition"], "degenerate": found["degenerate"]}


def _curves(policies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds by reference and beta, with t intervals where there are several."""
    keys = dict.fromkeys((row["ref"], row["beta"]) for row in policies)
    return [
        {"ref": ref, "beta": beta, **_over_seeds([p for p in policies if (p["ref"], p["beta"]) == (ref, beta)])}
        for ref, beta in keys
    ]


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"degenerate": sum(bool(row["degenerate"]) for row in rows), "chains": len(rows)}
    for name in NUMBERS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            interval = statistics.t_interval(torch.tensor(values, dtype=torch.float64))
            found |= {f"{name}_lo": interval.lo.item(), f"{name}_hi": interval.hi.item()}
        if values:
            found[name] = sum(values) / len(values)
    return found


def _indicators(chains: list[Chain]) -> list[dict[str, Any]]:
    """How each reference looks at the training pairs, before anything is trained; means over seeds.

    sd: of its margins log pi_ref(chosen) - log pi_ref(rejected), nats: what beta multiplies. correlation: of its
    margins with the policy's own. accuracy: how often it ranks chosen first.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for chain in chains:
        margins = _margins(chain)
        for ref, values in margins.items():
            both = torch.corrcoef(torch.stack([values, margins["self"]]))[0, 1].item()
            accuracy = statistics.wins(values, torch.zeros_like(values)).mean().item()
            found.setdefault(ref, []).append((values.std().item(), both, accuracy))
    names = ("sd", "correlation", "accuracy")
    means = {ref: torch.tensor(rows, dtype=torch.float64).mean(0).tolist() for ref, rows in found.items()}
    return [{"ref": ref, **dict(zip(names, values, strict=True))} for ref, values in means.items()]


def _margins(chain: Chain) -> dict[str, Tensor]:
    """Margins (B,) of the training pairs under every stored reference of a chain."""
    pairs = data.load(chain.folder / "pairs" / "pairs.parquet", "pairs")
    texts = texts_of(pairs)
    margins: dict[str, Tensor] = {}
    for manifest in sorted((chain.folder / "references").glob("*/manifest.json")):
        table = load(manifest.parent, tokens=False)
        kind, scorer = table.recipe["conditioning"]["kind"], Path(table.manifest["scorer"]["name"]).parent.name
        sums = torch.from_numpy(table.sum_logp[table.rows(texts)])
        margins["prior" if kind == "prior" else "self" if scorer == "sft" else scorer] = sums[::2] - sums[1::2]
    return {ref: margins[ref] for ref in dict.fromkeys(one.ref for one in chain.trained) if ref in margins}


def _measured(chain: Chain) -> claims.Measured:
    by_ref: dict[str, list[Trained]] = {}
    for trained in chain.trained:
        by_ref.setdefault(trained.ref, []).append(trained)
    return claims.Measured(
        {ref: [one.beta for one in ones] for ref, ones in by_ref.items()},
        {ref: torch.stack([_by_prompt(one.evaluation, "gold") for one in ones]) for ref, ones in by_ref.items()},
        {ref: torch.stack([_by_prompt(one.evaluation, "length") for one in ones]) for ref, ones in by_ref.items()},
        {
            ref: torch.tensor([(one.run.results or {})["last"]["policy_accuracy"] for one in ones])
            for ref, ones in by_ref.items()
        },
    )


def _by_prompt(run: Run, name: str) -> Tensor:
    """(Q,) means over the answers to each prompt, in the prompts' order."""
    sums: dict[Any, list[float]] = {}
    for row in _rows(run):
        sums.setdefault(row["prompt_id"], []).append(float(row[name]))
    return torch.tensor([sum(values) / len(values) for values in sums.values()], dtype=torch.float64)


def _rows(run: Run) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(run.folder / "answers.parquet").to_pylist()


def _samples(chain: Chain, *, prompts: int = 6) -> list[dict[str, Any]]:
    """The first answer of some policies to the same prompts."""
    shown: dict[str, Run] = {"start": chain.start}
    for trained in chain.trained:
        if trained.ref == "self" or trained.beta == 0.1:
            shown[f"{trained.ref}, β = {trained.beta:g}"] = trained.evaluation
    by_run = {name: [row for row in _rows(run) if row["sample"] == 0][:prompts] for name, run in shown.items()}
    return [
        {
            "prompt": data.plain(by_run["start"][i]["prompt"]),
            "answers": [
                {"policy": name, "response": rows[i]["response"], "gold": rows[i]["gold"], "length": rows[i]["length"]}
                for name, rows in by_run.items()
            ],
        }
        for i in range(len(by_run["start"]))
    ]
