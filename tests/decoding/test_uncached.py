"""Whole texts against the cache, step by step, and against the stock model, one text at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, MambaConfig, PreTrainedConfig

from pyrite.math.samplers import mixed_logits
from pyrite.models import generation
from pyrite.models.decoder import Decoder, Prompts, attending
from pyrite.models.generation import Uncached, Voice, open_voice, score

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 23}
SMALL = {"vocab_size": 23, "hidden_size": 32, "initializer_range": 0.2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE, initializer_range=0.2),
    "gemma2": Gemma2Config(**BASE, head_dim=8, num_key_value_heads=2, sliding_window=5, initializer_range=0.2),
    "bloom": BloomConfig(**SMALL, n_layer=2, n_head=4),
    "mamba": MambaConfig(**SMALL, num_hidden_layers=2),
}
PROMPTS = Prompts([[5, 6, 7, 8, 9, 10], [3, 9, 17], [4]], [2, 1, 2])
ROWS = [p for p, n in zip(PROMPTS.tokens, PROMPTS.repeats, strict=True) for _ in range(n)]
STEPS = 8


def make(family: str, seed: int = 1) -> Voice:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    return Voice(model)


def drawn() -> Tensor:
    return torch.randint(3, 23, (len(ROWS), STEPS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_score_is_the_stock_model(family: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr(generation, "LOGITS", 400)  # a row or two at a time
    voice, tokens, lengths = make(family), drawn(), torch.tensor([3, 8, 1, 8, 5])
    with torch.inference_mode():
        found = score(voice, PROMPTS, tokens, lengths)
        assert found.shape == tokens.shape
        for row, (prompt, length) in enumerate(zip(ROWS, lengths.tolist(), strict=True)):
            response = tokens[row, :length]
            logps = voice.model(torch.tensor([[*prompt, *response.tolist()]])).logits[0].log_softmax(-1)
            expected = logps[len(prompt) - 1 : -1].gather(1, response[:, None]).squeeze(1)
            torch.testing.assert_close(found[row, :length], expected, atol=2e-5, rtol=0)
            assert not found[row, length:].any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cached_equals_uncached_at_every_step(family: str) -> None:
    """Logits of both models and of their mixture, rows dropped on the way, prompts of unequal length."""
    bare, tokens = [make(family), make(family, seed=2)], drawn()
    arms, row = torch.tensor([[1.5, -0.5], [0.5, 0.5]]).repeat(3, 1)[: len(ROWS)], torch.arange(len(ROWS))
    last = torch.tensor([prompt[-1] for prompt in ROWS])
    with torch.inference_mode():
        voices = [open_voice(voice.model, 20) for voice in bare]
        slow = [Uncached(voice, PROMPTS, steps=STEPS, device=tokens.device) for voice in bare]
        fast = []
        for voice in voices:
            assert voice.engine
            with attending(voice.model):
                fast.append(Decoder(voice.engine, PROMPTS, steps=STEPS, device=tokens.device))
        for step in range(STEPS):
            ours = []
            for voice, decoder in zip(voices, fast, strict=True):
                with attending(voice.model):
                    ours.append(decoder.step(last))
            theirs = [decoder.step(last) for decoder in slow]
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=3e-5, rtol=0)
            torch.testing.assert_close(mixed_logits(*ours, arms), mixed_logits(*theirs, arms), atol=1e-4, rtol=0)
            last = tokens[row, step]
            if step == 3:
                keep = torch.tensor([4, 1, 2])
                for decoder in [*fast, *slow]:
                    decoder.keep(keep)
                row, last, arms = row[keep], last[keep], arms[keep]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_short_prompt_does_not_see_its_neighbors(family: str) -> None:
    voice, token = make(family), torch.tensor([10, 10, 17, 4, 4])
    with torch.inference_mode():
        whole = Uncached(voice, PROMPTS, steps=2, device=token.device).step(token)
        alone = Uncached(voice, Prompts([[4]], [1]), steps=2, device=token.device).step(token[-1:])
    torch.testing.assert_close(whole[-1:], alone, atol=1e-5, rtol=0)
    assert torch.equal(whole[3], whole[4]) and not torch.allclose(whole[2], whole[3])
