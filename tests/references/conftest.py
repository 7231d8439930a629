"""A scorer, pairs and a model with a real second tokenizer, all tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from conftest import WORDS, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.responses import Answer, Prompt, Responses
from pyrite.models import references
from pyrite.models.policy import Policy
from pyrite.models.references import ReferenceTable, row_id

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <user> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


class Text(NamedTuple):
    """A prompt and an answer to it."""

    prompt: Prompt
    answer: Answer
    finished: bool = True


def said(texts: Sequence[Text]) -> Responses:
    """Answers without tokens, each to a prompt of its own."""
    rows = [{"prompt": one.prompt} for one in texts]
    return Responses.said(rows, [one.answer for one in texts], finished=[one.finished for one in texts])


def id_of(one: Text) -> str:
    return row_id(one.prompt, one.answer)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text, other tokens than the word-level tokenizer of `tiny`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another tokenizer and room for 200 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("foreign"), bytes_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=200))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stronger(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Another model with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("stronger")
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = LlamaForCausalLM(tiny_config(hidden_size=48, intermediate_size=64))
    model.save_pretrained(folder)
    Policy.load(tiny).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return Policy.load(tiny)


@pytest.fixture
def rows(pairs: Path) -> list[dict]:
    return data.load(pairs, "pairs")


@pytest.fixture
def texts(rows: list[dict]) -> list[Text]:
    return [Text(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


def encode(tokenizer: object, texts: list[Text], *, max_length: int = 64, max_prompt: int = 48) -> Responses:
    return text.encode(tokenizer, said(texts), max_length=max_length, max_prompt=max_prompt)


def by_hand(policy: Policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Token log-probabilities of one answer through the stock model, alone."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logp = policy.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return logp[len(prompt) - 1 :, 0]


def compute(
    policy: Policy,
    texts: list[Text],
    *,
    folder: Path,
    scorer: str = "me",
    conditioning: references.Conditioning = "prompt",
    max_length: int | None = None,
    max_prompt: int | None = None,
    precision: references.Dtype = "float32",
    budget: int = 16384,
) -> ReferenceTable:
    """Read, then score."""
    longest, longest_prompt = references.limits(policy.context, max_length, max_prompt)
    lengths = {"max_length": longest, "max_prompt": longest_prompt}
    reading = references.read(policy.tokenizer, said(texts), conditioning=conditioning, **lengths)
    recipe = references.recipe_of(policy, reading, precision=precision)
    return references.compute(policy, reading, recipe, folder=folder, scorer=scorer, budget=budget)


class Forwards:
    """Counts forward passes of policies (the probe at loading is none), and loaded models."""

    def __init__(self) -> None:
        self.passes = self.loads = 0


@pytest.fixture
def forwards():
    """How many forward passes and loads of policies there were."""
    count, forward, load = Forwards(), Policy.forward, Policy.load.__func__  # type: ignore[attr-defined]

    def counted(self, *args, **options):
        count.passes += 1
        return forward(self, *args, **options)

    def loaded(cls, *args, **options):
        count.loads += 1
        return load(cls, *args, **options)

    with patch.object(Policy, "forward", counted), patch.object(Policy, "load", classmethod(loaded)):
        yield count
