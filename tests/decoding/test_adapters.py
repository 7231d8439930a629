"""Adapters off is the base model, and the switch leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyrite.models.decoder import adapter_layers, base_of, innermost, silent

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
IDS = torch.tensor([[3, 4, 5, 6]])
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
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_silent_is_the_base_and_leaves_nothing_behind(options: dict[str, Any]) -> None:
    model, want = adapted(**options), logits(make())
    before, grads = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    run, layers = base_of(model)
    assert run is model and layers
    with silent(layers):
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), before) and not torch.allclose(before, want)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    with pytest.raises(RuntimeError), silent(layers):
        raise RuntimeError
    assert torch.equal(logits(model), before)


def test_adapters_that_were_off_stay_off() -> None:
    model = adapted(target_modules="all-linear")
    with model.disable_adapter():
        with silent(adapter_layers(model)):
            pass
        assert torch.equal(logits(model), logits(make()))


def test_virtual_tokens_are_left_out_with_their_wrapper() -> None:
    base = make()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert base_of(model) == (base, ()) and innermost(model) is model


def test_innermost_is_the_model_that_runs_alike() -> None:
    base, model = make(), adapted(target_modules="all-linear")
    assert innermost(base) is base and innermost(model) is model.get_base_model()
    assert torch.equal(logits(innermost(model)), logits(model))


def test_no_adapters_or_merged_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="it has none: give a ref_model"):
        base_of(make())
    model = adapted(target_modules="all-linear")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weights: unmerge them"):
        base_of(model)
