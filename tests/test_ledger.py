"""The ledger file: what is refused, who is alive, what is shown and exported."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from asking import SERVER, open_at, open_together

from pyrite import cli
from pyrite.data import rows as data
from pyrite.feedback import ledger
from pyrite.feedback.judges import JudgeOptions, LanguageJudge
from pyrite.feedback.ledger import Account, Books, Budget, Ledger, LedgerError, Pace

VERDICTS = {"a1": 0.75, "a2": 0.5, "a3": 0.1, "a4": float("nan")}


def judge(prompts: list[str], a: list[str], b: list[str]) -> torch.Tensor:
    return torch.tensor([VERDICTS[text] for text in a], dtype=torch.float64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with three verdicts and a failure, one of them used again by another run."""
    path = tmp_path / "gold.db"
    with Ledger(path) as opened:
        for run, asked in (("first", [*VERDICTS]), ("second", ["a1"])):
            budget = Budget(money=2.0, cost=0.25)
            mine = Account(opened, run, "judge()", "verdict", budget, Pace(retries=1, backoff=0.0))
            mine.ask(judge, ["p"] * len(asked), asked, ["b"] * len(asked), round=3)
    return path


def test_rows(path: Path) -> None:
    with Ledger(path) as opened:
        rows = list(opened.rows())
    assert [row["a"] for row in rows] == list(VERDICTS)
    first, last = rows[0], rows[-1]
    assert {**first, "key": 0, "asked": 0, "settled": 0} == {
        **{"key": 0, "kind": "verdict", "source": "judge()", "criterion": "", "prompt": "p", "a": "a1", "b": "b"},
        **{"state": "answered", "answer": 0.75, "label": None, "text": None, "error": None, "run": "first", "round": 3},
        **{"attempts": 1, "lost": 0, "unusable": 0, "reused": 1, "tokens_in": 0, "tokens_out": 0},
        **{"cost": 0.25, "at_risk": 0.0, "asked": 0, "settled": 0},
    }
    assert first["asked"] <= first["settled"] <= last["asked"]
    assert (last["state"], last["answer"], last["error"], last["cost"]) == ("failed", None, "answered nan", 0.5)
    assert len({row["key"] for row in rows}) == 4


def test_summary_and_table(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as opened:
        first, second = opened.summary()
    counts = {"answered": 3, "failed": 1, "calls": 5, "cost": 1.25}
    assert {name: value for name, value in first.items() if value} == {
        **{"kind": "verdict", "source": "judge()", "run": "first", "last_round": 3},
        **counts,
    }
    assert (second["run"], second["answered"], second["reused"], second["cost"]) == ("second", 0, 1, 0.0)
    lines = ledger.show(path).splitlines()
    names = ["kind", "source", "run", "last_round", "answered", "failed", "calls", "reused", "cost"]
    assert lines[0].split() == names  # columns that hold nothing are left out
    assert lines[1].split() == [f"{first[name]}" for name in names]
    assert lines[-1] == "total: 3 answers, 1.25 paid"
    Ledger(tmp_path / "new.db").close()
    assert ledger.show(tmp_path / "new.db").endswith("no question yet")


@pytest.mark.parametrize("name", ["all.parquet", "all.jsonl", "all.jsonl.gz"])
def test_export(path: Path, tmp_path: Path, name: str) -> None:
    assert ledger.export(path, tmp_path / name) == 4
    if name == "all.parquet":
        rows = pq.read_table(tmp_path / name).to_pylist()
        assert [row["answer"] for row in rows] == [0.75, 0.5, 0.1, None]
    assert ledger.export(path, tmp_path / name, pairs=True) == 2
    pairs = data.load(tmp_path / name, "pairs")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("a1", "b"), ("b", "a3")]
    assert [pair["strength"] for pair in pairs] == pytest.approx([1.0986, 2.1972], abs=1e-4)  # ln 3, ln 9


