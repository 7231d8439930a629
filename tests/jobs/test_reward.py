"""Reward models: members differ by head and order only; accuracy, constants and the length baseline are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reading import asked, each, encode_all

from pyrite.core.runs import read_json, read_metrics
from pyrite.data import rows as data
from pyrite.jobs import reward
from pyrite.math import seeds, statistics
from pyrite.models.policy import RewardModel, member_paths
from pyrite.training.loop import Logging, Training, order


@pytest.fixture
def config(tiny: Path, pairs: Path, tmp_path: Path) -> reward.Config:
    training = Training(lr=1e-2, epochs=4, batch_size=8, lr_scheduler_type="cosine(warmup_steps=0)")
    return reward.Config(
        str(tiny),
        str(pairs),
        tmp_path / "run",
        held_out=0.25,
        members=2,
        training=training,
        logging=Logging(logging_steps=1, save_steps=5),
    )


def test_it_learns_what_is_easy(config: reward.Config, pairs: Path) -> None:
    results = reward.run(config).results
    assert results is not None
    assert (results["pairs"], results["held_out_pairs"]) == (60, 20)
    _, held = data.split(data.load(pairs, "pairs"), fraction=0.25, seed=seeds.derive(0, "held out"))
    prompts = [pair["prompt"] for pair in held]
    for path, measured in zip(member_paths(config.out), results["members"], strict=True):
        assert measured["accuracy"] >= 0.9
        assert measured["accuracy_lo"] <= measured["accuracy"] <= measured["accuracy_hi"]
        model = RewardModel.load(path)
        chosen, rejected = (model.scores(prompts, [pair[side] for pair in held]) for side in ("chosen", "rejected"))
        assert statistics.win_rate(chosen, rejected).item() == pytest.approx(measured["accuracy"])
        both = torch.cat([chosen, rejected])
        assert both.mean().item() == pytest.approx(0, abs=1e-4)
        assert both.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    longer = [len(p["chosen"].split()) - len(p["rejected"].split()) for p in held]
    want = sum((d > 0) + 0.5 * (d == 0) for d in longer) / len(held)
    assert results["length_accuracy"] == pytest.approx(want)


def test_members_differ_by_head_and_order_only(config: reward.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(reward.loop, "fit", lambda model, read, pairs, loss, **more: given.append((model, read, more)))
    reward.run(config)
    (one, rows, first), (two, same, second) = given
    assert rows is same
    ours, theirs = one.model.state_dict(), two.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == ["score.weight"]
    assert order(60, 0, seed=first["seed"]) != order(60, 0, seed=second["seed"])
    assert first["training"] == second["training"]


def test_a_cut_ensemble_goes_on_exactly(config: reward.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reward.run(replace(config, out=config.out.with_name("whole"))).folder
    real, calls = reward.pair_loss, []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 32 + 13:  # in the second member, beyond its checkpoint at step 10
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(reward, "pair_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        reward.run(config)
    with pytest.raises(ValueError, match="is not done"):
        member_paths(config.out)
    reward.run(config)
    assert len(calls) == 32 + 13 + 32 - 10
    assert read_metrics(config.out) == read_metrics(whole)
    for a, b in zip(member_paths(config.out), member_paths(whole), strict=True):
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert not (config.out / "checkpoints").exists()


def test_the_loss_is_bradley_terry_on_the_pairs(config: reward.Config) -> None:
    """The first logged loss against the formula on the stock scores."""
    from pyrite.math.reward_losses import bradley_terry

    reward.run(replace(config, members=1))
    train_pairs, _ = data.split(data.load(config.data, "pairs"), fraction=0.25, seed=seeds.derive(0, "held out"))
    batch = [train_pairs[i] for i in order(60, 0, seed=seeds.derive(0, "member", 0))[:8]]
    model = RewardModel.load(config.model, head_seed=seeds.derive(0, "head", 0))
    prompts = [pair["prompt"] for pair in batch]
    sides = []
    for side in ("chosen", "rejected"):
        encoded = encode_all(model.tokenizer, prompts, [pair[side] for pair in batch])
        assert all(one.ids[-1] == 2 for one in encoded)
        sides.append(torch.stack([model.model(input_ids=torch.tensor([one.ids])).logits[0, 0] for one in encoded]))
    row = read_metrics(config.out)[0]
    assert row["loss"] == pytest.approx(bradley_terry(*sides, center=0.001).mean().item(), abs=1e-5)
    assert row["margin"] == pytest.approx((sides[0] - sides[1]).mean().item(), abs=1e-5)


def test_long_texts_are_cut_alike_in_training_and_scoring(config: reward.Config) -> None:
    folder = member_paths(reward.run(replace(config, members=1, max_length=12, max_prompt=5)).folder)[0]
    model = RewardModel.load(folder)
    assert (model.max_length, model.max_prompt) == (12, 5)
    (encoded,) = each(model.encode(asked(["tell me about " + "cat " * 30], ["dog " * 30])))
    assert len(encoded.prompt) == 5
    assert len(encoded.ids) == 12
    assert encoded.truncated


def test_adapters(config: reward.Config) -> None:
    run = reward.run(replace(config, members=1, lora="lora(r=4)"))
    member = run.folder / "member_0"
    assert (member / "adapter_model.safetensors").exists()
    assert not (member / "model.safetensors").exists()
    measured = read_json(member / "measured.json")
    assert (RewardModel.load(member).mean, RewardModel.load(member).std) == (measured["mean"], measured["std"])


def test_held_out_file_and_none(config: reward.Config, pairs: Path, tmp_path: Path) -> None:
    data.write(data.load(pairs, "pairs")[:20], tmp_path / "held.jsonl")
    from_file = reward.run(replace(config, members=1, held_out=str(tmp_path / "held.jsonl"))).results
    assert from_file is not None
    assert (from_file["pairs"], from_file["held_out_pairs"]) == (60, 20)  # what is held out is not learned from
    none = reward.run(replace(config, members=1, held_out=0.0, out=tmp_path / "none")).results
    assert none is not None
    assert (none["pairs"], none["held_out_pairs"]) == (80, 0)
    assert "train_accuracy" in none["members"][0] and "accuracy" not in none["members"][0]


def test_bad_options_are_refused_before_work(config: reward.Config, tmp_path: Path) -> None:
    data.write(data.load(config.data, "pairs")[:4], tmp_path / "four.jsonl")
    for change, words in (
        ({"members": 0}, "--members 0"),
        ({"loss": "bradly_terry()"}, "did you mean bradley_terry"),
        ({"data": str(tmp_path / "four.jsonl")}, "1 pair to measure accuracy on"),
    ):
        with pytest.raises(ValueError, match=words):
            reward.run(replace(config, **change))
    assert not config.out.exists()


def test_half_precision(config: reward.Config) -> None:
    training = replace(config.training, precision="bfloat16")
    results = reward.run(replace(config, members=1, training=training)).results
    assert results is not None
    assert results["members"][0]["accuracy"] > 0.8
