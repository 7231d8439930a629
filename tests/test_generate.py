"""`sample` as a whole: exact frequencies, rows that do not depend on their batch, ends, progress, bad input."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from pyrite.models import generation
from pyrite.models.generation import Samples, sample

EOS = 2


def make(vocabulary: int = 40, scale: float = 0.2) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=64, initializer_range=scale)
        return LlamaForCausalLM(config).eval()


MODEL = make()
PROMPTS = [[int(t) for t in torch.arange(3, 3 + 1 + i % 9) * (i + 1) % 37 + 3] for i in range(64)]


def exact(model: LlamaForCausalLM, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probability of every response of at most two tokens, by full forwards."""
    tokens = range(model.config.vocab_size)

    def follow(ids: list[int]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).tolist()

    first = follow(prompt)
    second = {a: follow([*prompt, a]) for a in tokens}
    pairs = {(a, b): first[a] * second[a][b] for a, b in itertools.product(tokens, tokens) if a != EOS}
    return {(EOS,): first[EOS], **pairs}


def p_value(samples: Samples, prompt: int, probability: dict[tuple[int, ...], float]) -> float:
    rows = [tuple(r) for r, p in zip(samples.responses(), samples.prompt.tolist(), strict=True) if p == prompt]
    observed = [rows.count(outcome) for outcome in probability]
    assert sum(observed) == len(rows)  # nothing outside the enumeration
    expected = [p * len(rows) for p in probability.values()]
    return float(stats.chisquare(observed, expected, sum_check=False).pvalue)


def test_frequencies_are_the_exact_probabilities() -> None:
    model, prompts = make(vocabulary=5), [[3], [4, 1, 3, 4]]
    samples = sample(model, prompts, eos=EOS, k=3000, max_new_tokens=2, seed=1)
    hotter = sample(model, prompts, eos=EOS, k=3000, max_new_tokens=2, seed=1, temperature=1.4)
    for index, prompt in enumerate(prompts):
        assert p_value(samples, index, exact(model, prompt)) > 1e-3
        assert p_value(hotter, index, exact(model, prompt)) < 1e-6  # the test can fail


def test_a_batch_of_one_equals_a_batch_of_many() -> None:
    options: dict[str, Any] = {"eos": EOS, "k": 2, "max_new_tokens": 24, "seed": 3}
    whole = sample(MODEL, PROMPTS, **options)
    assert 0 < whole.finished.float().mean() < 1  # rows were dropped on the way, others were cut
    assert len(set(map(tuple, whole.responses()))) > 100
    for index in range(0, 64, 7):
        one = sample(MODEL, [PROMPTS[index]], **options, keys=[index])
        assert one.responses() == whole.responses()[2 * index : 2 * index + 2]
        width = one.logps.shape[1]
        torch.testing.assert_close(one.logps, whole.logps[2 * index : 2 * index + 2, :width], atol=1e-5, rtol=0)
    narrow = sample(MODEL, PROMPTS, **options, max_rows=5)
    assert narrow.responses() == whole.responses()
    order = list(range(64))[::-1]
    turned = sample(MODEL, [PROMPTS[i] for i in order], **options, keys=order)
    assert turned.responses()[::2] == whole.responses()[::2][::-1]
    more = sample(MODEL, PROMPTS[:3], **{**options, "k": 5})
    assert [more.responses()[i] for i in (0, 1, 5, 6)] == whole.responses()[:4]
    assert sample(MODEL, PROMPTS, **{**options, "seed": 4}).responses() != whole.responses()


DOUBLED = [[3], [4, 5, 6], [3], [7, 8], [4, 5, 6]]


@pytest.mark.parametrize(("check", "compact"), [(1, 1.0), (1, 0.0), (7, 0.8)])
def test_dropping_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch, check: int, compact: float) -> None:
    kept: list[int] = []
    model = make(vocabulary=11)
    keep = generation.Decoder.keep
    monkeypatch.setattr(generation.Decoder, "keep", lambda self, rows: (kept.append(len(rows)), keep(self, rows))[1])
    usual = sample(model, DOUBLED, eos=2, k=20, max_new_tokens=32)
    assert kept == sorted(kept, reverse=True) and kept[0] < 80 and kept[-1] < 10
    monkeypatch.setattr(generation, "CHECK", check)
    monkeypatch.setattr(generation, "COMPACT", compact)
    other = sample(model, DOUBLED, eos=2, k=20, max_new_tokens=32)
    assert other.responses() == usual.responses()
    torch.testing.assert_close(other.logps, usual.logps, atol=1e-5, rtol=0)


