"""Run folders as users have them: two processes, typed paths, moved files, upgrades, files of their own, full disks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyrite.cli.parse import parse
from pyrite.core import runs
from pyrite.data import rows as data
from pyrite.models.policy import RewardModel
from tests import launch
from tests.walks.command import pyrite

SFT = ("--batch-size", 30, "--epochs", 2, "--lr", 0.01)


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """Four answers to each of six prompts."""
    rows = [
        {
            "prompt_id": str(p),
            "prompt": f"tell {p}",
            "sample": s,
            "response": "a " * (s + 1) + "cat",
            "finished": True,
            "length": s + 2,
            "logp": -1.0,
            "gold": float(s),
        }
        for p in range(6)
        for s in range(4)
    ]
    data.write(rows, tmp_path / "candidates.jsonl")
    return tmp_path / "candidates.jsonl"


@pytest.fixture
def reward_run(tiny: Path, tmp_path: Path) -> Path:
    """A reward run in a folder as sweeps name them."""
    folder = tmp_path / "sweep" / "lr=1e-05,loss=bt(center=0.1)"
    for member in range(2):
        RewardModel.load(tiny, head_seed=member).save(folder / f"member_{member}")
    runs.write_json(folder / "done.json", {"members": 2})
    return folder


def label(candidates: Path, out: object, *options: object) -> tuple[int, str, str]:
    return pyrite("label", "--candidates", candidates, "--gold", "length()", "--out", out, *options)


def refused(done: tuple[int, str, str], *words: object) -> None:
    status, out, err = done
    assert (status, out) == (2, ""), err
    assert err.startswith("pyrite: ")
    assert err.count("\n") == 1
    for word in words:
        assert str(word) in err


# One owner --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def other_process(folder: Path, *, host: str | None = None) -> Iterator[int]:
    """A process that owns the folder until it is killed; its id."""
    code = "import sys; from pathlib import Path; from pyrite.core import runs\n"
    code += f"runs._host = lambda: {host!r}\n" if host else ""
    code += f"mine = lambda: 0; runs.take(Path({str(folder)!r}), mine); print('owned', flush=True); sys.stdin.read()"
    folder.mkdir(exist_ok=True)
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, env=launch.environment(), text=True, stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout and process.stdout.readline() == "owned\n"
            yield process.pid
        finally:
            process.kill()


def test_a_second_process_is_refused_with_the_name_of_the_first(candidates: Path, tmp_path: Path) -> None:
    with other_process(tmp_path / "run") as pid:
        refused(label(candidates, tmp_path / "run"), f"process {pid} on host", "is working there", "--out")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [runs.LOCK]
    assert label(candidates, tmp_path / "run")[0] == 0  # a killed process leaves a lock that nobody has to remove
    assert not (tmp_path / "run" / runs.LOCK).exists()


def test_a_lock_of_another_host_is_taken_over_once_its_heart_stands_still(candidates: Path, tmp_path: Path) -> None:
    with other_process(tmp_path / "run", host="elsewhere") as pid:
        pass
    refused(label(candidates, tmp_path / "run"), f"process {pid} on host elsewhere")
    lock, now = tmp_path / "run" / runs.LOCK, time.time()
    os.utime(lock, (now, now - runs.GONE + 60))
    refused(label(candidates, tmp_path / "run"), "elsewhere")
    os.utime(lock, (now, now - runs.GONE - 60))
    assert label(candidates, tmp_path / "run")[0] == 0


def test_a_lock_file_that_nobody_holds_is_no_lock(candidates: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = {"host": runs._host(), "pid": os.getppid(), "token": "x", "since": "then"}
    (tmp_path / "run" / runs.LOCK).write_text(json.dumps(left))
    assert label(candidates, tmp_path / "run")[0] == 0


def test_a_run_that_another_host_has_taken_over_stops_and_names_it(tmp_path: Path) -> None:
    run = runs.Run(tmp_path / "run", {}, {})
    run.own()
    lock = tmp_path / "run" / runs.LOCK
    mine = lock.read_text()
    lock.write_text("")  # as when a network file system does not answer for a moment
    run.log(step=1)
    theirs = {**json.loads(mine), "token": "theirs", "host": "elsewhere", "pid": 12}
    lock.write_text(json.dumps(theirs))
    with pytest.raises(runs.RunError, match=r"process 12 on host elsewhere .* took over"):
        run.log(step=2)


def test_sweeps_and_recipes_have_one_owner_too(candidates: Path, tmp_path: Path) -> None:
    with other_process(tmp_path / "out") as pid:
        refused(label(candidates, tmp_path / "out", "--seed", 0, 1), f"process {pid}")
        refused(pyrite("recipe", "references", "--out", tmp_path / "out"), f"process {pid}")


def test_reading_needs_no_lock(candidates: Path, tmp_path: Path) -> None:
    assert label(candidates, tmp_path / "run")[0] == 0
    with other_process(tmp_path / "run"):
        assert pyrite("report", tmp_path / "run")[0] == 0
        assert label(candidates, tmp_path / "run")[0] == 0  # it is done: nothing is written


def race(folder: Path, count: int) -> list[str]:
    """What happens to processes that want one folder at the same moment."""
    code = (
        "import sys, time; from pathlib import Path; from pyrite.core import runs\n"
        f"folder = Path({str(folder)!r}); mine = lambda: 0; sys.stdin.readline()\n"
        "try: runs.take(folder, mine); print('owner', flush=True); sys.stdin.readline()\n"
        "except ValueError as error: print(error)"
    )
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    all_of_them = [
        subprocess.Popen(command, env=launch.environment(), text=True, stdin=pipe, stdout=pipe) for _ in range(count)
    ]
    with contextlib.ExitStack() as stack:
        for process in all_of_them:
            stack.enter_context(process)
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in all_of_them if process.stdout]
        for process in all_of_them:
            process.communicate("end\n")
    return said


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "a dead owner's lock"])
def test_of_several_processes_that_want_one_folder_exactly_one_gets_it(tmp_path: Path, left: str) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if left != "nothing":
            gone = {"host": runs._host(), "pid": 2**22 + 1, "token": "x", "since": "then"}
            (folder / runs.LOCK).write_text(json.dumps(gone))
        said = race(folder, 4)
        assert sum(line == "owner" for line in said) == 1, said
        assert sum("is working there" in line for line in said) == 3, said
        assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_processes_of_one_launcher_are_one_owner(tiny: Path, demos: Path, tmp_path: Path) -> None:
    options = list(map(str, ("sft", "--model", tiny, "--data", demos, "--out", tmp_path / "run", *SFT)))
    launch.launch([options, options], processes=2)
    assert (tmp_path / "run" / "done.json").exists()
    assert not (tmp_path / "run" / runs.LOCK).exists()


# Folders that are no run's ----------------------------------------------------------------------------------------


def test_files_of_the_users_own_are_not_overwritten(candidates: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "pairs.parquet").write_text("my own")
    refused(label(candidates, mine), mine, "files that are no run's (pairs.parquet)", "--out")
    refused(label(candidates, mine, "--seed", 0, 1), mine, "no sweep's", "--out")
    refused(label(candidates, mine / "pairs.parquet"), "it is a file")
    refused(label(candidates, mine / "pairs.parquet" / "run"), "is not a writable folder")
    (mine / "pairs.parquet").unlink()
    for name in ("manifest.json", "sweep.json"):
        (mine / name).write_text('{"name": "my own"}')
        refused(label(candidates, mine), mine, "choose another --out")
        refused(label(candidates, mine, "--seed", 0, 1), mine, "choose another --out")
        assert (mine / name).read_text() == '{"name": "my own"}'
        (mine / name).unlink()
    (mine / "config.json").write_text('{"model_type": "llama"}')
    refused(label(candidates, mine), "config.json that is no run's")
    assert sorted(p.name for p in mine.iterdir()) == ["config.json"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(label(candidates, tmp_path / "link"), "is a link to", "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_a_sweep_or_of_another_job_is_no_place_for_a_run(candidates: Path, tmp_path: Path) -> None:
    assert label(candidates, tmp_path / "sweep", "--seed", 0, 1)[0] == 0
    refused(label(candidates, tmp_path / "sweep"), "holds a sweep", "--out")
    assert label(candidates, tmp_path / "sweep", "--seed", 1, 2)[0] == 0  # more runs of a sweep
    refused(label(candidates, tmp_path / "sweep" / "seed=0", "--seed", 4, 5), "no sweep's")
    best = pyrite("best_of_n", "--candidates", candidates, "--proxy", "x", "--out", tmp_path / "sweep" / "seed=0")
    refused(best, "job: 'label' there, 'best_of_n' now")


def test_the_current_folder_is_not_meant(candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("", "."):
        status, _, err = label(candidates, out)
        assert (status, err.count("\n")) == (2, 1)
        assert "--out" in err
    assert pyrite("label", "--candidates", candidates, "--gold", "length()", "--out=")[0] == 2
    assert list(Path().iterdir()) == []
    assert label(candidates, tmp_path / "run")[0] == 0
    monkeypatch.chdir(tmp_path / "run")
    assert label(candidates, ".")[0] == 0  # the run that is here


# Refused, corrected, run again ------------------------------------------------------------------------------------


def test_a_refused_command_leaves_no_folder_that_refuses_the_corrected_one(candidates: Path, tmp_path: Path) -> None:
    (tmp_path / "equal.py").write_text("def score(prompts, responses):\n    return [1.0] * len(prompts)\n")
    out, equal = tmp_path / "run", ("--gold", f"{tmp_path / 'equal.py'}:score()", "--ties", "drop")
    status, _, err = pyrite("label", "--candidates", candidates, "--out", out, *equal)
    assert (status, "no pair could be made" in err) == (2, True)
    assert label(candidates, out)[0] == 0


def test_a_refused_sweep_leaves_no_folder(tmp_path: Path, pairs: Path) -> None:
    command = ("dpo", "--model", tmp_path / "nowhere", "--data", pairs, "--out", tmp_path / "sweep")
    refused_later = pyrite(*command, "--lr", 1e-5, 1e-4)
    assert refused_later[0] == 2, refused_later
    assert not (tmp_path / "sweep").exists()


def test_a_scorer_that_fails_in_its_first_part_may_be_mended(candidates: Path, tmp_path: Path) -> None:
    mine, command = tmp_path / "mine.py", ("label", "--candidates", candidates, "--out", tmp_path / "run")
    mine.write_text("def score(prompts, responses):\n    return [1.0, 2.0] if len(prompts) == 2 else 1 / 0\n")
    refused(pyrite(*command, "--gold", f"{mine}:score()"), "mine.py:2, score(): ZeroDivisionError")
    mine.write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    status, _, err = pyrite(*command, "--gold", f"{mine}:score()")
    assert status == 0, err


def test_a_run_that_failed_before_it_learned_anything_may_be_asked_otherwise(
    tiny: Path, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sft", "--model", tiny, "--data", demos, "--out", tmp_path / "run", "--batch-size", 30)
    with monkeypatch.context() as patch:
        patch.setattr(
            "pyrite.training.loop.Learner.update", lambda *a, **k: (_ for _ in ()).throw(ValueError("out of memory"))
        )
        assert pyrite(*command, "--lr", 1)[0] == 2
    assert (tmp_path / "run" / "config.json").exists()
    assert pyrite(*command, "--lr", 0.01)[0] == 0
    assert runs.read_json(tmp_path / "run" / "config.json")["training"]["lr"] == 0.01
    refused(pyrite(*command, "--lr", 1), "training.lr: 0.01 there, 1.0 now")


# The same run by another name -------------------------------------------------------------------------------------


def test_another_spelling_of_a_path_is_the_same_run(
    tiny: Path, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    (tmp_path / "deep").mkdir()

    def run(model: str, prompts: str, gold: str, out: str) -> tuple[int, str, str]:
        answers = ("--limit", 2, "--max-new-tokens", 2)
        return pyrite("evaluate", "--model", model, "--prompts", prompts, "--gold", gold, "--out", out, *answers)

    assert run("model", "candidates.jsonl", "mine.py:score()", "run")[0] == 0
    done = (tmp_path / "run" / "done.json").stat().st_mtime_ns
    assert run("./model/", "~/candidates.jsonl", "~/mine.py:score()", "~/run")[0] == 0
    assert (
        run(str(tmp_path / "link"), str(candidates), f"{tmp_path}/mine.py:score()", str(tmp_path / "run") + "/")[0] == 0
    )
    monkeypatch.chdir(tmp_path / "deep")
    assert run("../model", "../candidates.jsonl", "../mine.py:score()", "../run")[0] == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "model").rename(tmp_path / "renamed")
    candidates.rename(tmp_path / "other.jsonl")
    assert run("../renamed", "../other.jsonl", "../mine.py:score()", "../moved")[0] == 0
    assert (tmp_path / "moved" / "done.json").stat().st_mtime_ns == done
    assert not (tmp_path / "~").exists()
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [0.0 for r in responses]\n")
    refused(run("../renamed", "../other.jsonl", "../mine.py:score()", "../moved"), "has changed")


def test_a_run_of_an_earlier_version_goes_on(candidates: Path, tmp_path: Path) -> None:
    assert label(candidates, tmp_path / "run")[0] == 0
    made = tmp_path / "run" / "manifest.json"
    manifest = runs.read_json(made)
    del manifest["identity"]["noise_seed"]  # an option that came later
    runs.write_json(made, manifest | {"identity": {**manifest["identity"], "gone": None}})
    done = (tmp_path / "run" / "done.json").stat().st_mtime_ns
    assert label(candidates, tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "done.json").stat().st_mtime_ns == done
    refused(label(candidates, tmp_path / "run", "--noise-seed", 5), "noise_seed: 0 there, 5 now")
    runs.write_json(made, manifest | {"identity": {**manifest["identity"], "gone": 3}})
    refused(label(candidates, tmp_path / "run"), "gone: 3 there")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "done.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\x01"])
def test_a_corrupt_file_of_a_run_is_named(candidates: Path, tmp_path: Path, name: str, content: str) -> None:
    assert label(candidates, tmp_path / "run")[0] == 0
    (tmp_path / "run" / name).write_text(content)
    refused(label(candidates, tmp_path / "run"), name, tmp_path / "run")


def test_a_corrupt_row_of_metrics_is_named(candidates: Path, tmp_path: Path) -> None:
    assert label(candidates, tmp_path / "run")[0] == 0
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    refused(pyrite("report", tmp_path / "run"), tmp_path / "run" / "metrics.jsonl", "line 2")


# What a job reads -------------------------------------------------------------------------------------------------


def reads(job: str, *arguments: object) -> set[str]:
    module = importlib.import_module(f"pyrite.jobs.{job}")
    config = parse(module.Config, [*map(str, arguments), "--out", "unused"], prog=job)
    return set(map(str, runs.reads(config, module.inputs(config)).values()))


def test_whatever_a_spec_string_names_is_read(reward_run: Path, tiny: Path, pairs: Path, candidates: Path) -> None:
    gold = f"reward_model(path='{reward_run}')"
    several = f'weighted_sum(golds=["{gold}", "length()"], weights=[1.0, 0.1])'
    online = ("online", "--prompts", pairs, "--judge")
    judge = "bradley_terry(gold='length()')"
    assert str(reward_run) in reads(*online, judge, "--model", tiny, "--annotator", f"reward(path='{reward_run}')")
    assert str(reward_run) in reads(*online, f'bradley_terry(gold="{gold}")', "--model", tiny)
    assert str(tiny) in reads(*online, judge, "--model", reward_run, "--annotator", f"implicit(path='{tiny}')")
    assert str(reward_run) in reads("label", "--candidates", candidates, "--gold", several)
    ppo = ("ppo", "--model", tiny, "--prompts", pairs, "--reward")
    assert str(reward_run) in reads(*ppo, reward_run)
    assert str(reward_run) in reads(*ppo, f"0.5*{reward_run}", "length()")
    assert str(reward_run) in reads(*ppo, f"0.5*{gold}", "length()")
    assert str(reward_run / "member_0") in reads(*ppo, "length()", "--value", reward_run / "member_0")


def test_a_changed_reward_run_in_a_sweep_is_noticed(
    reward_run: Path, candidates: Path, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    ppo = ("ppo", "--model", tiny, "--prompts", pairs, "--reward", reward_run, "--value", reward_run / "member_0")
    ppo += ("--steps", 1, "--prompts-per-step", 2, "--max-new-tokens", 2, "--out", tmp_path / "ppo")
    best = ("best_of_n", "--candidates", candidates, "--proxy", reward_run, "--out", tmp_path / "best")
    for command in (ppo, best, ppo, best):
        status, _, err = pyrite(*command)
        assert status == 0, err
    runs.write_text(reward_run / "report.html", "a page that was written later")
    for command in (ppo, best):
        assert pyrite(*command)[0] == 0
    RewardModel.load(tiny, head_seed=7).save(reward_run / "member_1")
    for command in (ppo, best):
        refused(pyrite(*command), "has changed", "--out")
