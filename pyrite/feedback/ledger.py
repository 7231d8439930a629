"""An account asks a gold through the ledger: within its budget, each question once, no label invented.

What is charged: a label is an answer, so a question that failed costs no label; money is paid for every call of the
gold, answered or not, for a call that gave nothing was made all the same. Questions in flight count as spent, also
those of a process that died, until somebody has asked them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import sqlite3
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.data import rows as data
from pyrite.math import ranges
from pyrite.math.ranges import Count, Natural, NonNegative, Several

# ledger: The ledger: every question put to a gold, with its answer and price, in one SQLite file that runs can share.


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
        """What was asked of language models by `pyrite.feedback.judges.llm`, a row for each model and criterion."""
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


# accounts: An account asks a gold through the ledger: within its budget, each question once, no label invented.


DOWN = 8  # questions in a row without an answer: the gold is taken to be down
LOOK = 0.05  # seconds between looks at what another process is asking
Gold = Callable[..., Tensor]
FIND = "SELECT state, answer, run, round, cost, owner FROM labels WHERE key = ?"
INTEND = """
INSERT INTO labels VALUES (:key, :gold, :kind, :prompt, :a, :b, 'asked', NULL, NULL, :run, :round, 1, 0, :cost, :now,
  NULL, :owner)
ON CONFLICT (key) DO UPDATE SET state = 'asked', error = NULL, run = :run, round = :round, attempts = attempts + 1,
  repeated = repeated + (state = 'asked'), cost = cost + :cost, asked = :now, settled = NULL, owner = :owner
