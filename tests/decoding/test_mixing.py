"""Two models in one loop: exact frequencies, arms that are one model, adapters on and off, both log-probabilities."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from families import Row
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from pyrite.data.responses import Responses
from pyrite.math import samplers
from pyrite.models import generation
from pyrite.models.generation import Samples, sample, sample_mixed
from pyrite.models.policy import Policy
from tests.conftest import tiny_tokenizer

EOS = 2
ARMS = {"policy": (1.0, 0.0), "ref": (0.0, 1.0), "past": (1.5, -0.5), "short": (0.5, 0.5)}


def make(seed: int, vocabulary: int = 40, scale: float = 0.2) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=64, initializer_range=scale)
        return LlamaForCausalLM(config).eval()


def adapted(model: nn.Module, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, **options)).eval()


def bloom(seed: int) -> BloomForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5)
        return BloomForCausalLM(config).eval()


POLICY, REF = make(4), make(5)
PROMPTS = [[int(t) for t in torch.arange(3, 3 + 1 + i % 9) * (i + 1) % 37 + 3] for i in range(64)]


def arms(*rows: tuple[float, float], prompts: int = len(PROMPTS)) -> Tensor:
    return torch.tensor(rows).expand(prompts, -1, -1)


ALL = arms(*ARMS.values())


def rows_of(samples: Samples, *numbers: int) -> list[list[int]]:
    """Responses of these sample numbers."""
    return [r for r, n in zip(samples.responses(), samples.sample.tolist(), strict=True) if n in numbers]


def same(a: Samples, b: Samples) -> bool:
    """Bit for bit."""
    blocks = zip((a.tokens, a.logps, a.length), (b.tokens, b.logps, b.length), strict=True)
    return all(torch.equal(x, y) for x, y in blocks)


def test_arms_of_one_model_are_that_model_bit_for_bit() -> None:
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 24, "seed": 3}
    online = sample(POLICY, PROMPTS, k=2, **options)
    for pair in samplers.mixed(kappa=0.0).pairs:
        exponents = samplers.exponents([pair.first, pair.second]).expand(64, -1, -1)
        mixed = sample_mixed(POLICY, REF, PROMPTS, exponents=exponents, **options)
        assert same(mixed, online) and torch.equal(mixed.policy_logps, online.policy_logps)
        assert mixed.ref_logps is None and mixed.path == "fused"
    offline = sample(REF, PROMPTS, k=2, **options)
    mixed = sample_mixed(POLICY, REF, PROMPTS, exponents=arms((0, 1), (0, 1)), **options)
    assert mixed.ref_logps is not None
    assert same(mixed, offline) and torch.equal(mixed.ref_logps, offline.policy_logps)
    assert not same(mixed, online)


def test_one_model_arms_among_others() -> None:
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 24, "temperature": 0.8, "top_p": 0.9, "top_k": 12}
    mixed = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, **options)
    assert rows_of(mixed, 0) == rows_of(sample(POLICY, PROMPTS, k=4, **options), 0)
    assert rows_of(mixed, 1) == rows_of(sample(REF, PROMPTS, k=4, **options), 1)
    assert mixed.ref_logps is not None
    unread = mixed.ref_logps.isnan().any(1)
    assert unread.tolist() == [True, False, False, False] * 64
    inside = torch.arange(mixed.tokens.shape[1]) < mixed.length[:, None]
    assert mixed.ref_logps[unread & (mixed.length > 0)][inside[unread]].isnan().all()
    assert not mixed.ref_logps[~inside].any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_policy_equal_to_reference_makes_all_arms_alike(temperature: float) -> None:
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 16, "seed": 5, "temperature": temperature}
    plain = sample(POLICY, PROMPTS, k=4, **options)
    for ref in (POLICY, make(4)):
        mixed = sample_mixed(POLICY, ref, PROMPTS, exponents=ALL, **options)
        assert mixed.responses() == plain.responses()
        torch.testing.assert_close(mixed.logps, plain.logps, atol=1e-5, rtol=0)
    other = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, **options)
    assert rows_of(other, 2) != rows_of(plain, 2) and rows_of(other, 3) != rows_of(plain, 3)


def test_a_batch_of_one_equals_a_batch_of_many() -> None:
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 24, "seed": 3}
    whole = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, **options)
    assert 0 < whole.finished.float().mean() < 1  # rows were dropped on the way, others were cut
    for index in range(0, 64, 9):
        one = sample_mixed(POLICY, REF, [PROMPTS[index]], exponents=ALL[:1], keys=[index], **options)
        part = slice(4 * index, 4 * index + 4)
        assert one.responses() == whole.responses()[part]
        for name in ("logps", "policy_logps", "ref_logps"):
            mine, theirs = getattr(one, name), getattr(whole, name)[part, : one.tokens.shape[1]]
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0, equal_nan=True)
    narrow = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, max_rows=5, **options)
    assert narrow.responses() == whole.responses()
    order = list(range(64))[::-1]
    turned = sample_mixed(POLICY, REF, [PROMPTS[i] for i in order], exponents=ALL, keys=order, **options)
    assert rows_of(turned, 2) == rows_of(whole, 2)[::-1]


@pytest.mark.parametrize(("check", "compact"), [(1, 1.0), (1, 0.0)])
def test_dropping_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch, check: int, compact: float) -> None:
    usual = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, eos=[EOS, 5, 6], max_new_tokens=24)
    monkeypatch.setattr(generation, "CHECK", check)
    monkeypatch.setattr(generation, "COMPACT", compact)
    other = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, eos=[EOS, 5, 6], max_new_tokens=24)
    assert other.responses() == usual.responses()
    torch.testing.assert_close(other.logps, usual.logps, atol=2e-5, rtol=0)


WORKED = [  # logits 2, 1, 0 of the policy, constant of the reference
    ((1.0, 0.0), 1.0, (0.665241, 0.244728, 0.090031)),
    ((1.5, -0.5), 1.0, (0.785597, 0.175290, 0.039113)),
    ((0.5, 0.5), 1.0, (0.506480, 0.307196, 0.186324)),
    ((1.5, -0.5), 0.7, (0.884108, 0.103723, 0.012169)),  # temperature after mixing
    ((0.5, 0.5), 0.7, (0.578305, 0.283104, 0.138591)),
]


def constant(logits: list[float]) -> LlamaForCausalLM:
    model = make(0, vocabulary=len(logits))
    model.lm_head = nn.Linear(32, len(logits))
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = torch.tensor(logits)
    return model


@pytest.mark.parametrize("level", [0.0, 3.0])  # a constant in one model's logits changes nothing
@pytest.mark.parametrize(("arm", "temperature", "expected"), WORKED)
def test_worked_values(arm: tuple[float, float], temperature: float, expected: tuple[float, ...], level: float) -> None:
    policy, ref = constant([2.0, 1.0, 0.0]), constant([level] * 3)
    options: dict[str, Any] = {"eos": [], "max_new_tokens": 8, "temperature": temperature}
    drawn = sample_mixed(policy, ref, [[1]], exponents=torch.tensor([[arm] * 40]), **options)
    assert set(drawn.tokens.flatten().tolist()) == {0, 1, 2}
    torch.testing.assert_close(drawn.logps.exp(), torch.tensor(expected)[drawn.tokens], atol=1e-6, rtol=0)
    plain = torch.tensor([2.0, 1.0, 0.0]).log_softmax(0)[drawn.tokens]
    torch.testing.assert_close(drawn.policy_logps, plain, atol=1e-6, rtol=0)
    if arm[1]:
        assert drawn.ref_logps is not None
        torch.testing.assert_close(drawn.ref_logps, torch.full_like(plain, -math.log(3)), atol=1e-6, rtol=0)


def exact(arm: tuple[float, float], prompt: list[int], temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """Probability of every response of at most two tokens, by full forwards in float64."""
    tokens = range(5)

    def follow(ids: list[int]) -> list[float]:
        with torch.no_grad():
            logps = [model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for model in SMALL]
        return ((arm[0] * logps[0] + arm[1] * logps[1]) / temperature).softmax(-1).tolist()

    first = follow(prompt)
    second = {a: follow([*prompt, a]) for a in tokens}
    pairs = {(a, b): first[a] * second[a][b] for a, b in itertools.product(tokens, tokens) if a != EOS}
    return {(EOS,): first[EOS], **pairs}


SMALL = make(4, vocabulary=5, scale=0.15), make(5, vocabulary=5, scale=0.15)


def p_value(responses: list[list[int]], probability: dict[tuple[int, ...], float]) -> float:
    cells = [(responses.count(list(outcome)), p * len(responses)) for outcome, p in probability.items()]
    assert sum(seen for seen, _ in cells) == len(responses)  # nothing outside the enumeration
    rare = [cell for cell in cells if cell[1] < 10]  # taken together, as the approximation wants
    cells = [cell for cell in cells if cell[1] >= 10] + (
        [(sum(a for a, _ in rare), sum(b for _, b in rare))] if rare else []
    )
    return float(stats.chisquare(*zip(*cells, strict=True), sum_check=False).pvalue)


def test_frequencies_are_the_exact_probabilities() -> None:
    prompt, rows = [4, 1, 3, 4], 3000
    for temperature in (1.0, 0.7):
        for name in ("past", "short"):
            arm = ARMS[name]
            exponents = torch.tensor(arm).expand(1, rows, 2)
            options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 2, "temperature": temperature}
            responses = sample_mixed(*SMALL, [prompt], exponents=exponents, **options).responses()
            assert p_value(responses, exact(arm, prompt, temperature)) > 1e-3
            for other in {"policy", "ref", "past", "short"} - {name}:  # the test can fail
                assert p_value(responses, exact(ARMS[other], prompt, temperature)) < 1e-6


def test_kl_of_drawn_tokens_is_the_exact_kl() -> None:
    prompt = [4, 1, 3, 4]
    for arm in (ARMS["past"], ARMS["policy"]):
        pi, ref = exact(ARMS["policy"], prompt), exact(ARMS["ref"], prompt)
        want = sum(q * (math.log(pi[y]) - math.log(ref[y])) for y, q in exact(arm, prompt).items())
        both = arm[0], arm[1] or 1e-30  # so that the reference runs, and changes nothing
        drawn = sample_mixed(
            *SMALL, [prompt], exponents=torch.tensor([both]).expand(1, 4000, 2), eos=EOS, max_new_tokens=2
        )
        assert drawn.ref_logps is not None
        gap = (drawn.policy_logps - drawn.ref_logps).sum(1).double()
        error = gap.std().item() / math.sqrt(len(gap))
        assert abs(gap.mean().item() - want) < 3 * error < 0.3 * abs(want)


@pytest.mark.parametrize("kind", ["fused", "cached", "generate"])
def test_both_log_probabilities_are_those_of_packed_forwards(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "cached":
        monkeypatch.setattr(generation, "can_fuse", lambda _: False)
    if kind == "generate":
        monkeypatch.setattr(generation, "open_cached", lambda *_: None)
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 16, "temperature": 0.9, "top_k": 20}
    drawn = sample_mixed(POLICY, REF, PROMPTS[:16], exponents=ALL[:16], **options)
    assert drawn.path == ("uncached" if kind == "generate" else kind)
    rows = Responses.of([Row(PROMPTS[i], drawn.responses()[4 * i : 4 * i + 4]) for i in range(16)])
    assert drawn.ref_logps is not None
    for model, ours in ((POLICY, drawn.policy_logps), (REF, drawn.ref_logps)):
        policy = Policy(model, tiny_tokenizer())
        with torch.no_grad():
            packed = policy.logps(policy.pack(rows), tokens=True).tokens
        assert packed is not None
        ran = ~ours.isnan().any(1)
        assert int(ran.sum()) == 48  # of four arms one does without this model
        torch.testing.assert_close(ours[ran], packed[ran], atol=1e-4, rtol=0)


def test_slow_paths_draw_the_same_rows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 16, "seed": 2}
    fast = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, **options)
    monkeypatch.setattr(generation, "can_fuse", lambda _: False)
    cached = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, **options)
    real = generation.open_cached
    monkeypatch.setattr(
        generation, "open_cached", lambda model, columns: None if model is REF else real(model, columns)
    )
    with caplog.at_level(logging.WARNING):
        slow = sample_mixed(POLICY, REF, PROMPTS, exponents=ALL, **options)
    assert (fast.path, cached.path, slow.path) == ("fused", "cached", "uncached")
    assert "cannot decode from our cache" in caplog.text
    for other in (cached, slow):
        assert other.responses() == fast.responses()
        for name in ("logps", "policy_logps", "ref_logps"):
            torch.testing.assert_close(getattr(other, name), getattr(fast, name), atol=3e-5, rtol=0, equal_nan=True)


def test_families_without_our_cache() -> None:
    policy, ref = bloom(0), bloom(1)
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 6}
    drawn = sample_mixed(policy, ref, PROMPTS[:8], exponents=ALL[:8], **options)
    assert drawn.path == "uncached"
    assert rows_of(drawn, 0) == rows_of(sample(policy, PROMPTS[:8], k=4, **options), 0)
    for index in (1, 6):
        one = sample_mixed(policy, ref, PROMPTS[index : index + 1], exponents=ALL[:1], keys=[index], **options)
        assert one.responses() == drawn.responses()[4 * index : 4 * index + 4]
    alone = sample_mixed(policy, ref, PROMPTS[:8], exponents=arms((1, 0), (0, 1), prompts=8), **options)
    assert alone.path == "generate" and rows_of(alone, 1) == rows_of(sample(ref, PROMPTS[:8], k=2, **options), 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
@pytest.mark.parametrize(("kind", "path"), [("lora", "fused"), ("dora", "cached")])
def test_adapters_on_and_off_are_two_models(kind: str, path: str) -> None:
    model = adapted(make(4), r=4, use_dora=kind == "dora")
    model.train()
    grads = [parameter.requires_grad for parameter in model.parameters()]
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 20, "seed": 1}
    drawn = sample_mixed(model, None, PROMPTS, exponents=ALL, **options)
    inside = sample_mixed(model.get_base_model(), None, PROMPTS, exponents=ALL, **options)
    with model.disable_adapter():
        off = sample(model, PROMPTS, k=4, **options)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert model.training and drawn.path == path
    merged = model.merge_and_unload()
    two = sample_mixed(merged.eval(), POLICY, PROMPTS, exponents=ALL, **options)
    assert drawn.responses() == inside.responses() == two.responses()
    assert rows_of(drawn, 1) == rows_of(off, 1) != rows_of(drawn, 0)
    for name in ("logps", "policy_logps", "ref_logps"):
        torch.testing.assert_close(getattr(drawn, name), getattr(two, name), atol=5e-5, rtol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
def test_virtual_tokens_on_and_off() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(make(4), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    options: dict[str, Any] = {"eos": EOS, "max_new_tokens": 6}
    drawn = sample_mixed(tuned, None, PROMPTS[:6], exponents=arms(ARMS["past"], ARMS["ref"], prompts=6), **options)
    assert drawn.path == "uncached" and drawn.ref_logps is not None
    assert rows_of(drawn, 1) == rows_of(sample(POLICY, PROMPTS[:6], k=2, **options), 1)
    for row, response in enumerate(drawn.responses()):
        ids = torch.tensor([PROMPTS[row // 2] + response])
        for model, ours in ((tuned, drawn.policy_logps), (POLICY, drawn.ref_logps)):
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, torch.tensor(response)[:, None]).squeeze(1)
            if model is tuned and row % 2:  # the arm of the reference alone
                assert ours[row, : len(response)].isnan().all()
            else:
                torch.testing.assert_close(ours[row, : len(response)], expected, atol=3e-5, rtol=0)
    assert not torch.equal(drawn.policy_logps, drawn.ref_logps)


@pytest.mark.parametrize(("names", "policy", "ref"), [(["policy"], 9, 0), (["ref"], 0, 9), (["past", "ref"], 9, 18)])
def test_only_the_models_of_an_arm_decode(names: list[str], policy: int, ref: int) -> None:
    models, steps = (make(4), make(5)), ([], [])
    for model, seen in zip(models, steps, strict=True):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
    exponents = arms(*(ARMS[name] for name in names), prompts=4)
    drawn = sample_mixed(*models, PROMPTS[:4], exponents=exponents, eos=[], max_new_tokens=9)
    assert drawn.path == "cached"  # a model with hooks is run as it is
    assert [sum(width == 1 for width in seen) for seen in steps] == [policy, ref]


def test_arms_of_a_power_and_of_nothing() -> None:
    drawn = sample_mixed(POLICY, REF, PROMPTS, exponents=arms((0.5, 0), (0, 0), (0, 2.0)), eos=EOS, max_new_tokens=9)
    hot, cold = (
        sample(m, PROMPTS, k=3, eos=EOS, max_new_tokens=9, temperature=t) for m, t in ((POLICY, 2), (REF, 0.5))
    )
    assert rows_of(drawn, 0) == rows_of(hot, 0) and rows_of(drawn, 2) == rows_of(cold, 2)
    uniform = drawn.logps[drawn.sample == 1, 0]
    torch.testing.assert_close(uniform, torch.full_like(uniform, -math.log(40)))
    assert drawn.ref_logps is not None and not drawn.ref_logps[drawn.sample == 2].isnan().any()


def test_progress_and_options_of_sample() -> None:
    seen: list[int] = []
    drawn = sample_mixed(
        POLICY, REF, PROMPTS, exponents=ALL, eos=[EOS, 5], max_new_tokens=8, max_rows=50, progress=seen.append
    )
    assert sum(seen) == 256 and min(seen) >= 0
    assert drawn.prompt.tolist() == [i for i in range(64) for _ in range(4)]
    assert drawn.sample.tolist() == [0, 1, 2, 3] * 64
    weight = torch.ones(1, requires_grad=True)
    (weight * drawn.logps).sum().backward()  # the results may enter a loss
    before = torch.get_rng_state()
    sample_mixed(POLICY, REF, PROMPTS[:2], exponents=ALL[:2], eos=EOS, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)
