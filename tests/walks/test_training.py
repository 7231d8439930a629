"""What a training run says of itself: gradients lost at bounds, models that hardly moved, dropout, models loaded."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from pyrite.core.runs import read_json, read_metrics
from pyrite.jobs import ppo
from pyrite.math import logps, losses, policy_gradient
from pyrite.models import policy
from pyrite.models.policy import Lora, Policy, RewardModel
from pyrite.training import loop
from walks.command import pyrite

QUICK = "--lr-scheduler-type cosine(warmup_steps=0) --logging-steps 1 --batch-size 40".split()
DRAW = "--held-out .2 --max-new-tokens 8 --measure-every 1".split()


@pytest.fixture(scope="module")
def reward(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "reward"
    RewardModel.load(tiny, head_seed=0).save(folder)
    return folder


def done(*command: object) -> str:
    """What a command that must succeed says."""
    status, out, err = pyrite(*command)
    assert status == 0, err
    return out + err


# Gradients lost at bounds


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        ("f_dpo(divergence='forward_kl')", True),
        ("f_dpo(divergence='alpha',alpha=0.3)", True),
        ("alphapo(alpha=90.0)", True),
        ("beta_dpo()", True),
        ("orpo()", True),
        ("f_dpo(divergence='js')", False),
        ("dpo()", False),
    ],
)
def test_dpo_counts_pairs_held_at_a_bound(tiny: Path, pairs: Path, tmp_path: Path, loss: str, found: bool) -> None:
    """A learning rate far too large throws the policy beyond the bounds of losses that have any."""
    out = tmp_path / "run"
    done("dpo", "--model", tiny, "--data", pairs, "--out", out, "--loss", loss, "--lr", "0.5", *QUICK)
    rows = read_metrics(out)
    assert all(("clamped" in row) == found for row in rows)
    if found:
        assert all(0 <= row["clamped"] <= 1 for row in rows)
        if "alphapo" in loss:
            assert rows[0]["clamped"] > 0.5  # exponents of 90 times three nats a token


def test_a_pair_beyond_the_bound_has_no_gradient_and_is_counted() -> None:
    from pyrite.math.logps import Logps, PairLogps

    near, far = torch.tensor([-5.0, -5.0]), torch.tensor([-5.0, -205.0], requires_grad=True)
    ref, length = Logps.from_sums(near, torch.ones(2)), torch.ones(2)
    pair = PairLogps(Logps.from_sums(near, length), Logps.from_sums(far, length), ref, ref)
    with logps.counting() as found:
        value = losses.f_dpo(pair, divergence="forward_kl")
    (gradient,) = torch.autograd.grad(value.sum(), far)
    assert gradient[0] != 0
    assert gradient[1] == 0
    assert logps.pairs(found, 2) == 1


def test_ppo_and_online_count_theirs(tiny: Path, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "--model",
        tiny,
        "--prompts",
        demos,
        *DRAW,
        "--lr",
        "0.1",
        "--lr-scheduler-type",
        "cosine(warmup_steps=0)",
        "--batch-size",
        "4",
    )
    some = ("ppo", *given, "--prompts-per-step", 16, "--steps", 1, "--k", 2, "--reward", "length()")
    done(*some, "--out", tmp_path / "ppo", "--reward-scaling", "fixed(clip=5)")
    first = read_metrics(tmp_path / "ppo")[1]
    assert first["clamped"] == 0  # a token that was drawn does not become e^20 times as likely
    assert 0 < first["reward_clipped"] < 1  # answers of more than five words
    monkeypatch.setattr(policy_gradient, "FAR", 0.1)
    done(*some, "--out", tmp_path / "near")
    assert 0 < read_metrics(tmp_path / "near")[1]["clamped"] < 1
    monkeypatch.setattr(sys.modules["pyrite.math.losses.reference_free"], "LARGEST", 4.0)  # nats a token
    judge = ("--judge", "bradley_terry(gold='length()')", "--rounds", 1, "--prompts-per-round", 16)
    done("online", *given, *judge, "--out", tmp_path / "online", "--loss", "alphapo(alpha=1.0)")
    assert 0 < read_metrics(tmp_path / "online")[1]["clamped"] < 1


# Models that hardly moved


def test_dpo_at_its_default_rate_says_that_nothing_moved(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    given = ("dpo", "--model", tiny, "--data", pairs)
    said = done(*given, "--out", tmp_path / "still")
    assert "hardly moved" in said
    assert "--lr was 1e-06" in said
    found = read_json(tmp_path / "still" / "done.json")["moved"]
    assert 0 < found["weights"] < loop.STILL
    assert abs(found["margin"]) < 0.1
    rate = re.search(r"such as --lr (\S+),", said)
    assert rate is not None
    said = done(*given, "--out", tmp_path / "moved", "--lr", rate[1], "--epochs", 3)
    assert "hardly moved" not in said  # the rate it names is enough
    assert read_json(tmp_path / "moved" / "done.json")["moved"]["margin"] > 0.1


@pytest.mark.parametrize("job", ["sft", "reward", "online", "ppo"])
@pytest.mark.parametrize("adapters", [False, True])
def test_every_job_says_so(tiny: Path, pairs: Path, demos: Path, tmp_path: Path, job: str, adapters: bool) -> None:
    judge = ("--judge", "bradley_terry(gold='length()')")
    given = {
        "sft": ("--data", demos, "--epochs", 4),
        "reward": ("--data", pairs),
        "online": ("--prompts", demos, *DRAW, *judge, "--rounds", 2),
        "ppo": ("--prompts", demos, *DRAW, "--reward", "length()", "--steps", 2, "--k", 4),
    }[job]
    common = (
        job,
        "--model",
        tiny,
        *given,
        "--lr-scheduler-type",
        "cosine(warmup_steps=0)",
        "--batch-size",
        8,
        *(("--lora", "lora(r=4)") if adapters else ()),
    )
    still = done(*common, "--out", tmp_path / "still", "--lr", "1e-7")
    assert still.count("hardly moved") == 1
    assert "--lr was 1e-07" in still
    assert "hardly moved" not in done(*common, "--out", tmp_path / "moved", "--lr", "2e-2")


def test_the_change_of_weights_is_exact_for_small_models_and_for_adapters(tiny: Path) -> None:
    whole = Policy.load(tiny)
    then, start = loop.Weights.of(whole), copy.deepcopy(whole)
    for parameter in whole.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    before, after = (torch.cat([p.flatten() for p in model.parameters()]) for model in (start, whole))
    assert then.change(whole) == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)

    adapted = Policy.load(tiny, lora=Lora(r=4))
    layers = [m for m in adapted.model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]
    for layer in layers:
        layer.lora_B["default"].weight.data.normal_(0, 0.1)
    then = loop.Weights.of(adapted)
    assert then.change(adapted) == pytest.approx(0, abs=1e-6)
    start = [layer.get_delta_weight("default").clone() for layer in layers]
    for layer in layers:
        layer.lora_B["default"].weight.data += 0.05
        layer.lora_A["default"].weight.data *= 1.1
    change = sum(
        (layer.get_delta_weight("default") - old).square().sum() for layer, old in zip(layers, start, strict=True)
    )
    size = sum(layer.get_base_layer().weight.square().sum() for layer in layers)
    assert then.change(adapted) == pytest.approx((change / size).sqrt().item(), rel=1e-4)


# Dropout


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def noisy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own configuration has dropout."""
    folder, vocabulary = tmp_path_factory.mktemp(request.param), len(tiny_tokenizer())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "gpt2":
            sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
            model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **ids))
        else:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 2}
            sizes |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64}
            model = OPTForCausalLM(OPTConfig(vocab_size=vocabulary, **sizes, **ids))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_preference_losses_learn_without_dropout(noisy: Path, pairs: Path, tmp_path: Path) -> None:
    """Policy and reference are read alike, so the first loss is ln 2."""
    given = ("dpo", "--model", noisy, "--data", pairs, *QUICK, "--lr", "1e-3")
    said = done(*given, "--out", tmp_path / "none")
    assert said.count("dropout of 0.1") == 1
    first = read_metrics(tmp_path / "none")[1]
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    before, after = (read_json(folder / "config.json") for folder in (noisy, tmp_path / "none" / "model"))
    named = {name for name in before if "drop" in name or "pdrop" in name}
    assert named and all(before[name] == after[name] for name in named)  # the model keeps its own setting


