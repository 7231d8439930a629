"""Labels bought before the rounds: on the start's own answers, through a ledger, to the exact number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pyrite.core import runs, specs
from pyrite.data import rows as data
from pyrite.feedback import judges
from pyrite.feedback.ledger import Account, Budget, Ledger, Pace
from pyrite.feedback.pairing import label

HELD_OUT = 100  # couples to measure reward models on; not charged


@dataclass(frozen=True)
class Offline:
    """Files of pairs, and the labels that were paid for them (ties among them)."""

    pairs: Path
    held_out: Path
    labels: int


def offline(folder: Path, answers: Path, judge: str, n: int, *, seed: int) -> Offline:
    """n labels on the first couples of a generate run's candidates, two a prompt; ties are paid and make no pair."""
    made = Offline(folder / "pairs.parquet", folder / "held_out.parquet", n)
    if (folder / "done.json").exists():
        return made
    couples = _couples(answers)
    if len(couples) < n + 2:
        raise ValueError(f"{answers}: {len(couples)} couples of different answers; {n} labels need 2 more than that")
    verdict = specs.part(judge, judges)
    with Ledger(folder / "ledger.db") as ledger:
        account = Account(ledger, "offline", judge, "verdict", Budget(labels=n), Pace(batch=64))
        data.write(_labelled(couples[:n], partial(account.ask, verdict), seed), made.pairs)
    data.write(_labelled(couples[n : n + HELD_OUT], verdict, seed), made.held_out)
    runs.write_json(folder / "done.json", {"labels": n})
    return made


def _couples(answers: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Two different finished answers to a prompt, in the prompts' order."""
    rows = data.load(str(answers / "candidates.parquet"), "candidates")
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    couples = [(some[0], some[1]) for some in by_prompt.values() if len(some) > 1]
    return [(a, b) for a, b in couples if a["response"] != b["response"] and a["finished"] and b["finished"]]


def _labelled(couples: list[tuple[dict[str, Any], dict[str, Any]]], judge: judges.Judge, seed: int) -> list[dict]:
    both = [row for couple in couples for row in couple]
    groups = [[2 * i, 2 * i + 1] for i in range(len(couples))]
    prompts, answers = [row["prompt"] for row in both], [row["response"] for row in both]
    made = label(judge, prompts, answers, groups, pairing="consecutive", labels="hard", seed=seed)
    return [
        {
            **{k: both[pair.chosen][k] for k in ("prompt_id", "prompt")},
            "chosen": answers[pair.chosen],
            "rejected": answers[pair.rejected],
        }
        for pair in made.pairs
    ]
