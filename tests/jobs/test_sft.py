"""Supervised fine-tuning: the loss falls, runs resume after kill -9, two processes make the model of one."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import launch
import pyarrow.parquet as pq
import pytest
import torch
from families import Row
from reading import encode
from safetensors.torch import load_file
from torch import Tensor

from pyrite import cli
from pyrite.core.runs import RunError, read_json, read_metrics
from pyrite.data import rows
from pyrite.data.responses import Responses
from pyrite.jobs import sft
from pyrite.models.policy import Policy
from pyrite.training.loop import Logging, Training


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(folder / name)


def largest_difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_it_learns_and_measures_what_it_says(tuned: Path, tiny: Path, demos: Path) -> None:
    losses = [row["loss"] for row in read_metrics(tuned)]
    assert len(losses) == math.ceil(59 / 8) * 3
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    results = read_json(tuned / "done.json")
    assert (results["train_rows"], results["held_out_rows"]) == (59, 1)
    _, held = rows.split(rows.load(demos, "demos"), fraction=0.02, seed=0)
    policy = Policy.load(tuned / "model")
    encoded = encode(policy.tokenizer, held[0]["prompt"], held[0]["response"])
    logp = policy.logps(policy.pack(Responses.of([Row(encoded.prompt, [encoded.response])]))).sum.item()
    assert results["held_out_nll"] == pytest.approx(-logp / len(encoded.response), abs=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(results["held_out_nll"]))
    assert not (tuned / "checkpoints").exists()


def test_the_first_loss_is_the_mean_over_response_tokens(tuned: Path, tiny: Path, demos: Path) -> None:
    from pyrite.training.loop import order

    training, _ = rows.split(rows.load(demos, "demos"), fraction=0.02, seed=0)
    batch = [training[i] for i in order(59, 0, seed=0)[:8]]
    policy = Policy.load(tiny)
    total = count = 0.0
    for row in batch:
        encoded = encode(policy.tokenizer, row["prompt"], row["response"])
        ids = torch.tensor([encoded.ids])
        logp = policy.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        total -= logp[len(encoded.prompt) - 1 :].sum().item()
        count += len(encoded.response)
    assert read_metrics(tuned)[0]["loss"] == pytest.approx(total / count, abs=1e-5)


def test_a_done_run_loads_no_model(tuned: Path, tiny: Path, demos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    training = Training(lr=1e-2, epochs=3, batch_size=8)
    config = sft.Config(
        model=str(tiny), data=str(demos), out=tuned, training=training, logging=Logging(logging_steps=1)
    )
    assert sft.run(config).results == read_json(tuned / "done.json")
    with pytest.raises(RunError, match=r"training.lr: 0.01 there, 0.5 now"):
        sft.run(replace(config, training=replace(training, lr=0.5)))


def test_adapters_only(tiny: Path, demos: Path, tmp_path: Path) -> None:
    config = sft.Config(model=str(tiny), data=str(demos), out=tmp_path, lora="lora(r=2)", training=Training(lr=1e-2))
    run = sft.run(config)
    assert not (run.folder / "model" / "model.safetensors").exists()
    assert all("lora_" in name for name in weights(run.folder / "model", "adapter_model.safetensors"))
    assert Policy.load(run.folder / "model").packed


def test_long_prompts_and_no_held_out(tiny: Path, demos: Path, tmp_path: Path) -> None:
    long = {"prompt_id": "long", "prompt": "cat " * 70, "response": "dog"}
    rows.write([*rows.load(demos, "demos"), long], tmp_path / "long.jsonl")
    config = sft.Config(model=str(tiny), data=str(tmp_path / "long.jsonl"), out=tmp_path / "run", held_out=0.0)
    with pytest.raises(ValueError, match=r"long\.jsonl, line 61: the prompt has 71 tokens"):
        sft.run(replace(config, on_long="error"))
    assert not (tmp_path / "run").exists()
    results = sft.run(replace(config, data=str(demos))).results
    assert results is not None
    assert results["held_out_nll"] is None


def command(tiny: Path, demos: Path, out: Path, *more: str) -> list[str]:
    return ["sft", "--model", str(tiny), "--data", str(demos), "--out", str(out), "--lr", "1e-2", *more]


def test_kill_9_and_the_same_command_again(tiny: Path, demos: Path, tmp_path: Path) -> None:
    options = ["--epochs", "15", "--batch-size", "8", "--save-steps", "10", "--logging-steps", "7"]
    process = launch.start(command(tiny, demos, tmp_path / "killed", *options))
    checkpoints = tmp_path / "killed" / "checkpoints"
    for _ in range(20000):
        if list(checkpoints.glob("step-*")) or process.poll() is not None:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(checkpoints.glob("step-*"))
    assert not (tmp_path / "killed" / "done.json").exists()
    training, logging = Training(lr=1e-2, epochs=15, batch_size=8), Logging(save_steps=10, logging_steps=7)
    given = {"model": str(tiny), "data": str(demos), "training": training, "logging": logging}
    runs = [sft.run(sft.Config(out=tmp_path / name, **given)) for name in ("killed", "whole")]
    assert largest_difference(*(run.folder / "model" for run in runs)) == 0
    assert read_metrics(runs[0].folder) == read_metrics(runs[1].folder)


def test_two_processes_equal_one(tiny: Path, demos: Path, pairs: Path, few: Path, tmp_path: Path, monkeypatch) -> None:
    """sft (batches of 7: never divisible by 2), reward and generate in one launch."""
    short = ["--max-new-tokens", "10"]
    options = ["--batch-size", "7", "--micro-batch-tokens", "60", "--epochs", "2", "--logging-steps", "1"]

    def commands(out: Path) -> list[list[str]]:
        made = ["--model", str(out / "sft" / "model"), "--out"]
        return [
            command(tiny, demos, out / "sft", *options),
            ["reward", *made, str(out / "reward"), "--data", str(pairs), "--members", "2", "--lr", "1e-2", *options],
            ["generate", *made, str(out / "generate"), "--prompts", str(few), "--k", "4", "--rows", "8", *short],
        ]

    launch.launch(commands(tmp_path / "two"), processes=2)
    for arguments in commands(tmp_path / "one"):
        monkeypatch.setattr("sys.argv", ["pyrite", *arguments])
        cli.main()
    one, two = tmp_path / "one", tmp_path / "two"
    assert read_json(two / "sft" / "manifest.json")["hardware"]["processes"] == 2
    for part in ("sft/model", "reward/member_0", "reward/member_1"):
        assert largest_difference(one / part, two / part) < 1e-5
    for job in ("sft", "reward"):
        lines = [read_metrics(folder / job) for folder in (one, two)]
        assert len(lines[0]) == len(lines[1])
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            assert {k: v for k, v in a.items() if k != "part"} == pytest.approx(
                {k: v for k, v in b.items() if k != "part"}, abs=1e-3
            )
    tables = [pq.read_table(folder / "generate" / "candidates.parquet").to_pylist() for folder in (one, two)]
    assert len(tables[0]) == 40
    for a, b in zip(*tables, strict=True):
        assert {**a, "logp": 0} == {**b, "logp": 0}
        assert a["logp"] == pytest.approx(b["logp"], abs=1e-3)
