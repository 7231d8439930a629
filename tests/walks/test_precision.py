"""Every training job in bfloat16: it starts where it must, goes two steps, and resumes exactly.

Both sides of every difference (policy and reference, draw and forward) are read in one precision, so that rounding
cancels. At the start margins, the KL of what is learned from, and ratios less 1 are 0 within EXACT, though bfloat16
itself rounds these log-probabilities by about .01 nats a token. A loss of the start is its own value within EXACT.
Measurements of answers are made in float32 on both sides: their KL is 0 within MEASURED, nats an answer.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyrite.core.runs import read_json, read_metrics
from pyrite.models.policy import Policy, RewardModel
from pyrite.training import loop
from walks.command import pyrite

EXACT = 1e-6
MEASURED = 1e-5
HALF = "--precision bfloat16 --lr-scheduler-type cosine(warmup_steps=0) --batch-size 40 --lr 1e-3".split()
LOG = {job: ("--logging-steps", "1") for job in ("sft", "reward", "dpo")}
MEASURE = "--gold length() --max-new-tokens 8 --held-out .2 --measure-every 1".split()
JUDGE = ("--judge", "bradley_terry(gold='length()')", "--loss", "dpo()")

DPO = {loss: ("--loss", loss) for loss in ("dpo()", "ipo()", "simpo()", "tdpo()", "wpo()", "beta_dpo()", "orpo()")}
DPO |= {
    "bco": ("--loss", "bco(delta=None)"),
    "ema": ("--ref", "ema(rate=0.5)"),
    "ref none": ("--ref", "none"),
    "ref model": ("--ref", "{tiny}"),
    "sum": ("--ref", "0.5*self + 0.5*{tiny}"),
    "lora recomputed": ("--lora", "lora(r=4)", "--gradient-checkpointing"),
    "measured": (
        *("--eval-prompts", "{demos}", "--gold", "length()", "--max-new-tokens", "8"),
        *("--proxy", "{reward}"),
    ),
}
ONLINE = {
    "plain": (),
    "previous": ("--ref", "previous"),
    "mixed": ("--sampler", "mixed()"),
    "lora": ("--sampler", "hybrid()", "--lora", "lora(r=4)", "--gradient-checkpointing"),
    "live": (
        "--annotator",
        "reward(path='{reward}',precision='bfloat16')",
        "--gold-budget",
        "8",
        "--proxy",
        "{reward}",
    ),
    "implicit": ("--annotator", "implicit(precision='bfloat16')", "--gold-budget", "8"),
    "self_reward": ("--annotator", "self_reward()", "--gold-budget", "8"),
}
PPO = {
    "shared": (),
    "detached": ("--value", "detached"),
    "own critic": ("--value", "{tiny}"),
    "reward critic": ("--value", "{reward}"),
    "lora critic": ("--value", "model(path='{tiny}',lora='lora(r=4)')"),
    "lora": ("--lora", "lora(r=4)", "--gradient-checkpointing"),
    "rloo": ("--advantage", "rloo()"),
    "group": ("--advantage", "grpo()", "--gradient-checkpointing"),
    "reinforce": ("--advantage", "reinforce()"),
    "reward": ("--reward", "{reward}", "--proxy", "{reward}"),
}


@pytest.fixture(scope="module")
def places(tiny: Path, demos: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files and folders that options name."""
    folder = tmp_path_factory.mktemp("reward") / "reward"
    RewardModel.load(tiny, head_seed=0).save(folder)
    return {"tiny": tiny, "demos": demos, "pairs": pairs, "reward": folder}


