"""When the flat Llama forward stands in for the stock one, and that its linear map is the linear map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from pyrite.models import generation
from pyrite.models.generation import DecodingCache, Dense, FusedLlama, can_fuse

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_dense_is_linear(dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator).to(dtype)[:, -1]  # strided, as the last column is
    weight, bias = torch.randn(7, 8, generator=generator).to(dtype), torch.randn(7, generator=generator).to(dtype)
    with torch.inference_mode():
        out = Dense(weight, bias if biased else None)(x)
    torch.testing.assert_close(out, F.linear(x, weight, bias if biased else None), atol=1e-5, rtol=1e-5)


def test_only_plain_small_causal_models_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert can_fuse(model)
    assert not can_fuse(LlamaForSequenceClassification(LlamaConfig(**SIZES)))
    assert not can_fuse(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)))
    monkeypatch.setattr(generation, "LIMIT", 1000)
    assert not can_fuse(model)


def test_replaced_linear_layers_are_seen() -> None:
    class Quantized(nn.Linear):
        pass

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj = Quantized(16, 24, bias=False)
    assert not can_fuse(model)


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft


@PEFT
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_dropout": 0.5}, True),
        ({"target_modules": "all-linear", "use_dora": True}, False),
        ({"target_modules": "all-linear", "lora_bias": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, False),
    ],
    ids=str,
)
def test_plain_low_rank_adapters_only(options: dict, fused: bool) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    model = get_peft_model(base, LoraConfig(r=2, **options)).eval()
    assert can_fuse(model.get_base_model()) is fused
    model.merge_adapter()
    assert not can_fuse(model.get_base_model())


@PEFT
@pytest.mark.parametrize("biased", [False, True])
def test_adapters_of_several_layers_side_by_side(biased: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        base = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=biased))
        model = get_peft_model(base, config)
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    attention, x = model.get_base_model().model.layers[0].self_attn.eval(), torch.randn(5, 16)
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    with torch.inference_mode():
        one = generation._fused(*layers, dtype=torch.float32)
        torch.testing.assert_close(one(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5, rtol=1e-5)
        assert one.adapter and one.adapter[0].shape == (8, 16) and one.adapter[1].shape == (48, 8)
        with model.disable_adapter():
            assert generation._fused(*layers, dtype=torch.float32).adapter is None
        half = generation._fused(*layers, dtype=torch.bfloat16)
        assert half.adapter and {part.dtype for part in (half.weight, *half.adapter)} == {torch.bfloat16}
        assert (half(x) - one(x)).norm() < 0.02 * one(x).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_casts_float32_weights_once_and_nothing_else(dtype: torch.dtype) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()
    tokens, cache = torch.tensor([[3, 4, 5], [6, 7, 8]]), DecodingCache()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        engine = FusedLlama(model, 8)
        logits = engine(tokens, torch.arange(3).expand(2, 3), cache, None)
    products = torch.bfloat16 if dtype == torch.float32 else dtype
    block = engine.blocks[0]
    dense = engine.head, block.qkv, block.out, block.gate_up, block.down
    assert {part.weight.dtype for part in dense} == {logits.dtype} == {products}
    assert {part.dtype for layer in cache.parts for part in layer.blocks} == {dtype}  # on a processor
    assert engine.embedding is model.model.embed_tokens.weight and block.norm.dtype == engine.cos.dtype == dtype
    with torch.inference_mode():
        assert FusedLlama(model, 8).head.weight is model.lm_head.weight  # no autocast, no copy
