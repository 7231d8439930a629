"""Families of models, each against its stock forward, one text at a time: log-probabilities, scores and draws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import MORE, PACKED, VOCAB, Row, build, by_loop, random_rows
from reading import each
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cohere2Config,
    Gemma3Config,
    GenerationConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from pyrite.core import processes
from pyrite.data.responses import Responses
from pyrite.models import forward
from pyrite.models.generation import sample, sample_mixed
from pyrite.models.policy import Policy, RewardModel
from walks.command import pyrite

SHAPES = [(3, [7, 3]), (1, [5]), (8, [2, 4])]
REFUSED = ("bert", "roberta", "electra", "cpmant", "xlnet", "xlm", "bart")
SPEAK = sorted({*MORE, *PACKED, "gemma2", "phi"} - {*REFUSED})
LONG = ("long phi3", "long llama", "dynamic llama")


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


def of(policy: Policy, shapes: list) -> tuple[Tensor, Tensor]:
    """All rows in one batch, and each text alone through the stock model."""
    rows = random_rows(shapes)
    with torch.no_grad():
        return policy(policy.pack(Responses.of(rows))), torch.cat(by_loop(policy.model, rows)).float()


@pytest.mark.parametrize("noise", [0.15, 0.0], ids=["sizeable", "fresh"])
@pytest.mark.parametrize("family", SPEAK)
def test_a_batch_gives_the_numbers_of_single_texts(family: str, noise: float, tokenizer) -> None:
    got, want = of(Policy(build(family, noise=noise), tokenizer), SHAPES)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "cohere", "falcon_h1", "jamba", "lfm2", "qwen3_next", "granite"])
def test_a_fresh_model_in_bfloat16_is_run_as_one_in_float32(family: str, tokenizer) -> None:
    policy = Policy(build(family, noise=0.0).bfloat16(), tokenizer)
    assert policy.packed == Policy(build(family), tokenizer).packed
    got, want = of(policy, SHAPES)
    torch.testing.assert_close(got, want, atol=0.01, rtol=0)


@pytest.mark.parametrize("family", [*PACKED, "mixtral", "olmo2", "opt"])
def test_fresh_models_of_plain_families_are_packed(family: str, tokenizer) -> None:
    assert Policy(build(family, noise=0.0), tokenizer).packed
    assert Policy(build(family, noise=0.0).bfloat16(), tokenizer).packed


@pytest.mark.parametrize("family", ["bloom", "cohere", "falcon_h1", "gemma2", "jamba", "qwen3_next", "mamba"])
def test_gradients_of_padded_rows_are_those_of_single_texts(family: str, tokenizer) -> None:
    policy, rows = Policy(build(family), tokenizer), random_rows(SHAPES)
    found = []
    for values in (policy(policy.pack(Responses.of(rows))), torch.cat(by_loop(policy.model, rows))):
        (values * torch.linspace(0.5, 1.5, len(values))).sum().backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys()
    for name, want in found[1].items():
        torch.testing.assert_close(
            found[0][name], want, atol=2e-4 * max(1.0, want.abs().max().item()), rtol=0, msg=name
        )


@pytest.mark.parametrize("family", LONG)
def test_a_text_beyond_the_turn_of_its_rotations_does_not_touch_its_neighbors(family: str, tokenizer) -> None:
    policy = Policy(build(family), tokenizer)
    for shapes in ([(3, [4]), (5, [20]), (4, [5, 18, 13]), (12, [4]), (12, [5])], [(3, [4]), (9, [7])]):
        rows = random_rows(shapes)
        apart = [Row(row.prompt, [response]) for row in rows for response in row.responses]
        with torch.no_grad():
            want = torch.cat([by_loop(build(family), [row])[0] for row in apart])
            torch.testing.assert_close(policy(policy.pack(Responses.of(rows))), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*LONG, "roberta", "bert", "xlnet", "recurrent_gemma", "jamba"])
def test_a_score_does_not_depend_on_its_batch(family: str, tokenizer) -> None:
    if family == "recurrent_gemma":
        family = "gpt_neo"
    stock = build(family, classifier=True, pad_token_id=0)
    model = RewardModel(stock, tokenizer)
    rows = random_rows([(3 + i, [2 + 3 * i]) for i in range(6)])
    texts = Responses.of(rows)
    with torch.no_grad():
        again = [build(family, classifier=True, pad_token_id=0) for _ in rows]
        both = zip(again, each(texts), strict=True)
        want = torch.stack([one(input_ids=torch.tensor([text.ids])).logits[0, 0] for one, text in both])
    torch.testing.assert_close(model.raw_scores(texts), want, atol=2e-5, rtol=1e-5)


def alone(family: str, noise: float, prompt: list[int], steps: int) -> list[int]:
    """What transformers' own `generate` says to one prompt."""
    config = GenerationConfig(do_sample=False, max_new_tokens=steps, eos_token_id=[VOCAB], pad_token_id=0)
    with torch.no_grad():
        said = build(family, noise=noise).generate(torch.tensor([prompt]), generation_config=config)
    return said[0, len(prompt) :].tolist()


