"""The ledger: every question put to a gold, with its answer and price, in one SQLite file that runs can share.

A question is written down before the gold is called and its answer as soon as it is there, each in a transaction of
its own, so a process killed at any point loses at most the answers in flight, and what is answered is never bought
again. The file is in WAL mode: it must lie on a disk of the machine that uses it, with every process on that machine.
A killed process loses no transaction; a power failure loses none either where labels cost money, for then each is
flushed to the disk. `pyrite.accounts` does the asking.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import sqlite3
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite import data

VERSION = 1
PATIENCE = 60.0  # seconds a process waits for another one's transaction
SCHEMA = """
CREATE TABLE labels (
  key TEXT PRIMARY KEY, gold TEXT NOT NULL, kind TEXT NOT NULL, prompt TEXT NOT NULL, a TEXT NOT NULL, b TEXT,
  state TEXT NOT NULL, answer REAL, error TEXT, run TEXT NOT NULL, round INTEGER NOT NULL, attempts INTEGER NOT NULL,
  repeated INTEGER NOT NULL, cost REAL NOT NULL, asked REAL NOT NULL, settled REAL, owner TEXT);
CREATE INDEX books ON labels (gold, kind, run, round, state, cost);
CREATE TABLE uses (run TEXT, key TEXT, round INTEGER NOT NULL, PRIMARY KEY (run, key)) WITHOUT ROWID;
"""
BOOKS = """
SELECT gold, kind, run, SUM(labels) AS labels, SUM(open) AS in_flight, SUM(failed) AS failed, SUM(attempts) AS calls,
  SUM(repeated) AS repeated, SUM(reused) AS reused, SUM(cost) AS money, MAX(round) AS last_round
FROM (SELECT gold, kind, run, round, state = 'answered' AS labels, state = 'asked' AS open, state = 'failed' AS failed,
    attempts, repeated, 0 AS reused, cost FROM labels
  UNION ALL SELECT gold, kind, uses.run, uses.round, 0, 0, 0, 0, 0, 1, 0.0 FROM uses JOIN labels USING (key))
"""
MODELS = """
SELECT model, criterion, SUM(state = 'answered') AS answers, SUM(state = 'answered' AND label IS NULL) AS no_verdict,
  SUM(state = 'failed') AS failed, SUM(requests) AS requests, SUM(unusable) AS unusable, SUM(lost) AS lost,
  SUM(prompt_tokens) AS tokens_in, SUM(completion_tokens) AS tokens_out, SUM(cost) AS cost, SUM(at_risk) AS at_risk
