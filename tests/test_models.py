"""Packed, padded and one-by-one agree, for every family; scores depend on the text alone; save and load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import PACKED, Row, build, by_loop, random_rows
from peft import PeftModel
from reading import asked, each
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from pyrite.data.responses import Responses
from pyrite.math import seeds
from pyrite.models.forward import micro_batches, pack
from pyrite.models.loading import Lora
from pyrite.models.policy import Policy, RewardEnsemble, RewardModel, member_paths

SHAPES = [
    [(5, [7, 3, 9])],
    [(1, [1]), (8, [4, 4]), (3, [12, 1, 6])],
    [(4, [0, 5]), (6, [2])],
    [(10, [20]), (2, [3]), (17, [1, 2])],
]


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


def weighted(values: Tensor) -> Tensor:
    return (values * torch.linspace(0.5, 1.5, len(values))).sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(got[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_packed_logps_and_gradients_are_those_of_single_sequences(family, shapes, tokenizer) -> None:
    model = build(family)
    policy, rows = Policy(model, tokenizer), random_rows(shapes)
    assert policy.packed
    batch = policy.pack(Responses.of(rows))
    assert not batch.padded
    got, want = policy(batch), torch.cat(by_loop(model, rows))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    weighted(got).backward()
    packed = gradients(model)
    weighted(want).backward()
    assert_same_gradients(packed, gradients(model))


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_a_model_that_cannot_run_packed_runs_padded(family, tokenizer) -> None:
    model = build(family)
    policy, rows = Policy(model, tokenizer), random_rows(SHAPES[1])
    batch = policy.pack(Responses.of(rows))
    assert not policy.packed
    assert batch.padded
    got, want = policy(batch), torch.cat(by_loop(model, rows))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    weighted(got).backward()
    padded = gradients(model)
    weighted(want).backward()
    assert_same_gradients(padded, gradients(model))


@pytest.mark.parametrize("longest", [20, 21, 30])
def test_rows_beyond_a_sliding_window_run_padded_and_agree(longest, tokenizer) -> None:
    model = build("windowed")
    policy = Policy(model, tokenizer)
    assert policy.packed
    rows = random_rows([(4, [longest - 4, 2]), (3, [3])])
    batch = policy.pack(Responses.of(rows))
    assert batch.padded == (longest > 20)
    torch.testing.assert_close(policy(batch), torch.cat(by_loop(model, rows)), atol=1e-5, rtol=1e-5)


def test_order_and_budget_change_nothing(tokenizer) -> None:
    policy = Policy(build("qwen3"), tokenizer)
    rows = random_rows([(3 + i % 5, [1 + (7 * i) % 11, 1 + i % 4]) for i in range(12)])
    whole = policy.logps(policy.pack(Responses.of(rows))).sum.view(-1, 2)
    for budget in (1, 40, 100):
        for group in micro_batches([len(row.prompt) + sum(map(len, row.responses)) for row in rows], budget=budget):
            part = policy.logps(policy.pack(Responses.of([rows[i] for i in group]))).sum.view(-1, 2)
            torch.testing.assert_close(part, whole[group], atol=1e-5, rtol=1e-6)


def test_sums_are_those_of_the_tokens_in_float64(tokenizer) -> None:
    policy = Policy(build("llama"), tokenizer)
    batch = policy.pack(Responses.of(random_rows([(4, [0, 5]), (6, [2])])))
    flat = policy(batch).double().split(batch.lengths.tolist())
    logps = policy.logps(batch)
    assert logps.sum[0] == 0
    assert logps.length.tolist() == [0, 5, 2]
    torch.testing.assert_close(logps.sum.double(), torch.stack([part.sum() for part in flat]), atol=0, rtol=1e-7)
    full = policy.pack(Responses.of(random_rows([(4, [3, 5])])))
    kept = policy.logps(full, tokens=True)
    assert kept.tokens is not None
    torch.testing.assert_close(kept.sum, policy.logps(full).sum)


def test_attention_dropout_is_not_lost_in_packed_rows(tokenizer) -> None:
    policy = Policy(build("llama", attention_dropout=0.5), tokenizer)
    batch = policy.pack(Responses.of(random_rows(SHAPES[0])))
    quiet = policy(batch)
    policy.train()
    torch.manual_seed(0)
    assert (policy(batch) - quiet).abs().max() > 1e-3
    policy.eval()
    torch.testing.assert_close(policy(batch), quiet)


def texts(n: int, *, seed: int = 0) -> Responses:
    rows = random_rows([(2 + i % 6, [1 + (5 * i) % 13]) for i in range(n)], seed=seed)
    return Responses.of([(row.prompt, [[*row.responses[0], 2]]) for row in rows])


def alone(model: RewardModel, encoded: Responses) -> Tensor:
    """Scores of the texts, one at a time."""
    return torch.cat([model.raw_scores(encoded.take([i])) for i in range(len(encoded))])


def stock_scores(model, encoded: Responses, *, side: str) -> Tensor:
    """The stock classifier on a padded batch."""
    width = max(len(text.ids) for text in each(encoded))
    ids, mask = [], []
    for text in each(encoded):
        pads = [model.config.pad_token_id] * (width - len(text.ids))
        ids.append(pads + text.ids if side == "left" else text.ids + pads)
        mask.append([0] * len(pads) + [1] * len(text.ids) if side == "left" else [1] * len(text.ids) + [0] * len(pads))
    with torch.no_grad():
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        if side == "right":
            return model(input_ids=ids, attention_mask=mask).logits[:, 0]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]


@pytest.mark.parametrize("family", ["llama grouped", "qwen2", "mistral", "gemma", "gpt_neox", "gpt2"])
def test_a_score_depends_on_its_text_alone(family, tokenizer) -> None:
    stock = build(family, classifier=True, pad_token_id=0)
    model = RewardModel(stock, tokenizer)
    assert model.packed
    encoded = texts(11)
    together = model.raw_scores(encoded)
    torch.testing.assert_close(together, stock_scores(stock, encoded, side="right"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, stock_scores(stock, encoded, side="left"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, alone(model, encoded), atol=1e-5, rtol=1e-5)
    turned = encoded.take(range(10, -1, -1))
    torch.testing.assert_close(together, model.raw_scores(turned).flip(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, model.raw_scores(encoded, budget=10), atol=1e-5, rtol=1e-5)


def test_answers_to_one_prompt_share_a_row_without_meeting(tokenizer) -> None:
    model = RewardModel(build("llama", classifier=True), tokenizer)
    prompt = [5, 6, 7]
    encoded = Responses.of([(prompt, [[3 + i % 30, *range(3, 3 + i % 9), 2] for i in range(150)])])
    torch.testing.assert_close(model.raw_scores(encoded), alone(model, encoded), atol=1e-5, rtol=1e-5)


def test_mean_pooling_is_the_mean_over_response_tokens(tokenizer) -> None:
    stock = build("llama", classifier=True)
    model = RewardModel(stock, tokenizer, pooling="mean")
    encoded = texts(7)
    got = model.raw_scores(encoded)
    with torch.no_grad():
        for score, text in zip(got, each(encoded), strict=True):
            states = stock.model(input_ids=torch.tensor([text.ids])).last_hidden_state[0, len(text.prompt) :]
            torch.testing.assert_close(score, stock.score(states.mean(0))[0], atol=1e-5, rtol=1e-5)


def test_reward_gradients_are_those_of_the_stock_model(tokenizer) -> None:
    stock = build("qwen2", classifier=True)
    model = RewardModel(stock, tokenizer)
    rows = random_rows([(4, [5, 2]), (2, [7, 3])])
    weighted(model(model.pack(Responses.of(rows)))).backward()
    got = gradients(stock)
    singles = [
        stock(input_ids=torch.tensor([[*row.prompt, *response]])).logits[0, 0]
        for row in rows
        for response in row.responses
    ]
    weighted(torch.stack(singles)).backward()
    assert_same_gradients(got, gradients(stock))


def test_an_encoder_scores_padded(tmp_path: Path, tiny: Path) -> None:
    stock = build("bert", classifier=True)
    stock.save_pretrained(tmp_path / "bert")
    encoder_tokenizer(tiny).save_pretrained(tmp_path / "bert")
    model = RewardModel.load(tmp_path / "bert")
    assert not model.packed
    encoded = texts(9)
    got = model.raw_scores(encoded)
    with torch.no_grad():
        want = [stock(input_ids=torch.tensor([text.ids])).logits[0, 0] for text in each(encoded)]
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="pooling=mean needs a decoder"):
        RewardModel.load(tmp_path / "bert", pooling="mean")


def encoder_tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    backend = AutoTokenizer.from_pretrained(tiny).backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", cls_token="<bos>", sep_token="<eos>")


def test_an_encoder_without_pooler_begins_from_its_seed(tmp_path: Path, tiny: Path) -> None:
    """What a base model lacks is drawn from the seed too, whatever the global stream did before."""
    from transformers import BertForMaskedLM

    BertForMaskedLM(build("bert", classifier=True).config).save_pretrained(tmp_path / "bert")
    encoder_tokenizer(tiny).save_pretrained(tmp_path / "bert")
    scores = []
    for seed in (0, 0, 1):
        torch.rand(3)
        scores.append(RewardModel.load(tmp_path / "bert", head_seed=seed).raw_scores(texts(3)))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_saved_reward_model_comes_back(tiny: Path, tmp_path: Path, pooling) -> None:
    model = RewardModel.load(tiny, head_seed=3, pooling=pooling, max_length=30, max_prompt=12)
    model.mean, model.std = 0.25, 2.0
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert (again.pooling, again.mean, again.std) == (pooling, 0.25, 2.0)
    assert (again.max_length, again.max_prompt) == (30, 12)
    prompts, responses = ["tell me about the cat"], ["the cat sat on the mat ."]
    torch.testing.assert_close(again.scores(prompts, responses), model.scores(prompts, responses), atol=0, rtol=0)
    raw = model.raw_scores(model.encode(asked(prompts, responses)))
    torch.testing.assert_close(model.scores(prompts, responses), (raw - 0.25) / 2, atol=0, rtol=0)
    if pooling == "last":
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        encoded = model.encode(asked(prompts * 2, [responses[0], "a dog"]))
        torch.testing.assert_close(
            stock_scores(stock, encoded, side="right"), model.raw_scores(encoded), atol=1e-5, rtol=1e-5
        )


AGAIN = """
import json, sys
import torch
from pyrite.models.policy import RewardEnsemble

