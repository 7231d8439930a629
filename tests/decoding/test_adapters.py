"""Adapters off is the base model, and switching them off leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyrite.models.generation import sample, sample_mixed

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
PROMPTS = [[3, 4, 5, 6], [7, 8]]
REF = torch.tensor([0.0, 1.0]).expand(2, 4, 2)
OPTIONS: dict[str, Any] = {"eos": 2, "max_new_tokens": 8}
KINDS = [
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "use_dora": True},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [4]},
]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft


def make() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()


def adapted(**options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False, **options)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_off_is_the_base_and_leaves_nothing_behind(options: dict[str, Any]) -> None:
    model = adapted(**options)
    before, grads = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    off = sample_mixed(model, None, PROMPTS, exponents=REF, **OPTIONS)
    want = sample(make(), PROMPTS, k=4, **OPTIONS)
    assert torch.equal(off.tokens, want.tokens) and off.ref_logps is not None
    torch.testing.assert_close(off.ref_logps, want.policy_logps, atol=1e-5, rtol=0)
    assert torch.equal(logits(model), before) and not torch.allclose(before, logits(make()))
    assert [parameter.requires_grad for parameter in model.parameters()] == grads


def test_adapters_that_were_off_stay_off() -> None:
    model = adapted(target_modules="all-linear")
    with model.disable_adapter():
        sample_mixed(model, None, PROMPTS, exponents=REF, **OPTIONS)
        assert torch.equal(logits(model), logits(make()))
