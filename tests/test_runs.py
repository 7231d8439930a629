"""Run folders: returned at once when done, refused when another, whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pyrite.core import runs
from pyrite.core.runs import Run, RunError, read_metrics


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True)
class Config:
    out: Path
    data: str
    k: int = 2
    training: Inner = Inner()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = tmp_path / "data.jsonl"
    data.write_text("one\n")
    return Config(tmp_path / "run", str(data))


def start(config: Config) -> Run:
    return runs.start("job", config, inputs={"data": config.data})


def test_a_done_run_is_returned_at_once(config: Config) -> None:
    run = start(config)
    assert not run.done
    assert not config.out.exists()
    run.open()
    (config.out / "parts").mkdir()
    run.finish(score=1.5)
    assert not (config.out / "parts").exists()
    again = start(config)
    assert again.done
    assert again.results == run.results
    assert again.results is not None
    assert again.results["score"] == 1.5
    assert again.results["seconds"] >= 0
    moved = replace(config, out=config.out.rename(config.out.with_name("moved")))
    assert start(moved).done


def test_config_and_manifest(config: Config) -> None:
    start(config).open()
    assert runs.read_json(config.out / "config.json") == {
        "job": "job",
        "data": config.data,
        "k": 2,
        "training": {"lr": 0.1, "betas": [0.9, 0.98]},
    }
    manifest = runs.read_json(config.out / "manifest.json")
    assert manifest["inputs"] == {"data": runs.fingerprint(config.data)}
    assert {"torch", "transformers"} <= manifest["versions"].keys()
    assert manifest["hardware"]["processes"] == 1


def test_another_config_is_refused_with_the_difference(config: Config) -> None:
    run = start(config)
    run.open()
    run.log(step=1, loss=0.5)
    with pytest.raises(RunError) as error:
        start(replace(config, k=3, training=Inner(lr=0.2)))
    message = str(error.value)
    assert "k: 2 there, 3 now" in message
    assert "training.lr: 0.1 there, 0.2 now" in message
    assert "betas" not in message
    assert "\n" not in message
    with pytest.raises(RunError, match="job: 'job' there, 'other' now"):
        runs.start("other", config, inputs={"data": config.data})


def test_a_changed_input_is_refused(config: Config) -> None:
    run = start(config)
    run.open()
    run.log(step=1, loss=0.5)
    Path(config.data).write_text("two\n")
    with pytest.raises(RunError, match="the data file or model has changed"):
        start(config)


def test_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = runs.fingerprint(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert runs.fingerprint(tmp_path / "b") == before
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert runs.fingerprint(tmp_path / "b") != before
    assert runs.fingerprint("org/model") == "name:org/model"


def test_a_place_that_cannot_be_written_is_refused(config: Config, tmp_path: Path) -> None:
    for out in (Path(config.data), Path(config.data) / "below"):
        with pytest.raises(RunError, match="cannot write there") as error:
            start(replace(config, out=out))
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunError, match="cannot write there"):
        start(replace(config, out=tmp_path / "locked" / "run"))


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.write_text(tmp_path / "x", "old")

    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        runs.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_json_that_would_not_be_read_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()
    runs.write_json(tmp_path / "x.json", {"path": Path("a/b"), "pair": (1, 2), "inner": Inner().betas})
    assert runs.read_json(tmp_path / "x.json") == {"path": "a/b", "pair": [1, 2], "inner": [0.9, 0.98]}


def test_a_line_cut_by_a_kill_is_dropped_and_overwritten(config: Config) -> None:
    run = start(config)
    run.open()
    run.log(step=1, part="a", loss=0.5)
    run.log(step=2, part="a", loss=0.4)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "pa')
    assert [row["step"] for row in read_metrics(config.out)] == [1, 2]
    run.rewind(2, part="a")
    run.log(step=3, part="a", loss=0.3)
    assert [row["step"] for row in read_metrics(config.out)] == [1, 2, 3]


def test_rewind_forgets_later_steps_of_its_part_only(config: Config) -> None:
    run = start(config)
    run.open()
    run.rewind(0, part="a")
    assert read_metrics(config.out) == []
    for part in ("a", "b"):
        for step in (10, 20, 30):
            run.log(step=step, part=part)
    run.log(other=1)
    run.rewind(10, part="b")
    assert [(row.get("part"), row.get("step")) for row in read_metrics(config.out)] == [
        *(("a", step) for step in (10, 20, 30)),
        ("b", 10),
        (None, None),
    ]


def test_pauses_add_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    run = start(config)
    run = Run(run.folder, run.config, run.inputs, started=now[0])
    run.open()
    now[0] += 5
    run.pause()
    again = Run(run.folder, run.config, run.inputs, started=1000.0)
    del run  # and its lock with it
    now[0] = 1002.0
    again.pause()
    now[0] = 1003.0
    assert again.finish().results == {"seconds": 8.0}
    assert sorted(path.name for path in config.out.iterdir()) == ["config.json", "done.json", "manifest.json"]


def test_parts_are_never_done_twice(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def work(begin: int, end: int) -> dict[str, list]:
        if len(seen) == 2 and begin == 4:
            raise KeyboardInterrupt
        seen.append((begin, end))
        return {"x": [i * i for i in range(begin, end)], "name": [str(i) for i in range(begin, end)]}

    with pytest.raises(KeyboardInterrupt):
        runs.in_parts(tmp_path / "parts", 7, work, size=2)
    assert seen == [(0, 2), (2, 4)]
    seen.append((-1, -1))
    table = runs.in_parts(tmp_path / "parts", 7, work, size=2)
    assert seen == [(0, 2), (2, 4), (-1, -1), (4, 6), (6, 7)]
    assert table["x"].to_pylist() == [i * i for i in range(7)]
    assert runs.in_parts(tmp_path / "parts", 7, work, size=2).equals(table)
    assert len(seen) == 5


def test_a_part_cut_by_a_kill_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".000000000.parquet").write_bytes(b"PAR1 and then nothing")
    table = runs.in_parts(tmp_path / "parts", 2, lambda a, b: {"x": list(range(a, b))}, size=2)
    assert table["x"].to_pylist() == [0, 1]


def test_log_writes_one_line_a_row(config: Config) -> None:
    run = start(config)
    run.open()
    run.log(step=1, loss=0.25)
    assert json.loads((config.out / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.25}


def test_a_run_of_an_earlier_version_is_named_as_one(config: Config) -> None:
    start(config).open()
    made = config.out / "manifest.json"
    manifest = runs.read_json(made)
    del manifest["identity"]
    runs.write_json(made, manifest)
    with pytest.raises(RunError, match=r"a run of an earlier version, with other options; choose another --out"):
        start(config)


@dataclass(frozen=True)
class Plan:
    """A Config whose settings have no default, as a recipe's."""

    out: Path
    data: str
    settings: Inner


@pytest.mark.parametrize(("schema", "within"), [(Config, "training"), (Plan, "settings")])
def test_an_option_of_a_newer_version_takes_its_default(config: Config, schema: type, within: str) -> None:
    """A run that was made before the option existed is the same run."""
    given = config if schema is Config else Plan(config.out, config.data, Inner())
    run = start(given)  # type: ignore[arg-type]
    run.open()
    run.finish(score=1.0)
    for name in ("config.json", "manifest.json"):
        kept = runs.read_json(config.out / name)
        if name == "manifest.json":
            del kept["identity"][f"{within}.lr"]
        else:
            del kept[within]["lr"]
        runs.write_json(config.out / name, kept)
    assert start(given).done  # type: ignore[arg-type]
    other = replace(given, **{within: Inner(lr=0.2)})
    with pytest.raises(RunError, match=rf"{within}.lr: 0.1 there, 0.2 now"):
        start(other)  # type: ignore[arg-type]
