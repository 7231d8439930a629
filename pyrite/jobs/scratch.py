"""A small model from scratch: a byte-level tokenizer trained on your data and a random Llama to go with it.

For trying things where no pretrained model is at hand; the result is an ordinary model folder for `pyrite sft` and
`pyrite reward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.math import seeds
from pyrite.math.ranges import Count, Natural, Several

OUTPUTS = {"model/": "random weights and a tokenizer, Hugging Face layout"}
PAD, BOS, EOS = SPECIALS = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True)
class Config:
    """A random small Llama with a tokenizer trained on your data."""

    data: str
    """Texts to train the tokenizer on."""
    out: Path
    """Folder of the run, new or empty."""
    kind: Literal["pairs", "demos", "prompts"] = "pairs"
    """Kind of rows in --data."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    vocabulary: Count = 4096
    """Vocabulary size."""
    hidden: Count = 128
    """Hidden size; a multiple of --heads."""
    layers: Count = 2
    """Number of layers."""
    heads: Count = 4
    """Attention heads per layer."""
    context: Several = 1024
    """Longest prompt + response in tokens."""
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"data": config.data}


def run(config: Config) -> Run:
    """Train the tokenizer, draw the weights, save both."""
    run = runs.start("scratch", config, inputs=inputs)
    if run.done:
        return run
    if config.hidden % config.heads:
        raise ValueError(f"--hidden {config.hidden} is no multiple of --heads {config.heads}")
    tokenizer = _tokenizer(_texts(config), config)
    model = _model(tokenizer, config)
    run.open()
    if run.writes:
        model.save_pretrained(run.folder / "model")
        tokenizer.save_pretrained(run.folder / "model")
    say(f"scratch: {model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    return run.finish(parameters=model.num_parameters(), vocabulary=len(tokenizer))


def _texts(config: Config) -> list[str]:
    """Every prompt and response of the data."""
    rows = data.load(config.data, config.kind, columns=config.columns)
    columns = {"pairs": ("chosen", "rejected"), "demos": ("response",), "prompts": ()}[config.kind]
    return [text.plain(row["prompt"]) for row in rows] + [row[name] for row in rows for name in columns]


def _tokenizer(texts: list[str], config: Config) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def batches() -> Iterator[list[str]]:
        for begin in range(0, len(texts), 1000):
            yield texts[begin : begin + 1000]

    inner.train_from_iterator(batches(), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=config.context
    )


def _model(tokenizer: PreTrainedTokenizerFast, config: Config) -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=3 * config.hidden,
        max_position_embeddings=config.context,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(config.seed, "model"))
        return LlamaForCausalLM(shape)
