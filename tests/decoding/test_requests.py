"""Rows by the models they need, and what `sample_mixed` refuses in one line, before any work where it can be seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyrite.math import samplers
from pyrite.math.samplers import Arm
from pyrite.models import generation
from pyrite.models.generation import check_arms, check_reference, check_tokenizers, groups, sample_mixed
from tests.conftest import tiny_tokenizer

EOS, ALL = 2, torch.tensor([(1.0, 0.0), (0.0, 1.0), (1.5, -0.5), (0.5, 0.5)]).expand(3, -1, -1)
PROMPTS = [[3], [4, 5, 6], [7, 8]]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}


def llama(**options: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 64, **options})).eval()


def test_groups_hold_every_row_once() -> None:
    arms = torch.tensor([[(1, 0), (0, 1), (1.5, -0.5)], [(0.5, 0), (0, 2), (0, 0)], [(1, 0), (0.5, 0.5), (1, 1)]])
    found = {(g.policy, g.ref, g.exponents is None): g.rows.int().tolist() for g in groups(arms)}
    assert found == {
        (True, False, True): [[1, 0, 0], [0, 0, 0], [1, 0, 0]],
        (False, True, True): [[0, 1, 0], [0, 0, 0], [0, 0, 0]],
        (True, True, False): [[0, 0, 1], [0, 0, 0], [0, 1, 1]],
        (True, False, False): [[0, 0, 0], [1, 0, 1], [0, 0, 0]],
        (False, True, False): [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    }


def test_arms_are_float32() -> None:
    assert check_arms(torch.ones(2, 3, 2, dtype=torch.float64), 2).dtype == torch.float32
    with pytest.raises(ValueError, match="exponents of prompt 0, sample 2 are not finite"):
        check_arms(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [math.nan, 1.0]]]), 1)


def test_reference_of_the_same_vocabulary_and_device() -> None:
    policy, ref = llama(), llama(hidden_size=32)
    assert check_reference(policy, ref) is ref and check_reference(policy, policy) is policy
    with pytest.raises(ValueError, match="vocabulary has 9 tokens, the reference's 10: only models of one tokenizer"):
        check_reference(policy, llama(vocab_size=10))
    with pytest.raises(ValueError, match="the policy is on cpu, the reference on meta: move them to one device"):
        check_reference(policy, llama().to("meta"))


def test_tokenizers_with_the_same_ids(tiny: Path) -> None:
    check_tokenizers(tiny_tokenizer(), AutoTokenizer.from_pretrained(tiny))
    other = tiny_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(ValueError) as error:
        check_tokenizers(tiny_tokenizer(), other)
    size = len(tiny_tokenizer())
    assert f"first at id {size} ('zebra'): only models of one tokenizer" in str(error.value)
    assert f"policy ({size} tokens) and reference ({size + 1})" in str(error.value) and "\n" not in str(error.value)


MESSAGES = [
    ({"ref": llama(vocab_size=10)}, "the policy's vocabulary has 9 tokens, the reference's 10"),
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
    monkeypatch.setattr(generation, "open_engine", lambda *_: pytest.fail("work was begun"))
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
@pytest.mark.parametrize("arm", [Arm(1.5, -0.5), Arm(0.0, 1.0)])
def test_nan_logits_are_an_error(broken: int, whose: str, arm: Arm) -> None:
    models = llama(), llama()
    models[broken].lm_head.weight.data[7] = float("nan")
    exponents = samplers.exponents([arm]).expand(3, -1, -1)
    with pytest.raises(ValueError, match=f"the {whose}'s logits are not finite on prompt 0"):
        sample_mixed(*models, PROMPTS[:3], exponents=exponents, eos=EOS, max_new_tokens=4)


def test_exponents_beyond_float32_are_an_error() -> None:
    policy, exponents = llama(), torch.tensor([[[3e38, -3e38]]])
    policy.lm_head.weight.data *= 100
    with pytest.raises(ValueError, match="the arm's logits are not finite on prompt 0: check its exponents"):
        sample_mixed(policy, llama(), [[3]], exponents=exponents, eos=EOS, max_new_tokens=4)
