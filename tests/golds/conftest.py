"""Small models for the golds that ask one: language models, a reward model with a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import AutoModelForCausalLM

from pyrite.models.policy import RewardModel
from pyrite.recipes import toy


@pytest.fixture(scope="session")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model with other weights."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on a toy model, whose tokenizer has a chat template."""
    root = tmp_path_factory.mktemp("chat")
    toy.model(0).save_pretrained(root / "base")
    toy.tokenizer().save_pretrained(root / "base")
    RewardModel.load(root / "base", head_seed=1, head_std=0.5).save(root / "reward")
    return root / "reward"
