"""Merging adapters: the same logits and scores, ordinary folders, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pyrite.core.runs import read_json
from pyrite.jobs import merge
from pyrite.models.policy import Lora, Policy, RewardModel


def nudge(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))


def test_a_policy(tiny: Path, tmp_path: Path) -> None:
    policy = Policy.load(tiny, lora=Lora(r=4))
    nudge(policy)
    policy.save(tmp_path / "adapted")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        wanted = policy.model(ids).logits
    done = merge.run(merge.Config(str(tmp_path / "adapted"), tmp_path / "run"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(tiny)(ids).logits
    assert (base - wanted).abs().max() > 0.1  # the adapters do something
    assert done.results is not None
    assert done.results["kind"] == "policy"
    assert done.results["difference"] < 1e-4
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    Policy.load(tmp_path / "run" / "model")


def test_a_reward_model_keeps_its_constants(tiny: Path, tmp_path: Path) -> None:
    model = RewardModel.load(tiny, lora=Lora(r=4), head_seed=1)
    nudge(model)
    model.mean, model.std = 0.5, 2.0
    model.save(tmp_path / "adapted")
    asked = (["tell me", "please"], ["the cat sat", "a dog"])
    wanted = RewardModel.load(tmp_path / "adapted").scores(*asked)
    merge.run(merge.Config(str(tmp_path / "adapted"), tmp_path / "run"))
    torch.testing.assert_close(
        RewardModel.load(tmp_path / "run" / "model").scores(*asked), wanted, atol=1e-4, rtol=1e-4
    )
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").config.num_labels == 1
    assert read_json(tmp_path / "run" / "done.json")["kind"] == "reward model"


def test_a_whole_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole model already"):
        merge.run(merge.Config(str(tiny), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_reward_models_is_refused_with_the_name_of_a_member(rewards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapters here .*did you mean '.*rewards/member_0'\?"):
        merge.run(merge.Config(str(rewards), tmp_path / "merged"))
