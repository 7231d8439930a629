"""The table of answers: worked sums, money at risk, and what a killed process leaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from asking import SERVER

from pyrite.feedback import ledger
from pyrite.feedback.judges.llm import Answers, Kept, Outcome, Question, Tally
from pyrite.feedback.judges.questions import Case
from pyrite.feedback.ledger import Ledger, LedgerError

QUESTIONS = [Question(f"k{i}", "m", "brevity", Case("p", f"a{i}", f"b{i}")) for i in range(4)]


def test_worked_sums(tmp_path: Path) -> None:
    with Answers(tmp_path / "j.db") as answers:
        one, two, three, four = QUESTIONS
        assert [answers.intend(question, risk=1.0, limit=None) for question in QUESTIONS] == ["ask"] * 4
        assert answers.tally() == Tally(requests=4, at_risk=4.0)
        paid = {"prompt_tokens": 10, "completion_tokens": 2, "cost": 0.25, "released": 1.0}
        answers.settle({one.key: Outcome("answered", "A", 1.0, "A", **paid)})
        answers.settle({two.key: Outcome("open", None, None, "hm", "no verdict", unusable=1, **paid)})
        answers.settle({three.key: Outcome("open", error="cut", lost=1)})
        answers.settle({four.key: Outcome("failed", error="500", released=1.0)})
        assert answers.tally() == Tally(1, 0, 1, 4, 1, 1, 20, 4, 0.5, 1.0)
        assert answers.spent() == 1.5
        assert answers.intend(one, risk=1.0, limit=None) == "known"
        assert answers.intend(two, risk=1.0, limit=2.4) == "broke"
        assert answers.intend(two, risk=1.0, limit=2.5) == "ask"
        answers.settle({two.key: Outcome("answered", None, None, "hm", **paid)})
        assert answers.tally([two.key]) == Tally(0, 1, 0, 2, 1, 0, 20, 4, 0.5, 0.0)
        assert answers.find(["k0", "k1", "k2", "nothing"]) == {"k0": Kept("A", 1.0, "A"), "k1": Kept(None, None, "hm")}
        assert answers.rows()[2]["error"] == "cut"
    assert "m      brevity    2        1           1" in ledger.show(tmp_path / "j.db")


def test_another_process_s_question_is_not_asked(tmp_path: Path) -> None:
    with Answers(tmp_path / "j.db") as mine, Answers(tmp_path / "j.db") as other:
        assert other.intend(QUESTIONS[0], risk=0.0, limit=None) == "ask"
        assert mine.intend(QUESTIONS[0], risk=0.0, limit=None) == "busy"
        other.settle({"k0": Outcome("open", released=0.0)})
        assert mine.intend(QUESTIONS[0], risk=0.0, limit=None) == "busy"  # it will ask again
    with Answers(tmp_path / "j.db") as later:
        assert later.intend(QUESTIONS[0], risk=0.0, limit=None) == "ask"
        assert later.tally() == Tally(requests=2)


def intend(path: Path, asked: Any) -> None:
    """A process that asks, and is not heard of again."""
    with Answers(path) as answers:
        asked.send(answers.intend(QUESTIONS[0], risk=0.5, limit=None))
        time.sleep(600)


def test_what_a_killed_process_had_asked_is_lost_and_at_risk(tmp_path: Path) -> None:
    heard, asked = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=intend, args=(tmp_path / "j.db", asked))
    process.start()
    assert heard.recv() == "ask"
    with Answers(tmp_path / "j.db") as mine:
        assert mine.intend(QUESTIONS[0], risk=0.5, limit=None) == "busy"
        process.kill()
        process.join()
        assert mine.intend(QUESTIONS[0], risk=0.5, limit=None) == "ask"
        mine.settle({"k0": Outcome("answered", "A", 1.0, "A", cost=0.1, released=0.5)})
        assert mine.tally() == Tally(answered=1, requests=2, lost=1, cost=0.1, at_risk=0.5)


def test_it_shares_a_ledger_s_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "gold.db") as gold, Answers(tmp_path / "gold.db") as answers:
        answers.intend(QUESTIONS[0], risk=0.0, limit=None)
        assert gold.models()[0]["requests"] == 1
        assert gold.summary() == []
    assert Ledger(tmp_path / "new.db").models() == []
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(LedgerError, match="cannot be used"):
        Answers(tmp_path / "text")
