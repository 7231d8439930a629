"""An account asks a gold through the ledger: within its budget, each question once, no label invented.

What is charged: a label is an answer, so a question that failed costs no label; money is paid for every call of the
gold, answered or not, for a call that gave nothing was made all the same. Questions in flight count as spent, also
those of a process that died, until somebody has asked them again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrite import runs
from pyrite.ledger import Books, GoldStopped, Ledger

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
                raise ValueError(f"question {i + 1} is not of texts; render messages with pyrite.text.plain")
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
            labels, money = self.ledger.db.execute(f"{where} {whose}", [self.gold, self.kind, *values]).fetchone()
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


def with_own_code(spec: str) -> str:
    """A spec followed by the hash of every file of your own that it names: "mine.py:score() [mine.py 0f3a...]"."""
    files = dict.fromkeys(re.findall(r"""[^\s'"(),=]+\.py(?=:)""", spec))
    hashes = [f"{file} {runs.fingerprint(file)}" for file in files if Path(file).is_file()]
    return f"{spec} [{', '.join(hashes)}]" if hashes else spec


def _less(limit: float | None, spent: float) -> float:
    return math.inf if limit is None else limit - spent
