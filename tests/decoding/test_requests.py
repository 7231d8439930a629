"""What `sample_mixed` refuses in one line, before any work where it can be seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pyrite.math import samplers
from pyrite.math.samplers import Arm
from pyrite.models import generation
from pyrite.models.generation import sample_mixed

EOS, ALL = 2, torch.tensor([(1.0, 0.0), (0.0, 1.0), (1.5, -0.5), (0.5, 0.5)]).expand(3, -1, -1)
PROMPTS = [[3], [4, 5, 6], [7, 8]]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}


def llama(**options: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 64, **options})).eval()


MESSAGES = [
    ({"ref": llama(vocab_size=10)}, "the policy's vocabulary has 9 tokens, the reference's 10"),
    ({"ref": llama().to("meta")}, "the policy is on cpu, the reference on meta: move them to one device"),
    ({"ref": None}, "ref_model=None means the policy with its adapters off, but it has none"),
    ({"exponents": torch.ones(3, 2)}, "exponents (3, 2): give (2, k, 2)"),
    ({"exponents": torch.ones(3, 4, 2)}, "exponents (3, 4, 2): give (2, k, 2)"),
    ({"exponents": torch.tensor([[[1.0, 0.0]], [[0.0, math.inf]]])}, "exponents of prompt 1, sample 0 are not finite"),
    ({"exponents": torch.ones(2, 0, 2)}, "k=0"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"keys": [1]}, "1 keys for 2 prompts"),
    ({"max_new_tokens": 64}, "beyond the model's context of 64"),
]


@pytest.mark.parametrize(("change", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(generation, "open_runner", lambda *_: pytest.fail("work was begun"))
    options = {"ref": llama(), "exponents": ALL[:2], "eos": EOS, "max_new_tokens": 8, **change}
    with pytest.raises(ValueError) as error:
        sample_mixed(llama(), options.pop("ref"), PROMPTS[:2], **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
def test_adapters_that_cannot_be_switched_off() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    for same in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="give ref_model=None to switch them off"):
            sample_mixed(model, same, PROMPTS[:2], exponents=ALL[:2], eos=EOS)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged"):
        sample_mixed(model, None, PROMPTS[:2], exponents=ALL[:2], eos=EOS)


@pytest.mark.parametrize(("broken", "whose"), [(0, "policy"), (1, "reference")])
def test_nan_logits_are_an_error(broken: int, whose: str) -> None:
    models = llama(), llama()
    models[broken].lm_head.weight.data[7] = float("nan")
    exponents = samplers.exponents([Arm(1.5, -0.5)]).expand(3, -1, -1)
    with pytest.raises(ValueError, match=f"the {whose}'s logits are not finite on prompt 0"):
        sample_mixed(*models, PROMPTS[:3], exponents=exponents, eos=EOS, max_new_tokens=4)


def test_exponents_beyond_float32_are_an_error() -> None:
    policy, exponents = llama(), torch.tensor([[[3e38, -3e38]]])
    policy.lm_head.weight.data *= 100
    with pytest.raises(ValueError, match="the arm's logits are not finite on prompt 0: check its exponents"):
        sample_mixed(policy, llama(), [[3]], exponents=exponents, eos=EOS, max_new_tokens=4)
