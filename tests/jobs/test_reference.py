"""References from the command line: computed once; bad input refused before work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import launch
import numpy as np
import pytest

from pyrite import cli
from pyrite.core import runs
from pyrite.core.runs import RunError, read_json
from pyrite.data import rows as data
from pyrite.jobs import reference
from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, load


@pytest.fixture
def made(tiny: Path, pairs: Path, tmp_path: Path) -> Path:
    """A run of `reference`."""
    return reference.run(reference.Config(str(tiny), str(pairs), tmp_path / "made")).folder


def test_what_is_made(made: Path, tiny: Path) -> None:
    results, table = read_json(made / "done.json"), load(made / "table")
    assert results["rows"] == len(table) == 160
    assert results["fingerprint"] == table.manifest["fingerprint"]
    assert results["margins"]["sd"] > 0
    assert table.manifest["scorer"]["name"] == str(tiny)
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "done.json", "manifest.json", "table"]


def test_a_done_run_loads_no_model(made: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    config = reference.Config(str(tiny), str(pairs), made)
    assert reference.run(config).results == read_json(made / "done.json")
    with pytest.raises(RunError, match="conditioning: 'prompt' there, 'prior' now"):
        reference.run(replace(config, conditioning="prior"))


def test_refusals_before_work(tiny: Path, pairs: Path, demos: Path, tmp_path: Path) -> None:
    config = reference.Config(str(tiny), str(pairs), tmp_path / "run")
    for change, words in (
        ({"data": str(demos)}, "pairs need prompt, chosen, rejected"),
        ({"model": str(tmp_path / "nowhere")}, "no such folder"),
        ({"max_length": 4, "max_prompt": 4}, "--max-prompt 4: leaves no room"),
        ({"max_prompt": 0}, "--max-prompt 0"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            reference.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_interrupted_and_run_again(tiny: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, write = reference.Config(str(tiny), str(pairs), tmp_path / "run"), runs.write_json

    def stopped(path: Path, value: object) -> None:
        if path.parent.name == "table" and path.name == "manifest.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(runs, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        reference.run(config)
    monkeypatch.setattr(runs, "write_json", write)
    with pytest.raises(BadReference, match=r"^R7: .* is not finished"):
        load(tmp_path / "run" / "table")
    monkeypatch.setattr(Policy, "forward", lambda *_, **__: pytest.fail("a finished part was computed again"))
    assert len(load(reference.run(config).folder / "table")) == 160


def test_the_command_line(tiny: Path, pairs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def pyrite(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["pyrite", "reference", *arguments])
        cli.main()
        return capsys.readouterr().out

    made = ["--model", str(tiny), "--data", str(pairs), "--out", str(tmp_path / "run")]
    plan = json.loads(pyrite(*made, "--dry-run"))
    assert plan["reads"] == {"model": str(tiny), "data": str(pairs)}
    assert '"rows": 160' in pyrite(*made, "--conditioning", "prior")


def test_two_processes_make_the_reference_of_one(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    """Parts are dealt out; more pairs than one part holds."""
    rows = data.load(pairs, "pairs")
    longer = [{side: row[side] + " a" * k for side in ("chosen", "rejected")} for k in range(9) for row in rows]
    data.write([row | sides for row, sides in zip(rows * 9, longer, strict=True)], tmp_path / "many.jsonl")
    shutil.copytree(tiny, tmp_path / "model")

    def command(out: str) -> list[str]:
        files = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "many.jsonl")]
        return ["reference", *files, "--out", str(tmp_path / out)]

    said = launch.launch([command("two")], processes=2)
    assert said.count('"fingerprint"') == 1  # one process prints the results
    config = reference.Config(str(tmp_path / "model"), str(tmp_path / "many.jsonl"), tmp_path / "one")
    one, two = load(reference.run(config).folder / "table"), load(tmp_path / "two" / "table")
    assert len(one.manifest["parts"]) == len(two.manifest["parts"]) == 2
    assert one.manifest["fingerprint"] == two.manifest["fingerprint"]
    assert one.row_id == two.row_id
    np.testing.assert_allclose(one.sum_logp, two.sum_logp, atol=1e-5)
