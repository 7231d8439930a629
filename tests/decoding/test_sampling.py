"""The loop's parts: how rows are grouped, and that finished rows are dropped without touching the others."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyrite.models import generation
from pyrite.models.generation import chunks, sample, streams

PROMPTS = [[3], [4, 5, 6], [3], [7, 8], [4, 5, 6]]


@pytest.mark.parametrize("max_rows", [1, 3, 4, 100])
def test_every_row_once_each_prompt_once_longest_first(max_rows: int) -> None:
    keys = torch.tensor([10, 11, 12, 13, 14])
    parts = list(chunks(PROMPTS, keys, 3, 0, max_rows))
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(15))
    for part in parts:
        assert len(part.rows) == sum(part.prompts.repeats) <= max_rows
        assert len(set(part.prompts.tokens)) == len(part.prompts.tokens)
        lengths = [len(prompt) for prompt in part.prompts.tokens]
        assert lengths == sorted(lengths, reverse=True)
        rows = [p for p, n in zip(part.prompts.tokens, part.prompts.repeats, strict=True) for _ in range(n)]
        assert [list(row) for row in rows] == [PROMPTS[row // 3] for row in part.rows.tolist()]
        assert torch.equal(part.state, streams(0, keys[part.rows // 3], part.rows % 3))


def test_some_rows_with_their_exponents() -> None:
    keys, arms = torch.tensor([10, 11, 12, 13, 14]), torch.arange(20.0).reshape(5, 2, 2)
    among = torch.tensor([[True, False], [False, False], [True, True], [False, True], [True, True]])
    parts = list(chunks(PROMPTS, keys, 2, 0, 3, among=among, exponents=arms))
    rows = torch.cat([part.rows for part in parts])
    assert sorted(rows.tolist()) == among.flatten().nonzero().squeeze(1).tolist()
    for part in parts:
        assert part.exponents is not None and torch.equal(part.exponents, arms.flatten(0, 1)[part.rows])
        assert torch.equal(part.state, streams(0, keys[part.rows // 2], part.rows % 2))
        assert len(part.rows) == sum(part.prompts.repeats)


@pytest.mark.parametrize(("check", "compact"), [(1, 1.0), (1, 0.0), (7, 0.8)])
def test_dropping_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch, check: int, compact: float) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=11, max_position_embeddings=64)).eval()
    kept: list[int] = []
    keep = generation.Decoder.keep
    monkeypatch.setattr(generation.Decoder, "keep", lambda self, rows: (kept.append(len(rows)), keep(self, rows))[1])
    usual = sample(model, PROMPTS, eos=2, k=20, max_new_tokens=32)
    assert kept == sorted(kept, reverse=True) and kept[0] < 80 and kept[-1] < 10
    monkeypatch.setattr(generation, "CHECK", check)
    monkeypatch.setattr(generation, "COMPACT", compact)
    other = sample(model, PROMPTS, eos=2, k=20, max_new_tokens=32)
    assert other.responses() == usual.responses()
    torch.testing.assert_close(other.logps, usual.logps, atol=1e-5, rtol=0)
