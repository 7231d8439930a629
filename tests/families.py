"""Tiny random models of many families, and the plainest way to their numbers: one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pyrite.data.responses import Responses
from pyrite.math.logps import Logps
from pyrite.models.forward import token_logps
from pyrite.models.policy import Policy


class Row(NamedTuple):
    """A prompt and its responses as token ids."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]


def read_rows(model: Policy, rows: Sequence[Row] | Responses) -> Logps:
    """Log-probabilities of all responses, row by row."""
    responses = rows if isinstance(rows, Responses) else Responses.of(rows)
    return token_logps(model, responses, responses.groups())


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
STATES = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 8}
H1_SCALES = {"lm_head_multiplier": 0.5, "embedding_multiplier": 3.0, "key_multiplier": 0.3}
LENGTHS = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5], "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, **LENGTHS}
CPM = {"dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32, "prompt_length": 4, "prompt_types": 4}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
XLM = {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
MORE = {
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeoConfig", {**SIZES, "attention_types": [[["global", "local"], 1]], "window_size": 6}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "openai-gpt": ("OpenAIGPTConfig", GPT2),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.0625}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 3.0}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2Config", GROUPED),
    "jamba": ("JambaConfig", {**GROUPED, **STATES, "num_hidden_layers": 4, "attn_layer_offset": 1,
                              "attn_layer_period": 2, "num_experts": 2, "use_mamba_kernels": False}),
    "lfm2": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "falcon_h1": ("FalconH1Config", {**GROUPED, **STATES, **H1, **H1_SCALES}),
    "qwen3_next": ("Qwen3NextConfig", {**GROUPED, **LINEAR, **FEW, "head_dim": 16, "num_experts": 4,
                                       "layer_types": ["linear_attention", "full_attention"]}),
    "mamba": ("MambaConfig", {**SIZES, "state_size": 8}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8,
                                                 "attention_window_size": 16}),
    "rwkv": ("RwkvConfig", {**SIZES, "attention_hidden_size": 32, "context_length": 64}),
    "long phi3": ("Phi3Config", {**GROUPED, "rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "long llama": ("LlamaConfig", {**GROUPED, "rope_parameters": LONG}),
    "dynamic llama": ("LlamaConfig", {**GROUPED, "max_position_embeddings": 16,
                                      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "roberta": ("RobertaConfig", SIZES),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 16}),
    "cpmant": ("CpmAntConfig", {**SIZES, **CPM}),
    "xlnet": ("XLNetConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "xlm": ("XLMConfig", {**XLM, "causal": True}),
    "bart": ("BartConfig", {"vocab_size": VOCAB, **BART, "encoder_attention_heads": 4, "decoder_attention_heads": 4}),
}  # fmt: skip
CONFIGS |= MORE
PACKED = ("llama", "llama grouped", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt_neox", "gpt2")


def build(
    name: str, *, classifier: bool = False, seed: int = 0, noise: float = 0.15, **options: object
) -> PreTrainedModel:
    """The model with random weights large enough that mistakes show, unless noise is 0, in eval mode."""
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
            parameter.data += noise * torch.randn_like(parameter)
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
            logp = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            found.append(logp[len(row.prompt) - 1 :])
    return found
