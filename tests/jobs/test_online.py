"""Online preference optimization: rounds, their pairs, budgets, references, exact resumption."""

from __future__ import annotations

import json
import math
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import pyarrow.parquet as pq
import pytest
import torch

from pyrite.core.runs import read_json, read_metrics
from pyrite.feedback.ledger import Ledger
from pyrite.jobs import online
from pyrite.models.policy import Policy
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training

TRAINING = Training(lr=3e-3, epochs=1, batch_size=8, lr_scheduler_type="cosine(warmup_steps=0)")
SAMPLERS = ["reference()", "on_policy()", "hybrid()", "mixed(kappa=0.5)", "mixed(on_policy=0.3)"]


@pytest.fixture
def config(tiny: Path, demos: Path, tmp_path: Path) -> online.Config:
    return online.Config(
        str(tiny),
        str(demos),
        "bradley_terry(gold='length()')",
        tmp_path / "run",
        held_out=0.2,
        rounds=3,
        prompts_per_round=16,
        evaluation=Evaluation(gold="length()", max_new_tokens=8),
        training=TRAINING,
    )


def results(config: online.Config) -> dict:
    return read_json(online.run(config).folder / "done.json")


def rows(config: online.Config, number: int) -> list[dict]:
    return pq.read_table(config.out / "rounds" / f"{number:05d}.parquet").to_pylist()


def test_it_learns_what_the_judge_likes(config: online.Config) -> None:
    roomy = replace(config.evaluation, max_new_tokens=24)
    found = results(replace(config, rounds=8, k=4, loss="soft_dpo(beta=0.05)", evaluation=roomy))
    assert found["last"]["gold"] > found["start"]["gold"] + 3 * found["start"]["gold_se"]
    assert found["last"]["win_rate"] > 0.6
    assert found["last"]["agreement"] == 1.0  # the judge is the gold
    assert found["last"]["kl_k1"] > found["start"]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert found["answers"] == 8 * 16 * 4
    assert (config.out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_method_has_the_same_budget_and_prompts(config: online.Config, sampler: str) -> None:
    found = results(replace(config, sampler=sampler, rounds=2))
    assert found["answers"] == 2 * 16 * 2
    assert found["labels"] <= 2 * 16  # equal texts are not asked about
    for number in (1, 2):
        made = rows(config, number)
        assert all(row["strength"] > 0 for row in made)
        assert all(len(r["chosen"].split()) > len(r["rejected"].split()) for r in made)
    metrics = read_metrics(config.out)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert all({"gold", "kl_k1", "length"} <= row.keys() for row in metrics)


def test_the_reference_stays_or_moves(config: online.Config) -> None:
    stays = results(replace(config, rounds=3))
    moves = results(replace(config, rounds=3, ref="previous", out=config.out.with_name("moves")))
    first = [read_metrics(folder)[1]["loss"] for folder in (config.out, config.out.with_name("moves"))]
    assert first[0] == first[1]  # in the first round they are the same
    assert stays["last"]["loss"] != moves["last"]["loss"]
    start = read_metrics(config.out.with_name("moves"))
    assert start[-1]["kl_k1"] == moves["last"]["kl_k1"]  # KL is from the start in both


@pytest.mark.parametrize("ref", ["start", "previous"])
def test_bfloat16_rounds_begin_at_ln_2_and_are_measured_in_float32(
    config: online.Config, monkeypatch: pytest.MonkeyPatch, ref: Any
) -> None:
    """Soft labels or not, a policy that is its reference has loss ln 2; one step later, with ref=start, it has not."""
    real, drawn = online.Players.draw, []

    def draw(self: online.Players, *args: Any, **options: Any) -> Any:
        drawn.append(self.precision)
        return real(self, *args, **options)

    monkeypatch.setattr(online.Players, "draw", draw)
    training = replace(TRAINING, lr=3e-2, batch_size=16, precision="bfloat16")
    found = results(replace(config, training=training, ref=ref, loss="dpo(beta=1.0)", rounds=2))
    assert drawn and set(drawn) == {"bfloat16"}
    first, second = (abs(row["loss"] - math.log(2)) for row in read_metrics(config.out)[1:])
    assert first < 1e-2
    assert (second < 1e-2) == (ref == "previous")
    assert found["start"]["kl_k1"] == pytest.approx(0, abs=1e-5)


def test_adapters_alone_are_trained_and_switched_off_for_the_reference(config: online.Config) -> None:
    found = results(replace(config, lora="lora(r=4)", sampler="mixed()", rounds=2))
    assert found["start"]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert (config.out / "model" / "adapter_model.safetensors").exists()
    assert math.isfinite(found["last"]["kl_k1"])


@pytest.mark.parametrize("change", [{}, {"reset_optimizer": False, "loss": "bco(delta=None)"}, {"ref": "previous"}])
def test_a_cut_run_goes_on_exactly(config: online.Config, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    config = replace(config, rounds=5, measure_every=2, sampler="mixed(on_policy=0.5)", **change)
    whole = online.run(replace(config, out=config.out.with_name("whole"))).folder
    real, calls = online.Journal.log, []

    def log(self: online.Journal, number: int, *rest: Any, **options: Any) -> None:
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, number, *rest, **options)

    monkeypatch.setattr(online.Journal, "log", log)
    with pytest.raises(KeyboardInterrupt):
        online.run(config)
    online.run(config)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert read_metrics(config.out) == read_metrics(whole)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (config.out, whole))
    assert ours == theirs