def test_sft_learns_with_the_model_s_own(noisy: Path, demos: Path, tmp_path: Path) -> None:
    given = ("sft", "--model", noisy, "--data", demos, *QUICK, "--lr", "1e-3")
    said = done(*given, "--out", tmp_path / "own")
    assert said.count("its own dropout, 0.1") == 1
    assert "here it learns with 0" in done(*given, "--out", tmp_path / "none", "--dropout", "0")
    first = [read_metrics(tmp_path / name)[0]["loss"] for name in ("own", "none")]
    assert first[0] != first[1]


def test_policy_optimization_begins_at_ratio_1(noisy: Path, demos: Path, tmp_path: Path) -> None:
    given = ("--model", noisy, "--prompts", demos, *DRAW, "--reward", "length()", "--value", noisy)
    some = ("--steps", 1, "--prompts-per-step", 8, "--epochs", 1, "--lr", "1e-3", "--batch-size", 8)
    said = done("ppo", *given, *some, "--out", tmp_path / "ppo")
    assert said.count("dropout of 0.1") == 2  # of the policy, and of the critic
    assert read_metrics(tmp_path / "ppo")[1]["ratio"] == pytest.approx(1, abs=1e-4)


# Models loaded


@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}/../reward"])
def test_ppo_loads_a_reward_run_once(
    tiny: Path, demos: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    loaded = []
    real = policy.RewardModel.load.__func__  # type: ignore[attr-defined]

    def load(cls: type, path: Path, **options: Any) -> RewardModel:
        loaded.append(str(path))
        return real(cls, path, **options)

    monkeypatch.setattr(policy.RewardModel, "load", classmethod(load))
    given = ("--model", tiny, "--prompts", demos, *DRAW, "--proxy", reward, "--steps", 1, "--prompts-per-step", 4)
    done("ppo", *given, "--reward", spelled.format(reward), "--out", tmp_path / "run")
    assert len(loaded) == 1
    assert ppo.RewardEnsemble is policy.RewardEnsemble