def test_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(MODEL, PROMPTS[:4], eos=EOS, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_ends_lengths_and_padding() -> None:
    samples = sample(MODEL, PROMPTS, eos=[EOS, 5], k=2, max_new_tokens=16)
    for row, (tokens, length) in enumerate(zip(samples.tokens.tolist(), samples.length.tolist(), strict=True)):
        ends = [i for i, token in enumerate(tokens[:length]) if token in (EOS, 5)]
        assert ends == ([length - 1] if samples.finished[row] else [])
        assert samples.finished[row] or length == 16
        assert not any(tokens[length:]) and not samples.logps[row, length:].any()
        assert (samples.logps[row, :length] < 0).all()
    assert samples.prompt.tolist() == [i for i in range(64) for _ in range(2)]
    assert samples.sample.tolist() == [0, 1] * 64
    assert samples.tokens.shape[1] == int(samples.length.max())


def test_both_log_probabilities() -> None:
    samples = sample(MODEL, PROMPTS[:9], eos=[], max_new_tokens=8, temperature=0.7, top_k=6, top_p=0.9)
    for row, response in enumerate(samples.responses()):
        with torch.no_grad():
            logits = MODEL(torch.tensor([PROMPTS[row] + response])).logits[0, len(PROMPTS[row]) - 1 : -1]
        chosen = torch.tensor(response)[:, None]
        plain = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
        torch.testing.assert_close(samples.policy_logps[row], plain, atol=3e-5, rtol=0)
        for step, token in enumerate(response):  # temperature, then the six largest, then mass 0.9 of those
            p = (logits[step] / 0.7).softmax(-1)
            best = p.argsort(descending=True)[:6]
            mass = (p[best] / p[best].sum()).tolist()
            size = next(n for n in range(1, 7) if sum(mass[:n]) >= 0.9 or n == 6)
            assert token in best[:size].tolist()
            expected = p[token] / p[best[:size]].sum()
            assert samples.logps[row, step].exp().item() == pytest.approx(expected.item(), abs=1e-5)


def test_log_probabilities_may_enter_a_loss() -> None:
    samples = sample(MODEL, PROMPTS[:2], eos=EOS, max_new_tokens=4)
    weight = torch.ones(1, requires_grad=True)
    (weight * samples.logps).sum().backward()
    assert weight.grad is not None


def test_training_mode_is_restored_module_by_module() -> None:
    model = make()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    sample(model, PROMPTS[:2], eos=EOS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_progress_counts_every_row_once() -> None:
    seen: list[int] = []
    sample(MODEL, PROMPTS, eos=EOS, k=3, max_new_tokens=24, max_rows=50, progress=seen.append)
    assert sum(seen) == 192 and min(seen) >= 0 and len(seen) > 8


def test_fallback_draws_the_same_kind_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=5, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5))
    model.generation_config.repetition_penalty = 3.0  # a default of the model that must not leak in
    with caplog.at_level(logging.WARNING):
        samples = sample(model.eval(), [[3], [4, 1, 3]], eos=EOS, k=1500, max_new_tokens=2)
    assert samples.path == "generate" and "cannot decode from our cache" in caplog.text
    assert p_value(samples, 1, exact(model, [4, 1, 3])) > 1e-3
    one = sample(model, [[4, 1, 3]], eos=EOS, k=20, max_new_tokens=2, keys=[1])
    assert one.responses() == samples.responses()[1500:1520]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[3], []], {}, "prompt 1 is empty"),
        ([[3] * 60], {}, "prompt 0 has 60 tokens and max_new_tokens is 8, beyond the model's context of 64"),
        ([[3, 40]], {}, "prompt 0 has a token outside 0..39"),
        ([[3]], {"keys": [1, 2]}, "2 keys for 1 prompts"),
        ([[3]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[3]], {"temperature": float("nan")}, "temperature=nan"),
        ([[3]], {"top_p": 0.0}, "top_p=0.0"),
        ([[3]], {"top_p": 1.5}, "top_p=1.5"),
        ([[3]], {"top_k": -1}, "top_k=-1"),
        ([[3]], {"k": 0}, "k=0"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_input_is_one_line(prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        sample(MODEL, prompts, **{"eos": EOS, "max_new_tokens": 8, **options})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(temperature: float) -> None:
    model = make()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="not finite on prompt 0"):
        sample(model, PROMPTS[:3], eos=EOS, max_new_tokens=4, temperature=temperature)
