"""When the flat Llama forward stands in for the stock one, and that its linear map is the linear map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from pyrite.decoding import lean
from pyrite.decoding.lean import Dense, is_lean

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
    assert is_lean(model)
    assert not is_lean(LlamaForSequenceClassification(LlamaConfig(**SIZES)))
    assert not is_lean(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)))
    monkeypatch.setattr(lean, "LIMIT", 1000)
    assert not is_lean(model)


def test_replaced_linear_layers_are_seen() -> None:
    class Quantized(nn.Linear):
        pass

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj = Quantized(16, 24, bias=False)
    assert not is_lean(model)
