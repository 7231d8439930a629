"""Silver labels and the gold ones beside them: who is asked, what overrides, what is learned, what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pyrite.feedback import schedules
from pyrite.feedback.judges import bradley_terry
from pyrite.feedback.schedules import Schedule
from pyrite.training.annotators import Better, Live, Rules, Shelf
from pyrite.training.loop import Learner
from pyrite.training.rounds import Answer

GOLD = bradley_terry(gold="length()", hard=True)  # more words are better


@dataclass
class Liar:
    """Thinks that fewer words are better until it has learned; remembers what it was taught."""

    sign: float = -1.0
    members: int = 1
    learns: bool = True
    taught: list[list[Better]] = field(default_factory=list)
    learners: Sequence[Learner] = ()

    def scores(self, answers: Sequence[Answer]) -> Tensor:
        return self.sign * torch.tensor([[len(a.response.split()) for a in answers]] * self.members).float()

    def learn(self, labels: Sequence[Better], *, seed: int) -> dict[str, float]:
        self.taught.append(list(labels))
        self.sign = 1.0 if self.learns else self.sign
        return {"loss": 0.5}


def answer(prompt: str, words: int) -> Answer:
    return Answer(prompt, prompt, " ".join(["x"] * words), True, [1, 5], list(range(3, 3 + words)))


def answers(*sizes: tuple[int, int], start: int = 0) -> list[Answer]:
    """Two answers to each prompt, of so many words."""
    return [answer(f"p{start + i}", n) for i, pair in enumerate(sizes) for n in pair]


def live(schedule: Schedule, *, rounds: int = 4, budget: int | None = None, liar: Liar | None = None) -> Live:
    return Live(liar or Liar(), schedule, Rules(judge="mine"), rounds, budget)


def counting(judge: Callable = GOLD) -> tuple[Callable, list[tuple[str, str]]]:
    asked: list[tuple[str, str]] = []

    def count(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        asked.extend(zip(prompts, a, strict=True))
        return judge(prompts, a, b)

    return count, asked


def test_gold_overrides_silver_and_silver_labels_the_rest() -> None:
    """Margins .9, .1, .5, .3 in words; a budget of 2 goes to the smallest, and their order is gold's."""
    made = live(schedules.even(), budget=8, liar=Liar(learns=False))
    judge, asked = counting()
    judged = made(judge, answers((1, 10), (3, 4), (1, 6), (5, 8)), 0)
    assert [prompt for prompt, _ in asked] == ["p1", "p3"]
    by_prompt = {judged.answers[p.chosen].prompt_id: p for p in judged.labelled.pairs}
    longer = {
        name: len(judged.answers[p.chosen].response) > len(judged.answers[p.rejected].response)
        for name, p in by_prompt.items()
    }
    assert longer == {"p0": False, "p1": True, "p2": False, "p3": True}
    assert [by_prompt[name].source for name in ("p0", "p1", "p2", "p3")] == ["silver", "gold", "silver", "gold"]
    assert judged.labelled.labels == 2
    assert judged.found["gold_pairs"] == judged.found["silver_pairs"] == 2


def test_silver_comes_from_after_learning() -> None:
    for learns, longer in ((True, 4), (False, 1)):
        made = live(schedules.even(), budget=4, liar=Liar(learns=learns))
        judged = made(GOLD, answers((1, 10), (3, 4), (1, 6), (5, 8)), 0)
        pairs = [(judged.answers[p.chosen], judged.answers[p.rejected]) for p in judged.labelled.pairs]
        assert sum(len(a.response) > len(b.response) for a, b in pairs) == longer
        assert judged.found["reward_loss"] == 0.5


def test_a_budget_of_everything_is_the_judge_alone() -> None:
    drawn = answers((1, 10), (3, 4), (6, 1), (5, 8))
    pairs = live(schedules.even(), budget=None)(GOLD, drawn, 0).labelled.pairs
    assert all(p.source == "gold" for p in pairs)
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 0), (3, 2), (4, 5), (7, 6)]


