"""Every job that loads a model refuses a broken, foreign or incomplete one: one line, status 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyrite import cli, data
from pyrite.loading import Lora
from pyrite.models import Policy, RewardModel

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def pyrite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit status and standard error of a command."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["pyrite", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        return status, capsys.readouterr().err

    return run


def refused(pyrite: Command, out: Path, *arguments: object) -> str:
    """The one line with which a command is refused that has written nothing."""
    status, said = pyrite(*arguments, "--out", out)
    assert status == 2, said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert not out.exists()
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """Sound models of every kind, and the smallest data that every job takes."""
    top = tmp_path_factory.mktemp("world")
    made = {"policy": tiny, "reward": top / "reward", "adapters": top / "adapters", "judge": top / "judge"}
    RewardModel.load(tiny, head_seed=0).save(made["reward"])
    RewardModel.load(tiny, head_seed=0, lora=Lora(lora_rank=2)).save(made["judge"])
    Policy.load(tiny, lora=Lora(lora_rank=2)).save(made["adapters"])
    words = "the cat sat on a red mat then ran".split()
    asked = [{"prompt_id": str(i), "prompt": f"tell me {words[i]}"} for i in range(8)]
    rows: dict[str, list[dict[str, Any]]] = {
        "prompts": asked,
        "demos": [{**row, "response": "a big dog"} for row in asked],
        "pairs": [{**row, "chosen": "a big dog", "rejected": "the bird"} for row in asked],
        "candidates": [
            {**row, "response": text, "sample": k, "finished": True, "length": 2, "logp": -5.0, "gold": float(k)}
            for row in asked
            for k, text in enumerate(("a dog", "the small cat", "on the mat"))
        ],
    }
    for name, some in rows.items():
        made[name] = top / f"{name}.jsonl"
        data.write(some, made[name])
    return made


def policy_jobs(world: dict[str, Path], model: Path) -> dict[str, list[object]]:
    """Commands that read a model as a policy, a reference or a start of training."""
    prompts, pairs, demos = world["prompts"], world["pairs"], world["demos"]
    draws = ["--max-new-tokens", 4]
    return {
        "sft": ["sft", "--model", model, "--data", demos],
        "generate": ["generate", "--model", model, "--prompts", prompts, "--k", 2, *draws],
        "dpo": ["dpo", "--model", model, "--data", pairs],
        "dpo --ref": ["dpo", "--model", world["policy"], "--data", pairs, "--ref", model],
        "online": [
            "online",
            "--model",
            model,
            "--prompts",
            prompts,
            "--judge",
            "bradley_terry(gold='length()')",
            "--rounds",
            1,
            "--prompts-per-round",
            2,
            *draws,
        ],
        "ppo": ["ppo", "--model", model, "--prompts", prompts, "--reward", "length()", "--steps", 1, *draws],
        "evaluate": ["evaluate", "--model", model, "--prompts", prompts, *draws],
        "evaluate --ref": ["evaluate", "--model", world["policy"], "--ref", model, "--prompts", prompts, *draws],
        "reference": ["reference", "compute", "--model", model, "--data", pairs],
        "label": [
            *("label", "--no-pairs", "--candidates", world["candidates"]),
            *("--gold", f"distillation(strong={str(world['policy'])!r}, weak={str(model)!r})"),
        ],
        "soup": ["soup", "--ingredients", model, model, "--mode", "full"],
    }


def reward_jobs(world: dict[str, Path], model: Path) -> dict[str, list[object]]:
    """Commands that read a model as a trained reward model."""
    policy, prompts, candidates = world["policy"], world["prompts"], world["candidates"]
    draws = ["--max-new-tokens", 4]
    return {
        "ppo --reward": ["ppo", "--model", policy, "--prompts", prompts, "--reward", model, "--steps", 1, *draws],
        "best_of_n": ["best_of_n", "--candidates", candidates, "--rewards", model],
        "evaluate --rewards": ["evaluate", "--model", policy, "--prompts", prompts, "--rewards", model, *draws],
        "label": ["label", "--candidates", candidates, "--no-pairs", "--gold", f"reward_model(path={str(model)!r})"],
        "online --silver": [
            *(
                "online",
                "--model",
                policy,
                "--prompts",
                prompts,
                "--judge",
                "bradley_terry(gold='length()')",
                "--rounds",
                1,
                "--prompts-per-round",
                2,
                *draws,
            ),
            *("--silver", f"reward(path={str(model)!r})"),
        ],
    }


def test_a_sound_model_passes_everywhere(world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    """What the commands below refuse, they refuse for the model alone."""
    for kind in ("policy", "adapters"):
        for name, command in policy_jobs(world, world[kind]).items():
            if (kind, name) != ("adapters", "soup"):
                status, said = pyrite(*command, "--out", tmp_path / f"{kind} {name}")
                assert (status, name) == (0, name), said
    for kind in ("reward", "judge"):
        for name, command in reward_jobs(world, world[kind]).items():
            status, said = pyrite(*command, "--out", tmp_path / f"{kind} {name}")
            assert (status, name) == (0, name), said
