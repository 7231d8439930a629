"""Several values for one option: the combinations, their folders, and what is no sweep."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyrite.cli import parse, sweeps
from pyrite.core import runs
from pyrite.math.ranges import declared
from pyrite.training.loop import Training


@dataclass(frozen=True)
class Config:
    data: str
    out: Path
    n: tuple[int, ...] = (1, 2)
    held_out: float | str = 0.1
    pairs: bool = True
    training: Training = field(default=Training())
    seed: int = 0


def axes(*arguments: str) -> dict[str, list[str]]:
    return sweeps.axes(declared(Config), parse.read(Config, ["--data", "d", "--out", "o", *arguments]))


def split(*arguments: str) -> dict[str, Config]:
    """The config of every combination, by its folder."""
    given = parse.read(Config, ["--data", "d", "--out", "o", *arguments])
    points = sweeps.points(given, sweeps.axes(declared(Config), given))
    return {folder: parse.make(Config, options, prog="x") for folder, options in points.items()}


def test_one_value_each_is_no_sweep() -> None:
    arguments = ["--n", "1", "2", "3", "--no-pairs", "--seed", "1"]
    assert axes(*arguments) == {}
    assert split(*arguments) == {"": Config("d", Path("o"), n=(1, 2, 3), pairs=False, seed=1)}


def test_combinations_keep_the_other_options_and_name_their_folders() -> None:
    points = split("--seed", "0", "1", "--lr", "1e-5", "2e-5", "--n", "4", "5", "--no-pairs")
    assert list(points) == ["seed=0,lr=1e-5", "seed=0,lr=2e-5", "seed=1,lr=1e-5", "seed=1,lr=2e-5"]
    assert points["seed=1,lr=2e-5"] == Config("d", Path("o"), n=(4, 5), pairs=False, training=Training(lr=2e-5), seed=1)


def test_values_with_signs_make_plain_folder_names() -> None:
    folders = list(split("--held-out", "some/pairs file.jsonl", "0.2"))
    assert folders == ["held_out=some_pairs_file.jsonl", "held_out=0.2"]


def test_negative_numbers_are_values() -> None:
    assert axes("--seed", "-1", "-2") == {"seed": ["-1", "-2"]}


def test_the_last_mention_of_an_option_wins() -> None:
    assert split("--seed", "0", "1", "--seed", "5") == {"": Config("d", Path("o"), seed=5)}
    assert list(split("--seed", "5", "--seed", "0", "1")) == ["seed=0", "seed=1"]


def test_repeated_values_run_once() -> None:
    assert list(split("--seed", "0", "1", "0")) == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--out", "a", "b"], "--out takes one folder"), (["--held-out", "a/b", "a b"], "same folder name")],
)
def test_sweeps_that_cannot_be(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split(*arguments)


def test_a_sweep_runs_every_combination_and_keeps_their_results(tmp_path: Path) -> None:
    seen = []

    def job(config: Config) -> runs.Run:
        run = runs.start("x", config, inputs={})
        run.open()
        seen.append((config.seed, len(json.loads((tmp_path / "sweep.json").read_text())) if seen else 0))
        return run.finish(twice=2 * config.seed)

    configs = {f"seed={seed}": Config("d", tmp_path / f"seed={seed}", seed=seed) for seed in (3, 4)}
    table = sweeps.run(configs, job, tmp_path)
    assert [(name, row["twice"]) for name, row in table.items()] == [("seed=3", 6), ("seed=4", 8)]
    assert seen == [(3, 0), (4, 1)]  # the table is up to date after every run
    assert runs.read_json(tmp_path / "sweep.json") == table
