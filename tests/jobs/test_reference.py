"""References from the command line: computed once, verified rule by rule, imported; bad input refused before work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import launch
import numpy as np
import pyarrow.parquet as pq
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
    """A run of `reference compute`."""
    return reference.run(reference.Compute(str(tiny), str(pairs), tmp_path / "made")).folder


def test_compute_and_verify(made: Path, tiny: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, table = read_json(made / "done.json"), load(made / "table")
    assert results["rows"] == len(table) == 160
    assert results["fingerprint"] == table.manifest["fingerprint"]
    assert results["margins"]["sd"] > 0
    assert table.manifest["scorer"]["name"] == str(tiny)
    checked = reference.run(reference.Verify(made, str(pairs), model=str(tiny), tokens=True))
    assert checked.results is not None
    assert list(checked.results["rules"]) == ["R7", "R5", "R1", "R2", "R4", "R6", "R9"]
    assert checked.results["rules"]["R6"].startswith("32 answers computed again differ by")
    said = capsys.readouterr().err
    assert all(f"{rule} kept" in said for rule in checked.results["rules"])
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "done.json", "manifest.json", "table"]


def test_a_done_run_loads_no_model(made: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    config = reference.Compute(str(tiny), str(pairs), made)
    assert reference.run(config).results == read_json(made / "done.json")
    with pytest.raises(RunError, match="conditioning: 'prompt' there, 'prior' now"):
        reference.run(replace(config, conditioning="prior"))


def test_verify_without_the_scorer(made: Path, pairs: Path, tuned: Path) -> None:
    alone = reference.run(reference.Verify(made / "table", str(pairs))).results
    assert alone is not None
    assert alone["rules"]["R2"] == "not checked; name the policy with --model"
    other = reference.run(reference.Verify(made / "table", str(pairs), model=str(tuned / "model"))).results
    assert other is not None
    assert other["rules"]["R2"] == "the tokenizer is the policy's, and so are the ids"
    assert other["rules"]["R6"].startswith("not checked")


def test_verify_names_the_broken_rule(
    made: Path, tiny: Path, pairs: Path, demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = reference.Verify(made / "table", str(pairs), model=str(tiny))
    with pytest.raises(BadReference, match=r"^R2"):
        reference.run(replace(config, max_length=12))
    said = capsys.readouterr().err
    assert "R7 kept" in said
    assert "R2 broken" in said
    rows = data.load(pairs, "pairs")
    data.write([*rows, {**rows[0], "prompt_id": "new", "prompt": "a cat"}], tmp_path / "more.jsonl")
    with pytest.raises(BadReference, match=r"^R1: .* is not there"):
        reference.run(replace(config, data=str(tmp_path / "more.jsonl")))
    part = made / "table" / "part-00000.parquet"
    whole = pq.read_table(part)
    sums = np.array(whole["sum_logp"]).copy()
    sums[0] -= 1
    pq.write_table(whole.set_column(whole.column_names.index("sum_logp"), "sum_logp", [sums]), part)
    with pytest.raises(BadReference, match=r"^R7: .* was changed"):
        reference.run(config)
    assert "R7 broken" in capsys.readouterr().err


def test_verify_counts_what_training_will_drop(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt_id": "0", "prompt": "a cat", "chosen": "a dog", "rejected": "a bird"},
        {"prompt_id": "1", "prompt": "a cat sat", "chosen": "a " * 80, "rejected": "red"},
    ]
    data.write(rows, tmp_path / "pairs.jsonl")
    made = reference.run(reference.Compute(str(tiny), str(tmp_path / "pairs.jsonl"), tmp_path / "made")).folder
    found = reference.run(reference.Verify(made / "table", str(tmp_path / "pairs.jsonl"), model=str(tiny))).results
    assert found is not None
    assert found["rules"]["R4"] == "to be dropped: 1 pairs: truncation cut one answer only"


def test_import(pairs: Path, tiny: Path, tmp_path: Path) -> None:
    rows = [{**row, "w": -10.0 - i, "l": -20.0} for i, row in enumerate(data.load(pairs, "pairs"))]
    data.write(rows, tmp_path / "given.jsonl")
    config = reference.Import(str(tmp_path / "given.jsonl"), "theirs", tmp_path / "run", chosen="w", rejected="l")
    run = reference.run(config)
    assert run.results is not None
    assert run.results["margins"]["accuracy"] == (10 + 0.5) / 80
    assert reference.run(config).results == run.results
    table = load(run.folder / "table")
    assert table.imported
    found = reference.run(reference.Verify(table.folder, str(pairs), model=str(tiny))).results
    assert found is not None
    assert found["rules"]["R3"] == "another tokenizer, or an unknown one: for losses of sums"
    with pytest.raises(BadReference, match=r"^R3"):
        reference.run(reference.Verify(table.folder, str(pairs), model=str(tiny), tokens=True))


def test_refusals_before_work(tiny: Path, pairs: Path, demos: Path, tmp_path: Path) -> None:
    config = reference.Compute(str(tiny), str(pairs), tmp_path / "run")
    for change, words in (
        ({"data": str(demos)}, "pairs need prompt, chosen, rejected"),
        ({"model": str(tmp_path / "nowhere")}, "no such folder"),
        ({"max_length": 4, "max_prompt": 4}, "--max-prompt 4: leaves no room"),
        ({"max_prompt": 0}, "--max-prompt 0"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            reference.run(replace(config, **change))
        assert "\n" not in str(error.value)
    with pytest.raises(BadReference, match=r"^R1: column 'chosen_logprob' of the answer .*, line 1\) holds None"):
        reference.run(reference.Import(str(pairs), "theirs", tmp_path / "run"))
    with pytest.raises(BadReference, match=r"^R7: .* holds no reference"):
        reference.run(reference.Verify(tmp_path / "nothing", str(pairs)))
    assert not (tmp_path / "run").exists()


def test_interrupted_and_run_again(tiny: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, write = reference.Compute(str(tiny), str(pairs), tmp_path / "run"), runs.write_json

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

    made = ["compute", "--model", str(tiny), "--data", str(pairs), "--out", str(tmp_path / "run")]
    plan = json.loads(pyrite(*made, "--dry-run"))
    assert plan["reads"] == {"model": str(tiny), "data": str(pairs)}
    assert '"rows": 160' in pyrite(*made, "--conditioning", "prior")
    table = str(tmp_path / "run" / "table")
    assert '"R6"' in pyrite("verify", "--table", table, "--data", str(pairs), "--model", str(tiny))
    with pytest.raises(SystemExit) as stop:
        pyrite("verfy")
    assert stop.value.code == 2


def test_two_processes_make_the_reference_of_one(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    """Parts are dealt out; more pairs than one part holds."""
    rows = data.load(pairs, "pairs")
    longer = [{side: row[side] + " a" * k for side in ("chosen", "rejected")} for k in range(9) for row in rows]
    data.write([row | sides for row, sides in zip(rows * 9, longer, strict=True)], tmp_path / "many.jsonl")
    shutil.copytree(tiny, tmp_path / "model")

    def command(out: str) -> list[str]:
        files = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "many.jsonl")]
        return ["reference", "compute", *files, "--out", str(tmp_path / out)]

    said = launch.launch([command("two")], processes=2)
    assert said.count('"fingerprint"') == 1  # one process prints the results
    config = reference.Compute(str(tmp_path / "model"), str(tmp_path / "many.jsonl"), tmp_path / "one")
    one, two = load(reference.run(config).folder / "table"), load(tmp_path / "two" / "table")
    assert len(one.manifest["parts"]) == len(two.manifest["parts"]) == 2
    assert one.manifest["fingerprint"] == two.manifest["fingerprint"]
    assert one.row_id == two.row_id
    np.testing.assert_allclose(one.sum_logp, two.sum_logp, atol=1e-5)
