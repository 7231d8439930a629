"""Members of an ensemble share what they have in common, and score exactly as they do apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from pyrite.models.loading import Lora, beside, one_trunk
from pyrite.models.policy import RewardEnsemble, RewardModel


def trained_member(tiny: Path, folder: Path, *, seed: int, **options) -> Path:
    """A reward model whose every weight that is trained has moved, saved with constants of its own."""
    model = RewardModel.load(tiny, head_seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.mean, model.std = 0.1 * seed, 1.0 + seed
    model.save(folder)
    return folder


def storages(models: list[RewardModel]) -> int:
    """Elements in memory, what several models share counted once."""
    distinct = {parameter.data_ptr(): parameter.numel() for model in models for parameter in model.parameters()}
    return sum(distinct.values())


PROMPTS = ["tell me", "tell me", "tell me about a bird"]
RESPONSES = ["a cat", "the big dog ran", "no"]


def finished_run(folder: Path) -> Path:
    (folder / "done.json").write_text("{}")
    return folder


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_members_that_differ_in_their_heads_run_their_trunk_once(tiny: Path, tmp_path: Path, pooling) -> None:
    for seed in range(4):
        model = RewardModel.load(tiny, head_seed=seed, head_std=1.0, pooling=pooling)
        model.mean, model.std = 0.1 * seed, 1.0 + seed
        model.save(tmp_path / f"member_{seed}")
    ensemble = RewardEnsemble.load(finished_run(tmp_path))
    apart = [RewardModel.load(tmp_path / f"member_{seed}") for seed in range(4)]
    head = sum(p.numel() for p in apart[0].model.score.parameters())
    assert storages(ensemble.members) == storages(apart[:1]) + 3 * head
    calls: list[int] = []
    ensemble.members[0].model.model.register_forward_hook(lambda *_: calls.append(1))
    scores = ensemble.scores(PROMPTS, RESPONSES, finished=[True, False, True])
    assert len(calls) == 1
    want = torch.stack([member.scores(PROMPTS, RESPONSES, finished=[True, False, True]) for member in apart])
    torch.testing.assert_close(scores, want, atol=1e-6, rtol=1e-6)
    assert (scores[0] - scores[1]).abs().max() > 0.01


def test_lora_members_share_their_base(tiny: Path, tmp_path: Path) -> None:
    for seed in range(3):
        trained_member(tiny, tmp_path / f"member_{seed}", seed=seed, lora=Lora(r=2))
    ensemble = RewardEnsemble.load(finished_run(tmp_path))
    apart = [RewardModel.load(tmp_path / f"member_{seed}") for seed in range(3)]
    added = sum(p.numel() for p in apart[0].parameters() if p.requires_grad)
    assert storages(ensemble.members) == storages(apart[:1]) + 2 * added
    want = torch.stack([member.scores(PROMPTS, RESPONSES) for member in apart])
    torch.testing.assert_close(ensemble.scores(PROMPTS, RESPONSES), want, atol=1e-6, rtol=1e-6)
    assert (want[0] - want[1]).abs().max() > 0.01
    for index in (2, 0, 1):  # by itself each member is still its own
        torch.testing.assert_close(ensemble.members[index].scores(PROMPTS, RESPONSES), want[index])
    with pytest.raises(ValueError, match="shares its base with 2 others"):
        ensemble.members[1].save(tmp_path / "again")


def test_members_of_other_trunks_stay_apart(tiny: Path, tmp_path: Path) -> None:
    trained_member(tiny, tmp_path / "member_0", seed=0)
    trained_member(tiny, tmp_path / "member_1", seed=1)
    trained_member(tiny, tmp_path / "member_2", seed=2, lora=Lora(r=2))
    ensemble = RewardEnsemble.load(finished_run(tmp_path))
    apart = [RewardModel.load(tmp_path / f"member_{seed}") for seed in range(3)]
    assert storages(ensemble.members) == storages(apart)
    want = torch.stack([member.scores(PROMPTS, RESPONSES) for member in apart])
    torch.testing.assert_close(ensemble.scores(PROMPTS, RESPONSES), want, atol=1e-6, rtol=1e-6)


def test_members_that_read_differently_are_scored_one_by_one(tiny: Path, tmp_path: Path) -> None:
    for seed, limit in enumerate((5, 30)):
        RewardModel.load(tiny, head_seed=seed, max_length=limit).save(tmp_path / f"member_{seed}")
    ensemble = RewardEnsemble.load(finished_run(tmp_path))
    want = torch.stack([RewardModel.load(tmp_path / f"member_{seed}").scores(PROMPTS, RESPONSES) for seed in (0, 1)])
    torch.testing.assert_close(ensemble.scores(PROMPTS, RESPONSES), want, atol=1e-6, rtol=1e-6)


def test_members_of_an_encoder_are_scored_padded(tiny: Path, tmp_path: Path) -> None:
    build("bert", classifier=True).save_pretrained(tmp_path / "bert")
    backend = AutoTokenizer.from_pretrained(tiny).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", cls_token="<bos>", sep_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    for seed in (0, 1):
        RewardModel.load(tmp_path / "bert", head_seed=seed).save(tmp_path / f"member_{seed}")
    ensemble = RewardEnsemble.load(finished_run(tmp_path))
    want = torch.stack([RewardModel.load(tmp_path / f"member_{seed}").scores(PROMPTS, RESPONSES) for seed in (0, 1)])
    torch.testing.assert_close(ensemble.scores(PROMPTS, RESPONSES), want, atol=1e-6, rtol=1e-6)


def test_only_what_is_equal_is_shared(tiny: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        RewardModel.load(tiny, head_seed=seed).save(tmp_path / f"{seed}")
    first, second = (RewardModel.load(tmp_path / f"{seed}").model for seed in (0, 1))
    assert not one_trunk([first, second])
    found = beside(first, tmp_path / "1")
    assert found is not None
    twin, adapter = found
    assert adapter is None
    assert one_trunk([first, twin])
    assert torch.equal(twin.score.weight, second.score.weight)
    assert not torch.equal(twin.score.weight, first.score.weight)
    assert beside(first, tiny) is None  # no classifier
    assert beside(first, tmp_path) is None  # no model
    config = AutoConfig.from_pretrained(tmp_path / "1")
    config.rms_norm_eps *= 10  # the same weights, another function of them
    config.save_pretrained(tmp_path / "1")
    assert beside(first, tmp_path / "1") is None


def test_adapters_of_another_base_stay_apart(tiny: Path, tmp_path: Path) -> None:
    model = RewardModel.load(tiny, head_seed=0, lora=Lora(r=2))
    RewardModel.load(tiny, head_seed=0).save(tmp_path / "plain")
    RewardModel.load(tmp_path / "plain", lora=Lora(r=2)).save(tmp_path / "other")
    assert beside(model.model, tmp_path / "other") is None
    assert beside(model.model, tmp_path / "plain") is None
    assert not one_trunk([model.model, model.model])
