"""Direct preference optimization: the formula's step, references that count, a checked start, exact resume."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import launch
import pytest
import torch
from reading import encode_all

from pyrite.core import specs
from pyrite.core.runs import read_json, read_metrics
from pyrite.data import rows as data
from pyrite.jobs import dpo
from pyrite.math import losses, seeds
from pyrite.models.policy import Policy
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Logging, Training, order

TRAINING = Training(lr=3e-3, epochs=2, batch_size=8, lr_scheduler_type="cosine(warmup_steps=0)")


@pytest.fixture
def config(tiny: Path, pairs: Path, tmp_path: Path) -> dpo.Config:
    return dpo.Config(
        str(tiny),
        str(pairs),
        tmp_path / "run",
        held_out=0.25,
        training=TRAINING,
        logging=Logging(logging_steps=1, save_steps=5),
    )


def results(config: dpo.Config) -> dict:
    return read_json(dpo.run(config).folder / "done.json")


def part(config: dpo.Config, name: str) -> list[dict]:
    return [row for row in read_metrics(config.out) if row["part"] == name]


def direct(model: Policy, prompts: list, responses: list[str]) -> torch.Tensor:
    """Summed log-probabilities by the stock model, one text at a time."""
    sums = []
    for one in encode_all(model.tokenizer, prompts, responses):
        logp = model.model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
        ids = torch.tensor(one.response)
        sums.append(logp[len(one.prompt) - 1 : -1].gather(1, ids[:, None]).sum())
    return torch.stack(sums)


def test_it_learns_what_is_easy(config: dpo.Config) -> None:
    found = results(config)
    assert found["start"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["start"]["margin"] == pytest.approx(0, abs=1e-4)
    assert found["start"]["accuracy"] == pytest.approx(0.5, abs=0.26)  # ties up to rounding
    assert found["last"]["accuracy"] >= 0.9
    assert found["last"]["loss"] < 0.6
    assert found["pairs"] == 60
    assert found["best"]["loss"] <= min(row["loss"] for row in part(config, "held_out") if row["step"])
    assert (config.out / "best" / "model.safetensors").exists()


def test_the_first_loss_and_step_are_the_formula(config: dpo.Config, pairs: Path) -> None:
    """Against the stock model's log-probabilities: loss, margin and the parameters after one AdamW step."""
    ref = Policy.load(config.model)
    spec = "dpo(beta=0.3)"
    one = replace(
        config, loss=spec, training=replace(TRAINING, epochs=1, batch_size=60, optim="adamw(betas=(0.0, 0.0))")
    )
    results(one)
    train, _ = data.split(data.load(pairs, "pairs"), fraction=0.25, seed=seeds.derive(0, "held out"))
    prompts = [pair["prompt"] for pair in train]
    model = Policy.load(config.model)
    chosen, rejected = (direct(model, prompts, [pair[side] for pair in train]) for side in ("chosen", "rejected"))
    fixed = (chosen - rejected).detach()
    loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected - fixed)).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    row = part(one, "dpo")[0]
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert row["logp_chosen"] == pytest.approx(chosen.mean().item(), abs=1e-3)
    del ref


def test_every_loss_trains(config: dpo.Config, tmp_path: Path) -> None:
    """Each member of the registry for a few steps, from whatever it needs."""
    rows = [{**row, "strength": 1.0 + i % 3} for i, row in enumerate(data.load(config.data, "pairs"))]
    data.write(rows, tmp_path / "strong.jsonl")
    required = {"odpo": "", "rebel": ""}
    for member in specs.members(losses):
        options = [f"{k}=1.0" for k, v in member.options.items() if v is inspect.Parameter.empty]
        spec = f"{member.name}({required.get(member.name, ','.join(options))})"
        training = replace(TRAINING, epochs=1, batch_size=20, lr=1e-3)
        made = replace(
            config, data=str(tmp_path / "strong.jsonl"), loss=spec, out=tmp_path / member.name, training=training
        )
        found = results(replace(made, measure_every=3))
        assert math.isfinite(found["last"]["loss"]), spec
        assert len(part(made, "dpo")) == 3


