"""Rewards of preferences: one score for every option of a row, of the raw prompt with that option, made one."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import drawn
from torch import Tensor

from pyrite.data.conditioning import Dimensions, Option, conditioned, render
from pyrite.data.responses import Responses
from pyrite.models.policy import Lora, RewardModel
from pyrite.training import ppo
from pyrite.training.ppo import Objectives, Reward, combined, gold_scorers, model_scorers, scored

ALONG = Dimensions(
    (
        Option("long", "size", "tell me a big", "Which is longer?", gold="length()"),
        Option(
            "small", "size", "a small", "Which is shorter?", gold="weighted_sum(golds=['length()'], weights=[-1.0])"
        ),
        Option("cat", "animal", "about the cat", "Which has cats?", gold="word_collector(words=['cat'])"),
        Option("dog", "animal", "about the dog", "Which has dogs?", gold="word_collector(words=['dog'])"),
        Option("red", "color", "in red", "Which is redder?", gold="word_collector(words=['red'])"),
    )
)
OPTIONS = [["long"], ["small", "cat"], ["long", "dog", "red"], ["dog"]]
SAID = ["a cat", "the red dog sat", "cat and dog", "a dog ran"]


def answers(said: list[str] = SAID, *, finished: bool = True) -> Responses:
    rows = [conditioned({"prompt_id": i, "prompt": "please"}, ALONG.chosen(ids)) for i, ids in enumerate(OPTIONS)]
    return drawn(rows, said, finished=finished)


def fixed(scores: list[float]) -> Objectives:
    """Scores that are given, of the options long, cat and red."""
    scorers = {
        id: lambda some, value=value: torch.full((len(some),), value)
        for id, value in zip(("long", "cat", "red"), scores, strict=True)
    }
    return Objectives(ALONG, scorers)


def test_examples() -> None:
    result = doctest.testmod(ppo, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_worked_numbers() -> None:
    """Scores (1.0, -0.5, 2.0): mean 0.8333, by weights (.5, .25, .25) 0.875, worst -0.5."""
    scores = torch.tensor([[1.0], [-0.5], [2.0]])
    assert combined(scores).item() == pytest.approx(0.8333, abs=1e-4)
    assert combined(scores, how="weighted", weights=torch.tensor([0.5, 0.25, 0.25])).item() == pytest.approx(0.875)
    assert combined(scores, how="min").item() == -0.5
    row = drawn([{"prompt_id": "x", "prompt": "p", "asked": "p", "preferences": ["long", "cat", "red"]}], ["y"])
    every = fixed([1.0, -0.5, 2.0])
    assert every.combine(every.score(row)).item() == pytest.approx(0.8333, abs=1e-4)
    weights = {"long": 0.5, "cat": 0.25, "red": 0.25}
    every = Objectives(ALONG, every.scorers, "weighted", weights)
    assert every.combine(every.score(row)).item() == pytest.approx(0.875)


def test_absent_options_do_not_count() -> None:
    """However many options a row has, the others change nothing: not a third of one, not a zero."""
    gaps = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [3.0, -2.0]])
    assert combined(gaps).tolist() == [2.0, -2.0]
    assert combined(gaps, how="min").tolist() == [1.0, -2.0]
    assert combined(gaps, how="weighted", weights=torch.tensor([3.0, 9.0, 1.0])).tolist() == [1.5, -2.0]


def test_exact_golds_score_each_row_by_its_options() -> None:
    reward = Reward.of_preferences(None, ALONG)
    found = scored([reward], answers())
    nan = math.nan
    expected = [[2, nan, 3, nan], [nan, -4, nan, nan], [nan, 0, nan, nan], [nan, nan, 1, 1], [nan, nan, 0, nan]]
    torch.testing.assert_close(found.members["preferences"], torch.tensor(expected), equal_nan=True)
    torch.testing.assert_close(found.total, torch.tensor([2, -2, 4 / 3, 1]))
    summary = found.summary()
    assert summary["preferences mean"] == pytest.approx((2 - 2 + 4 / 3 + 1) / 4)
    assert {name: summary[f"preferences {name}"] for name in ALONG.ids} == {
        "long": 2.5,
        "small": -4.0,
        "cat": 0.0,
        "dog": 1.0,
        "red": 0.0,
    }
    assert not any("variance" in name or "member" in name for name in summary)


def test_the_reward_depends_on_the_answer() -> None:
    reward = Reward.of_preferences(None, ALONG)
    totals = [scored([reward], answers(said)).total for said in (SAID, ["a", "the", "sat on", "ran"])]
    assert (totals[0] != totals[1]).all()


def saved(tiny: Path, folder: Path, *, seed: int, mean: float, std: float, lora: Lora | None = None) -> str:
    model = RewardModel.load(tiny, head_seed=seed, head_std=0.5, lora=lora)
    model.mean, model.std = mean, std
    model.save(folder)
    return str(folder)


def one_by_one(models: dict[str, RewardModel], some: Responses) -> Tensor:
    """Each score by a call of its own: standardized, of the raw prompt with one option."""
    table = torch.full((len(ALONG.ids), len(some)), math.nan)
    for e, id in enumerate(ALONG.ids):
        for n, row in enumerate(some.owners):
            if id in row["preferences"]:
                prompt = render("please", [ALONG.option(id)])
                table[e, n] = models[id].scores([prompt], [some.texts[n]], finished=bool(some.finished[n]))[0]
    return table


@pytest.mark.parametrize("finished", [True, False])
def test_one_conditioned_model_for_all(tiny: Path, tmp_path: Path, finished: bool) -> None:
    folder = saved(tiny, tmp_path / "reward", seed=1, mean=0.3, std=2.0)
    some = answers(finished=finished)
    reward = Reward.of_preferences(folder, ALONG)
    model = RewardModel.load(folder)
    expected = one_by_one(dict.fromkeys(ALONG.ids, model), some)
    torch.testing.assert_close(reward.score(some), expected, equal_nan=True, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored([reward], some).total, expected.nanmean(0), atol=1e-5, rtol=1e-5)
    other = reward.score(answers(["on", "big blue", "in a tree", "sang"], finished=finished))
    assert (other != expected)[~expected.isnan()].all()


def test_a_row_of_one_option_is_scored_as_by_the_reward_run(tiny: Path, tmp_path: Path) -> None:
    """P-Soups: the policy read the very prompt that the model is asked about."""
    folder = saved(tiny, tmp_path / "reward", seed=1, mean=0.3, std=2.0)
    single = answers().take([n for n, row in enumerate(answers().owners) if len(row["preferences"]) == 1])
    both = [
        scored([reward], single).total for reward in (Reward.of_models(folder), Reward.of_preferences(folder, ALONG))
    ]
    torch.testing.assert_close(both[0], both[1])


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["whole", "adapters"])
def test_a_model_for_each_preference(tiny: Path, tmp_path: Path, lora: Lora | None) -> None:
    folders = {
        id: saved(tiny, tmp_path / id, seed=i, mean=float(i), std=1.0 + i, lora=lora) for i, id in enumerate(ALONG.ids)
    }
    models = {id: RewardModel.load(folder) for id, folder in folders.items()}
    reward = Reward.of_preferences(folders, ALONG)
    torch.testing.assert_close(
        reward.score(answers()), one_by_one(models, answers()), equal_nan=True, atol=1e-5, rtol=1e-5
    )
    del folders["red"]
    some = Reward.of_preferences(folders, ALONG)
    assert some.objectives == ("long", "small", "cat", "dog")
    with pytest.raises(ValueError, match=r"prompt .*: nothing scores red; there is long, small, cat, dog"):
        some.score(answers())


def prompts(*preferences: list[str]) -> list[dict[str, Any]]:
    return [{"prompt_id": i, "prompt": "p", "asked": "p", "preferences": p} for i, p in enumerate(preferences)]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"prompt_id": "q", "prompt": "p"}, "prompt q has no preferences to be rewarded for; --dimensions"),
    ({}, {"prompt_id": "q", "prompt": "p", "preferences": ["cat"]}, "prompt q has no preferences"),
    ({}, {"prompt_id": "q", "asked": "p", "preferences": []}, "prompt q has no preferences"),
    (
        {},
        {"prompt_id": "q", "asked": "p", "preferences": ["car"]},
        "prompt q: unknown preference 'car': did you mean cat",
    ),
    ({}, {"prompt_id": "q", "asked": "p", "preferences": ["cat", "dog"]}, "prompt q: .*cat and dog are both of animal"),
    ({"combine": "weighted", "weights": {"cat": 1.0}}, prompts(["cat", "red"])[0], "prompt 0: no weight for red"),
    ({"combine": "weighted", "weights": {"cat": 0.0}}, prompts(["cat"])[0], "prompt 0: cat weigh nothing"),
]


@pytest.mark.parametrize(("options", "row", "words"), BAD, ids=[words for _, _, words in BAD])
def test_prompts_that_cannot_be_rewarded_are_refused_before_work(
    options: dict[str, Any], row: dict[str, Any], words: str
) -> None:
    reward = Reward.of_preferences(None, ALONG, **options)
    reward.check(prompts(["cat"]) if not options else [])
    with pytest.raises(ValueError, match=words):
        reward.check([*prompts(["cat"])[: not options], row])


def test_other_rewards_check_nothing() -> None:
    Reward.of_scorer("length()").check([{"prompt_id": "q", "prompt": "p"}])


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mean, weighted or min, not 'sum'"):
        Reward.of_preferences(None, ALONG, combine="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give weights to weighted"):
        Reward.of_preferences(None, ALONG, combine="weighted")
    with pytest.raises(ValueError, match="give weights to weighted"):
        Reward.of_preferences(None, ALONG, weights={"cat": 1.0})
    with pytest.raises(ValueError, match="unknown preference 'cats': did you mean cat"):
        Reward.of_preferences(None, ALONG, combine="weighted", weights={"cats": 1.0})
    with pytest.raises(ValueError, match="weight of cat is -1"):
        Reward.of_preferences(None, ALONG, combine="weighted", weights={"cat": -1.0})
    with pytest.raises(ValueError, match="has a gold; give reward runs"):
        gold_scorers(Dimensions.load("soups"))
    with pytest.raises(ValueError, match="no reward model here"):
        model_scorers(str(tmp_path), ALONG)
    with pytest.raises(ValueError, match="unknown preference 'x'"):
        model_scorers({"x": str(tmp_path)}, ALONG)


def test_a_score_that_is_not_finite_is_refused() -> None:
    """A gap says that a row lacks an option; a NaN of a scorer is no gap."""
    broken = Objectives(ALONG, {"long": lambda some: torch.full((len(some),), math.nan)})
    with pytest.raises(ValueError, match="the reward of long"):
        broken.score(answers().take([0]))
