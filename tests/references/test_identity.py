"""What makes two references the same: whatever can move a number changes the fingerprint, nothing else does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from pyrite.models import references
from pyrite.models.loading import Lora
from pyrite.models.policy import Policy
from pyrite.models.references import read

from .conftest import TEMPLATE, Text, bytes_tokenizer, said, tiny_config

Change = dict


def fingerprint(policy: Policy, texts: list[Text], **change: object) -> str:
    options = {"conditioning": "prompt", "max_length": 64, "max_prompt": 48, "precision": "float32"}
    options |= change
    precision = options.pop("precision")
    reading = read(policy.tokenizer, said(texts), **options)  # type: ignore[arg-type]
    return references.digest(references.recipe_of(policy, reading, precision=precision))  # type: ignore[arg-type]


def with_template(policy: Policy, template: str) -> Policy:
    changed = copy.deepcopy(policy)
    changed.tokenizer.chat_template = template
    return changed


def bumped(policy: Policy, name: str, amount: float = 1e-7) -> Policy:
    changed = copy.deepcopy(policy)
    with torch.no_grad():
        dict(changed.model.named_parameters())[name][0] += amount
    return changed


def test_every_change_that_can_move_a_number_changes_the_fingerprint(policy: Policy, texts: list[Text], tiny) -> None:
    wide = Policy.load(tiny)
    wide.model.config.rope_parameters["rope_theta"] = 77.0
    more = copy.deepcopy(policy)
    more.tokenizer.add_tokens(["zebra"])
    found = {
        "base": fingerprint(policy, texts),
        "weight": fingerprint(bumped(policy, "model.norm.weight", 1e-3), texts),
        "architecture": fingerprint(wide, texts),
        "dtype": fingerprint(Policy.load(tiny, dtype="bfloat16"), texts),
        "tokenizer": fingerprint(more, texts),
        "template": fingerprint(with_template(policy, TEMPLATE), texts),
        "template newline": fingerprint(
            with_template(policy, TEMPLATE.replace(" <assistant>", " <assistant>\n")), texts
        ),
        "max_length": fingerprint(policy, texts, max_length=63),
        "max_prompt": fingerprint(policy, texts, max_prompt=47),
        "conditioning": fingerprint(policy, texts, conditioning="prior"),
        "precision": fingerprint(policy, texts, precision="bfloat16"),
        "fewer": fingerprint(policy, texts[:-1]),
        "a word": fingerprint(policy, [*texts[:-1], Text(texts[-1].prompt, "red")]),
    }
    assert len(set(found.values())) == len(found)
    assert fingerprint(Policy.load(tiny), texts) == found["base"]
    assert fingerprint(policy, texts[::-1]) == found["base"]
    assert fingerprint(policy, [*texts, texts[0]]) == found["base"]


def test_adapters_count_once_they_do_something(tiny: Path) -> None:
    base = references.weights_hash(Policy.load(tiny).model)
    policy = Policy.load(tiny, lora=Lora(r=2))
    assert references.weights_hash(policy.model) == base
    trained = {name: p for name, p in policy.model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        next(iter(trained.values())).fill_(0.1)
    learned = references.weights_hash(policy.model)
    assert learned != base
    policy.model.peft_config["default"].lora_alpha = 3  # type: ignore[union-attr]
    assert references.weights_hash(policy.model) not in (base, learned)


def test_names_and_shapes_count(tiny: Path) -> None:
    policy = Policy.load(tiny)
    before = references.weights_hash(policy.model)
    layers = policy.model.model.layers
    attention = layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    assert references.weights_hash(policy.model) != before


def test_tied_weights_are_hashed_once_and_saving_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    policy = Policy(model, Policy.load(tiny).tokenizer)
    policy.save(tmp_path)
    again = Policy.load(tmp_path)
    assert references.weights_hash(again.model) == references.weights_hash(model)
    assert references.tokenizer_hash(again.tokenizer) == references.tokenizer_hash(policy.tokenizer)


def test_calling_a_tokenizer_does_not_change_it() -> None:
    tokenizer = bytes_tokenizer()
    before = references.tokenizer_hash(tokenizer)
    tokenizer(["the cat", "a"], padding=True, truncation=True, max_length=2)
    assert references.tokenizer_hash(tokenizer) == before
    tokenizer.chat_template = TEMPLATE
    assert references.tokenizer_hash(tokenizer) == before
    tokenizer.eos_token = "<s>"
    assert references.tokenizer_hash(tokenizer) != before


def test_the_files_of_a_model(tiny: Path, tmp_path: Path) -> None:
    Policy.load(tiny).save(tmp_path / "copy")
    first = references.files_hash(tmp_path / "copy")
    assert references.files_hash(tmp_path / "copy") == first
    adapters = Policy.load(str(tmp_path / "copy"), lora=Lora(r=2))
    adapters.save(tmp_path / "adapters")
    above = references.files_hash(tmp_path / "adapters")
    assert above not in (None, first)
    assert references.context_of_files(tmp_path / "adapters") == 64
    (tmp_path / "copy" / "config.json").write_text((tmp_path / "copy" / "config.json").read_text() + " ")
    assert references.files_hash(tmp_path / "copy") != first
    assert references.files_hash(tmp_path / "adapters") != above


def test_a_prior_begins_with_the_header_of_an_answer(policy: Policy) -> None:
    tokenizer = policy.tokenizer
    assert references.prior_prompt(tokenizer) == ("<bos>", [tokenizer.bos_token_id])
    header = with_template(policy, TEMPLATE).tokenizer
    assert references.prior_prompt(header) == ("<bos> <assistant>", [header.bos_token_id, header.unk_token_id])
    bare = with_template(policy, "{% for m in messages %} {{ m['content'] }}{% endfor %}").tokenizer
    assert references.prior_prompt(bare) == ("<bos>", [bare.bos_token_id])
    without = bytes_tokenizer()
    without.bos_token = None
    with pytest.raises(ValueError, match="a prior needs a start token"):
        references.prior_prompt(without)
