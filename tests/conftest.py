"""A tiny real model with a real tokenizer, and small data, shared by the tests of models and jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from pyrite.data import rows as data

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


WORDS = "a the cat dog bird sat ran sang on in mat tree red blue big small and then . tell me about please".split()
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models lose more to threads than they gain


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_config(**options: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kind = {"vocab_size": len(SPECIALS + WORDS), "max_position_embeddings": 64, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, **ids, **kind, **options})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 20 k parameter Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sentence(generator: torch.Generator, low: int = 2, high: int = 9) -> str:
    size = int(torch.randint(low, high, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (size,), generator=generator).tolist())


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 demonstrations."""
    g = torch.Generator().manual_seed(1)
    rows = [{"prompt_id": str(i), "prompt": "tell me " + sentence(g), "response": sentence(g)} for i in range(60)]
    path = tmp_path_factory.mktemp("data") / "demos.jsonl"
    data.write(rows, path)
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pairs in which the chosen answer mentions the cat."""
    g = torch.Generator().manual_seed(2)
    rows = [
        {
            "prompt_id": str(i),
            "prompt": "tell me " + sentence(g),
            "chosen": sentence(g) + " cat",
            "rejected": sentence(g) + " dog",
        }
        for i in range(80)
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    data.write(rows, path)
    return path
