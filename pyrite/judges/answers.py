"""What an LLM judge was asked, in the ledger's file: one row a question, with its raw answer, tokens and cost.

A request is written down before it is sent, with the most it can cost at risk, and its outcome as soon as it is there:
a process killed at any point loses at most the answers in flight. Those are counted as lost, as are requests whose
connection was cut: they may have been answered and charged, so what they can have cost stays at risk.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pyrite.judges.forms import Case
from pyrite.judges.verdicts import Label
from pyrite.ledger import Ledger

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY, model TEXT NOT NULL, criterion TEXT NOT NULL, prompt TEXT NOT NULL, a TEXT NOT NULL,
  b TEXT NOT NULL, state TEXT NOT NULL, label TEXT, p REAL, raw TEXT, error TEXT, requests INTEGER NOT NULL,
  unusable INTEGER NOT NULL, lost INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
  cost REAL NOT NULL, at_risk REAL NOT NULL, asked REAL NOT NULL, settled REAL, owner TEXT)
"""
SPENT_INDEX = "CREATE INDEX IF NOT EXISTS spent ON answers (cost, at_risk)"
INTEND = """
INSERT INTO answers VALUES (:key, :model, :criterion, :prompt, :a, :b, 'asked', NULL, NULL, NULL, NULL, 1, 0, 0, 0, 0,
  0, :risk, :now, NULL, :owner)
ON CONFLICT (key) DO UPDATE SET state = 'asked', error = NULL, requests = requests + 1, lost = lost + (state = 'asked'),
  at_risk = at_risk + :risk, asked = :now, settled = NULL, owner = :owner
"""
SETTLE = """
UPDATE answers SET state = :state, label = :label, p = :p, raw = COALESCE(:raw, raw), error = :error,
  unusable = unusable + :unusable, lost = lost + :lost, prompt_tokens = prompt_tokens + :prompt_tokens,
  completion_tokens = completion_tokens + :completion_tokens, cost = cost + :cost,
  at_risk = MAX(0, at_risk - :released), settled = :now, owner = CASE WHEN :state = 'open' THEN owner END
WHERE key = :key
"""
MANY = 500  # keys in one query


class Question(NamedTuple):
    """A case put to a model by a criterion; the key stands for everything that makes the answer what it is."""

    key: str
    model: str
    criterion: str
    case: Case


class Kept(NamedTuple):
    """An answer of the ledger: the label, none where the judge gave none; P(first beats second); the judge's text."""

    label: Label | None
    p: float | None
    raw: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a request; state open: the question will be asked again.

    released: what is no longer at risk, because it is known that nothing, or how much, was charged.
    """

    state: Literal["answered", "open", "failed"]
    label: Label | None = None
    p: float | None = None
    raw: str | None = None
    error: str | None = None
    unusable: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    released: float = 0.0


@dataclass(frozen=True)
class Tally:
    """The answers of a file, or of some questions: how they ended, what was sent for them, what was paid.

    no_verdict: answered without one. requests: calls sent. unusable: paid answers that were asked for again. lost:
    calls that may have been answered and paid for without an answer arriving. at_risk: what those, and calls in
    flight, can have cost at most, on top of cost.
    """

    answered: int = 0
    no_verdict: int = 0
    failed: int = 0
    requests: int = 0
    unusable: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    at_risk: float = 0.0


TALLY = """
SELECT SUM(state = 'answered' AND label IS NOT NULL), SUM(state = 'answered' AND label IS NULL), SUM(state = 'failed'),
  SUM(requests), SUM(unusable), SUM(lost), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost), SUM(at_risk)
FROM answers
"""


class Answers:
    """The answers in a ledger file; use it from one thread, in a `with`. Raises LedgerError."""

    def __init__(self, path: str | Path, *, paid: bool = False) -> None:
        self.ledger = Ledger(path)
        with self.ledger.write() as db:
            db.execute(SCHEMA)
            db.execute(SPENT_INDEX)
        if paid:
            self.ledger.flush()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self.ledger.close()

    def find(self, keys: Iterable[str]) -> dict[str, Kept]:
        """The answers there are, by key."""
        found: dict[str, Kept] = {}
        for some in _some(list(keys)):
            marks = ", ".join("?" * len(some))
            query = f"SELECT key, label, p, raw FROM answers WHERE state = 'answered' AND key IN ({marks})"
            found |= {key: Kept(*values) for key, *values in self.ledger.db.execute(query, some)}
        return found

    def intend(self, question: Question, *, risk: float, limit: float | None) -> str:
        """Write down that the question is being asked: "ask" it now. Otherwise the reason not to.

        "known": it is answered. "busy": another process is asking it. "broke": with `risk`, the most that the request
        can cost, the file's spending could exceed `limit`.
        """
        with self.ledger.write() as db:
            row = db.execute("SELECT state, owner FROM answers WHERE key = ?", (question.key,)).fetchone()
            if row and row[0] == "answered":
                return "known"
            if row and self.ledger.alive(row[1]):
                return "busy"
            if limit is not None and self.spent() + risk > limit + 1e-9:
                return "broke"
            prompt, a, b = question.case
            what = {"key": question.key, "model": question.model, "criterion": question.criterion}
            texts = {"prompt": prompt, "a": a, "b": b, "risk": risk, "now": time.time()}
            db.execute(INTEND, what | texts | {"owner": self.ledger.owner()})
        return "ask"

    def settle(self, outcomes: dict[str, Outcome]) -> None:
        """Keep what became of requests, by key."""
        with self.ledger.write() as db:
            db.executemany(SETTLE, [{"key": k, "now": time.time(), **asdict(one)} for k, one in outcomes.items()])

    def spent(self) -> float:
        """Money of the whole file, paid or at risk."""
        return self.ledger.db.execute("SELECT COALESCE(SUM(cost) + SUM(at_risk), 0.0) FROM answers").fetchone()[0]

    def tally(self, keys: Sequence[str] | None = None) -> Tally:
        """The sums over the file, or over some questions."""
        if keys is None:
            return _sum([self.ledger.db.execute(TALLY).fetchone()])
        marks = [(f"{TALLY} WHERE key IN ({', '.join('?' * len(some))})", some) for some in _some(keys)]
        return _sum([self.ledger.db.execute(query, some).fetchone() for query, some in marks])

    def last_error(self, keys: Sequence[str]) -> str:
        """Why the latest of some questions that have no verdict has none."""
        found: list[tuple[float, str]] = []
        for some in _some(keys):
            query = (
                f"SELECT settled, error FROM answers WHERE error IS NOT NULL AND key IN ({', '.join('?' * len(some))})"
            )
            found += [(settled or 0.0, error) for settled, error in self.ledger.db.execute(query, some)]
        return max(found)[1] if found else "nothing was asked"

    def rows(self) -> list[dict[str, Any]]:
        """Every question, oldest first."""
        cursor = self.ledger.db.execute("SELECT * FROM answers ORDER BY rowid")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


def _some(keys: Sequence[str]) -> list[list[str]]:
    return [list(keys[begin : begin + MANY]) for begin in range(0, len(keys), MANY)]


def _sum(rows: list[tuple[Any, ...]]) -> Tally:
    return Tally(*(cast(Any, sum(value or 0 for value in column)) for column in zip(*rows, strict=True)))