def test_an_empty_answer_makes_no_pair(tmp_path: Path) -> None:
    with Ledger(tmp_path / "gold.db") as opened:
        mine = Account(opened, "r", "judge()", "verdict")
        mine.ask(lambda p, a, b: torch.tensor([0.9]), ["p"] * 3, ["good", " ", "good"], ["", "bad", "bad"])
    assert ledger.export(tmp_path / "gold.db", tmp_path / "pairs.jsonl", pairs=True) == 1
    assert [pair["rejected"] for pair in data.load(tmp_path / "pairs.jsonl", "pairs")] == ["bad"]


def test_nothing_to_export(tmp_path: Path) -> None:
    with Ledger(tmp_path / "gold.db") as opened:
        Account(opened, "r", "length()", "score").ask(lambda p, r: torch.ones(1), ["p"], ["a"])
    with pytest.raises(LedgerError, match="no verdict"):
        ledger.export(tmp_path / "gold.db", tmp_path / "pairs.parquet", pairs=True)
    with pytest.raises(ValueError, match=r"must end in \.parquet"):
        ledger.export(tmp_path / "gold.db", tmp_path / "all.csv")
    Ledger(tmp_path / "new.db").close()
    with pytest.raises(LedgerError, match="no question"):
        ledger.export(tmp_path / "new.db", tmp_path / "all.parquet")


