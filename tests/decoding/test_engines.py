"""Every path against the stock model of transformers: greedy tokens and log-probabilities, family by family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pyrite.models import generation
from pyrite.models.generation import Samples, sample

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"vocab_size": 67, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {**SIZES, **IDS, "max_position_embeddings": 96, "initializer_range": 0.2}
GROUPS = {**BASE, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 7}
GEMMA = {**GROUPS, "head_dim": 8, "query_pre_attn_scalar": 8}
SMALL = {"vocab_size": 67, "hidden_size": 32, "initializer_range": 0.2}
STEPS = 18
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [3, 9, 27], [8] * 6, [3, 9, 27]]

FAMILIES: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "llama": ("fused", lambda: LlamaConfig(**GROUPS)),
    "llama-bias": ("fused", lambda: LlamaConfig(**BASE, attention_bias=True, mlp_bias=True)),
    "llama-tied": ("fused", lambda: LlamaConfig(**GROUPS, tie_word_embeddings=True)),
    "qwen2": ("fused", lambda: Qwen2Config(**GROUPS)),
    "qwen3": ("fused", lambda: Qwen3Config(**GROUPS, head_dim=8)),
    "mistral": ("fused", lambda: MistralConfig(**GROUPS)),
    "mistral-window": ("cached", lambda: MistralConfig(**GROUPS, **WINDOW)),
    "qwen2-window": ("cached", lambda: Qwen2Config(**GROUPS, **WINDOW, use_sliding_window=True, max_window_layers=1)),
    "gemma": ("cached", lambda: GemmaConfig(**GROUPS, head_dim=8)),
    "gemma2": ("cached", lambda: Gemma2Config(**GEMMA, **WINDOW)),
    "gemma3": ("cached", lambda: Gemma3TextConfig(**GEMMA, **WINDOW)),
    "gpt_neox": ("cached", lambda: GPTNeoXConfig(**BASE)),
    "gpt2": ("cached", lambda: GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "bloom": ("generate", lambda: BloomConfig(**SMALL, n_layer=2, n_head=4)),  # positions from the mask alone
    "gpt_oss": ("generate", lambda: GptOssConfig(**GROUPS, head_dim=8, num_local_experts=4)),  # attention sinks
    "mamba": ("generate", lambda: MambaConfig(**SMALL, num_hidden_layers=2)),  # no attention
}


def make(config: PreTrainedConfig) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:  # initialized to 1 and 0, where a mistake would not show
                weight.data += 0.2 * torch.randn_like(weight)
    return model


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """transformers' own greedy tokens, one prompt at a time, so nothing is padded."""
    ids = torch.tensor([prompt])
    never = model.config.vocab_size  # an end token that does not exist
    options = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0, "eos_token_id": never}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def uncached(model: nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities of the response by one full forward."""
    with torch.no_grad():
        logp = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).squeeze(1)


def forced(model: nn.Module, drawn: Samples) -> torch.Tensor:
    """Log-probabilities (N, T) of all responses, each by one full forward."""
    rows = zip(drawn.prompt.tolist(), drawn.responses(), strict=True)
    return torch.stack([uncached(model, PROMPTS[prompt], response) for prompt, response in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str) -> None:
    path, config = FAMILIES[family]
    model = make(config())
    before = model.config._attn_implementation
    samples = sample(model, PROMPTS, eos=[], temperature=0, max_new_tokens=STEPS)
    assert samples.path == path
    assert samples.responses() == [greedy(model, prompt) for prompt in PROMPTS]
    drawn = sample(model, PROMPTS, eos=[], k=2, max_new_tokens=STEPS, seed=1)
    for row, response in enumerate(drawn.responses()):
        expected = uncached(model, PROMPTS[int(drawn.prompt[row])], response)
        torch.testing.assert_close(drawn.policy_logps[row], expected, atol=3e-5, rtol=0)
    assert model.config._attn_implementation == before


def test_cached_path_equals_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LlamaConfig(**GROUPS))
    fused = sample(model, PROMPTS, eos=2, k=3, max_new_tokens=STEPS)
    monkeypatch.setattr(generation, "can_fuse", lambda _: False)
    cached = sample(model, PROMPTS, eos=2, k=3, max_new_tokens=STEPS)
    assert (fused.path, cached.path) == ("fused", "cached")
    assert fused.responses() == cached.responses()
    torch.testing.assert_close(fused.logps, cached.logps, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
@pytest.mark.parametrize(("path", "dora"), [("fused", False), ("cached", True)])
def test_lora_equals_its_merged_model(path: str, dora: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = ["q_proj", "v_proj", "down_proj"]
        lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=dora)
        model = get_peft_model(make(LlamaConfig(**GROUPS)), lora)
    ours = sample(model, PROMPTS, eos=2, k=2, max_new_tokens=STEPS)
    inside = sample(model.get_base_model(), PROMPTS, eos=2, k=2, max_new_tokens=STEPS)
    with model.disable_adapter():
        base = sample(model, PROMPTS, eos=2, k=2, max_new_tokens=STEPS)
    merged = sample(model.merge_and_unload(), PROMPTS, eos=2, k=2, max_new_tokens=STEPS)
    assert (ours.path, inside.path, merged.path) == (path, path, "fused")
    assert ours.responses() == inside.responses() == merged.responses() != base.responses()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
def test_a_model_that_our_cache_would_change_is_detected() -> None:
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with torch.random.fork_rng():
        model = get_peft_model(make(LlamaConfig(**GROUPS)), tuned)
    with torch.inference_mode():
        assert generation.open_cached(model, 32) is None


@pytest.mark.parametrize("change", ["hook", "rope"])
def test_fused_path_steps_aside(change: str) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make(LlamaConfig(**GROUPS, **({"rope_parameters": rope} if change == "rope" else {})))
    if change == "hook":
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    samples = sample(model, PROMPTS, eos=[], temperature=0, max_new_tokens=STEPS)
    assert samples.path == "cached"
    assert samples.responses() == [greedy(model, prompt) for prompt in PROMPTS]


def test_prefill_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LlamaConfig(**GROUPS))
    whole = sample(model, PROMPTS, eos=2, k=2, max_new_tokens=STEPS)
    monkeypatch.setattr(generation, "PREFILL", 8)
    assert sample(model, PROMPTS, eos=2, k=2, max_new_tokens=STEPS).responses() == whole.responses()


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_draws_are_those_of_a_stock_forward_under_autocast(family: str) -> None:
    """Within twice the rounding of the stock forward itself, which another model's is not: weights 3 % larger."""
    path, config = FAMILIES[family]
    model = make(config())
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample(model, PROMPTS, eos=[], k=4, max_new_tokens=STEPS, seed=1)
    with torch.autocast("cpu", enabled=False):
        exact = forced(model, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        stock = forced(model, drawn)
        for weight in model.parameters():
            weight.data.mul_(1.03)
        other = forced(model, drawn)
    assert drawn.path == path and drawn.logps.dtype == torch.float32
    assert not torch.equal(drawn.policy_logps, exact)
    noise = (stock - exact).abs().mean()
    assert 1e-4 < noise < 0.03
    assert (drawn.policy_logps - stock).abs().mean() < 2 * noise < (drawn.policy_logps - other).abs().mean()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast_rows_are_drawn_alike_alone_and_together(family: str) -> None:
    """As far as rounding allows: the shape of a product may change a logit's last bit, and with it a rare token."""
    model = make(FAMILIES[family][1]())
    with torch.autocast("cpu", torch.bfloat16):
        together = sample(model, PROMPTS, eos=[], k=4, max_new_tokens=STEPS, seed=1).responses()
        alone = [
            response
            for index, prompt in enumerate(PROMPTS)
            for response in sample(model, [prompt], eos=[], k=4, max_new_tokens=STEPS, seed=1, keys=[index]).responses()
        ]
        others = sample(model, PROMPTS, eos=[], k=4, max_new_tokens=STEPS, seed=2).responses()
    same, chance = (sum(map(list.__eq__, together, rows)) / len(together) for rows in (alone, others))
    assert same >= 0.8 and chance == 0


def test_agreement_with_the_stock_forward_is_told_in_float32() -> None:
    seen = []
    model = make(FAMILIES["gpt2"][1]())
    model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert generation.open_cached(model, 32)
    assert seen and not any(seen)


def test_bfloat16_runs_close_to_float32() -> None:
    model = make(LlamaConfig(**GROUPS))
    exact = sample(model, PROMPTS, eos=[], max_new_tokens=1)
    half = sample(model.bfloat16(), PROMPTS, eos=[], max_new_tokens=1)
    same = exact.tokens == half.tokens
    assert same.float().mean() > 0.5
    torch.testing.assert_close(exact.logps[same], half.logps[same], atol=0.2, rtol=0)