def test_a_budget_of_nothing_is_the_discriminator_alone() -> None:
    for schedule, budget in ((schedules.never(), None), (schedules.even(), 0)):
        judge, asked = counting()
        liar = Liar()
        pairs = live(schedule, budget=budget, liar=liar)(judge, answers((1, 10), (4, 3)), 0).labelled.pairs
        assert asked == [] and liar.taught == []
        assert [(p.chosen, p.rejected, p.source) for p in pairs] == [(0, 1, "silver"), (3, 2, "silver")]


def test_strength_is_the_discriminator_s_log_odds() -> None:
    pairs = live(schedules.never())(GOLD, answers((1, 3), (2, 9)), 0).labelled.pairs
    assert [p.strength for p in pairs] == pytest.approx([2.0, 7.0], abs=1e-5)


def test_a_gold_tie_is_paid_and_teaches_nothing() -> None:
    made = live(schedules.even(), budget=8, rounds=1)
    judged = made(lambda p, a, b: torch.full((len(p),), 0.5), answers((1, 10), (3, 4)), 0)
    assert judged.labelled.labels == made.shelf.used == 2
    assert judged.labelled.ties == 2
    assert made.discriminator.taught == []  # type: ignore[attr-defined]
    assert judged.labelled.pairs == []


def test_no_verdict_leaves_the_pair_silver_and_costs_no_label() -> None:
    made = live(schedules.even(), budget=8, rounds=1)
    judged = made(lambda p, a, b: torch.full((len(p),), math.nan), answers((1, 10), (3, 4)), 0)
    assert (judged.labelled.labels, judged.labelled.missing, made.shelf.used) == (0, 2, 0)
    assert [p.source for p in judged.labelled.pairs] == ["silver", "silver"]


def test_equal_answers_are_neither_asked_about_nor_pairs() -> None:
    judge, asked = counting()
    judged = live(schedules.even())(judge, answers((4, 4), (3, 4)), 0)
    assert len(asked) == len(judged.labelled.pairs) == judged.labelled.ties == 1


@pytest.mark.parametrize(("window", "bought"), [(1, "p11"), (2, "p2")])
def test_pairs_of_the_whole_window_compete(window: int, bought: str) -> None:
    """Of what the first round left, p2 is closer than all of the second round's pairs."""
    made = live(schedules.even(window=window), budget=4)
    judge, asked = counting()
    made(judge, answers((1, 10), (4, 5), (1, 9)), 0)
    judged = made(judge, answers((1, 30), (1, 20), start=10), 1)
    assert [prompt for prompt, _ in asked] == ["p1", bought]
    sources = {judged.answers[p.chosen].prompt_id: p.source for p in judged.labelled.pairs}
    assert sources == {"p10": "silver", "p11": "silver", bought: "gold"}  # of earlier pairs only those just bought
    assert len(made.shelf.pool) == (0 if window == 1 else 2)  # p0 is too old for a third round, whatever the window


def test_replay_brings_back_earlier_labels() -> None:
    for replay, sizes in ((0.0, [2, 2, 2]), (1.0, [2, 4, 4]), (math.inf, [2, 4, 6])):
        liar = Liar()
        made = live(schedules.even(replay=min(replay, 1e9)), budget=8, liar=liar)
        for number in range(3):
            made(GOLD, answers((1, 10), (3, 4), (1, 6), start=10 * number), number)
        assert [len(labels) for labels in liar.taught] == sizes
        assert all(len(a.response) > len(b.response) for labels in liar.taught for a, b in labels)
        last = {a.prompt_id for a, _ in liar.taught[2]}
        assert (len([name for name in last if int(name[1:]) < 20]) > 0) == (replay > 0)


def test_the_shelf_comes_back_from_disk() -> None:
    made = live(schedules.even(window=3), budget=4)
    for number in range(2):
        made(GOLD, answers((1, 10), (3, 4), start=10 * number), number)
    back = Shelf.read(json.loads(json.dumps(made.shelf.rows())))
    assert back == made.shelf
    assert back.learned and back.pool and back.used == 2
