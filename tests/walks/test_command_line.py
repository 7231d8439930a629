"""The command line as users type it: results apart, help, hints, dry runs, replays, signals and full disks."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file

from pyrite import cli
from pyrite.cli import commands
from pyrite.cli import help as usage
from pyrite.cli.parse import parse
from pyrite.core import runs
from pyrite.math.ranges import declared
from pyrite.recipes import study
from pyrite.training.loop import Learner
from tests import launch
from tests.walks.command import pyrite

SFT = ("--batch-size", 20, "--epochs", 2, "--lr", 0.01)


def schemas() -> dict[str, type]:
    """Every job, command and recipe, by what is typed."""
    found: dict[str, type] = {}
    for name in cli.names("jobs"):
        config = importlib.import_module(f"pyrite.jobs.{name}").Config
        commands = {f"{name} {one.__name__.lower()}": one for one in get_args(config)}
        found |= commands or {name: config}
    for name in cli.names("recipes"):
        found[f"recipe {name}"] = study.Config
    return found


SCHEMAS = schemas()


def refused(done: tuple[int, str, str], *words: str) -> None:
    status, out, err = done
    assert (status, out) == (2, ""), err
    assert err.startswith("pyrite: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err


# Results and everything else --------------------------------------------------------------------------------------


def test_results_are_json_whatever_parts_and_processes_print(tiny: Path, demos: Path, tmp_path: Path) -> None:
    loud = "import subprocess\nprint('at import')\ndef score(prompts, responses):\n    print('while scoring')\n"
    loud += "    subprocess.run(['echo', 'from a process'])\n    return [float(len(r)) for r in responses]\n"
    (tmp_path / "loud.py").write_text(loud)
    options = ["evaluate", "--model", tiny, "--prompts", demos, "--gold", f"{tmp_path}/loud.py:score()"]
    options += ["--limit", "3", "--max-new-tokens", "2", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "pyrite", *map(str, options)]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == runs.read_json(tmp_path / "run" / "done.json")
    for words in ("at import", "while scoring", "from a process", "evaluate: done, in"):
        assert words in done.stderr


def test_a_terminal_gets_a_summary_with_the_next_command(
    tiny: Path, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sft", "--model", tiny, "--data", demos, "--out", tmp_path / "run", *SFT)
    monkeypatch.setattr(commands, "on_terminal", lambda: True)
    status, out, _ = pyrite(*command)
    assert status == 0
    assert len(out.splitlines()) < 15
    assert "perplexity" in out
    assert f"pyrite report {tmp_path / 'run'}" in out
    status, out, _ = pyrite(*command, "--json")
    assert json.loads(out) == runs.read_json(tmp_path / "run" / "done.json")


# Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_option_has_text_and_the_example_is_a_command(command: str) -> None:
    known = list(declared(SCHEMAS[command]))
    assert [one.name for one in known if not one.text and one.name != "out"] == []
    status, short, err = pyrite(*command.split(), "--help")
    assert (status, err) == (0, "")
    status, whole, _ = pyrite(*command.split(), "--help-all")
    assert all(f"--{one.name.replace('_', '-')} " in whole for one in known)
    assert all(f"--{one.name.replace('_', '-')} " in short for one in known if one.required)
    for everywhere in ("--config FILE", "--dry-run", "--json", "--debug"):
        assert everywhere in short
    if len(known) > 30:
        assert len(re.findall(r"^  --", short, re.MULTILINE)) < len(known) / 1.2
    (example,) = re.findall(r"^example\n  pyrite (.*)$", short, re.MULTILINE)
    parts = shlex.split(example)
    count = len(command.split())
    assert parts[:count] == command.split()
    parse(SCHEMAS[command], parts[count:], prog="x")


def test_other_and_earlier_names_lead_to_options_that_exist() -> None:
    known = {one.typed for schema in SCHEMAS.values() for one in declared(schema)}
    later = [new for now in usage.OLD_NAMES.values() if now.startswith("--") for new in now.split(" or ")]
    elsewhere = [f"--{name}" for name in usage.ALIASES.values()]
    assert {name.split()[0].rstrip(",") for name in [*later, *elsewhere]} - known == set()


def test_a_job_alone_shows_its_help() -> None:
    for job in ("sft", "ppo", "judge ask"):
        assert pyrite(*job.split()) == pyrite(*job.split(), "--help")


def test_version() -> None:
    status, out, _ = pyrite("--version")
    assert (status, out.split()[0]) == (0, "pyrite")
    assert re.fullmatch(r"\d+\.\d+\.\d+", out.split()[1])


# Messages ---------------------------------------------------------------------------------------------------------

BASE = "--model m --data d --out o"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("sft --lerning-rate 1", "--lerning-rate; did you mean --lr?"),
        ("sft --learning_rate 1", "did you mean --lr?"),
        ("dpo --per_device_train_batch_size 1", "did you mean --batch-size?"),
        ("dpo --num-train-epochs 1", "did you mean --epochs?"),
        ("dpo --warmup_steps 5", "did you mean --lr-scheduler-type 'cosine(warmup_steps=10)'?"),
        ("dpo --lora_r 8", "did you mean --lora 'lora(r=16)'?"),
        ("dpo --clip 1", "--clip is now --max-grad-norm"),
        ("dpo --recompute", "--recompute is now --gradient-checkpointing"),
        ("dpo --dropout 0", "--dropout is gone: only sft learns with it"),
        ("online --save-every 5", "unknown option --save-every; other jobs have --save-steps in its place"),
        ("best_of_n --objective 'mean()'", "unknown option --objective; did you mean 'objectives'?"),
        ("sft --lora-rank 8", "--lora-rank is now --lora, as in --lora 'lora(r=16)'"),
        ("sft --warmup 8", "--warmup is now --lr-scheduler-type, as in"),
        ("dpo --output_dir o", "did you mean --out?"),
        ("dpo --model_name_or_path m", "did you mean --model?"),
        ("dpo --dataset_name d", "did you mean --data?"),
        ("online --max_completion_length 3", "did you mean --max-new-tokens?"),
        ("sft --model m", "--data is missing"),
        (f"sft {BASE} --epochs many", "--epochs many: is no whole number"),
        (f"sft {BASE} --lr x", "--lr x: is no number"),
        (
            f"sft {BASE} --lr-scheduler-type cosin",
            "--lr-scheduler-type cosin: unknown name 'cosin': did you mean",
        ),
        (f"sft {BASE} --lora", "--lora: a value is missing"),
        (f"sft {BASE} --optim adamw(betas=0.9)", "--optim adamw(betas=0.9): adamw: option betas=0.9"),
        (f"sft {BASE} --lr -1", "--lr -1"),
        (f"sft extra {BASE}", "extra: no such option"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_typed(typed: str, words: str) -> None:
    done = pyrite(*typed.split())
    refused(done, words)
    assert not re.search(r"---{3}|Error parsing|full helptext|Value error", done[2])


def test_a_typo_in_a_path_is_answered_by_a_path(
    tiny: Path, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward").mkdir()
    ppo = ("ppo", "--model", tiny, "--prompts", demos, "--out", "run", "--reward")
    refused(pyrite(*ppo, "rewrad"), "--reward rewrad", "did you mean 'reward'?")


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("[")
    status, _, err = pyrite("sft", "--config", tmp_path / "bad.yaml", "--debug")
    assert status == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("pyrite: ")
    assert "Traceback" not in pyrite("sft", "--config", tmp_path / "bad.yaml")[2]


# Dry runs and replays ---------------------------------------------------------------------------------------------


def test_a_dry_run_finds_what_a_run_would_refuse(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    good = {"--model": tiny, "--data": pairs, "--loss": "dpo(beta=0.1)", "--out": tmp_path / "run", "--lr": 0.1}
    bad = {"--model": "./none", "--data": "none.jsonl", "--loss": "dpoo()", "--out": tmp_path / "mine", "--lr": -1}
    before = sorted(tmp_path.rglob("*"))

    def dry(options: dict, *more: object) -> tuple[int, str, str]:
        return pyrite("dpo", *(part for pair in options.items() for part in pair), *more, "--dry-run")

    status, out, err = dry(good)
    assert status == 0, err
    assert json.loads(out)["reads"] == {"model": str(tiny), "data": str(pairs)}
    for name, value in bad.items():
        refused(dry({**good, name: value}), str(value).removeprefix("./").partition("(")[0])
    refused(dry(bad))
    status, out, err = dry({**good, "--out": tmp_path / "sweep"}, "--seed", 0, 1)
    assert (status, len(json.loads(out))) == (0, 2)
    refused(dry({**good, "--model": "./none"}, "--seed", 0, 1), "none")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_replayed_from_its_folder(tiny: Path, demos: Path, tmp_path: Path) -> None:
    command = ("sft", "--model", tiny, "--data", demos, "--out", tmp_path / "run", *SFT)
    assert pyrite(*command)[0] == 0
    config = tmp_path / "run" / "config.json"
    status, _, err = pyrite("sft", "--config", config, "--out", tmp_path / "again")
    assert status == 0, err
    assert runs.read_json(tmp_path / "again" / "config.json") == runs.read_json(config)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert all(one[name].equal(other[name]) for name in one)
    refused(pyrite("dpo", "--config", config, "--out", tmp_path / "x"), "`pyrite sft`", "not of `pyrite dpo`")
    status, out, err = pyrite("sft", "--config", config, "--out", tmp_path / "sweep", "--seed", 0, 1, "--dry-run")
    assert (status, len(json.loads(out))) == (0, 2), err


# Signals and disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_checkpoint(
    number: int, expected: int, tiny: Path, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sft", "--model", tiny, "--data", demos, *SFT, "--out")
    assert pyrite(*command, tmp_path / "whole")[0] == 0
    update, seen = Learner.update, []

    def killed(*given: object, **options: object) -> object:
        seen.append(len(seen))
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return update(*given, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", killed)
        status, out, err = pyrite(*command, tmp_path / "cut")
    assert (status, out) == (expected, "")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-3.safetensors"]
    assert "sft has 3 of 6 steps; run the same command again to go on" in err.splitlines()[-1]
    status, _, err = pyrite(*command, tmp_path / "cut")
    assert status == 0
    assert "going on from step 3 of 6" in err
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_scheduler_ends_real_processes(processes: int, tiny: Path, demos: Path, tmp_path: Path) -> None:
    options = ["sft", "--model", tiny, "--data", demos, "--batch-size", 2, "--epochs", 2000, "--out", tmp_path / "run"]
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    starter += ["--master_port", str(launch.free_port())]
    command = [
        *(starter if processes > 1 else [sys.executable]),
        "-m",
        "pyrite",
        *map(str, options),
        "--logging-steps",
        "1",
    ]
    with subprocess.Popen(command, env=launch.environment(), stderr=subprocess.PIPE, text=True) as process:
        begin = time.monotonic()
        while not runs.read_metrics(tmp_path / "run") and time.monotonic() - begin < 90:
            time.sleep(0.5)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert err.count("stopped by SIGTERM; sft has") == 1, err
    assert processes > 1 or process.returncode == 143
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))) == 1


def test_a_full_disk_is_one_line_and_loses_nothing(tiny: Path, demos: Path, tmp_path: Path) -> None:
    command = ("sft", "--model", tiny, "--data", demos, *SFT, "--save-steps", 2, "--out", tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for bytes_free in (20_000, 150_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, hard))
        try:
            status, out, err = pyrite(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (status, out) == (2, "")
        assert "the disk is full" in err.splitlines()[-1]
        assert "run the same command again to go on" in err.splitlines()[-1]
        assert "Traceback" not in err
    status, out, err = pyrite(*command)
    assert status == 0, err
    assert json.loads(out)["train_rows"] > 0
