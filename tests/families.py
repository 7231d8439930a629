"""Tiny random models of many families, and the plainest way to their numbers: one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pyrite.packing import Row

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2}
CAPPED = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}
CONFIGS = {
    "llama": ("LlamaConfig", {**GROUPED, "num_key_value_heads": 4}),
    "llama grouped": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": None}),
    "gemma": ("GemmaConfig", {**GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16, "sliding_window": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "gpt2": ("GPT2Config", GPT2),
    "gemma2": ("Gemma2Config", {**GROUPED, **CAPPED, "head_dim": 16}),
    "phi": ("PhiConfig", {**GROUPED, "num_key_value_heads": 4}),
    "windowed": ("MistralConfig", {**GROUPED, "sliding_window": 20}),
    "bert": ("BertConfig", SIZES),
}
PACKED = ("llama", "llama grouped", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt_neox", "gpt2")


def build(name: str, *, classifier: bool = False, seed: int = 0, **options: object) -> PreTrainedModel:
    """The model with random weights large enough that mistakes show, in eval mode."""
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**{**sizes, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if classifier:
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval()


def random_rows(shapes: Sequence[tuple[int, Sequence[int]]], *, seed: int = 0) -> list[Row]:
    """Rows of random tokens, (prompt length, response lengths) each."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    return [Row(draw(prompt), [draw(n) for n in responses]) for prompt, responses in shapes]


def by_loop(model: PreTrainedModel, rows: Sequence[Row]) -> list[Tensor]:
    """Log-probabilities of every response's tokens, each sequence alone through the stock model."""
    found = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt, *response]])
            logp = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            found.append(logp[len(row.prompt) - 1 :])
    return found
