"""What every job computes at toy scale, frozen: a change of the code that should change no number changes none.

Each way is a command on a tiny model of random weights. Its metrics and results are compared with the file of its name
in tests/golden: to the last bit on the machine that recorded them (PYRITE_GOLDEN=exact), to 1e-4 elsewhere, since other
processors round otherwise. PYRITE_GOLDEN=record writes the files anew.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pyrite import cli

HERE = Path(__file__).parent / "golden"
MODE = os.environ.get("PYRITE_GOLDEN", "near")

GOLD = ["--gold", "length()"]
JUDGE = ["--judge", "bradley_terry(gold='length()')"]
EIGHT = ["--batch-size", "8"]
ONE = ["--logging-steps", "1", *EIGHT]
NEW = ["--max-new-tokens", "40"]
MEASURE = ["--eval-limit", "16", "--proxy", "{reward}", *GOLD, *NEW]

WAYS: dict[str, list[str]] = {
    "sft": ["sft", "--model", "{tiny}", "--data", "{demos}", "--lr", "1e-3", *ONE],
    "reward": ["reward", "--model", "{tiny}", "--data", "{pairs}", "--members", "2", "--lr", "1e-3", *ONE],
    "dpo": [
        *("dpo", "--model", "{tiny}", "--data", "{pairs}", "--lr", "1e-3", "--measure-every", "3"),
        *("--eval-prompts", "{demos}", *MEASURE, *ONE),
    ],
    "ipo_lora": [
        *("dpo", "--model", "{tiny}", "--data", "{pairs}", "--loss", "ipo()", "--lora", "lora(r=2)", "--lr", "1e-2"),
        *("--epochs", "1", *ONE),
    ],
    "generate": ["generate", "--model", "{tiny}", "--prompts", "{demos}", "--k", "8", "--limit", "20", *NEW],
    "label": ["label", "--candidates", "{generate}/candidates.parquet", *GOLD],
    "best_of_n": ["best_of_n", "--candidates", "{label}/candidates.parquet", "--proxy", "{reward}"],
    "evaluate": [
        *("evaluate", "--model", "{dpo}/model", "--ref", "{tiny}", "--prompts", "{demos}", "--proxy", "{reward}"),
        *(*GOLD, *NEW),
    ],
    "online": ["online", "--model", "{tiny}", "--prompts", "{demos}", *JUDGE, "--rounds", "2", "--lr", "1e-3"],
    "live_reward": [
        *("online", "--model", "{tiny}", "--prompts", "{demos}", *JUDGE, "--rounds", "2", "--lr", "1e-3"),
        *("--annotator", "reward(path='{reward}')", "--gold-budget", "24", *MEASURE, *EIGHT),
    ],
    "ppo": [
        *("ppo", "--model", "{tiny}", "--prompts", "{demos}", "--reward", "{reward}", "--steps", "3"),
        *("--prompts-per-step", "8", "--measure-every", "1", "--lr", "1e-3", *MEASURE, *EIGHT),
    ],
}
WAYS["online"] += [*MEASURE, *EIGHT]


@pytest.fixture(scope="module")
def world(tiny: Path, demos: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where everything lies; a way adds its own folder, for the ways after it."""
    return {"tiny": tiny, "demos": demos, "pairs": pairs, "runs": tmp_path_factory.mktemp("golden")}


def results(folder: Path) -> list[Any]:
    """Every number that a run wrote: its metrics, its results and the sums of its weights."""
    rows = [json.loads(line) for path in folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
    done = json.loads((folder / "done.json").read_text())
    found = [*rows, {name: value for name, value in done.items() if name != "seconds"}]
    found += [json.loads(path.read_text()) for path in sorted(folder.glob("curves.json"))]
    for path in sorted(folder.rglob("*.parquet")):
        columns = pq.read_table(path).to_pydict()
        found.append({name: columns[name] for name in ("response", "gold", "chosen") if name in columns})
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            weights = load_file(path)
            found.append({name: value.double().sum().item() for name, value in sorted(weights.items())})
    return [numbers(row) for row in found]


def numbers(value: Any) -> Any:
    """Without what differs between two equal runs: times and paths."""
    if isinstance(value, dict):
        known = {name: one for name, one in value.items() if not re.search("second|path|folder", name)}
        return {re.sub(r"\S*/", "", name): numbers(one) for name, one in known.items()}
    if isinstance(value, list):
        return [numbers(one) for one in value]
    return None if isinstance(value, str) and "/" in value else value


def same(got: Any, want: Any) -> bool:
    """Equal, or in MODE near equal up to what another processor rounds."""
    if isinstance(want, dict):
        return isinstance(got, dict) and got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, float) and isinstance(got, int | float) and MODE == "near":
        return math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-5)
    return got == want


@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_those_recorded(way: str, world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = world["runs"] / way
    command = [part.format(**world) for part in WAYS[way]]
    monkeypatch.setattr("sys.argv", ["pyrite", *command, "--out", str(out)])
    cli.main()
    world[way] = out
    got, file = results(out), HERE / f"{way}.json"
    if MODE == "record":
        HERE.mkdir(exist_ok=True)
        file.write_text(json.dumps(got, indent=0, sort_keys=True) + "\n")
    want = json.loads(file.read_text())
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert same(one, other), f"{way}: row {i} is not the recorded one"