def test_a_second_beta_reads_the_reference_file(
    config: dpo.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results(config)
    first = capsys.readouterr().err
    assert "reference: computed" in first
    calls = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    results(replace(config, loss="dpo(beta=0.3)", out=tmp_path / "second", seed=1))
    again = capsys.readouterr().err
    assert "no forward pass" in again
    assert "computed" not in again


def test_lora_starts_at_its_reference_and_saves_adapters(config: dpo.Config) -> None:
    found = results(replace(config, lora="lora(r=4)"))
    assert found["start"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (config.out / "model" / "adapter_model.safetensors").exists()
    assert found["last"]["loss"] < found["start"]["loss"]


def test_bfloat16_starts_at_ln_2(config: dpo.Config) -> None:
    found = results(replace(config, training=replace(TRAINING, precision="bfloat16")))
    assert found["start"]["loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("ref", ["self", "ema(rate=0.3,every=2)"])
@pytest.mark.parametrize("loss", ["dpo()", "bco(delta=None)", "tdpo()"])
def test_a_cut_run_goes_on_exactly(config: dpo.Config, monkeypatch: pytest.MonkeyPatch, ref: str, loss: str) -> None:
    config = replace(config, ref=ref, loss=loss, measure_every=4)
    whole = dpo.run(replace(config, out=config.out.with_name("whole"))).folder
    real, calls = dpo.Watch.__call__, []

    def watched(self: dpo.Watch, step: int) -> None:
        calls.append(step)
        if step == 13 and len(calls) == 13:
            raise KeyboardInterrupt
        real(self, step)

    monkeypatch.setattr(dpo.Watch, "__call__", watched)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(config)
    dpo.run(config)
    assert calls == [*range(1, 14), *range(11, 17)]
    assert sorted(read_metrics(config.out), key=json.dumps) == sorted(read_metrics(whole), key=json.dumps)
    for kept in ("model", "best"):
        ours, theirs = ((folder / kept / "model.safetensors").read_bytes() for folder in (config.out, whole))
        assert ours == theirs


def test_evaluation_shows_the_three_numbers(config: dpo.Config, rewards: Path, demos: Path) -> None:
    asked = Evaluation(eval_prompts=str(demos), gold="length()", proxy=str(rewards), eval_limit=8, max_new_tokens=6)
    found = results(replace(config, evaluation=asked, measure_every=8))
    assert {"gold", "proxy", "kl_k1", "kl_k3", "length"} <= set(found["last"])
    assert found["start"]["kl_k1"] == pytest.approx(0, abs=1e-5)
    assert found["last"]["kl_k3"] > 1e-3
    steps = [row["step"] for row in part(config, "held_out")]
    assert steps == [0, 8, 16]


def test_dropped_pairs_are_listed(config: dpo.Config, tmp_path: Path) -> None:
    rows = data.load(config.data, "pairs")
    rows[3] = {**rows[3], "rejected": ""}
    rows[5] = {**rows[5], "chosen": "cat " * 70}
    data.write(rows, tmp_path / "some.jsonl")
    found = results(replace(config, data=str(tmp_path / "some.jsonl")))
    assert found["dropped"] == 1  # an empty answer is its end token, which can be learned
    (row,) = [json.loads(line) for line in (config.out / "dropped.jsonl").read_text().splitlines()]
    assert row["prompt_id"] == rows[5]["prompt_id"]
    assert "truncation" in row["reason"]
    assert found["pairs"] in (59, 60)


def test_refusals_before_work(config: dpo.Config, tmp_path: Path) -> None:
    for change, words in (
        ({"loss": "dop()"}, "did you mean"),
        ({"loss": "dpo(bta=1)"}, "did you mean beta"),
        ({"loss": "odpo()"}, "strength column"),
        ({"loss": "ld_dpo(alpha=0.5)", "ref": "column"}, "sums only"),
        ({"loss": "tdpo()", "ref": "none"}, "whole distribution"),
        ({"ref": "slef"}, "did you mean 'self'"),
        ({"ref": "none + self"}, "cannot be part of a sum"),
        ({"loss": "tdpo()", "ref": "0.5*self"}, "whole distribution"),
        ({"loss": "ld_dpo(alpha=0.5)", "ref": "0.5*self + 0.5*column"}, "sums only"),
        ({"ref": "column"}, "chosen_logprob"),
        ({"measure_every": 0}, "--measure-every 0: give at least 1"),
        ({"evaluation": Evaluation(gold="length()")}, "--eval-prompts"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            dpo.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_a_tampered_reference_refuses_to_start(config: dpo.Config, tmp_path: Path) -> None:
    results(config)
    (folder,) = (config.out.parent / "references").iterdir()
    part_file = next(folder.glob("part-*.parquet"))
    part_file.write_bytes(part_file.read_bytes()[:-1] + b"x")
    second = replace(config, out=tmp_path / "second", loss="dpo(beta=0.3)")
    with pytest.raises(ValueError, match="R7"):
        dpo.run(second)
    assert not second.out.exists()


@pytest.mark.slow
def test_two_processes_equal_one(config: dpo.Config, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        options = ["--epochs", "2", "--batch-size", "7", "--lr", "3e-3", "--held-out", "0.25"]
        return ["dpo", "--model", config.model, "--data", config.data, "--out", str(out), *options]

    launch.launch([command(tmp_path / "one")], processes=1)
    launch.launch([command(tmp_path / "two")], processes=2)
    one, two = (Policy.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_the_order_of_the_pairs_is_the_seed_s(config: dpo.Config) -> None:
    assert order(60, 0, seed=0) != order(60, 0, seed=1)
