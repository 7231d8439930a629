"""Silver labels and the gold ones beside them: who is asked, what overrides, what is learned, what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from reading import drawn
from torch import Tensor

from pyrite.data.responses import Responses
from pyrite.feedback.judges import bradley_terry
from pyrite.feedback.pairing import Labelled, Pair
from pyrite.jobs.online import Labeler, Rules
from pyrite.training.loop import Learner

GOLD = bradley_terry(gold="length()", hard=True)  # more words are better


@dataclass
class Liar:
    """Thinks that fewer words are better until it has learned; remembers what it was taught."""

    sign: float = -1.0
    members: int = 1
    learns: bool = True
    taught: list[Responses] = field(default_factory=list)
    learners: Sequence[Learner] = ()
    schedule: str = "even()"

    def scores(self, answers: Responses) -> Tensor:
        return self.sign * torch.tensor([[len(said.split()) for said in answers.texts]] * self.members).float()

    def learn(self, labels: Responses, *, seed: int) -> dict[str, float]:
        self.taught.append(labels)
        self.sign = 1.0 if self.learns else self.sign
        return {"loss": 0.5}


def answers(*sizes: tuple[int, int], start: int = 0) -> Responses:
    """Two answers to each prompt, of so many words."""
    rows = [{"prompt_id": f"p{start + i}", "prompt": f"p{start + i}"} for i in range(len(sizes))]
    return drawn(rows, [" ".join(["x"] * n) for pair in sizes for n in pair], k=2)


def live(schedule: str, *, rounds: int = 4, budget: int | None = None, liar: Liar | None = None) -> Labeler:
    liar = liar or Liar()
    liar.schedule = schedule
    return Labeler(GOLD, "mine", Rules(), Path("none"), rounds=rounds, budget=budget, annotator=liar)


def labeled(made: Labeler, judge: Callable, some: Responses, number: int) -> tuple[Responses, Labelled, dict]:
    made.judge = judge
    return made(some, number)


def longer(some: Responses, pairs: Sequence[Pair]) -> dict[str, bool]:
    """By the prompt of each pair, whether the chosen answer is the longer one."""
    return {some.owners[p.chosen]["prompt_id"]: len(some.texts[p.chosen]) > len(some.texts[p.rejected]) for p in pairs}


def counting(judge: Callable = GOLD) -> tuple[Callable, list[tuple[str, str]]]:
    asked: list[tuple[str, str]] = []

    def count(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        asked.extend(zip(prompts, a, strict=True))
        return judge(prompts, a, b)

    return count, asked


def test_gold_overrides_silver_and_silver_labels_the_rest() -> None:
    """Margins .9, .1, .5, .3 in words; a budget of 2 goes to the smallest, and their order is gold's."""
    made = live("even()", budget=8, liar=Liar(learns=False))
    judge, asked = counting()
    some, labelled, found = labeled(made, judge, answers((1, 10), (3, 4), (1, 6), (5, 8)), 0)
    assert [prompt for prompt, _ in asked] == ["p1", "p3"]
    assert longer(some, labelled.pairs) == {"p0": False, "p1": True, "p2": False, "p3": True}
    sources = {some.owners[p.chosen]["prompt_id"]: p.source for p in labelled.pairs}
    assert [sources[name] for name in ("p0", "p1", "p2", "p3")] == ["silver", "gold", "silver", "gold"]
    assert labelled.labels == 2
    assert found["gold_pairs"] == found["silver_pairs"] == 2


def test_silver_comes_from_after_learning() -> None:
    for learns, many in ((True, 4), (False, 1)):
        made = live("even()", budget=4, liar=Liar(learns=learns))
        some, labelled, found = made(answers((1, 10), (3, 4), (1, 6), (5, 8)), 0)
        assert sum(longer(some, labelled.pairs).values()) == many
        assert found["reward_loss"] == 0.5


def test_a_budget_of_everything_is_the_judge_alone() -> None:
    pairs = live("even()", budget=None)(answers((1, 10), (3, 4), (6, 1), (5, 8)), 0)[1].pairs
    assert all(p.source == "gold" for p in pairs)
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 0), (3, 2), (4, 5), (7, 6)]


def test_a_schedule_of_your_own_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from pyrite.feedback.schedules import even\nprint('read')\n\ndef my_even():\n    return even()\n"
    )
    monkeypatch.chdir(tmp_path)
    made = live("mine.py:my_even()", rounds=3, budget=3)
    (tmp_path / "mine.py").unlink()
    assert [made(answers((1, 2), (3, 4), start=2 * i), i)[1].labels for i in range(3)] == [1, 1, 1]


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    made = Labeler(GOLD, "mine", Rules(), tmp_path, rounds=2, annotator=Liar())
    made(answers((1, 2), (3, 4)), 0)
    made.save(1)
    shelf = tmp_path / "checkpoints" / "silver" / "shelf-1.json"
    kept = json.loads(shelf.read_text())
    del kept["begun"]
    shelf.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"shelf-1.json: an earlier version wrote it, .*; choose another --out"):
        made.resume(1, 0)


