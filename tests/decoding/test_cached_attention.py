"""The attention of decoding against the formula, and that it leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyrite.models.generation import NAME, additive, attend, attending


def formula(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax(scale q k + mask) v, head by head, in float64."""
    times = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(times, 1), value.double().repeat_interleave(times, 1)
    scores = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_formula(groups: int, length: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(groups)
    query = torch.randn(3, 4, length, 8, generator=generator)
    key, value = torch.randn(2, 3, groups, 6, 8, generator=generator)
    hidden = torch.ones(length, 6, dtype=torch.bool).triu(6 - length + 1).expand(3, 1, length, 6)
    if masked:
        hidden = hidden | (torch.arange(6) < torch.tensor([0, 3, 5])[:, None])[:, None, None]
        hidden = hidden & ~torch.eye(6, dtype=torch.bool)[-length:]  # every query sees itself
    out = attend(query, key, value, additive(hidden) if masked else None, scale=0.3)
    torch.testing.assert_close(out.double(), formula(query, key, value, hidden, 0.3), atol=1e-6, rtol=0)
    half = attend(*(x.bfloat16() for x in (query, key, value)), additive(hidden) if masked else None, scale=0.3)
    torch.testing.assert_close(half.double(), out.double(), atol=5e-2, rtol=0)


def test_the_implementation_is_restored_after_an_error() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, attn_implementation="eager"))
    with pytest.raises(RuntimeError), attending([model.config]):
        assert model.model.layers[0].self_attn.config._attn_implementation == NAME
        raise RuntimeError
    assert model.config._attn_implementation == "eager"
