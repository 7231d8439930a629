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
from asking import SERVER, open_together

from pyrite import cli
from pyrite.data import rows as data
from pyrite.feedback import ledger
from pyrite.feedback.ledger import Account, Budget, Ledger, LedgerError

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
            mine = Account(opened, run, "judge()", "verdict", budget=budget, retries=1, backoff=0.0)
            mine.ask(judge, ["p"] * len(asked), asked, ["b"] * len(asked), round=3)
    return path


def test_rows(path: Path) -> None:
    with Ledger(path) as opened:
        rows = list(opened.rows())
    assert [row["a"] for row in rows] == list(VERDICTS)
    first, last = rows[0], rows[-1]
    assert {**first, "key": 0, "asked": 0, "settled": 0} == {
        **{"key": 0, "gold": "judge()", "kind": "verdict", "prompt": "p", "a": "a1", "b": "b", "state": "answered"},
        **{"answer": 0.75, "error": None, "run": "first", "round": 3, "attempts": 1, "repeated": 0, "reused": 1},
        **{"cost": 0.25, "asked": 0, "settled": 0},
    }
    assert first["asked"] <= first["settled"] <= last["asked"]
    assert (last["state"], last["answer"], last["error"], last["cost"]) == ("failed", None, "answered nan", 0.5)
    assert len({row["key"] for row in rows}) == 4


def test_summary_and_table(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as opened:
        first, second = opened.summary()
    counts = {"labels": 3, "in_flight": 0, "failed": 1, "calls": 5, "repeated": 0, "reused": 0, "money": 1.25}
    assert first == {"gold": "judge()", "kind": "verdict", "run": "first", **counts, "last_round": 3}
    assert (second["run"], second["labels"], second["reused"], second["money"]) == ("second", 0, 1, 0.0)
    lines = ledger.show(path).splitlines()
    assert lines[0].split() == list(first)
    assert lines[1].split() == [str(value) for value in first.values()]
    assert lines[-1] == "total: 3 labels, money 1.25"
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
        other.execute("CREATE TABLE labels (x)")
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
        Account(opened, "r", "length()", "score", budget=Budget(cost=0.01))
        assert opened.db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_transaction_is_whole_or_not_at_all(path: Path) -> None:
    with Ledger(path) as opened:
        with pytest.raises(KeyError), opened.write() as db:
            db.execute("DELETE FROM labels")
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
    assert "total: 3 labels, money 1.25" in out
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