@pytest.mark.parametrize("noise", [0.15, 0.0], ids=["sizeable", "fresh"])
@pytest.mark.parametrize("family", SPEAK)
def test_a_prompt_is_answered_as_alone(family: str, noise: float, tokenizer) -> None:
    prompts = [list(row.prompt) for row in random_rows([(n, [1]) for n in (3, 9, 1, 6)])]
    steps = 6 if family == "dynamic llama" else 12  # its context is its turn
    drawn = sample(build(family, noise=noise), prompts, eos=[], temperature=0, max_new_tokens=steps)
    assert drawn.responses() == [alone(family, noise, prompt, steps) for prompt in prompts]
    policy = Policy(build(family, noise=noise), tokenizer)
    rows = Responses.of([Row(p, [r]) for p, r in zip(prompts, drawn.responses(), strict=True)])
    if family not in LONG:  # one text is read otherwise than it is drawn, token by token
        with torch.no_grad():
            torch.testing.assert_close(policy(policy.pack(rows)), drawn.policy_logps.flatten(), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "recurrent_gemma", "long phi3"])
def test_two_models_are_mixed_as_alone(family: str) -> None:
    prompts = [list(row.prompt) for row in random_rows([(n, [1]) for n in (3, 9, 12)])]
    ours, theirs = build(family), build(family, seed=1)
    arms = torch.tensor([[[0.5, 0.5]]])

    def draw(prompts: list[list[int]]) -> Tensor:
        options = {"eos": [], "temperature": 0, "max_new_tokens": 6}
        return sample_mixed(ours, theirs, prompts, exponents=arms.expand(len(prompts), 1, 2), **options).policy_logps

    single = torch.cat([draw([prompt]) for prompt in prompts])
    torch.testing.assert_close(draw(prompts), single, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_causal_language_model_is_refused_as_a_policy_in_one_line(family: str, tiny: Path, tmp_path) -> None:
    build(family).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a policy needs a") as error:
        Policy.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_may_be_as_long_as_the_table_of_positions_without_its_pads(tokenizer) -> None:
    model = RewardModel(build("roberta", classifier=True, pad_token_id=1), tokenizer)
    assert model.context == 62
    assert model.raw_scores(Responses.of([([5] * 10, [[6] * 52])])).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model.raw_scores(Responses.of([([5] * 10, [[6] * 53])]))


def test_the_ways_of_a_family_leave_the_random_stream_alone(tokenizer) -> None:
    model = build("llama", intermediate_size=44)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    forward.ways(model)
    assert torch.equal(torch.rand(4), want)


def test_a_padded_model_computes_logits_of_responses_only(tokenizer, monkeypatch) -> None:
    policy = Policy(build("gemma2"), tokenizer)
    sizes = []
    policy.model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[:-1].numel()))
    policy(policy.pack(Responses.of(random_rows([(30, [3]), (20, [2])]))))
    assert sizes == [5]


def test_a_run_says_once_that_a_model_runs_padded(tiny: Path, tmp_path, capsys) -> None:
    build("bloom").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    processes.anew()
    for _ in range(2):
        Policy.load(tmp_path)
    said = capsys.readouterr()
    assert (said.out + said.err).count("runs padded") == 1


def test_a_large_shape_is_told_by_a_small_one() -> None:
    for config, packed, bare in (
        (Qwen2Config(num_attention_heads=14, num_key_value_heads=2, hidden_size=896), True, True),
        (Cohere2Config(), True, False),
    ):
        with torch.device("meta"):
            found = forward.ways(AutoModelForCausalLM.from_config(config))
        assert (found.packed, found.bare, found.causal, found.padded, found.head) == (packed, bare, True, True, True)


@pytest.mark.parametrize("family", ["falcon_h1", "openai-gpt", "jamba"])
def test_a_family_learns_preferences_from_the_command_line(family: str, tiny: Path, pairs: Path, tmp_path) -> None:
    build(family).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    options = ("--data", pairs, "--out", tmp_path / "run", "--batch-size", 36, "--lr", 1e-3)
    status, _, told = pyrite("dpo", "--model", tmp_path / "model", *options)
    assert status == 0, told
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in rows)
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


LARGE = {  # as published: a deep model with norms behind its layers, and a text model beside a large one for images
    "opt-350m": OPTConfig(
        vocab_size=50272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
        word_embed_proj_dim=512, do_layer_norm_before=False,
    ),
    "gemma-3-4b": Gemma3Config(
        text_config={"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "vocab_size": 262208,
                     "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024},
        vision_config={"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16,
                       "num_hidden_layers": 27, "patch_size": 14},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_published_shapes_are_packed(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LARGE[name])
    found = forward.ways(model)
    assert (found.causal, found.packed, found.padded, found.bare) == (True, True, True, True)
