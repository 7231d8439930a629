"""Online preference optimization: rounds, their pairs, budgets, references, exact resumption."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pyrite import data
from pyrite.evaluation import Evaluation
from pyrite.jobs import online
from pyrite.models import Lora, Policy
from pyrite.runs import read_json, read_metrics
from pyrite.train import Training

TRAINING = Training(lr=3e-3, epochs=1, batch_size=8, warmup=0)
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


def test_prompts_the_same_or_fresh_and_never_those_to_measure_on(config: online.Config, demos: Path) -> None:
    asked = {row["prompt_id"] for row in data.load(demos, "prompts")}
    _, test = online._prompts(config)
    held = {row["prompt_id"] for row in test}
    same = [online._places(config, 48, number) for number in range(3)]
    assert same[0] == same[1] == same[2]
    fresh = [online._places(replace(config, fresh=True), 48, number) for number in range(4)]
    assert sorted(fresh[0] + fresh[1] + fresh[2]) == list(range(48))
    assert sorted(fresh[3]) != sorted(fresh[0])  # a new order after all have been asked
    learned, _ = online._prompts(config)
    assert {row["prompt_id"] for row in learned} | held == asked
    assert not {row["prompt_id"] for row in learned} & held


def test_the_reference_stays_or_moves(config: online.Config) -> None:
    stays = results(replace(config, rounds=3))
    moves = results(replace(config, rounds=3, ref="previous", out=config.out.with_name("moves")))
    first = [read_metrics(folder)[1]["loss"] for folder in (config.out, config.out.with_name("moves"))]
    assert first[0] == first[1]  # in the first round they are the same
    assert stays["last"]["loss"] != moves["last"]["loss"]
    start = read_metrics(config.out.with_name("moves"))
    assert start[-1]["kl_k1"] == moves["last"]["kl_k1"]  # KL is from the start in both


def test_adapters_alone_are_trained_and_switched_off_for_the_reference(config: online.Config) -> None:
    found = results(replace(config, lora=Lora(lora_rank=4), sampler="mixed()", rounds=2))
    assert found["start"]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert (config.out / "model" / "adapter_model.safetensors").exists()
    assert math.isfinite(found["last"]["kl_k1"])


@pytest.mark.parametrize("change", [{}, {"restart": False, "loss": "bco(delta=None)"}, {"ref": "previous"}])
def test_a_cut_run_goes_on_exactly(config: online.Config, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    config = replace(config, rounds=5, measure_every=2, sampler="mixed(on_policy=0.5)", **change)
    whole = online.run(replace(config, out=config.out.with_name("whole"))).folder
    real, calls = online.Book.write, []

    def write(self: online.Book, number: int, *rest: object) -> None:
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(online.Book, "write", write)
    with pytest.raises(KeyboardInterrupt):
        online.run(config)
    online.run(config)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert read_metrics(config.out) == read_metrics(whole)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (config.out, whole))
    assert ours == theirs


def test_strictly_on_policy(config: online.Config) -> None:
    found = results(replace(config, rounds=6, prompts_per_round=4, restart=False, measure_every=3, fresh=True))
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
    assert "round 1 gave no pair (16 ties" in capsys.readouterr().out
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
        ({"evaluation": Evaluation(gold="length()", max_new_tokens=64)}, "reads 64 at most"),
        ({"evaluation": Evaluation(gold=f"{tmp_path}/short.py:score()", max_new_tokens=8)}, "1 responses need"),
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