def command(job: str, places: dict[str, Path], *options: str) -> list[str]:
    """Two steps of a job in bfloat16."""
    common = {
        "sft": ("--model", "{tiny}", "--data", "{demos}"),
        "reward": ("--model", "{tiny}", "--data", "{pairs}", "--epochs", "1"),
        "dpo": ("--model", "{tiny}", "--data", "{pairs}"),
        "online": (
            *("--model", "{tiny}", "--prompts", "{demos}", "--rounds", "2", "--prompts-per-round", "8"),
            *(*JUDGE, *MEASURE),
        ),
        "ppo": (
            *("--model", "{tiny}", "--prompts", "{demos}", "--steps", "2", "--prompts-per-step", "8", "--k", "2"),
            *("--epochs", "1", *MEASURE, *(() if "--reward" in options else ("--reward", "length()"))),
        ),
    }[job]
    return [job, *(part.format(**places) for part in (*HALF, *LOG.get(job, ()), *common, *options))]


def run(job: str, places: dict[str, Path], out: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of metrics of a run that must succeed."""
    status, _, said = pyrite(*command(job, places, *options), "--out", out)
    assert status == 0, said
    rows = read_metrics(out)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    return rows


def changed(before: Path, after: Path) -> bool:
    """Whether any weight of a model did."""
    old, new = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in (before, after)
    )
    return any(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("options", [(), ("--lora", "lora(r=4)", "--gradient-checkpointing")], ids=["whole", "lora"])
def test_sft(places: dict[str, Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    rows = run("sft", places, tmp_path / "run", *options)
    exact = run("sft", places, tmp_path / "exact", *options, "--precision", "float32")
    assert len(rows) == len(exact) == 2
    for half, single in zip(rows, exact, strict=True):
        assert half["loss"] != single["loss"]
        assert half["loss"] == pytest.approx(single["loss"], abs=0.02)  # nats a token


@pytest.mark.parametrize(
    "options", [(), ("--pooling", "mean", "--gradient-checkpointing"), ("--lora", "lora(r=4)")], ids=str
)
def test_reward(places: dict[str, Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    rows = run("reward", places, tmp_path / "run", *options)
    assert len(rows) == 2
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # a new head: nearly no difference yet


@pytest.mark.parametrize("name", DPO)
def test_dpo(places: dict[str, Path], tmp_path: Path, name: str) -> None:
    rows = run("dpo", places, tmp_path / "run", *DPO[name])
    start, first, last = rows[0], rows[1], rows[-1]
    assert (start["part"], first["part"], last["part"]) == ("held_out", "dpo", "held_out")
    own = {"ipo()": 25.0, "bco": 2 * math.log(2), "simpo()": None, "wpo()": None, "orpo()": None, "ref none": None}
    if name not in ("simpo()", "orpo()", "ref none"):
        assert abs(start["margin"]) <= EXACT
        assert abs(first["margin"]) <= EXACT
    if (value := own.get(name, math.log(2))) is not None:
        assert start["loss"] == pytest.approx(value, abs=EXACT)
        assert first["loss"] == pytest.approx(value, abs=EXACT)
    if "kl_k1" in start:
        assert abs(start["kl_k1"]) <= MEASURED
    assert last["loss"] != start["loss"]


@pytest.mark.parametrize("name", ONLINE)
def test_online(places: dict[str, Path], tmp_path: Path, name: str) -> None:
    start, first, second = run("online", places, tmp_path / "run", *ONLINE[name])
    assert abs(start["kl_k1"]) <= MEASURED
    assert abs(first["margin"]) <= EXACT
    assert first["loss"] == pytest.approx(math.log(2), abs=EXACT)
    if name == "implicit":
        assert first["reward_loss"] == pytest.approx(math.log(2), abs=0.02)  # two updates, of which the first is ln 2
    if name == "previous":
        assert abs(second["margin"]) <= EXACT
    else:
        assert abs(second["margin"]) > EXACT


@pytest.mark.parametrize("name", PPO)
def test_ppo(places: dict[str, Path], tmp_path: Path, name: str) -> None:
    start, first, second = run("ppo", places, tmp_path / "run", *PPO[name])
    assert abs(start["kl_k1"]) <= MEASURED
    assert abs(first["rollout_kl"]) <= EXACT
    for row in (first, second):  # one update a step: it begins at the policy that drew
        assert row["ratio"] == pytest.approx(1, abs=EXACT)
        assert abs(row["step_kl"]) <= EXACT
        assert row["clip_fraction"] == 0
    assert abs(second["rollout_kl"]) > EXACT
    assert second["grad_norm"] > 0


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("sft", ("--save-steps", "1")),
        ("reward", ("--save-steps", "1")),
        ("dpo", ("--save-steps", "1", "--lora", "lora(r=4)", "--gradient-checkpointing")),
        ("online", ()),
        ("ppo", ("--value", "model(path='{tiny}',lora='lora(r=4)')")),
    ],
)
def test_a_stopped_run_goes_on_exactly(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, options: tuple[str, ...]
) -> None:
    whole = run(job, places, tmp_path / "whole" / "run", *options)
    real = loop.save

    def stopped(checkpoints: Path, *given: Any) -> None:
        real(checkpoints, *given)
        if checkpoints.name != "value":  # the critic's, which comes first
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save", stopped)
        status, _, _ = pyrite(*command(job, places, *options), "--out", tmp_path / "cut" / "run")
        assert status == 130
    assert run(job, places, tmp_path / "cut" / "run", *options) == whole
    name = "member_0" if job == "reward" else "model"
    (path,) = (tmp_path / "whole" / "run" / name).glob("*.safetensors")
    ours, theirs = load_file(path), load_file(tmp_path / "cut" / "run" / name / path.name)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_model_stored_in_half_is_trained_in_float32(places: dict[str, Path], tmp_path: Path, stored: str) -> None:
    """Weights are read as float32, so that small steps are not lost in rounding, and saved so."""
    shutil.copytree(places["tiny"], tmp_path / "half")
    shutil.copytree(places["tiny"], tmp_path / "same")
    model = AutoModelForCausalLM.from_pretrained(places["tiny"], dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "same")
    rows = {}
    for name in ("half", "same"):
        assert Policy.load(tmp_path / name).model.dtype == torch.float32
        here = {**places, "tiny": tmp_path / name}
        rows[name] = run("dpo", here, tmp_path / f"run {name}" / "dpo", "--lr", "1e-6")
        assert changed(tmp_path / name, tmp_path / f"run {name}" / "dpo" / "model")
    assert rows["half"] == rows["same"]
    assert read_json(tmp_path / "run half" / "dpo" / "model" / "config.json")["dtype"] == "float32"


def test_a_reference_of_the_policy_in_another_precision_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    made = ("reference", "--model", places["tiny"], "--data", places["pairs"])
    for precision in ("float32", "bfloat16"):
        assert pyrite(*made, "--out", tmp_path / precision, "--precision", precision)[0] == 0
    given = ("--ref", str(tmp_path / "bfloat16" / "table"))
    assert abs(run("dpo", places, tmp_path / "fits", *given)[0]["margin"]) <= EXACT
    other = ("--ref", str(tmp_path / "float32" / "table"), "--out", str(tmp_path / "not"))
    status, _, said = pyrite(*command("dpo", places, *other))
    assert status == 2
    assert "in float32" in said
    assert "--precision bfloat16" in said
    assert not (tmp_path / "not").exists()


def test_a_scorer_of_ones_own_is_not_rounded(tiny: Path, demos: Path, tmp_path: Path) -> None:
    """257 is no bfloat16 number."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef score(prompts, responses):\n"
        "    return (torch.full((len(prompts), 1), 257.0) @ torch.ones(1, 1)).squeeze(1)\n"
    )
    command = (
        "ppo",
        "--model",
        tiny,
        "--prompts",
        demos,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--reward-scaling",
        "fixed(clip=1000)",
    )
    scored = ("--reward", f"{tmp_path}/mine.py:score()", "--prompts-per-step", 4, "--max-new-tokens", 4)
    status, _, said = pyrite(*command, *scored, *HALF)
    assert status == 0, said
    assert [row["score"] for row in read_metrics(tmp_path / "run") if "score" in row] == [257.0]