def test_files_that_are_no_ledger_are_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("hello " * 100)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE calls (x)")
    other.close()
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute("PRAGMA user_version = 9")
    newer.close()
    before = {name: (tmp_path / name).read_bytes() for name in ("text.db", "other.db", "newer.db")}
    for name, words in (
        ("text.db", "not a database"),
        ("other.db", "something else"),
        ("newer.db", "another version"),
        ("", "cannot be used"),
        ("text.db/gold.db", "cannot be used"),
    ):
        with pytest.raises(LedgerError, match=words):
            Ledger(tmp_path / name)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    with pytest.raises(LedgerError, match="no ledger there"):
        ledger.show(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()


def test_folders_are_made_and_the_file_is_in_wal_mode(tmp_path: Path) -> None:
    with Ledger(tmp_path / "some" / "folder" / "gold.db") as opened:
        assert opened.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert opened.db.execute("PRAGMA synchronous").fetchone() == (1,)
        Account(opened, "r", "length()", "score", Budget(cost=0.01))
        assert opened.db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_transaction_is_whole_or_not_at_all(path: Path) -> None:
    with Ledger(path) as opened:
        with pytest.raises(KeyError), opened.write() as db:
            db.execute("DELETE FROM calls")
            raise KeyError
        assert len(list(opened.rows())) == 4
        with opened.write() as db:
            db.execute("DELETE FROM uses")
        assert opened.summary()[-1]["run"] == "first"
        opened.db.execute("PRAGMA busy_timeout = 1")
        with Ledger(path) as other, other.write(), pytest.raises(LedgerError, match="locked"), opened.write():
            pass


def test_one_thread_only(path: Path) -> None:
    caught: list[Exception] = []

    def elsewhere() -> None:
        try:
            opened.summary()
        except sqlite3.ProgrammingError as error:
            caught.append(error)

    with Ledger(path) as opened:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(caught) == 1


def sign_and_die(path: Path) -> None:
    opened = Ledger(path)
    with opened.write():
        opened.owner()
    os._exit(0)


def test_the_living_and_the_dead(path: Path) -> None:
    def signs() -> set[str]:
        return {sign.name.rpartition("owner-")[2] for sign in path.parent.glob("*-owner-*")}

    dead = SERVER.Process(target=sign_and_die, args=(path,))
    dead.start()
    dead.join()
    (left,) = signs()
    with Ledger(path) as mine, Ledger(path) as other:
        assert not mine.alive(None)
        assert not mine.alive("1-never")
        theirs = other.owner()
        assert mine.alive(theirs)
        assert not other.alive(theirs)  # not another's
        assert left not in signs()  # the dead one's was removed
        assert signs() == {theirs}
        other.release()
        assert not mine.alive(theirs)
    assert not signs()


def test_command_line(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pyrite(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["pyrite", "ledger", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as error:
            assert error.code == 2
        said = capsys.readouterr()
        return said.out, said.err

    out, err = pyrite("show", path)
    assert "total: 3 answers, 1.25 paid" in out
    target = path.parent / "pairs.jsonl"
    assert pyrite("export", path, target, "--pairs")[0].startswith("ledger: 2 pairs in")
    assert pyrite("export", path, target)[0].startswith("ledger: 4 questions in")
    for wrong in ((), ("show",), ("show", path, "--pairs"), ("export", path), ("buy", path)):
        out, err = pyrite(*wrong)
        assert err.startswith("pyrite: ledger") and ": write `ledger show FILE`" in err
    assert "no ledger there" in pyrite("show", path.parent / "none.db")[1]


def test_processes_make_a_file_at_once(tmp_path: Path) -> None:
    lives = [SERVER.Process(target=open_together, args=(tmp_path, time.time() + 0.5)) for _ in range(4)]
    for life in lives:
        life.start()
    for life in lives:
        life.join()
        assert life.exitcode == 0


OLD = Path(__file__).parent / "data" / "ledger_version_1.sql"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A ledger as the code before wrote it: labels of two runs, a failure, a call in flight, a language model's answers
    with two that hold no verdict, two failures, and one that was lost."""
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.executescript(OLD.read_text())
    db.close()
    return tmp_path / "old.db"


def test_an_old_ledger_is_migrated(old: Path) -> None:
    with Ledger(old) as opened:
        rows, groups = list(opened.rows()), {(row["source"], row["run"]): row for row in opened.summary()}
        tables = {name for (name,) in opened.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        whole = opened.books()
    assert tables == {"calls", "uses"}
    assert whole == Books(15, 2, 2, 3, 25, 2, 0, 2, 1040, 6, pytest.approx(2.546), 0.5)
    assert len(rows) == 20 and [row["kind"] for row in rows] == [
        *["score"] * 5,
        *["verdict"] * 3,
        "score",
        *["completion"] * 11,
    ]
    first = groups["length()", "first"]
    assert [first[name] for name in ("answered", "in_flight", "failed", "calls", "cost")] == [3, 1, 1, 6, 1.5]
    assert [groups["length()", "second"][name] for name in ("answered", "reused")] == [1, 2]
    assert [groups["toy", ""][name] for name in ("answered", "no_verdict", "failed", "calls")] == [8, 2, 2, 15]
    assert Ledger(old).books() == whole


def test_what_an_old_ledger_holds_is_not_bought_again(old: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def length(prompts: list[str], responses: list[str]) -> torch.Tensor:
        asked.extend(responses)
        return torch.tensor([float(len(response)) for response in responses])

    with Ledger(old) as opened:
        found = Account(opened, "first", "length()", "score", Budget(money=9.0, cost=0.25)).ask(
            length, ["p"] * 4, ["a", "ccc", "in flight", "dddd"], round=2
        )
        books = opened.books(run="first")
    assert found.tolist() == [1, 3, 9, 4] and asked == ["in flight"]
    assert (books.calls, books.lost, books.cost) == (7, 1, 1.75)  # the call that was in flight is paid twice
    options = JudgeOptions(base_url="http://127.0.0.1:9", price_in=1000.0, price_out=1000.0, reasks=1, retries=1)
    judge = LanguageJudge("toy", "more words", "words", options, str(old))
    texts = (["p0", "p1", "p2", "p3"], ["w w w a", "w a", "w a", "w w a"], ["w b", "w w b", "w b", "same b"])
    assert judge(*map(list, texts)).nan_to_num(-1).tolist() == [1.0, 0.0, 0.5, -1.0]  # nobody is at that address


def test_processes_migrate_a_file_at_once(old: Path) -> None:
    lives = [SERVER.Process(target=open_at, args=(old, time.time() + 0.5)) for _ in range(4)]
    for life in lives:
        life.start()
    for life in lives:
        life.join()
        assert life.exitcode == 0
    with Ledger(old) as opened:
        assert opened.books().answered == 15
