"""Policy optimization: it starts at the reference, follows its reward, prices KL, resumes exactly."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import pytest
import torch

from pyrite.evaluation import Evaluation
from pyrite.jobs import ppo
from pyrite.models import Lora, Policy, RewardModel
from pyrite.rollouts import Rollouts
from pyrite.runs import read_json, read_metrics
from pyrite.train import Training, TrainingError
from pyrite.values import HEAD, ValueModel
from pyrite.watch import Stopping

TRAINING = Training(lr=3e-3, epochs=2, batch_size=8, warmup=0)


@pytest.fixture
def config(tiny: Path, demos: Path, tmp_path: Path) -> ppo.Config:
    return ppo.Config(
        str(tiny),
        str(demos),
        ("length()",),
        tmp_path / "run",
        held_out=0.2,
        steps=3,
        prompts_per_step=12,
        k=2,
        measure_every=2,
        evaluation=Evaluation(gold="length()", max_new_tokens=8),
        training=TRAINING,
    )


def results(config: ppo.Config) -> dict[str, Any]:
    return read_json(ppo.run(config).folder / "done.json")


@pytest.mark.parametrize("method", ["gae", "rloo", "group", "reinforce"])
def test_it_follows_its_reward(config: ppo.Config, method: Any) -> None:
    roomy = replace(config.evaluation, max_new_tokens=16)
    found = results(replace(config, method=method, steps=18, k=4, beta=0.0, evaluation=roomy, measure_every=6))
    assert found["last"]["gold"] > found["start"]["gold"] + 3 * found["start"]["gold_se"]
    assert found["last"]["kl_k1"] > 0.1
    assert found["answers"] == 18 * 12 * 4
    assert (config.out / "model" / "model.safetensors").exists()


def test_the_first_step_is_at_the_reference(config: ppo.Config) -> None:
    ppo.run(replace(config, training=replace(TRAINING, epochs=1, batch_size=99)))
    first = read_metrics(config.out)[1]
    assert first["ratio"] == pytest.approx(1, abs=1e-4)
    assert first["clip_fraction"] == 0
    assert first["step_kl"] == pytest.approx(0, abs=1e-6)
    assert first["rollout_kl"] == pytest.approx(0, abs=1e-4)
    assert {"rollout_kl_se", "rollout_kl_k3", "entropy", "cut", "beta", "explained_variance"} <= first.keys()


def test_a_policy_that_is_not_its_reference_is_refused(config: ppo.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ppo.collect

    def other(*given: Any, **options: Any) -> Rollouts:
        made = real(*given, **options)
        return replace(made, ref=replace(made.ref, tokens=made.ref.tokens + 0.1))  # type: ignore[operator]

    monkeypatch.setattr(ppo, "collect", other)
    with pytest.raises(TrainingError, match=r"under the reference is 0\.1"):
        ppo.run(config)


def test_a_price_on_kl_holds_the_policy_back(config: ppo.Config) -> None:
    ends = []
    for beta in (0.0, 2.0):
        found = results(replace(config, steps=10, k=4, beta=beta, out=config.out.with_name(f"beta{beta}")))
        ends.append(found["last"]["kl_k1"])
    assert ends[1] < 0.5 * ends[0]


def test_beta_follows_its_target(config: ppo.Config) -> None:
    far = replace(config, steps=8, beta=0.01, kl_control="target", kl_target=0.01, measure_every=8)
    ppo.run(far)
    betas = [row["beta"] for row in read_metrics(far.out)[1:]]
    assert betas[-1] > betas[0]
    assert all(b / a in (0.5, 1.0, 2.0) for a, b in itertools.pairwise(betas))


@pytest.mark.parametrize("value", ["shared", "detached", "model", "reward"])
def test_every_critic_learns_the_returns(config: ppo.Config, tiny: Path, tmp_path: Path, value: str) -> None:
    RewardModel.load(tiny, head_seed=0).save(tmp_path / "reward")
    (tmp_path / "three.py").write_text("import torch\ndef score(p, r):\n    return torch.full((len(r),), 3.0)\n")
    named = {"model": str(tiny), "reward": str(tmp_path / "reward")}.get(value, value)
    own = value in ("model", "reward")
    config = replace(config, reward=(f"{tmp_path}/three.py:score",), value=named, value_lr=3e-3 if own else None)
    ppo.run(replace(config, value_weight=0.5, value_clip=None, steps=12, whiten=False, beta=0.0))
    rows = read_metrics(config.out)[1:]
    name = "critic_value_loss" if own else "value_loss"
    assert rows[-1][name] < 0.5 * rows[0][name]
    assert ("critic_value_loss" in rows[0]) == own
    if own:
        ValueModel.load(config.out / "value")
    else:
        assert (config.out / "model" / HEAD).exists()
    Policy.load(config.out / "model")


def test_an_ensemble_and_a_scorer_together(config: ppo.Config, tiny: Path, tmp_path: Path) -> None:
    for member in range(2):
        RewardModel.load(tiny, head_seed=member).save(tmp_path / "rewards" / f"member_{member}")
    (tmp_path / "rewards" / "done.json").write_text("{}")
    folder = str(tmp_path / "rewards")
    ppo.run(replace(config, reward=(folder, "0.1*length()"), objective="uwo(weight=0.5)"))
    row = read_metrics(config.out)[1]
    assert {f"{folder} mean", f"{folder} variance", f"{folder} member 1", "length() mean"} <= row.keys()
    assert row["score"] == pytest.approx(row[f"{folder} mean"] + 0.1 * row["length() mean"], abs=1e-4)


def test_adapters_alone_are_trained(config: ppo.Config) -> None:
    found = results(replace(config, lora=Lora(lora_rank=4)))
    assert found["start"]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert (config.out / "model" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [{}, {"value": "own", "normalize": True}, {"method": "reinforce", "kl_control": "adaptive", "kl_target": 1.0}],
)
def test_a_cut_run_goes_on_exactly(
    config: ppo.Config, tiny: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    change = {name: str(tiny) if value == "own" else value for name, value in change.items()}
    config = replace(config, steps=5, kl_horizon=100.0, **change)
    whole = ppo.run(replace(config, out=config.out.with_name("whole"))).folder
    real, calls = ppo.Journal.log, []

    def log(self: ppo.Journal, number: int, *rest: Any, **options: Any) -> None:
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, number, *rest, **options)

    monkeypatch.setattr(ppo.Journal, "log", log)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(config)
    ppo.run(config)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert read_metrics(config.out) == read_metrics(whole)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (config.out, whole))
    assert ours == theirs


def test_inner_passes_stop_where_the_policy_has_moved_enough(config: ppo.Config) -> None:
    eager = replace(config, training=replace(TRAINING, lr=3e-2, epochs=8), stop_kl=0.01)
    ppo.run(eager)
    updates = [row["updates"] for row in read_metrics(eager.out)[1:]]
    assert all(n < 8 * 2 for n in updates)


@pytest.mark.parametrize(
    ("golds", "last", "best"), [([0, 1, 3, 1, 1, 9], 4, 2), ([3, 1, 1, 9], 2, 0), ([0, 1, 2, 3], 6, 6)]
)
def test_it_stops_where_the_proxy_has_parted_from_gold(
    config: ppo.Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    golds: list[float],
    last: int,
    best: int,
) -> None:
    """Measurements as given; the policies, checkpoints and what is kept are real."""
    told = iter(enumerate([*golds, *range(10, 20)]))

    def measure(_: ppo.Journal) -> dict[str, float]:
        number, gold = next(told)
        return {"gold": float(gold), "gold_se": 0.1, "proxy": float(number), "kl_k1": float(number)}

    monkeypatch.setattr(ppo.Journal, "measure", measure)
    found = results(replace(config, steps=6, measure_every=1, stopping=Stopping(stop_when_parted=True)))
    assert found["last"]["step"] == last
    assert read_json(config.out / "best.json")["step"] == best
    assert ("the proxy has parted from gold at KL" in capsys.readouterr().out) == (last < 6)
    kept, ended = (Policy.load(config.out / name).state_dict() for name in ("best", "model"))
    assert all(torch.equal(kept[name], ended[name]) for name in kept) == (best == last)


def test_refusals_before_work(config: ppo.Config) -> None:
    for change, words in (
        ({"method": "rloo", "k": 1}, "give --k 2"),
        ({"method": "rloo", "value": "detached"}, "has no critic"),
        ({"value_lr": 1e-3}, "learns with the policy"),
        ({"steps": 0}, "at least 1"),
        ({"reward": ()}, "at least one"),
        ({"reward": ("lenght()",)}, "did you mean length"),
        ({"kl_target": 3.0}, "fixed, target"),
        ({"objective": "mea()", "reward": (config.model,)}, "mea"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            ppo.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_weights_of_rewards() -> None:
    assert ppo._weighed("0.5*runs/b") == (0.5, "runs/b")
    assert ppo._weighed("-1e-1 * length()") == (-0.1, "length()")
    assert ppo._weighed("length()") == (1.0, "length()")
    assert torch.tensor(ppo._weighed("2*x:y(z=3*4)")[0]) == 2


def _command(config: ppo.Config, out: Path, **more: str) -> list[str]:
    named = {"--model": config.model, "--prompts": config.prompts, "--reward": "length()", "--out": str(out)}
    options = {"--steps": "4", "--prompts-per-step": "6", "--k": "2", "--max-new-tokens": "8", "--gold": "length()"}
    last = {"--lr": "3e-3", "--batch-size": "5", "--epochs": "2", "--warmup": "0", "--measure-every": "1", **more}
    return ["ppo", *(part for option in (named | options | last).items() for part in option)]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["shared", "own"])
def test_two_processes_equal_one(config: ppo.Config, tmp_path: Path, value: str) -> None:
    more = {"--value": config.model if value == "own" else value}
    for name, processes in (("one", 1), ("two", 2)):
        launch.launch([_command(config, tmp_path / name, **more)], processes=processes)
    one, two = (Policy.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.slow
def test_a_killed_run_ends_where_another_does(config: ppo.Config, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch.launch([_command(config, whole, **{"--steps": "12"})], processes=1)
    process = launch.start(_command(config, cut, **{"--steps": "12"}))
    while not list((cut / "checkpoints").glob("step-3.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (cut / "done.json").exists()
    launch.launch([_command(config, cut, **{"--steps": "12"})], processes=1)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (cut, whole))
    assert ours == theirs
