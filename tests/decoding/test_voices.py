"""How a model is opened, and its reference beside it: one engine, the same engine without adapters, or another."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from pyrite.models.decoder import Lean
from pyrite.models.generation import Voice, open_reference, open_voice

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def test_a_reference_is_another_model_or_the_same() -> None:
    with torch.inference_mode():
        policy, other = open_voice(llama(), 16), llama()
        assert open_reference(policy.model, policy, 16) is policy
        ref = open_reference(other, policy, 16)
        assert ref.model is other and ref.engine and ref.engine.path == "lean" and ref.silenced == ()
        unopened = Voice(other)
        again = open_reference(other, unopened, 16)
        assert again.engine is not None  # an unopened policy lends none


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
def test_adapters_off_shares_the_engine() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")).eval()
    with torch.inference_mode():
        policy = open_voice(model, 16)
        ref = open_reference(None, policy, 16)
    assert ref.model is model and len(ref.silenced) == 7
    assert policy.engine and isinstance(policy.engine.forward, Lean) and policy.engine.forward.blocks[0].qkv.adapter
    assert ref.engine and isinstance(ref.engine.forward, Lean) and ref.engine.forward.blocks[0].qkv.adapter is None
    assert ref.engine.forward.embedding is policy.engine.forward.embedding


def test_logits_of_the_last_columns() -> None:
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 0, 0]])
    for model in (llama(), BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2)).eval()):
        with torch.no_grad():
            last = Voice(model).logits(ids, 3)
            torch.testing.assert_close(last, model(ids).logits[:, 1:], atol=1e-6, rtol=1e-5)


def test_a_model_without_an_engine_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        voice = open_voice(BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2)).eval(), 16)
    assert voice.engine is None and "BloomForCausalLM cannot decode from our cache" in caplog.text
