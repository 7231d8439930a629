"""The ledger: every paid call, in one SQLite file that runs can share.

A call is asked, then answered or failed. If its process dies in between, anybody may ask again; the ledger counts that
the first call may have been paid for. What is answered is never asked again. `Account` asks golds for scores and
verdicts; `pyrite.feedback.judges` asks language models.

Every call costs money, even if it fails. Only answered calls use up a budget of labels. A call in flight counts as
answered, also if its process has died, until somebody asks it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import re
import secrets
import sqlite3
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.data import rows as data
from pyrite.math.ranges import Count, NonNegative, Several

VERSION = 2
PATIENCE = 60.0  # seconds a process waits for another one's transaction
SCHEMA = """
CREATE TABLE calls (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, source TEXT NOT NULL, criterion TEXT NOT NULL, prompt TEXT NOT NULL,
  a TEXT NOT NULL, b TEXT, state TEXT NOT NULL, answer REAL, label TEXT, text TEXT, error TEXT, run TEXT NOT NULL,
  round INTEGER NOT NULL, attempts INTEGER NOT NULL, lost INTEGER NOT NULL, unusable INTEGER NOT NULL,
  tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL NOT NULL, at_risk REAL NOT NULL,
  asked REAL NOT NULL, settled REAL, owner TEXT);
CREATE INDEX spending ON calls (run, kind, source, round, state, cost, at_risk);
CREATE TABLE IF NOT EXISTS uses (run TEXT, key TEXT, round INTEGER NOT NULL, PRIMARY KEY (run, key)) WITHOUT ROWID;
"""
OLD = {  # tables of version 1, and what becomes of their rows
    "labels": """
INSERT INTO calls SELECT key, kind, gold, '', prompt, a, b, state, answer, NULL, NULL, error, run, round, attempts,
  repeated, 0, 0, 0, cost, 0, asked, settled, owner FROM labels ORDER BY rowid
""",
    "answers": """
INSERT INTO calls SELECT key, 'completion', model, criterion, prompt, a, b, state, p, label, raw, error, '', 0,
  requests, lost, unusable, prompt_tokens, completion_tokens, cost, at_risk, asked, settled, owner
  FROM answers ORDER BY rowid
""",
}
FIND = "SELECT key, state, answer, label, text, error, run, round, cost + at_risk, owner FROM calls WHERE key"
INTEND = """
INSERT INTO calls VALUES (:key, :kind, :source, :criterion, :prompt, :a, :b, 'asked', NULL, NULL, NULL, NULL, :run,
  :round, 1, 0, 0, 0, 0, :cost, :risk, :now, NULL, :owner)
ON CONFLICT (key) DO UPDATE SET state = 'asked', error = NULL, run = :run, round = :round, attempts = attempts + 1,
  lost = lost + (state = 'asked'), cost = cost + :cost, at_risk = at_risk + :risk, asked = :now, settled = NULL,
  owner = :owner
"""
SETTLE = """
UPDATE calls SET state = :state, answer = :answer, label = :label, text = COALESCE(:text, text), error = :error,
  unusable = unusable + :unusable, lost = lost + :lost, tokens_in = tokens_in + :tokens_in,
  tokens_out = tokens_out + :tokens_out, cost = cost + :cost, at_risk = MAX(0, at_risk - :released), settled = :now,
  owner = CASE WHEN :state = 'open' THEN owner END
WHERE key = :key
"""
BOOKS = """
SUM(state = 'answered') AS answered, SUM(state = 'answered' AND answer IS NULL) AS no_verdict,
  SUM(state IN ('asked', 'open')) AS in_flight, SUM(state = 'failed') AS failed, SUM(attempts) AS calls,
  SUM(unusable) AS unusable, SUM(lost) AS lost, SUM(reused) AS reused, SUM(tokens_in) AS tokens_in,
  SUM(tokens_out) AS tokens_out, SUM(cost) AS cost, SUM(at_risk) AS at_risk
FROM (SELECT key, kind, source, criterion, run, round, state, answer, attempts, unusable, lost, 0 AS reused, tokens_in,
    tokens_out, cost, at_risk FROM calls
  UNION ALL SELECT key, kind, source, criterion, uses.run, uses.round, '', 0, 0, 0, 0, 1, 0, 0, 0.0, 0.0
    FROM uses JOIN calls USING (key))