def test_strictly_on_policy(config: online.Config) -> None:
    found = results(replace(config, rounds=6, prompts_per_round=4, reset_optimizer=False, measure_every=3))
    steps = [row["step"] for row in read_metrics(config.out)]
    assert steps == list(range(7))
    assert [row["step"] for row in read_metrics(config.out) if "gold" in row] == [0, 3, 6]
    assert found["answers"] == 6 * 4 * 2


def test_a_round_of_ties_is_skipped_and_counted(
    config: online.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat.py").write_text(
        "import torch\ndef score(prompts, responses):\n    return torch.zeros(len(responses))\n"
    )
    found = results(replace(config, judge=f"bradley_terry(gold='{tmp_path}/flat.py:score()')", rounds=2))
    assert found["last"]["ties"] == 16
    assert found["last"]["pairs"] == 0
    assert "round 1 gave no pair (16 ties" in capsys.readouterr().err
    start, last = (Policy.load(path).state_dict() for path in (config.model, config.out / "model"))
    assert all(torch.equal(start[name], last[name]) for name in start)


def test_refusals_before_work(config: online.Config, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("import torch\ndef score(p, r):\n    return torch.zeros(len(r) + 1)\n")
    for change, words in (
        ({"sampler": "on_polcy()"}, "did you mean on_policy"),
        ({"sampler": "mix_r()"}, "needs a finite set"),
        ({"loss": "tdpo()"}, "whole distribution"),
        ({"judge": "bradly_terry()"}, "did you mean bradley_terry"),
        ({"k": 3}, "give an even number"),
        ({"rounds": 0}, "give at least 1"),
        ({"held_out": 0.0}, "0 to measure on"),
        ({"temperature": -1.0}, "temperature"),
        ({"evaluation": Evaluation(gold="length()", max_new_tokens=64)}, "reads 64 tokens at most"),
        ({"evaluation": Evaluation(gold=f"{tmp_path}/short.py:score()", max_new_tokens=8)}, "returns 3 values for 2"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            online.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_metrics_are_one_row_a_round(config: online.Config) -> None:
    results(config)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[2])["part"] == "online"


@pytest.fixture
def live(config: online.Config, tiny: Path) -> online.Config:
    """A reward model that starts without knowledge and learns from 12 labels."""
    return replace(
        config,
        judge="bradley_terry(gold='length()', hard=True)",
        annotator=f"reward(path={str(tiny)!r}, cold=True, lr=0.003)",
        gold_budget=12,
    )


def purchases(config: online.Config) -> list[dict]:
    return list(Ledger(config.out / "ledger.db", create=False).rows())


def test_a_live_reward_spends_its_budget_and_learns(live: online.Config) -> None:
    found = results(live)
    assert found["labels"] == len(purchases(live)) == 12
    metrics = read_metrics(live.out)
    assert [row["labels"] for row in metrics] == [0, 4, 8, 12]
    assert all(row["gold_pairs"] > 0 and row["silver_pairs"] > 0 and "reward_loss" in row for row in metrics[1:])
    sources = [row["source"] for number in (1, 2, 3) for row in rows(live, number)]
    assert sources.count("gold") <= 12 < len(sources)
    assert all(row["source"] == live.judge and row["kind"] == "verdict" for row in purchases(live))


@pytest.mark.parametrize("silver", ["implicit(lr=0.001)", "self_reward()"])
@pytest.mark.parametrize("schedule", ["even(window=2)", "never()"])
def test_every_discriminator_and_schedule(live: online.Config, silver: str, schedule: str) -> None:
    annotator = f"{silver[:-1]}{', ' if '=' in silver else ''}schedule={schedule!r})"
    found = results(replace(live, annotator=annotator, rounds=2))
    assert found["labels"] == {"even(window=2)": 12, "never()": 0}[schedule]


def test_a_budget_of_all_pairs_is_gold_alone(live: online.Config) -> None:
    """The same pairs in the same order, so the same policy; and without labels the reward model alone decides."""
    alone = replace(live, annotator=None, gold_budget=None, out=live.out.with_name("alone"))
    whole = replace(live, gold_budget=10_000, out=live.out.with_name("whole"))
    nothing = replace(live, gold_budget=0, out=live.out.with_name("nothing"))
    models = {}
    for one in (alone, whole, nothing):
        results(one)
        models[one.out.name] = (one.out / "model" / "model.safetensors").read_bytes()
    assert models["alone"] == models["whole"] != models["nothing"]
    assert {row["source"] for row in rows(nothing, 1)} == {"silver"}


def test_the_seed_decides_everything(live: online.Config) -> None:
    runs = {
        name: replace(live, out=live.out.with_name(name), seed=seed) for name, seed in {"a": 1, "b": 1, "c": 2}.items()
    }
    models = {}
    for name, one in runs.items():
        results(one)
        models[name] = (one.out / "model" / "model.safetensors").read_bytes()
    assert models["a"] == models["b"] != models["c"]


def test_gold_alone_stops_when_its_labels_are_spent(live: online.Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(replace(live, annotator=None, gold_budget=20, rounds=9))
    assert found["labels"] == 20
    assert found["last"]["step"] == 2
    assert "gold" in found["last"]
    assert "the budget is spent after round 2, with 20 labels" in capsys.readouterr().err


@pytest.mark.parametrize("silver", ["reward", "implicit(lr=0.001)"])
def test_a_cut_live_run_goes_on_exactly(live: online.Config, monkeypatch: pytest.MonkeyPatch, silver: str) -> None:
    silver = str(live.annotator) if silver == "reward" else silver
    annotator = f"{silver[:-1]}, schedule='even(window=3, replay=2.0)')"
    live = replace(live, rounds=4, measure_every=2, annotator=annotator)
    whole = online.run(replace(live, out=live.out.with_name("whole"))).folder
    real, calls = online.Journal.log, []

    def log(self: online.Journal, number: int, *rest: Any, **options: Any) -> None:
        calls.append(number)
        if calls == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        real(self, number, *rest, **options)

    monkeypatch.setattr(online.Journal, "log", log)
    with pytest.raises(KeyboardInterrupt):
        online.run(live)
    online.run(live)
    assert calls == [0, 1, 2, 3, 2, 3]
    assert read_metrics(live.out) == read_metrics(whole)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (live.out, whole))
    assert ours == theirs
    assert len(purchases(live)) == 12
    assert sum(row["attempts"] for row in purchases(live)) == 12  # what was paid before the stop was not bought again


COUNTED = """
import time
import torch
def verdict():
    def judge(prompts, a, b):
        with open({calls!r}, "a") as file:
            file.write("".join(f"{{p}}|{{x}}|{{y}}\\n" for p, x, y in zip(prompts, a, b)))
        time.sleep(0.002)
        return torch.tensor([float(len(x.split()) > len(y.split())) for x, y in zip(a, b)])
    return judge
"""


def _killed(config: online.Config, folder: Path, *, kills: int, seed: int) -> tuple[int, list[dict]]:
    """Run in a process of its own, killed at random places; calls of the gold function, and the ledger's rows."""
    calls = folder / "calls.txt"
    (folder / "counted.py").write_text(COUNTED.format(calls=str(calls)))
    config = replace(config, judge=f"{folder}/counted.py:verdict()")
    code = "import pickle, sys; from pyrite.jobs import online; online.run(pickle.load(open(sys.argv[1], 'rb')))"
    (folder / "config.pickle").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", code, str(folder / "config.pickle")]
    calls.touch()
    stops = random.Random(seed)
    done = 0
    while done < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen, wait = calls.stat().st_size, stops.random() * 0.2
        while process.poll() is None and calls.stat().st_size == seen and not (config.out / "done.json").exists():
            time.sleep(0.005)
        time.sleep(wait)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    return done, purchases(config)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_and_never_paid_twice(live: online.Config, tmp_path: Path, kills: int) -> None:
    rounds = 3 * kills
    budget = 5 * rounds
    live = replace(live, rounds=rounds, prompts_per_round=12, gold_budget=budget)
    folders = [tmp_path / name for name in ("killed", "whole")]
    for folder in folders:
        folder.mkdir()
    done, bought = _killed(replace(live, out=folders[0] / "run"), folders[0], kills=kills, seed=1)
    _, wanted = _killed(replace(live, out=folders[1] / "run"), folders[1], kills=0, seed=1)
    assert done == kills
    calls = (folders[0] / "calls.txt").read_text().splitlines()
    repeated = sum(row["lost"] for row in bought)
    assert len(bought) == len(wanted) == budget
    # a call is written down before it is made: one that was killed in between was recorded and not made
    assert budget <= len(calls) <= sum(row["attempts"] for row in bought) == budget + repeated
    assert repeated <= done  # at most the call in flight
    models = [(folder / "run" / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert models[0] == models[1]


@pytest.mark.slow
def test_two_processes_equal_one(live: online.Config, tmp_path: Path) -> None:
    """The reward model too; the judge is asked once, by one of them."""

    def command(out: Path) -> list[str]:
        named = {
            "--model": live.model,
            "--prompts": live.prompts,
            "--judge": live.judge,
            "--annotator": str(live.annotator),
        }
        options = {"--gold-budget": "8", "--rounds": "2", "--prompts-per-round": "12", "--max-new-tokens": "8"}
        last = {
            "--gold": "length()",
            "--lr": "3e-3",
            "--batch-size": "5",
            "--lr-scheduler-type": "cosine(warmup_steps=0)",
            "--out": str(out),
        }
        return ["online", *(part for option in (named | options | last).items() for part in option)]

    launch.launch([command(tmp_path / "one")], processes=1)
    launch.launch([command(tmp_path / "two")], processes=2)
    one, two = (Policy.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    for name in ("one", "two"):
        bought = purchases(replace(live, out=tmp_path / name))
        assert len(bought) == sum(row["attempts"] for row in bought) == 8


def test_labels_and_measurements_share_the_money(config: online.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """In one ledger; the budget is for labels. Gold is asked at measurements alone, so no agreement by round."""
    paid = replace(
        config,
        gold_budget=12,
        gold_limits="limits(every=2, prompts=3, cost=1.0, max_cost=19.0)",
        rounds=3,
        prompts_per_round=4,
    )
    online.run(paid)
    rows = read_metrics(paid.out)
    assert [row["step"] for row in rows if "gold" in row] in ([0, 2], [0, 2, 3])
    assert rows[0]["gold_labels"] <= 3 * paid.evaluation.eval_k and rows[-1]["gold_labels"] <= 7
    assert not any("agreement" in row for row in rows)
    with Ledger(paid.out / "ledger.db") as ledger:
        kinds = {row["kind"]: row["answered"] for row in ledger.summary()}
    assert sum(kinds.values()) <= 19 and kinds["verdict"] <= 12
    assert kinds == {"verdict": rows[-1]["labels"], "score": rows[-1]["gold_labels"]}