"""


@dataclass(frozen=True)
class Budget:
    """How many labels may be bought, and for how much money at `cost` a call; None is no limit.

    scope: whose purchases from this gold count, those of the run, or those of all runs in the file.
    """

    labels: int | None = None
    money: float | None = None
    cost: float = 0.0
    scope: Literal["run", "file"] = "run"

    def __post_init__(self) -> None:
        for name in ("labels", "money", "cost"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"budget: {name}={value}; it must be at least 0")
        if self.money is not None and not self.cost:
            raise ValueError(f"budget: money={self.money} without a cost; give cost, the price of one call")
        if self.scope not in ("run", "file"):
            raise ValueError(f"budget: scope={self.scope!r}; it must be 'run' or 'file'")


class Question(NamedTuple):
    """Texts as the gold gets them, and whether its verdict is to be read the other way around."""

    key: str
    texts: tuple[str, ...]
    mirrored: bool = False


class Row(NamedTuple):
    """What the ledger says of a question."""

    state: str
    answer: float
    run: str
    round: int
    cost: float
    owner: str | None


@dataclass
class Request:
    """What is still to be known, in order, and what is known already."""

    line: deque[Question]
    known: dict[str, float]
    round: int
    limit: int | None
    silent: int = 0


@dataclass
class Room:
    """What may still be spent: labels, labels of this round, money."""

    labels: float
    limit: float
    money: float


@dataclass(frozen=True)
class Account:
    """One run's purchases from one gold.

    gold: its spec string; a file of your own named in it counts with its content, so an edited gold is another one.
    kind: "score" asks (prompts, responses), "verdict" (prompts, a, b) for P(a beats b). batch: questions a call; all
    of them are in flight at once. retries: calls after a first one that raised or gave no number, one question at a
    time, `backoff`, 2 · `backoff`, ... seconds apart; then the question has failed, for this run and round. patience:
    seconds without progress to wait for what another process is asking. symmetric: P(a beats b) = 1 − P(b beats a),
    so that one of the two is asked.
    """

    ledger: Ledger
    run: str
    gold: str
    kind: Literal["score", "verdict"]
    budget: Budget = Budget()
    batch: int = 1
    retries: int = 2
    backoff: float = 1.0
    patience: float = 600.0
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("score", "verdict"):
            raise ValueError(f"account: kind={self.kind!r}; it must be 'score' or 'verdict'")
        if self.symmetric and self.kind == "score":
            raise ValueError("account: symmetric is about verdicts; scores have no other side")
        for name, least in (("batch", 1), ("retries", 0), ("backoff", 0), ("patience", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"account: {name}={getattr(self, name)}; it must be at least {least}")
        if self.budget.cost:
            self.ledger.flush()
        object.__setattr__(self, "gold", with_own_code(self.gold))

    def ask(
        self, gold: Gold, prompts: Sequence[str], *answers: Sequence[str], round: int = 0, limit: int | None = None
    ) -> Tensor:
        """Answers to N questions, (N,) float64; NaN where the budget is spent or the gold gave none.

        What the ledger holds is free, whoever paid for it; the rest is bought in the order given, each question
        once, up to `limit` labels for this round. A run that goes on from a checkpoint sees what it saw before: the
        round's own labels and earlier ones, not those that it had bought in a later round.
        `functools.partial(account.ask, judge, round=3)` is a judge itself. Raises ValueError for texts that are not
        N each, and lets GoldStopped pass: its questions are anybody's to ask again.
        """
        questions = self._questions(prompts, answers)
        request = Request(deque({question.key: question for question in questions}.values()), {}, round, limit)
        quiet = time.monotonic()
        try:
            while request.line:
                if mine := self._claim(request):
                    self._buy(gold, mine)
                    quiet = time.monotonic()
                elif request.line:
                    if time.monotonic() - quiet >= self.patience:
                        break
                    time.sleep(LOOK)
        except BaseException:
            self.ledger.release()
            raise
        found = [request.known.get(question.key, math.nan) for question in questions]
        values = [1 - p if question.mirrored else p for question, p in zip(questions, found, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    def books(self, *, round: int | None = None) -> Books:
        """What this run has spent on this gold, up to a round."""
        return self.ledger.books(gold=self.gold, kind=self.kind, run=self.run, round=round)

    def wanting(self, prompts: Sequence[str], *answers: Sequence[str], round: int = 0) -> int:
        """Labels that `ask` would still have to buy, had it room for all: what is answered or in flight is not."""
        keys = {question.key for question in self._questions(prompts, answers)}
        with self.ledger.write() as db:
            found = [db.execute(FIND, (key,)).fetchone() for key in keys]
            return sum(self._wanted(Row(*row) if row else None, round) for row in found)

    def broke(self, *, round: int) -> bool:
        """Whether the run had no money for another call after a round."""
        if self.budget.money is None:
            return False
        spent = "SELECT COALESCE(SUM(cost), 0.0) FROM labels WHERE run = ? AND round <= ?"
        money = self.ledger.db.execute(spent, (self.run, round)).fetchone()[0]
        return money + self.budget.cost > self.budget.money + 1e-9

    @property
    def left(self) -> float:
        """Labels that can still be bought; infinity without a budget."""
        room = self._room(0, None)
        calls = math.floor(room.money / self.budget.cost + 1e-9) if self.budget.cost else math.inf
        return max(0.0, min(room.labels, calls))

    def _questions(self, prompts: Sequence[str], answers: tuple[Sequence[str], ...]) -> list[Question]:
        columns, sides = [prompts, *answers], 1 if self.kind == "score" else 2
        if len(answers) != sides or len({len(column) for column in columns}) > 1:
            wanted = "prompts and responses" if self.kind == "score" else "prompts, a and b"
            raise ValueError(f"{self.kind}s need {wanted}, N each; got {[len(column) for column in columns]} texts")
        questions = []
        for i, texts in enumerate(zip(*columns, strict=True)):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"question {i + 1} is not of texts; render messages with pyrite.data.text.plain")
            mirrored = self.symmetric and texts[2] < texts[1]
            texts = (texts[0], texts[2], texts[1]) if mirrored else texts
            named = json.dumps([self.gold, self.kind, *texts]).encode()
            questions.append(Question(hashlib.sha256(named).hexdigest(), texts, mirrored))
        return questions

    def _claim(self, request: Request) -> list[Question]:
        """Note what the ledger knows, and write down the intent to ask the next questions, in one transaction.

        These, and what others are asking, stay in line: the next look finds their answers.
        """
        mine: list[Question] = []
        undecided: list[Question] = []
        with self.ledger.write() as db:
            room = self._room(request.round, request.limit)
            while request.line and len(mine) < self.batch:
                question = request.line.popleft()
                found = db.execute(FIND, (question.key,)).fetchone()
                row = Row(*found) if found else None
                standing = self._standing(row, request.round)
                if standing == "answered" and row:
                    request.known[question.key], request.silent = row.answer, 0
                    if row.run != self.run:
                        use = (self.run, question.key, request.round)
                        db.execute("INSERT OR IGNORE INTO uses VALUES (?, ?, ?)", use)
                elif standing == "failed":
                    request.silent += 1
                elif standing == "busy":
                    undecided.append(question)
                elif standing == "open" and request.silent < DOWN and self._take(room, row, request.round):
                    db.execute(INTEND, self._intent(question, request.round))
                    mine.append(question)
                    undecided.append(question)
        request.line.extendleft(reversed(undecided))
        return mine

    def _standing(self, row: Row | None, round: int) -> Literal["answered", "failed", "busy", "open", "later"]:
        if row is None:
            return "open"
        if row.run == self.run and row.round > round:
            return "later"  # this run went back to a checkpoint; it must not see what it did not know then
        if row.state == "answered":
            return "answered"
        if row.state == "failed":
            return "failed" if (row.run, row.round) == (self.run, round) else "open"
        return "busy" if self.ledger.alive(row.owner) else "open"

    def _wanted(self, row: Row | None, round: int) -> bool:
        """Whether a question needs a label that is not counted yet."""
        counted = row is not None and row.state == "asked" and (row.run == self.run or self.budget.scope == "file")
        return self._standing(row, round) in ("open", "later") and not counted

    def _room(self, round: int, limit: int | None) -> Room:
        budget = self.budget
        whose, values = ("run = ?", [self.run]) if budget.scope == "run" else ("TRUE", [])
        spent = "SELECT COALESCE(SUM(state != 'failed'), 0), COALESCE(SUM(cost), 0.0) FROM labels"
        where = f"{spent} WHERE gold = ? AND kind = ? AND"
        labels = money = here = 0
        if budget.labels is not None or budget.money is not None:
            labels = self.ledger.db.execute(f"{where} {whose}", [self.gold, self.kind, *values]).fetchone()[0]
            money = self.ledger.db.execute(f"{spent} WHERE {whose}", values).fetchone()[1]
        if limit is not None:
            mine = [self.gold, self.kind, self.run, round]
            here = self.ledger.db.execute(f"{where} run = ? AND round = ?", mine).fetchone()[0]
        return Room(_less(budget.labels, labels), _less(limit, here), _less(budget.money, money))

    def _take(self, room: Room, row: Row | None, round: int) -> bool:
        """Reserve a label and the price of a call, unless there is no room. What is in flight was counted before."""
        label = here = True
        price = self.budget.cost
        if row is not None:
            own, file, in_flight = row.run == self.run, self.budget.scope == "file", row.state == "asked"
            label = not (in_flight and (own or file))
            here = not (in_flight and own and row.round == round)
            price += 0.0 if own or file else row.cost  # the question comes with the calls that others made
        if room.labels < label or room.limit < here or room.money < price - 1e-9:
            return False
        room.labels, room.limit, room.money = room.labels - label, room.limit - here, room.money - price
        return True

    def _intent(self, question: Question, round: int) -> dict[str, Any]:
        prompt, a, b = (*question.texts, None)[:3]
        who = {"key": question.key, "gold": self.gold, "kind": self.kind, "run": self.run, "round": round}
        what = {"prompt": prompt, "a": a, "b": b, "cost": self.budget.cost, "now": time.time()}
        return who | what | {"owner": self.ledger.owner()}

    def _buy(self, gold: Gold, questions: list[Question]) -> None:
        """Call the gold, again where it gives no answer; every outcome is in the ledger afterwards."""
        errors = self._call(gold, questions)
        for attempt in range(self.retries):
            if errors:
                time.sleep(self.backoff * 2**attempt)
            for question in questions:
                if question.key in errors and self._again(question):
                    del errors[question.key]
                    errors |= self._call(gold, [question])
        self.ledger.failed(errors)

    def _again(self, question: Question) -> bool:
        """Write down one more call, if there is money for it."""
        with self.ledger.write() as db:
            if self._room(0, None).money < self.budget.cost - 1e-9:
                return False
            again = "UPDATE labels SET attempts = attempts + 1, cost = cost + ?, asked = ? WHERE key = ?"
            db.execute(again, (self.budget.cost, time.time(), question.key))
        return True

    def _call(self, gold: Gold, questions: list[Question]) -> dict[str, str]:
        """Keep the answers; errors by key for what has none."""
        columns = [list(column) for column in zip(*(question.texts for question in questions), strict=True)]
        keys = [question.key for question in questions]
        try:
            given = torch.as_tensor(gold(*columns)).double()
            if given.shape != (len(keys),):
                raise ValueError(f"{len(keys)} questions got answers of shape {tuple(given.shape)}")
        except GoldStopped:
            raise
        except Exception as error:  # whatever a gold raises, it has given no answer
            return dict.fromkeys(keys, f"{type(error).__name__}: {error}")
        values = dict(zip(keys, given.tolist(), strict=True))
        wrong = {key: f"answered {value}" for key, value in values.items() if not self._sound(value)}
        self.ledger.answered({key: value for key, value in values.items() if key not in wrong})
        return wrong

    def _sound(self, value: float) -> bool:
        return math.isfinite(value) if self.kind == "score" else 0 <= value <= 1


@dataclass(frozen=True)
class GoldLimits:
    """How often gold is asked, and what that may cost: the labels a run learns from, and the scores that measure it."""

    gold_budget: Natural | None = None
    """Answers of gold to buy at most: labels to learn from or, in ppo, scores of measured answers."""
    gold_cost: NonNegative = 0.0
    """Price of one answer."""
    gold_max_cost: NonNegative | None = None
    """Money to spend at most; needs --gold-cost."""
    gold_ledger: Path | None = None
    """SQLite file of paid answers, which runs may share; ledger.db in the run's folder by default."""
    gold_batch: Count = 1
    """Questions in one call; more is faster with a cheap gold, and puts more at risk if a run is killed."""
    gold_every: Count = 1
    """Measurements to one with gold; the first and the last have it too."""
    gold_prompts: Several | None = None
    """Held-out prompts whose answers gold scores, the first ones; all by default."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.gold_max_cost is not None and not self.gold_cost:
            raise ValueError(f"--gold-max-cost {self.gold_max_cost}: give --gold-cost, the price of one answer, too")

    @property
    def counted(self) -> bool:
        """Whether answers go through a ledger."""
        return self.gold_budget is not None or self.gold_cost > 0 or self.gold_ledger is not None

    @property
    def sparing(self) -> bool:
        """Whether measurements ask gold less than always; then nothing else asks it."""
        return self.counted or self.gold_every > 1 or self.gold_prompts is not None

    def measuring(self, gold: str | None) -> GoldLimits:
        """The limits on measurements in a run that buys labels: the budget is for labels, the money for both. A gold
        without a price measures for nothing."""
        if gold and self.gold_cost:
            return replace(self, gold_budget=None)
        return GoldLimits(gold_batch=self.gold_batch, gold_every=self.gold_every, gold_prompts=self.gold_prompts)

    def account(self, folder: Path, gold: str, kind: Literal["score", "verdict"]) -> Account:
        """A run's account with the gold."""
        ledger = Ledger(self.gold_ledger or folder / "ledger.db")
        budget = Budget(self.gold_budget, self.gold_max_cost, self.gold_cost)
        return Account(ledger, str(folder.resolve()), gold, kind, budget=budget, batch=self.gold_batch)


def with_own_code(spec: str) -> str:
    """A spec followed by the hash of every file of your own that it names: "mine.py:score() [mine.py 0f3a...]"."""
    files = dict.fromkeys(re.findall(r"""[^\s'"(),=]+\.py(?=:)""", spec))
    hashes = [f"{file} {runs.fingerprint(file)}" for file in files if Path(file).is_file()]
    return f"{spec} [{', '.join(hashes)}]" if hashes else spec


def _less(limit: float | None, spent: float) -> float:
    return math.inf if limit is None else limit - spent
