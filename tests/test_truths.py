"""When gold is asked, what it costs, and what is left of a measurement that it did not answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reading import drawn
from torch import Tensor

from pyrite.feedback.ledger import GoldLimits
from pyrite.training.evaluation import ALWAYS, Truth

PROMPTS = [{"prompt": "p"}, {"prompt": "q"}, {"prompt": "r"}]
SAID = ["a b", "a", "c", "c d e", "", "e"]
WORDS = [2.0, 1.0, 1.0, 3.0, 0.0, 1.0]


class Words:
    """A scorer that remembers what it was asked, and fails on some texts."""

    def __init__(self, *dumb: str) -> None:
        self.asked: list[tuple[str, str]] = []
        self.dumb = dumb

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        self.asked += zip(prompts, responses, strict=True)
        return torch.tensor([math.nan if y in self.dumb else float(len(y.split())) for y in responses])


def truth(folder: Path, scorer: Words, asking: GoldLimits = ALWAYS) -> Truth:
    account = asking.account(folder, "words()", "score") if asking.counted else None
    return Truth(scorer, "words()", asking, account and replace(account, pace=replace(account.pace, backoff=0.0)))


def ask(made: Truth, step: int, said: list[str] = SAID) -> list[float] | None:
    found = made(drawn(PROMPTS, said, k=2), step=step)
    return None if found is None else found.tolist()


@pytest.mark.parametrize("asking", [ALWAYS, GoldLimits(budget=6), GoldLimits(batch=4, ledger="own.db")])
def test_paid_or_not_the_scores_are_the_same(
    tmp_path: Path, asking: GoldLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scorer = Words()
    made = truth(tmp_path, scorer, asking)
    assert ask(made, 0) == WORDS
    assert len(scorer.asked) == 6
    assert made.spent(0) == ({} if asking == ALWAYS else {"gold_labels": 6})
    assert (tmp_path / "ledger.db").exists() == (asking.budget is not None)
    assert Path("own.db").exists() == (asking.ledger is not None)


def test_only_some_prompts_are_asked_about(tmp_path: Path) -> None:
    scorer = Words()
    found = ask(truth(tmp_path, scorer, GoldLimits(prompts=2)), 0)
    assert found is not None and found[:4] == WORDS[:4] and all(map(math.isnan, found[4:]))
    assert [prompt for prompt, _ in scorer.asked] == ["p", "p", "q", "q"]


@pytest.mark.parametrize("limit", [{"budget": 10}, {"max_cost": 0.5, "cost": 0.05}])
def test_a_measurement_is_bought_whole_or_not_at_all(
    tmp_path: Path, limit: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """6 answers, then 2 new ones beside 4 known; 2 are left, so 3 new ones are too many, and 2 are not."""
    scorer = Words()
    made = truth(tmp_path, scorer, GoldLimits(**limit))  # type: ignore[arg-type]
    new = [["x", "y", *SAID[2:]], ["u", "v", "w", *SAID[3:]], ["u w", *SAID[1:5], "w"]]
    assert ask(made, 0) == WORDS
    assert ask(made, 1, new[0]) == [1.0, 1.0, *WORDS[2:]]
    for step in (2, 3):
        assert ask(made, step, new[1]) is None
    assert ask(made, 4, new[2]) == [2.0, *WORDS[1:5], 1.0]
    assert ask(made, 5, [*SAID[:5], "z"]) is None
    assert ask(made, 6) == WORDS  # all known
    assert len(scorer.asked) == len(set(scorer.asked)) == 10
    assert made.spent(1)["gold_labels"] == 8 and made.spent(9)["gold_labels"] == 10
    assert made.spent(9).get("gold_money", 0.5) == pytest.approx(0.5)
    said = capsys.readouterr().err
    assert said.count("measuring goes on without gold") == 1
    assert "8 answers so far, does not pay for the measurement at step 2" in said


def test_a_run_that_went_back_decides_as_it_did(tmp_path: Path) -> None:
    """Step 1 was refused for 3 answers too many, step 2 bought the last 2; asked again, step 1 is refused again."""
    said = [SAID, ["x", "y", "z", *SAID[3:]], ["x", "y", *SAID[2:]]]
    first = truth(tmp_path, Words(), GoldLimits(budget=8))
    before = [ask(first, step, texts) for step, texts in enumerate(said)]
    again = truth(tmp_path, scorer := Words(), GoldLimits(budget=8))
    assert [ask(again, step, texts) for step, texts in enumerate(said)] == before
    assert before[1] is None and before[2] is not None and not scorer.asked


def test_what_gold_does_not_answer_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(truth(tmp_path, Words("c"), GoldLimits(budget=9)), 0)
    assert found is not None and [math.isnan(value) for value in found] == [False, False, True, False, False, False]
    assert "gave no score to 1 of 6 answers at step 0" in capsys.readouterr().err
    assert ask(truth(tmp_path / "down", Words(*SAID[2:]), GoldLimits(budget=9)), 0) is None  # one prompt has no error
    with pytest.raises(ValueError, match="must be finite"):
        ask(truth(tmp_path, Words("c")), 0)  # nobody pays: an error of the scorer's own


def test_when_it_is_due() -> None:
    made = Truth(Words(), "words()", GoldLimits(every=3))
    assert [made.due(number, over=number == 7) for number in range(8)] == [i in (0, 3, 6, 7) for i in range(8)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("every=0", "every=0: give at least 1"),
        ("prompts=1", "prompts=1: give at least 2"),
        ("batch=0", "batch=0: give at least 1"),
        ("max_cost=3.0", "max_cost=3.0: give cost"),
    ],
)
def test_refusals(options: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^--gold-limits .*{words}"):
        GoldLimits.parse(None, f"limits({options})")


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        GoldLimits(budget=-1).account(tmp_path, "length()", "score")


def test_what_counts_as_sparing() -> None:
    assert not ALWAYS.sparing and not ALWAYS.counted
    assert GoldLimits(every=2).sparing and not GoldLimits(every=2).counted
    assert GoldLimits(cost=1.0).counted and GoldLimits(budget=0).counted