"""


Standing = Literal["answered", "failed", "busy", "open", "later"]


class LedgerError(ValueError):
    """A file cannot be used as a ledger. The message says why and what to do."""


class GoldStopped(ValueError):  # noqa: N818, it says what happened
    """A gold cannot answer any more questions: the money is spent, it is down, or it cannot be reached. Its earlier
    answers are kept."""


class Question(NamedTuple):
    """The texts to ask about: prompt and response, or prompt, a and b. The key depends on everything that decides the
    answer."""

    key: str
    texts: tuple[str, ...]


class Call(NamedTuple):
    """What the ledger knows about a question: its state (asked, open, answered or failed), its answer, and who asked it
    last.

    answer: a score or P(a beats b); None for an answer without a verdict. money: paid or at risk.
    """

    state: str
    answer: float | None
    label: str | None
    text: str | None
    error: str | None
    run: str
    round: int
    money: float
    owner: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a question in one call. If the state is open, it will be asked again.

    unusable: 1 if the answer was paid for but cannot be used. lost: 1 if an answer that never arrived may have been
    paid for. released: money no longer at risk, because the price of the call is now known.
    """

    state: Literal["answered", "open", "failed"]
    answer: float | None = None
    label: str | None = None
    text: str | None = None
    error: str | None = None
    unusable: int = 0
    lost: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    released: float = 0.0


@dataclass(frozen=True)
class Books:
    """How many questions ended in which way, how many calls were made for them, and what was paid.

    no_verdict: answered, but without a verdict. unusable: paid answers whose question was asked again. lost: calls
    without an answer that may have been paid for. reused: answers that another run had paid for. at_risk: the most that
    lost calls and calls in flight may have cost, on top of cost.
    """

    answered: int = 0
    no_verdict: int = 0
    in_flight: int = 0
    failed: int = 0
    calls: int = 0
    unusable: int = 0
    lost: int = 0
    reused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    at_risk: float = 0.0

    @property
    def money(self) -> float:
        """The most that may have been spent."""
        return self.cost + self.at_risk


# The file ------------------------------------------------------------------------------------------------------------


class Ledger:
    """An open ledger file; use it from one thread, and close it or use it in a `with`.

    create: make the file if there is none. Raises LedgerError for a file that is no ledger or cannot be written.
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
        """Close the file. Questions still in flight may be asked again by anybody."""
        self.release()
        self.db.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction. No other process writes meanwhile, and if the block raises, nothing is written."""
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
        """From now on a transaction counts only once it is on the disk, so that a power failure loses none."""
        self.db.execute("PRAGMA synchronous = FULL")

    def owner(self) -> str:
        """The mark of this ledger on questions in flight: a locked file. The system drops the lock when the process
        ends.

        Call it inside `write`, so that nobody takes a new mark for that of a dead process before it is locked.
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
        """Whether another process, or another ledger of this process, may still bring the answer that it asked for."""
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
        """Give up the questions that this ledger has in flight, so that anybody may ask them again."""
        if self._owner is not None:
            self.db.execute("UPDATE calls SET owner = NULL WHERE owner = ?", (self._owner,))
            self._leave()
            self._owner = None

    def find(self, keys: Iterable[str]) -> dict[str, Call]:
        """The calls of these keys that the ledger holds."""
        found = self.db.execute(f"{FIND} IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),))
        return {key: Call(*values) for key, *values in found}

    def standing(self, call: Call | None, run: str, round: int) -> Standing:
        """What a question means for a run in a round: answered, failed, open (to be asked), busy (another process asks
        it) or later (asked by this run in a later round). run: "" for no run."""
        own = call is not None and bool(run) and call.run == run
        if call is None:
            return "open"
        if own and call.round > round:
            return "later"  # this run went back to a checkpoint; it must not see what it did not know then
        if call.state == "answered":
            return "answered"
        if call.state == "failed":
            return "failed" if own and call.round == round else "open"
        return "busy" if self.alive(call.owner) else "open"

    def left(self, run: str, kind: str, source: str, budget: Budget) -> tuple[float, float]:
        """The labels and the money that a run may still spend on a gold; infinity without a limit."""
        labels = money = 0.0
        if budget.labels is not None:
            spent = "SELECT COALESCE(SUM(state != 'failed'), 0) FROM calls WHERE run = ? AND kind = ? AND source = ?"
            labels = self.db.execute(spent, (run, kind, source)).fetchone()[0]
        if budget.money is not None:
            spent = "SELECT COALESCE(SUM(cost + at_risk), 0.0) FROM calls WHERE run = ?"
            money = self.db.execute(spent, (run,)).fetchone()[0]
        limits = (math.inf if limit is None else limit for limit in (budget.labels, budget.money))
        return next(limits) - labels, next(limits) - money

    def settle(self, outcomes: dict[str, Outcome]) -> None:
        """Write down what became of calls, by key."""
        with self.write() as db:
            db.executemany(SETTLE, [{"key": k, "now": time.time(), **asdict(one)} for k, one in outcomes.items()])

    def books(
        self,
        keys: Iterable[str] | None = None,
        *,
        kind: str | None = None,
        source: str | None = None,
        run: str | None = None,
        last_round: int | None = None,
    ) -> Books:
        """The books of the file, or of the calls selected by these conditions."""
        chosen = {
            "key IN (SELECT value FROM json_each(?))": None if keys is None else json.dumps(list(keys)),
            **{"kind = ?": kind, "source = ?": source, "run = ?": run, "round <= ?": last_round},
        }
        chosen = {condition: value for condition, value in chosen.items() if value is not None}
        where = " AND ".join(chosen) or "TRUE"
        row = _dicts(self.db, f"SELECT {BOOKS} WHERE {where}", tuple(chosen.values()))[0]
        return Books(**{name: value or 0 for name, value in row.items()})

    def summary(self) -> list[dict[str, Any]]:
        """The books by kind, source, criterion and run, with the last round."""
        groups = "kind, source, criterion, run"
        query = f"SELECT {groups}, MAX(round) AS last_round, {BOOKS} GROUP BY {groups} ORDER BY {groups}"
        return _dicts(self.db, query, ())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every call, oldest first; `asked` (the last time) and `settled` in seconds since 1970."""
        reused = "(SELECT COUNT(*) FROM uses WHERE uses.key = calls.key) AS reused"
        for row in _dicts(self.db, f"SELECT calls.*, {reused} FROM calls ORDER BY calls.rowid", ()):
            yield {name: value for name, value in row.items() if name != "owner"}

    def _sign(self, owner: str) -> Path:
        return self.path.with_name(f"{self.path.name}-owner-{owner}")


