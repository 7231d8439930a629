"""Values: packed, padded and one by one agree; nothing is read ahead; where they begin, what is trained and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import PACKED, Row, build, random_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pyrite.data.responses import Responses
from pyrite.models import forward
from pyrite.models.forward import score
from pyrite.models.loading import Lora
from pyrite.models.policy import Policy, RewardModel, ValueModel, WithValue

SHAPES = [(4, [3, 5, 1]), (1, [2]), (7, [6, 6])]


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


def one_by_one(model: ValueModel, rows: list[Row]) -> Tensor:
    """The head on the states of each whole text alone."""
    found = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt, *response]])
            states = model.model.base_model(input_ids=ids).last_hidden_state[0]
            scores = model.model.score(states[len(row.prompt) - 1 : -1])[:, 0]
            found.append((scores - model.mean) / model.std)
    return torch.cat(found)


def gradients(model: torch.nn.Module, values: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (values * torch.linspace(0.5, 1.5, len(values))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [*PACKED, "gemma2", "phi", "windowed"])
def test_values_and_gradients_are_those_of_single_texts(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = ValueModel(build(family, classifier=True), tokenizer, mean=0.3, std=2.0), random_rows(SHAPES)
    batch = model.pack(Responses.of(rows))
    assert batch.padded == (family == "gemma2")
    found, expected = model(batch), one_by_one(model, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    mine, other = gradients(model, found), gradients(model, expected)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(mine[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


def test_a_value_has_not_seen_its_token(tiny: Path) -> None:
    model = ValueModel(build("llama", classifier=True), AutoTokenizer.from_pretrained(tiny))
    first, other = (model(model.pack(Responses.of([Row([1, 5, 6], [[7, 8, token]])]))) for token in (9, 10))
    assert torch.equal(first, other)
    moved = model(model.pack(Responses.of([Row([1, 5, 6], [[7, 11, 9]])])))
    assert torch.equal(moved[:2], first[:2]) and (moved[2] - first[2]).abs() > 1e-4


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_one_forward_gives_both(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    policy, rows = Policy(build(family), tokenizer), random_rows(SHAPES)
    both, batch = WithValue(policy), policy.pack(Responses.of(random_rows(SHAPES)))
    logp, values = both(batch)
    torch.testing.assert_close(logp, policy(batch))
    assert not values.any()
    torch.nn.init.normal_(both.head.weight, generator=torch.Generator().manual_seed(0))
    logp, values = both(batch)
    torch.testing.assert_close(both.values(batch), values)
    expected = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt, *response]])
            states = policy.model.base_model(input_ids=ids).last_hidden_state[0]
            expected.append(states[len(row.prompt) - 1 : -1] @ both.head.weight[0])
    torch.testing.assert_close(values, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_a_detached_head_leaves_the_trunk_to_the_policy(detach: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    both = WithValue(Policy(build("llama"), tokenizer), detach=detach)
    torch.nn.init.ones_(both.head.weight)
    moved = gradients(both, both(both.pack(Responses.of(random_rows(SHAPES))))[1])
    assert {name.startswith("head.") for name, gradient in moved.items() if gradient.any()} == (
        {True} if detach else {True, False}
    )


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_it_begins_at_0_from_a_policy_and_at_the_score_from_a_reward_model(
    tiny: Path, tmp_path: Path, lora: Lora | None
) -> None:
    rows = Responses.of([Row([1, 5, 6], [[7, 8, 9, 2], [10, 2]])])
    fresh = ValueModel.load(tiny, lora=lora)
    assert not fresh(fresh.pack(rows)).any()
    reward = RewardModel.load(tiny, head_seed=3, head_std=0.5, lora=lora)
    reward.mean, reward.std = 0.7, 1.9
    reward.save(tmp_path / "reward")
    model = ValueModel.load(tmp_path / "reward")
    found = model(model.pack(rows))[:4]
    prefixes = [Row([1, 5, 6], [[7, 8, 9][:n]]) for n in range(1, 4)]
    expected = torch.cat([(reward(reward.pack(Responses.of([row]))) - 0.7) / 1.9 for row in prefixes])
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=1e-5)
    assert found.abs().max() > 0.05


def test_what_is_trained(tiny: Path) -> None:
    def trained(**options: object) -> set[str]:
        model = ValueModel.load(tiny, **options)  # type: ignore[arg-type]
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert {"model.score.weight", "model.model.norm.weight", "model.model.embed_tokens.weight"} <= trained()
    adapters = trained(lora=Lora(r=2))
    assert adapters and all("lora_" in name or "score" in name for name in adapters)


def test_adapters_are_saved_and_trained_on(tiny: Path, tmp_path: Path) -> None:
    rows = Responses.of([Row([1, 5], [[6, 7], [8, 2]])])
    model = ValueModel.load(tiny, lora=Lora(r=2))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    model.mean = 0.2
    model.save(tmp_path / "value")
    assert (tmp_path / "value" / "adapter_model.safetensors").exists()
    again = ValueModel.load(tmp_path / "value")
    torch.testing.assert_close(again(again.pack(rows)), model(model.pack(rows)))
    names = [{name for name, p in one.named_parameters() if p.requires_grad} for one in (model, again)]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match=r"value has adapters, which are trained on: leave out lora="):
        ValueModel.load(tmp_path / "value", lora=Lora(r=2))


def test_what_it_is_saved_with_is_how_its_reward_model_reads(tiny: Path, tmp_path: Path) -> None:
    reward = RewardModel.load(tiny, head_seed=3, pooling="mean", max_length=40, max_prompt=25)
    reward.save(tmp_path / "reward")
    ValueModel.load(tmp_path / "reward").save(tmp_path / "value")
    again = RewardModel.load(tmp_path / "value")
    assert (again.pooling, again.max_length, again.max_prompt) == ("mean", 40, 25)


def test_saved_and_loaded_it_is_the_same(tiny: Path, tmp_path: Path) -> None:
    rows = Responses.of([Row([1, 5], [[6, 7], [8, 2]])])
    model = ValueModel.load(tiny)
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr,arg-type]
    model.mean, model.std = 0.2, 3.0
    model.save(tmp_path / "value")
    again = ValueModel.load(tmp_path / "value")
    torch.testing.assert_close(again(again.pack(rows)), model(model.pack(rows)))
    both = WithValue(Policy.load(tiny))
    torch.nn.init.normal_(both.head.weight, generator=torch.Generator().manual_seed(1))
    both.save(tmp_path / "both")
    other = WithValue(Policy.load(tmp_path / "both"))
    other.head.load_state_dict(load_file(tmp_path / "both" / "value_head.safetensors"))
    torch.testing.assert_close(other(other.pack(rows)), both(both.pack(rows)))


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_values_of_answers_come_in_their_order(budget: int, tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = ValueModel(build("llama", classifier=True), tokenizer), random_rows(SHAPES)
    read = Responses.of(rows)
    found, lengths = read.padded(score(model, read, read.groups(), budget=budget)), [3, 5, 1, 2, 6, 6]
    flat = torch.cat([row[:length] for row, length in zip(found, lengths, strict=True)])
    torch.testing.assert_close(flat, one_by_one(model, rows).detach(), atol=1e-5, rtol=1e-5)
    assert found.shape == (6, 6) and not found[2, 1:].any() and not found.requires_grad


def test_refusals(tiny: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="reads ahead"):
        ValueModel(build("bert", classifier=True), tokenizer)


def test_a_head_that_reads_more_than_a_state_is_refused_as_such(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "ways", lambda model: forward.Ways(causal=True, head=False))
    with pytest.raises(ValueError, match=r"^LlamaForSequenceClassification has no head that reads one token's state"):
        ValueModel(build("llama", classifier=True), tokenizer)
