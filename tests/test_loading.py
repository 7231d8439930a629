"""What loading decides: pads, heads, adapters, settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyrite.models.forward import context_of
from pyrite.models.loading import (
    Lora,
    adapted,
    draw_head,
    has_bare_head,
    load_model,
    pad_id,
    settings,
    tokenizer_of,
)
from pyrite.models.policy import RewardModel


def test_pad_is_never_the_end_token(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token
    assert pad_id(tokenizer) == 0 != tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token = "<pad>"
    assert pad_id(tokenizer) == 1


def test_a_head_with_a_bias_is_not_bare() -> None:
    assert has_bare_head(build("llama"))
    assert not has_bare_head(build("phi"))


def test_draw_head_has_its_own_stream() -> None:
    model = build("llama", classifier=True)
    draw_head(model, seed=1, std=0.5)
    first = model.score.weight.clone()
    torch.rand(5)
    draw_head(model, seed=1, std=0.5)
    assert torch.equal(model.score.weight, first)
    draw_head(model, seed=1, std=1.0)
    torch.testing.assert_close(model.score.weight, 2 * first)
    encoder = build("bert", classifier=True)
    draw_head(encoder, seed=1, std=0.5)
    assert (encoder.classifier.bias == 0).all()


def test_adapters_are_optional_and_always_start_alike() -> None:
    model = build("llama")
    assert adapted(model, None, task="CAUSAL_LM") is model
    assert adapted(model, None, task="CAUSAL_LM") is model
    torch.rand(4)
    one = adapted(build("llama"), Lora(r=2, target_modules="q_proj,v_proj"), task="CAUSAL_LM")
    torch.rand(4)
    two = adapted(build("llama"), Lora(r=2, target_modules="q_proj,v_proj"), task="CAUSAL_LM")
    names = [name for name, p in one.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in names)
    assert all(torch.equal(dict(one.named_parameters())[n], dict(two.named_parameters())[n]) for n in names)


def test_settings_of_other_models_are_empty(tiny: Path, tmp_path: Path) -> None:
    assert settings(tiny) == {}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    assert settings(tmp_path) == {}
    RewardModel.load(tiny, head_seed=0).save(tmp_path / "reward")
    assert settings(tmp_path / "reward")["std"] == 1.0


def test_load_model_keeps_the_dtype(tiny: Path) -> None:
    assert load_model(AutoModelForCausalLM, tiny, dtype="bfloat16").dtype == torch.bfloat16
    model = load_model(AutoModelForCausalLM, tiny, dtype="float32")
    assert model.dtype == torch.float32
    assert context_of(model) == 64


def test_the_note_on_a_tokenizer_names_the_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_of(tiny)
    assert capsys.readouterr().err == ""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    tokenizer_of(tmp_path)
    assert capsys.readouterr().err.startswith(f"  note: {tmp_path}: the tokenizer pads with its end token")
