"""The judge alone or a discriminator beside it; budgets, the ledger, and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_live import Liar, answers
from torch import Tensor

from pyrite.feedback.judges import bradley_terry
from pyrite.feedback.ledger import Account, GoldLimits
from pyrite.jobs.online import Labeler, Rules

JUDGE = "bradley_terry(gold='length()', hard=True)"
GOLD = bradley_terry(gold="length()", hard=True)


def labeler(folder: Path, *, budget: int | None, live: bool = False, rounds: int = 2, name: str = "run") -> Labeler:
    limits = GoldLimits(budget=budget, ledger=str(folder / "ledger.db"))
    account = limits.account(folder / name, JUDGE, "verdict")
    given = {"rounds": rounds, "budget": budget, "account": account, "annotator": Liar() if live else None}
    return Labeler(GOLD, JUDGE, Rules(), folder / name, **given)


def test_the_judge_alone_until_its_labels_are_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = labeler(tmp_path, budget=3)
    first = made(answers((1, 2), (5, 3)), 0)[1]
    assert (len(first.pairs), first.labels, first.missing) == (2, 2, 0)
    assert not made.spent(0)
    second = made(answers((1, 2), (5, 3), start=5), 1)[1]
    assert (len(second.pairs), second.labels, second.missing) == (1, 1, 1)
    assert made.spent(1)
    assert (
        "the budget is spent after round 2, with 3 labels; there is nothing more to learn from"
        in capsys.readouterr().err
    )
    assert made.account is not None
    assert len(list(made.account.ledger.rows())) == 3


def test_money_runs_out_too(tmp_path: Path) -> None:
    limits = GoldLimits(max_cost=0.05, cost=0.02)
    made = Labeler(GOLD, JUDGE, Rules(), tmp_path, account=limits.account(tmp_path, JUDGE, "verdict"))
    labelled = made(answers((1, 2), (5, 3), (4, 8)), 0)[1]
    assert (labelled.labels, labelled.missing) == (2, 1)
    assert made.spent(0)


def test_silver_goes_on_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = labeler(tmp_path, budget=2, live=True)
    sources = [[p.source for p in made(answers((1, 2), (5, 3), start=10 * n), n)[1].pairs] for n in range(3)]
    assert [row.count("gold") for row in sources] == [1, 1, 0]
    assert [len(row) for row in sources] == [2, 2, 2]
    assert capsys.readouterr().err.count("silver labels go on alone") == 1


def test_two_runs_share_a_ledger_and_pay_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        asked.extend(prompts)
        return GOLD(prompts, a, b)

    some = answers((1, 2), (5, 3))
    for name in ("one", "two"):
        made = labeler(tmp_path, budget=5, name=name)
        made.judge = judge
        assert len(made(some, 0)[1].pairs) == 2
        assert made.used == 2  # a run's own count does not depend on what others have paid
    assert asked == ["p0", "p1"]


def test_a_judge_that_fails_is_retried_and_then_silver(tmp_path: Path) -> None:
    def broken(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        raise OSError("no route")

    made = labeler(tmp_path, budget=2, live=True, rounds=1)
    assert isinstance(made.account, Account)
    made.judge, made.account = broken, _impatient(made.account)
    labelled = made(answers((1, 2), (5, 3)), 0)[1]
    assert [p.source for p in labelled.pairs] == ["silver", "silver"]
    assert (labelled.labels, labelled.missing, made.used) == (0, 2, 0)


def test_what_is_not_paid_for_needs_no_ledger() -> None:
    assert not GoldLimits().counted and not GoldLimits(every=2).counted
    assert GoldLimits(budget=0).counted and GoldLimits(ledger="x").counted
    assert GoldLimits(max_cost=1.0, cost=0.1).counted


def test_measuring_beside_labels_is_free_unless_it_has_a_price() -> None:
    """The budget is for labels, the money for both."""
    free = GoldLimits(budget=9, ledger="x", batch=4, every=2)
    assert free.measuring("length()") == GoldLimits(batch=4, every=2)
    paid = GoldLimits(budget=9, cost=1.0, max_cost=5.0)
    assert paid.measuring("length()") == GoldLimits(cost=1.0, max_cost=5.0)
    assert paid.measuring(None) == GoldLimits()


def test_state_lasts(tmp_path: Path) -> None:
    made = labeler(tmp_path, budget=8, live=True, rounds=4)
    for number in range(3):
        made(answers((1, 2), (5, 3), start=10 * number), number)
        made.save(number + 1)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "silver").glob("*.json"))
    assert kept == ["shelf-2.json", "shelf-3.json"]
    back = labeler(tmp_path, budget=8, live=True, rounds=4)
    back.resume(3, made.used)
    assert back.begun == made.begun and back.pool.texts == made.pool.texts
    assert back.learned.tokens() == made.learned.tokens() and not len(back.fresh)
    assert back.used == made.used == 6


def _impatient(account: Account) -> Account:
    from dataclasses import replace

    return replace(account, pace=replace(account.pace, backoff=0.0))


def test_verdicts_are_checked(tmp_path: Path) -> None:
    made = Labeler(lambda p, a, b: torch.full((len(p),), 7.0), "mine", Rules(), tmp_path)
    with pytest.raises(ValueError, match="mine judged pair 1 as 7"):
        made(answers((1, 2)), 0)