torch.set_num_threads(1)
torch.manual_seed(99)
models = RewardEnsemble.load(sys.argv[1])
print(json.dumps([models.scores(*json.loads(sys.argv[2])).tolist() for _ in range(2)]))
"""


@pytest.mark.parametrize("lora", [None, Lora(r=2, dropout=0.5)], ids=["whole", "adapters"])
def test_a_fresh_process_scores_alike(tiny: Path, tmp_path: Path, lora: Lora | None) -> None:
    """The trained head is the one that is used, whatever the other process has drawn; dropout is off."""
    model = RewardModel.load(tiny, lora=lora, head_seed=5, head_std=0.5)
    generator = seeds.generator(0, "test")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.mean, model.std = 0.3, 1.7
    model.save(tmp_path)
    asked, said = ["tell me about the cat", "tell me"], ["the cat sat on the mat .", "a dog"]
    here = model.scores(asked, said)
    assert (here[0] - here[1]).abs() > 0.01
    command = [sys.executable, "-c", AGAIN, str(tmp_path), json.dumps([asked, said])]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    first, second = json.loads(there.stdout.splitlines()[-1])
    assert first == second
    assert first[0] == pytest.approx(here.tolist(), abs=1e-6)  # another layout in memory rounds its own way


def test_head_seed_changes_the_head_and_nothing_else(tiny: Path) -> None:
    one, same, other = (RewardModel.load(tiny, head_seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["score.weight"]
    assert 0.01 < one["score.weight"].std() < 0.03


def trained_names(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_lora_trains_only_adapters_and_a_policy_comes_back(tiny: Path, tmp_path: Path) -> None:
    torch.rand(7)
    policy = Policy.load(tiny, lora=Lora(r=2))
    assert policy.packed
    torch.rand(3)
    again = Policy.load(tiny, lora=Lora(r=2))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    rows = random_rows([(4, [5]), (2, [3])])
    rows = [Row([t % 24 for t in row.prompt], [[t % 24 for t in r] for r in row.responses]) for row in rows]
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (-policy(policy.pack(Responses.of(rows))).sum()).backward()
        optimizer.step()
    changed = trained_names(policy.model, before)
    assert changed
    assert all("lora_" in name for name in changed)
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path).eval()
    assert isinstance(loaded.model, PeftModel)
    policy.eval()
    read = Responses.of(rows)
    torch.testing.assert_close(loaded(loaded.pack(read)), policy(policy.pack(read)), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(loaded(loaded.pack(read)), again(again.pack(read)), atol=1e-3)


def test_lora_on_the_head_is_not_skipped(tiny: Path) -> None:
    policy = Policy.load(tiny, lora=Lora(r=2, target_modules="q_proj,lm_head"))
    assert not policy.packed
    rows = Responses.of([Row([4, 5], [[6, 7, 2]])])
    (-policy(policy.pack(rows)).sum()).backward()
    reached = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lm_head" in name for name in reached)


def test_unknown_lora_targets_are_one_line(tiny: Path) -> None:
    with pytest.raises(ValueError, match="--lora: target_modules nothing: no layer is called 'nothing'") as error:
        Policy.load(tiny, lora=Lora(r=2, target_modules="nothing"))
    assert "\n" not in str(error.value)


def test_lora_reward_model_comes_back_with_its_head_and_constants(tiny: Path, tmp_path: Path) -> None:
    model = RewardModel.load(tiny, lora=Lora(r=2), head_seed=5)
    assert model.packed
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    rows = Responses.of([Row([4, 5], [[6, 7, 2], [8, 2]]), Row([9], [[10, 2], [11, 12, 2]])])
    for _ in range(2):
        optimizer.zero_grad()
        chosen, rejected = model(model.pack(rows)).view(-1, 2).unbind(1)
        torch.nn.functional.softplus(rejected - chosen).sum().backward()
        optimizer.step()
    changed = trained_names(model.model, before)
    assert any("lora_" in name for name in changed)
    assert any("score" in name for name in changed)
    assert all("lora_" in name or "score" in name for name in changed)
    model.mean, model.std, model.max_prompt = -1.0, 0.5, 11
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert (again.mean, again.std, again.max_prompt) == (-1.0, 0.5, 11)
    prompts, responses = ["tell me"] * 2, ["a cat", "the big dog ran"]
    model.eval()
    torch.testing.assert_close(again.scores(prompts, responses), model.scores(prompts, responses), atol=1e-6, rtol=1e-6)


def resaved(tiny: Path, folder: Path, **tokens: str | None) -> Path:
    """The tiny model with a tokenizer of other special tokens."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    backend = AutoTokenizer.from_pretrained(tiny).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_a_pad_that_equals_eos_is_handled_with_a_note(tiny: Path, tmp_path: Path, capsys, pad) -> None:
    folder = resaved(tiny, tmp_path / "model", eos_token="<eos>", bos_token="<bos>", pad_token=pad)
    model = RewardModel.load(folder, head_seed=0)
    assert "pads instead" in capsys.readouterr().err
    assert model.model.config.pad_token_id not in (None, 2)
    finished, cut = (model.encode(asked(["tell me"], ["a cat"], finished=done)) for done in (True, False))
    assert finished.ids.tolist() == [*cut.ids.tolist(), 2]
    states = model.model.model(input_ids=torch.tensor([each(finished)[0].ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(model.raw_scores(finished)[0], model.model.score(states)[0], atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "saved")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    encoded = model.encode(asked(["tell me", "tell me about a bird"], ["a cat", "no"]))
    torch.testing.assert_close(
        stock_scores(stock, encoded, side="right"), model.raw_scores(encoded), atol=1e-5, rtol=1e-5
    )


def test_a_tokenizer_with_one_special_token_only_is_enough(tiny: Path, tmp_path: Path) -> None:
    """As that of GPT-2: one token begins, ends and is unknown, and there is none to pad with."""
    folder = resaved(tiny, tmp_path, eos_token="<eos>", bos_token="<eos>", unk_token="<eos>")
    config = AutoTokenizer.from_pretrained(folder)
    assert config.pad_token is None
    model = RewardModel.load(folder, head_seed=0)
    assert model.packed
    encoded = model.encode(asked(["tell me", "tell me about a bird"], ["a cat", "the dog"]))
    padded = model._plain(pack(encoded, padded=True))
    torch.testing.assert_close(model.raw_scores(encoded), padded, atol=1e-5, rtol=1e-5)


def test_a_folder_without_tokenizer_is_one_line(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    for load in (Policy.load, RewardModel.load):
        with pytest.raises(ValueError, match="holds no tokenizer") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


def test_no_model_is_one_line(tiny: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model could be loaded") as error:
        Policy.load(tmp_path)
    assert "\n" not in str(error.value)


def test_an_ensemble_stacks_its_members(tiny: Path, tmp_path: Path) -> None:
    for member in (0, 1, 10, 2):
        RewardModel.load(tiny, head_seed=member).save(tmp_path / f"member_{member}")
    with pytest.raises(ValueError, match="is not done"):
        member_paths(tmp_path)
    (tmp_path / "done.json").write_text("{}")
    assert [path.name for path in member_paths(tmp_path)] == ["member_0", "member_1", "member_2", "member_10"]
    ensemble = RewardEnsemble.load(tmp_path)
    scores = ensemble.scores(["tell me"] * 3, ["a", "the cat", "dog"])
    assert scores.shape == (4, 3)
    torch.testing.assert_close(
        scores[1], RewardModel.load(tmp_path / "member_1").scores(["tell me"] * 3, ["a", "the cat", "dog"])
    )
    assert member_paths(tmp_path / "member_0") == [tmp_path / "member_0"]
    with pytest.raises(ValueError, match="no reward model here"):
        member_paths(tmp_path / "nowhere")


def held(*models: torch.nn.Module) -> int:
    """Bytes of parameters in memory, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for model in models for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_reference_shares_the_trunk_that_is_not_trained(tiny: Path) -> None:
    """Top layers twice, the trunk below once; what is trained afterwards leaves the copy alone."""
    policy = Policy.load(tiny)
    policy.model.base_model.requires_grad_(False)
    policy.model.base_model.layers[-1].requires_grad_(True)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    ref = policy.frozen_copy()
    assert held(policy, ref) == held(policy) + sum(p.nbytes for p in trained.values())
    assert 0.2 < sum(p.nbytes for p in trained.values()) / held(policy) < 0.8
    assert held(policy, Policy.load(tiny).frozen_copy()) == 2 * held(policy)  # all of it trained: a full copy
    assert not any(p.requires_grad for p in ref.parameters())
    rows = Responses.of([Row([1, 5, 6], [[7, 8, 2]])])
    before = ref(ref.pack(rows)).detach()
    torch.testing.assert_close(policy(policy.pack(rows)), before, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.1)
    assert torch.equal(ref(ref.pack(rows)), before)
    assert not torch.equal(policy(policy.pack(rows)), before)


def test_adapters_that_are_trained_on_share_their_base_with_the_reference(tiny: Path, tmp_path: Path) -> None:
    Policy.load(tiny, lora=Lora(r=2)).save(tmp_path / "adapters")
    policy = Policy.load(tmp_path / "adapters")
    assert not policy.reversible
    ref = policy.frozen_copy()
    low = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert held(policy, ref) == held(policy) + low < 1.5 * held(policy)
    rows = Responses.of([Row([1, 5, 6], [[7, 8, 2]])])
    torch.testing.assert_close(ref(ref.pack(rows)), policy(policy.pack(rows)), atol=0, rtol=0)