def test_preferences_that_a_prompt_was_asked_under_are_kept_for_later_rounds(tmp_path: Path) -> None:
    some = answers((1, 2), (3, 4))
    rows = [{**row, "asked": "Tell.", "preferences": ["P1A"]} for row in some.rows]
    made = Labeler(GOLD, "mine", Rules(), tmp_path, rounds=2, budget=2, annotator=Liar())
    made(replace(some, rows=rows), 0)
    made.save(1)
    back = Labeler(GOLD, "mine", Rules(), tmp_path, rounds=2, budget=2, annotator=Liar())
    back.resume(1, made.used)
    for name in ("learned", "fresh", "pool"):
        assert getattr(back, name).owners == getattr(made, name).owners
    assert back.learned.owners[0]["preferences"] == ["P1A"]


def test_a_budget_of_nothing_is_the_discriminator_alone() -> None:
    for schedule, budget in (("never()", None), ("even()", 0)):
        judge, asked = counting()
        liar = Liar()
        pairs = labeled(live(schedule, budget=budget, liar=liar), judge, answers((1, 10), (4, 3)), 0)[1].pairs
        assert asked == [] and liar.taught == []
        assert [(p.chosen, p.rejected, p.source) for p in pairs] == [(0, 1, "silver"), (3, 2, "silver")]


def test_strength_is_the_discriminator_s_log_odds() -> None:
    pairs = live("never()")(answers((1, 3), (2, 9)), 0)[1].pairs
    assert [p.strength for p in pairs] == pytest.approx([2.0, 7.0], abs=1e-5)


def test_a_gold_tie_is_paid_and_teaches_nothing() -> None:
    made = live("even()", budget=8, rounds=1)
    labelled = labeled(made, lambda p, a, b: torch.full((len(p),), 0.5), answers((1, 10), (3, 4)), 0)[1]
    assert labelled.labels == made.used == 2
    assert labelled.ties == 2
    assert made.annotator.taught == []  # type: ignore[union-attr]
    assert labelled.pairs == []


def test_no_verdict_leaves_the_pair_silver_and_costs_no_label() -> None:
    made = live("even()", budget=8, rounds=1)
    labelled = labeled(made, lambda p, a, b: torch.full((len(p),), math.nan), answers((1, 10), (3, 4)), 0)[1]
    assert (labelled.labels, labelled.missing, made.used) == (0, 2, 0)
    assert [p.source for p in labelled.pairs] == ["silver", "silver"]


def test_equal_answers_are_neither_asked_about_nor_pairs() -> None:
    judge, asked = counting()
    labelled = labeled(live("even()"), judge, answers((4, 4), (3, 4)), 0)[1]
    assert len(asked) == len(labelled.pairs) == labelled.ties == 1


@pytest.mark.parametrize(("window", "bought"), [(1, "p11"), (2, "p2")])
def test_pairs_of_the_whole_window_compete(window: int, bought: str) -> None:
    """Of what the first round left, p2 is closer than all of the second round's pairs."""
    made = live(f"even(window={window})", budget=4)
    judge, asked = counting()
    made.judge = judge
    made(answers((1, 10), (4, 5), (1, 9)), 0)
    some, labelled, _ = made(answers((1, 30), (1, 20), start=10), 1)
    assert [prompt for prompt, _ in asked] == ["p1", bought]
    sources = {some.owners[p.chosen]["prompt_id"]: p.source for p in labelled.pairs}
    assert sources == {"p10": "silver", "p11": "silver", bought: "gold"}  # of earlier pairs only those just bought
    assert (
        len(made.begun) == len(made.pool) / 2 == (0 if window == 1 else 2)
    )  # p0 is too old for a third round, whatever the window


def test_replay_brings_back_earlier_labels() -> None:
    for replay, sizes in ((0.0, [2, 2, 2]), (1.0, [2, 4, 4]), (math.inf, [2, 4, 6])):
        liar = Liar()
        made = live(f"even(replay={min(replay, 1e9)})", budget=8, liar=liar)
        for number in range(3):
            made(answers((1, 10), (3, 4), (1, 6), start=10 * number), number)
        assert [len(labels) / 2 for labels in liar.taught] == sizes
        pairs = [pair for labels in liar.taught for pair in zip(labels.texts[::2], labels.texts[1::2], strict=True)]
        assert all(len(better) > len(worse) for better, worse in pairs)
        last = {row["prompt_id"] for row in liar.taught[2].owners}
        assert (len([name for name in last if int(name[1:]) < 20]) > 0) == (replay > 0)


def test_what_lasts_comes_back_from_disk(tmp_path: Path) -> None:
    made, back = (replace(live("even(window=3)", budget=4), folder=tmp_path) for _ in range(2))
    for number in range(2):
        made(answers((1, 10), (3, 4), start=10 * number), number)
    made.save(2)
    back.resume(2, made.used)
    assert back.used == made.used == 2 and back.begun == made.begun
    for ours, theirs in ((made.learned, back.learned), (made.fresh, back.fresh), (made.pool, back.pool)):
        assert (ours.owners, ours.asked(), ours.texts) == (theirs.owners, theirs.asked(), theirs.texts)
        assert ours.tokens() == theirs.tokens() and torch.equal(ours.finished, theirs.finished)
    assert len(back.learned) and len(back.pool)