FROM answers GROUP BY model, criterion ORDER BY model, criterion
"""


class LedgerError(ValueError):
    """A file cannot be used as a ledger; the message says why and what to do."""


class GoldStopped(ValueError):  # noqa: N818, it says what happened
    """A gold that will answer no more questions: out of money, down, or not to be had. What it answered is kept."""


@dataclass(frozen=True)
class Books:
    """What was spent: answers bought, questions in flight or failed, calls of the gold, and money for the calls.

    repeated: calls made once more because the process that had asked died before the answer. reused: answers that
    another run had paid for.
    """

    labels: int = 0
    in_flight: int = 0
    failed: int = 0
    calls: int = 0
    repeated: int = 0
    reused: int = 0
    money: float = 0.0


class Ledger:
    """An open ledger file; use it from one thread, and close it or use it in a `with`.

    create: make the file where there is none. Raises LedgerError for a file that is no ledger or cannot be written.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path).absolute()
        self.db = _connect(self.path, create=create)
        self._owner: str | None = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the file; questions still in flight are anybody's to ask again."""
        self.release()
        self.db.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction beside which no other process writes; undone where the block raises."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield self.db
            self.db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise LedgerError(f"{self.path}: cannot be written ({error}); the run can go on once it can") from error
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def flush(self) -> None:
        """From now on every transaction is on the disk before it counts: a power failure loses none."""
        self.db.execute("PRAGMA synchronous = FULL")

    def owner(self) -> str:
        """This ledger's sign on questions in flight: a file whose lock the system drops when the process ends.

        Call it inside `write`: then no sign is taken for a dead one's before it is locked.
        """
        if self._owner is None:
            for sign in self.path.parent.glob(f"{glob.escape(self.path.name)}-owner-*"):
                self.alive(sign.name.rpartition("owner-")[2])  # removes those of killed processes
            self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
            sign = os.open(self._sign(self._owner), os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fcntl.flock(sign, fcntl.LOCK_EX)
            self._leave = weakref.finalize(self, _leave, sign, self._sign(self._owner), os.getpid())
        return self._owner

    def alive(self, owner: str | None) -> bool:
        """Whether another process, or another ledger of this one, may still bring the answer it asked for."""
        if owner is None or owner == self._owner:
            return False
        try:
            sign = os.open(self._sign(owner), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(sign, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(sign)
        self._sign(owner).unlink(missing_ok=True)  # a dead owner's; names are never used twice
        return False

    def release(self) -> None:
        """Give up questions of this ledger that are still in flight; whoever wants one may ask it again."""
        if self._owner is not None:
            self.db.execute("UPDATE labels SET owner = NULL WHERE state = 'asked' AND owner = ?", (self._owner,))
            self._leave()
            self._owner = None

    def answered(self, answers: dict[str, float]) -> None:
        """Keep answers by key."""
        self._settle("answered", answers)

    def failed(self, errors: dict[str, str]) -> None:
        """Note what went wrong, by key."""
        self._settle("failed", errors)

    def _settle(self, state: Literal["answered", "failed"], values: dict[str, Any]) -> None:
        column = "answer" if state == "answered" else "error"
        settle = f"UPDATE labels SET state = ?, {column} = ?, settled = ?, owner = NULL WHERE key = ?"
        with self.write() as db:
            db.executemany(settle, [(state, value, time.time(), key) for key, value in values.items()])

    def books(self, *, gold: str, kind: str, run: str, round: int | None = None) -> Books:
        """What a run has spent on a gold, up to a round."""
        last = round if round is not None else 1 << 62
        where = "WHERE gold = ? AND kind = ? AND run = ? AND round <= ? GROUP BY gold, kind, run"
        row = _dicts(self.db, f"{BOOKS} {where}", (gold, kind, run, last))
        return Books(**{name: row[0][name] for name in Books.__dataclass_fields__}) if row else Books()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every question, oldest first; `asked` (its last call) and `settled` in seconds since 1970."""
        columns = "key, gold, kind, prompt, a, b, state, answer, error, run, round, attempts, repeated"
        reused = "(SELECT COUNT(*) FROM uses WHERE uses.key = labels.key) AS reused"
        yield from _dicts(self.db, f"SELECT {columns}, {reused}, cost, asked, settled FROM labels ORDER BY rowid", ())

    def summary(self) -> list[dict[str, Any]]:
        """The books of every gold and run, and their last round."""
        return _dicts(self.db, f"{BOOKS} GROUP BY gold, kind, run ORDER BY gold, kind, run", ())

    def models(self) -> list[dict[str, Any]]:
        """What was asked of language models by `pyrite.judges.llm`, a row for each model and criterion."""
        if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            return []
        return _dicts(self.db, MODELS, ())

    def _sign(self, owner: str) -> Path:
        return self.path.with_name(f"{self.path.name}-owner-{owner}")


def show(path: str | Path) -> str:
    """The books of a ledger file as a table."""
    with Ledger(path, create=False) as ledger:
        rows, models = ledger.summary(), ledger.models()
    shown = []
    if rows:
        money = sum(row["money"] for row in rows)
        shown += [*_table(rows), f"total: {sum(row['labels'] for row in rows)} labels, money {money:.2f}"]
    if models:
        cost = sum(row["cost"] for row in models)
        shown += [*_table(models), f"total: {sum(row['answers'] for row in models)} answers of models, {cost:.6g} paid"]
    return "\n".join(shown) or f"{path}: no question yet"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of aligned columns, their names above them."""
    lines = [list(rows[0]), *([f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def export(path: str | Path, out: str | Path, *, pairs: bool = False) -> int:
    """Every question to .parquet, .jsonl or .jsonl.gz, and how many they are.

    pairs: instead, the verdicts that prefer one answer, as {prompt, chosen, rejected, probability}, which every job
    that reads pairs takes. Raises LedgerError where there is nothing to write, DataError where it cannot be written.
    """
    with Ledger(path, create=False) as ledger:
        rows = list(ledger.rows())
    rows = [pair for row in rows if (pair := _pair(row))] if pairs else rows
    if not rows:
        raise LedgerError(f"{path}: {'no verdict that prefers one answer' if pairs else 'no question yet'}")
    data.write(rows, out)
    return len(rows)


def _pair(row: dict[str, Any]) -> dict[str, Any] | None:
    p = row["answer"]
    if row["kind"] != "verdict" or p is None or p == 0.5 or row["a"] == row["b"]:
        return None
    chosen, rejected = (row["a"], row["b"]) if p > 0.5 else (row["b"], row["a"])
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "probability": max(p, 1 - p)}


def _connect(path: Path, *, create: bool) -> sqlite3.Connection:
    if not create and not path.is_file():
        raise LedgerError(f"{path}: no ledger there; give the file that a run with labels to pay for has written")
    db = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        _prepare(db, path)
    except (sqlite3.Error, OSError, LedgerError) as error:
        if db is not None:
            db.close()
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(
            f"{path}: cannot be used as a ledger ({error}); give a file in a folder that can be written"
        ) from error
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """The tables, made once; a database of something else is left as it is."""
    db.execute("BEGIN")  # one look at version and tables, which another process may be making
    version = _version(db, path)
    db.execute("COMMIT")
    if not version:
        _patiently(db, "PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        if not _version(db, path):  # nobody was faster
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    db.execute("PRAGMA synchronous = NORMAL")


def _version(db: sqlite3.Connection, path: Path) -> int:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if (version != VERSION and (version or tables)) or (version and not tables >= {"labels", "uses"}):
        raise LedgerError(f"{path}: a database of something else, or a ledger of another version; give another file")
    return version


def _patiently(db: sqlite3.Connection, statement: str) -> None:
    """SQLite does not wait by itself where two processes make the file at once."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            db.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _dicts(db: sqlite3.Connection, query: str, values: tuple) -> list[dict[str, Any]]:
    cursor = db.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _leave(sign: int, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not a child that inherited the sign
        path.unlink(missing_ok=True)
        os.close(sign)
