"""What recipes share: a run for its settings, seeds in a row, results with their origin, verdicts in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pyrite.core.runs import RunError, read_json
from pyrite.recipes import study


@dataclass(frozen=True)
class Config:
    out: Path
    scale: str = "toy"
    seeds: int = 2
    first_seed: int = 3


@dataclass(frozen=True)
class Settings:
    rounds: int = 4


def test_a_run_belongs_to_its_settings(tmp_path: Path) -> None:
    config = Config(tmp_path / "run")
    run = study.start("mine", config, Settings())
    run.open()
    run.finish(chains=2)
    assert study.start("mine", config, Settings()).done
    with pytest.raises(RunError, match="rounds"):
        study.start("mine", config, Settings(rounds=5))


def test_every_seed_has_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study.chains("mine", tmp_path, 3, 2, lambda folder, seed: (folder.name, seed))
    assert found == [("seed_3", 3), ("seed_4", 4)]
    assert "mine: chain with seed 4" in capsys.readouterr().err


def test_results_say_where_they_come_from(tmp_path: Path) -> None:
    config = Config(tmp_path / "run")
    run = study.start("mine", config, Settings())
    run.open()
    found = study.results("mine", run, config, Settings(), seconds=1.25, found={"claims": []})
    written = read_json(run.folder / "results.json")
    assert written["seeds"] == found["seeds"] == [3, 4]
    assert (written["recipe"], written["scale"], written["seconds"]) == ("mine", "toy", 1.2)
    assert written["config"] == {"rounds": 4}
    assert written["manifest"] == read_json(run.folder / "manifest.json")


def test_verdicts_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"holds": True, "measured": 1.0, "interval": [0.5, 1.5], "statement": "one"},
        {"holds": False, "measured": -1.0, "interval": [-1.5, -0.5], "statement": "two"},
        {"holds": None, "measured": None, "interval": None, "statement": "three"},
    ]
    study.tell(rows)
    lines = capsys.readouterr().err.splitlines()
    assert "holds" in lines[0] and "+1.000 [+0.500, +1.500]  one" in lines[0]
    assert "does not hold" in lines[1]
    assert "undecided" in lines[2] and "–  three" in lines[2]