def show(path: str | Path) -> str:
    """The books of a ledger file as a table. Columns without any value are left out."""
    with Ledger(path, create=False) as ledger:
        rows, total = ledger.summary(), ledger.books()
    if not rows:
        return f"{path}: no question yet"
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [names, *([f"{v:.6g}" if isinstance(v, float) else str(v) for v in map(row.get, names)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    risk = f", {total.at_risk:.6g} at risk" if total.at_risk else ""
    return "\n".join([*shown, f"total: {total.answered} answers, {total.cost:.6g} paid{risk}"])


def export(path: str | Path, out: str | Path, *, pairs: bool = False) -> int:
    """Write every call to .parquet, .jsonl or .jsonl.gz; returns how many there are.

    pairs: write instead the verdicts that prefer one answer, as {prompt, chosen, rejected, probability}, which every
    job that learns from pairs reads. Raises LedgerError if there is nothing to write, DataError if it cannot be
    written.
    """
    with Ledger(path, create=False) as ledger:
        rows = list(ledger.rows())
    rows = [pair for row in rows if (pair := _pair(row))] if pairs else rows
    if not rows:
        raise LedgerError(f"{path}: {'no verdict that prefers one answer' if pairs else 'no question yet'}")
    data.write(rows, out)
    return len(rows)


def _pair(row: dict[str, Any]) -> dict[str, Any] | None:
    """The pair of a verdict; None for a tie, for equal or empty texts, and for anything but a verdict."""
    p, texts = row["answer"], (row["prompt"], row["a"], row["b"])
    if row["kind"] != "verdict" or p is None or p == 0.5 or row["a"] == row["b"] or not all(map(str.strip, texts)):
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
    """Make the tables, or migrate those of an earlier version. A database of something else is left as it is."""
    db.execute("BEGIN")  # one look at version and tables, which another process may be making
    version, _ = _version(db, path)
    db.execute("COMMIT")
    if version < VERSION:
        _patiently(db, "PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        version, tables = _version(db, path)
        if version < VERSION:  # nobody was faster
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            for table in (one for one in OLD if one in tables):
                db.execute(OLD[table])
                db.execute(f"DROP TABLE {table}")
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    db.execute("PRAGMA synchronous = NORMAL")


def _version(db: sqlite3.Connection, path: Path) -> tuple[int, set[str]]:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    needed = {0: set(), 1: {"labels", "uses"}, 2: {"calls", "uses"}}.get(version)
    if needed is None or not tables >= needed or (tables and not version):
        raise LedgerError(f"{path}: a database of something else, or a ledger of another version; give another file")
    return version, tables


def _patiently(db: sqlite3.Connection, statement: str) -> None:
    """Run a statement again while the file is locked: SQLite does not wait by itself if two processes create a file at
    once."""
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


# Asking ---------------------------------------------------------------------------------------------------------------


LOOK = 0.05  # seconds between looks at what another process is asking
LONGEST_WAIT = 600.0  # seconds that a server may ask to be left alone
# refused: not answered, for now; lost: maybe answered, and paid for; raised: a gold of one's own failed; unusable:
# answered, but nothing that can be read; rejected: this call cannot be answered; again: it has to be put otherwise;
# fatal: no call can be answered
TroubleKind = Literal["refused", "lost", "raised", "unusable", "rejected", "again", "fatal"]


class Trouble(Exception):  # noqa: N818, most of it passes
    """A call that brought no answer. wait: seconds that the server asked to be left alone."""

    def __init__(self, kind: TroubleKind, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind: TroubleKind = kind
        self.wait = wait


@dataclass(frozen=True)
class Budget:
    """How many answers a run may buy from a gold, and how much money all its calls may cost at `cost` each. None is no
    limit."""

    labels: int | None = None
    money: float | None = None
    cost: float = 0.0

    def __post_init__(self) -> None:
        for name in ("labels", "money", "cost"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"budget: {name}={value}; it must be at least 0")


@dataclass(frozen=True)
class Pace:
    """How hard a gold is pressed, and for how long.

    concurrency: calls at once; a single one is made in this thread. per_minute: calls a minute at most. batch:
    questions a call. retries: calls after a first one that was not answered, `backoff`, 2 · `backoff`, ... up to
    `longest` seconds apart, less up to a half by chance, and no sooner than the server asks. reasks: calls after an
    answer without a verdict. down: questions in a row without an answer after which the gold is taken not to work.
    patience: seconds without progress to wait for what another process is asking.
    """

    concurrency: int = 1
    per_minute: float | None = None
    batch: int = 1
    retries: int = 2
    reasks: int = 0
    backoff: float = 1.0
    longest: float = 60.0
    down: int = 8
    patience: float = 600.0

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "batch": 1, "retries": 0, "reasks": 0, "backoff": 0, "down": 1, "patience": 0}
        for name, lowest in least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if self.per_minute is not None and not self.per_minute > 0:
            raise ValueError(f"per_minute is {self.per_minute}; it must be positive")


class Attempt(NamedTuple):
    """The questions of one call: how often nobody answered, how often the answer had no verdict, and whether any answer
    could be read."""

    questions: tuple[Question, ...] = ()
    unanswered: int = 0
    useless: int = 0
    heard: bool = False


@dataclass
class Asker:
    """Asks questions of one gold through the ledger. One that is asked again keeps its place among the `concurrency`
    that are out.

    send: one call for some questions, an outcome each; it raises Trouble, or GoldStopped. kind and source: what is
    asked of whom. run: whose budget; "" for calls of no run. risk: the most that a question can cost, beside the fixed
    price `budget.cost` of a call. strict: raise GoldStopped if the gold is down or the money spent; otherwise what is
    left stays unanswered. advance: told of questions as they end.
    """

    ledger: Ledger
    send: Callable[[Sequence[Question]], Sequence[Outcome]]
    kind: str
    source: str
    pace: Pace
    criterion: str = ""
    run: str = ""
    round: int = 0
    budget: Budget = Budget()
    risk: Callable[[Question], float] = lambda _: 0.0
    strict: bool = False
    advance: Callable[[int], object] = lambda _: None

    def __post_init__(self) -> None:
        self.line: deque[Question] = deque()
        self.later: list[tuple[float, int, Attempt]] = []
        self.busy: deque[tuple[float, Question]] = deque()  # another process is asking these
        self.flying: dict[Future[Sequence[Outcome]], Attempt] = {}
        self.numbers = itertools.count()
        self.chance = random.Random()  # when, not what
        self.free = 0.0  # the earliest moment for the next call
        self.quiet = time.monotonic()  # since when nothing was asked
        self.silent = 0  # questions in a row that ended without an answer
        self.unanswered = 0  # those among them that nobody answered

    def ask(self, questions: Sequence[Question]) -> None:
        """Ask until every question has ended. The answers are then in the ledger.

        A strict asker raises GoldStopped. If anything is raised, answers in flight are still awaited and kept.
        """
        self.line.extend(questions)
        with ThreadPoolExecutor(self.pace.concurrency) if self.pace.concurrency > 1 else _Here() as pool:
            try:
                while self.line or self.later or self.busy or self.flying:
                    waiting = self.busy and not (self.line or self.later or self.flying)
                    if waiting and time.monotonic() - self.quiet >= self.pace.patience:
                        return
                    self._land(self._pause() if self._send(pool) else None)
            except BaseException:
                while self.flying:
                    with contextlib.suppress(GoldStopped):
                        self._land(None)
                self.ledger.release()
                raise

    def _send(self, pool: Executor) -> bool:
        """Send what may be sent now. Returns False if answers in flight decide whether there is money for more."""
        while time.monotonic() >= self.free and (attempt := self._next()) is not None:
            attempt = self._claimed(attempt)
            if attempt is None:
                return False
            if attempt.questions:
                self.quiet = time.monotonic()
                self.flying[pool.submit(self.send, attempt.questions)] = attempt
                self.free = self.quiet + (60 / self.pace.per_minute if self.pace.per_minute else 0.0)
        return True

    def _next(self) -> Attempt | None:
        """The attempt that is due, an empty one for the next questions in line, or None."""
        now, out = time.monotonic(), len(self.flying)
        if self.later and self.later[0][0] <= now and out < self.pace.concurrency:
            return heapq.heappop(self.later)[2]
        if out + len(self.later) >= self.pace.concurrency:
            return None
        while self.busy and self.busy[0][0] <= now:
            self.line.appendleft(self.busy.popleft()[1])
        return Attempt() if self.line else None

    def _claimed(self, attempt: Attempt) -> Attempt | None:
        """Write down, in one transaction, the questions that this asker may ask. None if answers in flight may leave
        money for more."""
        again, ours, risk = len(attempt.questions), [], 0.0
        queue = deque(attempt.questions) if again else self.line
        broke = False
        with self.ledger.write() as db:
            labels, money = self.ledger.left(self.run, self.kind, self.source, self.budget)
            while queue and not broke and len(ours) < (again or self.pace.batch):
                question = queue.popleft()
                row = db.execute(f"{FIND} = ?", (question.key,)).fetchone()
                call = Call(*row[1:]) if row else None
                standing = self.ledger.standing(call, self.run, self.round)
                if standing == "busy":
                    self.busy.append((time.monotonic() + LOOK, question))
                    continue
                if standing != "open" or (self._down() and not again):
                    self.silent = 0 if standing == "answered" else self.silent + (standing == "failed")
                    self.advance(1)
                    continue
                risk = self.risk(question)
                label, price = self._price(call, risk)
                if labels >= label and money >= price - 1e-9:
                    labels, money = labels - label, money - price
                    db.execute(INTEND, self._intent(question, risk))
                    ours.append(question)
                elif self.strict:
                    queue.appendleft(question)
                    broke = True
                elif again:
                    db.execute("UPDATE calls SET state = 'failed', owner = NULL WHERE key = ?", (question.key,))
                    self.silent += 1
        if broke and again:
            self.line.extendleft(reversed(queue))
        if broke and not ours:
            if self.flying:
                return None
            raise GoldStopped(self._broke(risk))
        return attempt._replace(questions=tuple(ours))

    def _down(self) -> bool:
        return self.silent >= self.pace.down and not self.strict

    def _price(self, call: Call | None, risk: float) -> tuple[bool, float]:
        """The labels and the money that a call takes. What is in flight was counted before."""
        own = call is not None and call.run == self.run
        label = not (own and call is not None and call.state in ("asked", "open"))
        others = 0.0 if own or call is None else call.money  # the question comes with the calls that others made
        return label, self.budget.cost + risk + others

    def _intent(self, question: Question, risk: float) -> dict[str, Any]:
        prompt, a, b = (*question.texts, None)[:3]
        who = {"key": question.key, "kind": self.kind, "source": self.source, "criterion": self.criterion}
        what = {"prompt": prompt, "a": a, "b": b, "run": self.run, "round": self.round}
        return who | what | {"cost": self.budget.cost, "risk": risk, "now": time.time(), "owner": self.ledger.owner()}

    def _pause(self) -> float | None:
        """Seconds until there is something to send; None if only an arrival can change that."""
        moments, out = [], len(self.flying)
        if self.later and out < self.pace.concurrency:
            moments.append(self.later[0][0])
        if out + len(self.later) < self.pace.concurrency:
            moments += [self.busy[0][0]] if self.busy else []
            moments += [self.free] if self.line else []
        return max(0.0, max(self.free, min(moments)) - time.monotonic()) if moments else None

    def _land(self, pause: float | None) -> None:
        """Handle the answers that arrive within the pause."""
        if not self.flying:
            time.sleep(pause or 0.0)
            return
        for future in wait(self.flying, pause, return_when=FIRST_COMPLETED).done:
            attempt = self.flying.pop(future)
            try:
                outcomes = future.result()
            except Trouble as trouble:
                self._troubled(attempt, trouble)
            else:
                self._arrived(attempt._replace(heard=True), outcomes)

    def _arrived(self, attempt: Attempt, outcomes: Sequence[Outcome]) -> None:
        """Handle an answer. Questions that it leaves open are asked again, one at a time."""
        left = tuple(q for q, one in zip(attempt.questions, outcomes, strict=True) if one.state == "open")
        single, done = len(attempt.questions) == 1, len(attempt.questions) - len(left)
        if done:
            self.silent = self.unanswered = 0
        end = bool(left) and single and attempt.useless >= self.pace.reasks
        if end:  # if every answer was no answer at all, such as a web page, another run asks again
            outcomes = [replace(outcomes[0], state="answered" if attempt.heard else "failed", unusable=0)]
        self._settle(attempt, outcomes)
        self.advance(done + end)
        if end:
            self._ended(1, outcomes[0].error or "")
        elif left and single:
            self._again(attempt._replace(useless=attempt.useless + 1), self._backoff(attempt.useless))
        else:
            self._singly(left, attempt)

    def _troubled(self, attempt: Attempt, trouble: Trouble) -> None:
        """Handle a call without an answer."""
        kind, error, count = trouble.kind, str(trouble), len(attempt.questions)
        if kind == "unusable":
            self._arrived(attempt, [Outcome("open", error=error, unusable=1)] * count)
            return
        over = attempt.unanswered >= self.pace.retries or (count == 1 and kind == "rejected")
        end = over and kind != "again"
        kept = Outcome("failed" if end else "open", error=error, lost=int(kind == "lost"))
        released = [0.0 if kind == "lost" else self.risk(question) for question in attempt.questions]
        self._settle(attempt, [replace(kept, released=risk) for risk in released])
        if kind == "fatal":
            raise GoldStopped(f"{trouble}; {self._rest()}")
        if end:
            self.unanswered += count
            self.advance(count)
            self._ended(count, error)
        elif kind == "again":
            self._again(attempt, 0.0)
        elif count > 1 and kind in ("rejected", "raised"):  # it may be one of them
            self._singly(attempt.questions, attempt)
        else:
            delay = max(self._backoff(attempt.unanswered), min(trouble.wait, LONGEST_WAIT))
            self._again(attempt._replace(unanswered=attempt.unanswered + 1), delay)

    def _ended(self, questions: int, error: str) -> None:
        """Count questions that ended without an answer. A strict asker stops if there were too many in a row."""
        self.silent += questions
        if self.silent < self.pace.down or not self.strict:
            return
        if self.unanswered == self.silent:
            what = f"the judge does not answer: {self.silent} questions in a row had no answer, the last one because: "
            raise GoldStopped(f"{what}{error}; {self._rest()}")
        what = f"the judge gives no verdicts: {self.silent} questions in a row had none, the last one because: {error}"
        advice = "check the address, the model, --reply and --max-tokens"
        raise GoldStopped(f"{what}; {advice}; {self._rest()}")

    def _settle(self, attempt: Attempt, outcomes: Sequence[Outcome]) -> None:
        self.ledger.settle({question.key: one for question, one in zip(attempt.questions, outcomes, strict=True)})

    def _again(self, attempt: Attempt, delay: float) -> None:
        heapq.heappush(self.later, (time.monotonic() + delay, next(self.numbers), attempt))

    def _singly(self, questions: Sequence[Question], attempt: Attempt) -> None:
        for question in questions:
            self._again(Attempt((question,), attempt.unanswered + 1), self._backoff(attempt.unanswered))

    def _backoff(self, times: int) -> float:
        return min(self.pace.longest, self.pace.backoff * 2**times) * self.chance.uniform(0.5, 1.0)

    def _broke(self, risk: float) -> str:
        spent = f"{self.ledger.books(run=self.run).money:.6g} of max_cost={self.budget.money:g} is spent"
        return f"{spent} or at risk, and the next answer may cost {risk:.3g}; raise max_cost; {self._rest()}"

    def _rest(self) -> str:
        left = len(self.line) + len(self.busy) + sum(len(attempt.questions) for *_, attempt in self.later)
        return f"{left} questions and those in flight are left; run again to go on from {self.ledger.path}"


class _Here(Executor):
    """An executor that runs each function at once, in this thread."""

    def submit(self, fn: Callable, /, *given: Any, **more: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*given, **more))
        except BaseException as error:
            future.set_exception(error)
        return future


# Golds ----------------------------------------------------------------------------------------------------------------


Gold = Callable[..., Tensor]


@dataclass(frozen=True)
class Account:
    """One run's purchases from one gold.

    gold: its spec string; a file of your own named in it counts with its content, so an edited gold is another one.
    kind: "score" asks (prompts, responses), "verdict" (prompts, a, b) for P(a beats b).
    """

    ledger: Ledger
    run: str
    gold: str
    kind: Literal["score", "verdict"]
    budget: Budget = Budget()
    pace: Pace = Pace()

    def __post_init__(self) -> None:
        if self.budget.cost:
            self.ledger.flush()
        object.__setattr__(self, "gold", with_own_code(self.gold))

    def ask(self, gold: Gold, prompts: Sequence[str], *answers: Sequence[str], round: int = 0) -> Tensor:
        """Answers to N questions, (N,) float64; NaN if the budget is spent or the gold gave no answer.

        Answers in the ledger are free, whoever paid for them. The others are bought in the order given, each question
        once. A run that goes on from a checkpoint sees what it saw before: its answers of this round and of earlier
        ones, but none that it had bought in a later round. `functools.partial(account.ask, judge, round=3)` is a judge
        itself. Raises ValueError for texts that are not N each. GoldStopped passes through, and its questions may be
        asked again by anybody.
        """
        questions, send = self._questions(prompts, answers), partial(self._call, gold)
        asker = Asker(self.ledger, send, self.kind, self.gold, self.pace, run=self.run, round=round, budget=self.budget)
        asker.ask(list(dict.fromkeys(questions)))
        found = self.ledger.find(question.key for question in questions)
        known = {key: one for key, one in found.items() if self.ledger.standing(one, self.run, round) == "answered"}
        with self.ledger.write() as db:
            used = [(self.run, key, round) for key, call in known.items() if call.run != self.run]
            db.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?, ?)", used)
        values = [known[question.key].answer if question.key in known else math.nan for question in questions]
        return torch.tensor(values, dtype=torch.float64)

    def books(self, *, round: int | None = None) -> Books:
        """What this run has spent on this gold, up to a round."""
        return self.ledger.books(kind=self.kind, source=self.gold, run=self.run, last_round=round)

    def broke(self, *, round: int) -> bool:
        """Whether, after a round, the run has no money left for another call."""
        spent, budget = self.ledger.books(run=self.run, last_round=round).money, self.budget
        return budget.money is not None and spent + budget.cost > budget.money + 1e-9

    def wanting(self, prompts: Sequence[str], *answers: Sequence[str], round: int = 0) -> int:
        """How many answers `ask` would have to buy if the budget allowed all of them. Answers that are known or in
        flight do not count."""
        keys = {question.key for question in self._questions(prompts, answers)}
        with self.ledger.write():
            known = self.ledger.find(keys)
            counted = {key for key, one in known.items() if one.run == self.run and one.state in ("asked", "open")}
            standings = (self.ledger.standing(known.get(key), self.run, round) for key in keys - counted)
            return sum(standing in ("open", "later") for standing in standings)

    @property
    def left(self) -> float:
        """Answers that can still be bought; infinity without a budget."""
        labels, money = self.ledger.left(self.run, self.kind, self.gold, self.budget)
        calls = money / self.budget.cost + 1e-9 if self.budget.cost else math.inf
        return max(0.0, min(labels, math.floor(calls) if math.isfinite(calls) else calls))

    def _questions(self, prompts: Sequence[str], answers: tuple[Sequence[str], ...]) -> list[Question]:
        columns, sides = [prompts, *answers], 1 if self.kind == "score" else 2
        if len(answers) != sides or len({len(column) for column in columns}) > 1:
            wanted = "prompts and responses" if self.kind == "score" else "prompts, a and b"
            raise ValueError(f"{self.kind}s need {wanted}, N each; got {[len(column) for column in columns]} texts")
        questions = []
        for i, texts in enumerate(zip(*columns, strict=True)):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"question {i + 1} is not of texts; render messages with pyrite.data.text.plain")
            named = json.dumps([self.gold, self.kind, *texts]).encode()
            questions.append(Question(hashlib.sha256(named).hexdigest(), texts))
        return questions

    def _call(self, gold: Gold, questions: Sequence[Question]) -> list[Outcome]:
        """One call of the gold; raises Trouble if it has no answer for anything."""
        columns = [list(column) for column in zip(*(question.texts for question in questions), strict=True)]
        try:
            given = torch.as_tensor(gold(*columns)).double()
            if given.shape != (len(questions),):
                raise ValueError(f"{len(questions)} questions got answers of shape {tuple(given.shape)}")
        except GoldStopped:
            raise
        except Exception as error:  # whatever a gold raises, it has given no answer
            raise Trouble("raised", f"{type(error).__name__}: {error}") from error
        values = given.tolist()
        if not any(map(self._sound, values)):
            raise Trouble("raised", f"answered {values[0]}")
        return [
            Outcome("answered", value) if self._sound(value) else Outcome("open", error=f"answered {value}")
            for value in values
        ]

    def _sound(self, value: float) -> bool:
        return math.isfinite(value) if self.kind == "score" else 0 <= value <= 1


@dataclass(frozen=True)
class GoldLimits:
    """What asking gold may cost and how often it is asked, for the labels a run learns from and the scores that measure
    it: --gold-budget, and --gold-limits (see `limits`)."""

    budget: int | None = None
    cost: float = 0.0
    max_cost: float | None = None
    ledger: str | None = None
    batch: int = 1
    every: int = 1
    prompts: int | None = None

    @classmethod
    def parse(cls, budget: int | None, spec: str) -> GoldLimits:
        """From the options --gold-budget and --gold-limits."""
        try:
            made: Any = specs.part(spec, {"limits": limits}).function
        except ValueError as error:
            raise ValueError(f"--gold-limits {spec}: {error}") from None
        return replace(made, budget=budget)

    @property
    def counted(self) -> bool:
        """Whether answers go through a ledger."""
        return self.budget is not None or self.cost > 0 or self.ledger is not None

    @property
    def sparing(self) -> bool:
        """Whether measurements ask gold only sometimes. Then nothing but measurements asks it."""
        return self.counted or self.every > 1 or self.prompts is not None

    def measuring(self, gold: str | None) -> GoldLimits:
        """The limits on measurements in a run that also buys labels. The budget is for labels alone, the money for
        both. A gold without a price measures for free."""
        if gold and self.cost:
            return replace(self, budget=None)
        return GoldLimits(batch=self.batch, every=self.every, prompts=self.prompts)

    def account(self, folder: Path, gold: str, kind: Literal["score", "verdict"]) -> Account:
        """A run's account with the gold; the ledger is ledger.db in the run's folder unless another one is named."""
        ledger = Ledger(self.ledger or folder / "ledger.db")
        budget = Budget(self.budget, self.max_cost, self.cost)
        return Account(ledger, str(folder.resolve()), gold, kind, budget, Pace(batch=self.batch))


def limits(
    *,
    cost: NonNegative = 0.0,
    max_cost: NonNegative | None = None,
    ledger: str | None = None,
    batch: Count = 1,
    every: Count = 1,
    prompts: Several | None = None,
) -> GoldLimits:
    """What asking gold costs and how often it is asked.

    cost: the price of one answer. max_cost: money to spend at most. ledger: SQLite file of paid answers, which runs may
    share. batch: questions in one call; more is faster with a cheap gold, and puts more at risk if a run is killed.
    every: measurements to one with gold; the first and the last have it too. prompts: held-out prompts whose answers
    gold scores, the first ones; all by default.
    """
    if max_cost is not None and not cost:
        raise ValueError(f"max_cost={max_cost}: give cost, the price of one answer, too")
    return GoldLimits(None, cost, max_cost, ledger, batch, every, prompts)


def with_own_code(spec: str) -> str:
    """A spec followed by the hashes of your own files that it names: "mine.py:score() [mine.py 0f3a...]"."""
    files = dict.fromkeys(re.findall(r"""[^\s'"(),=]+\.py(?=:)""", spec))
    hashes = [f"{file} {runs.fingerprint(file)}" for file in files if Path(file).is_file()]
    return f"{spec} [{', '.join(hashes)}]" if hashes else spec
