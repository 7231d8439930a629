"""A language model as a judge: two answers, one criterion, any OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import heapq
import http.client
import itertools
import json
import os
import random
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from pyrite.core.processes import say
from pyrite.data.text import load_tokenizer
from pyrite.feedback.judges.people import Judge
from pyrite.feedback.judges.questions import (
    EQUAL,
    SHOWN,
    WINS,
    Case,
    Form,
    Label,
    Message,
    Reply,
    Said,
    Shown,
    Verdict,
    combined,
    demonstrations,
    folded,
    probability,
    read_verdict,
    several,
    shown,
)
from pyrite.feedback.ledger import GoldStopped, Ledger
from pyrite.math import ranges
from pyrite.math.ranges import Count, Natural, NonNegative, Positive, Text

# endpoints: A chat completion from an OpenAI-compatible server: one request, one reply, or the kind of trouble there
# was.


# refused: not answered, for now; lost: maybe answered, and paid for; unusable: answered, but not a completion;
# rejected: this request cannot be answered; system: not with a system turn; fatal: no request can be answered
Kind = Literal["refused", "lost", "unusable", "rejected", "system", "fatal"]
CHUNK = 1 << 16
SAID = 200  # characters of a server's own words in a message
# how servers say that a model takes no system turn: "System role not supported" (vLLM, TGI and llama.cpp with Gemma),
# "Developer instruction is not enabled" (Google), "role does not support 'system'" (OpenAI), 'Unexpected role "system"'
# (Anthropic), "Only user and assistant roles are supported", "Conversation roles must alternate" (Mistral)
_SYSTEM = re.compile(
    r"(?:system|developer)\W{0,3}(?:role|message|prompt|instruction|turn|field|param)|\brole.{0,40}\b(?:system|developer)\b",
    re.IGNORECASE,
)
_NOT = re.compile(r"\bnot\b|n't\b|\bno\b|unsupported|unknown|invalid|unexpected|disabled|forbidden", re.IGNORECASE)
_ROLES = re.compile(
    r"only user(?:,| and) assistant\b|roles must (?:strictly )?alternate|must start with .{0,9}user\b", re.I
)


class Trouble(Exception):  # noqa: N818, most of it passes
    """No completion; wait: seconds the server asked to be left alone."""

    def __init__(self, kind: Kind, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.wait = wait


class Completion(NamedTuple):
    """What a model wrote; tokens where the server counts them, their log-probabilities where it offers them."""

    text: str
    cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Endpoint:
    """A server at `base_url`, which may want the key in the environment variable `key_env`; timeout in seconds.

    The key is read for each request, is sent to this address only, and appears in no message. Raises ValueError for
    an address that cannot be one, or that holds a password.
    """

    base_url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url is {self.base_url!r}; give an address such as http://127.0.0.1:8000/v1")
        if url.password or url.username or url.query:
            raise ValueError("base_url holds more than an address; a key belongs into the environment (key_env)")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; give seconds, more than 0")

    def complete(self, body: dict[str, Any]) -> Completion:
        """The completion of a request body. Raises Trouble."""
        key = self._key()
        try:
            raw = self._posted(body, key)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, key) from None
        except urllib.error.URLError as error:
            never = isinstance(error.reason, (ConnectionRefusedError, socket.gaierror))
            raise Trouble("refused" if never else "lost", f"no connection: {error.reason}") from None
        except TimeoutError:
            raise Trouble("lost", f"no answer within {self.timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise Trouble("lost", f"the connection was cut ({type(error).__name__})") from None
        return _completion(_hidden(raw.decode("utf-8", "replace"), key))

    def _key(self) -> str:
        key = os.environ.get(self.key_env, "").strip()
        if not key.isascii() or not key.isprintable():
            raise Trouble("fatal", f"the key in {self.key_env} holds characters that no header can carry; set it again")
        return key

    def _posted(self, body: dict[str, Any], key: str) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        until = time.monotonic() + self.timeout
        with self._opener().open(request, timeout=self.timeout) as response:
            parts = []
            while part := response.read1(CHUNK):  # a timeout of the socket alone would let a slow server drip on
                parts.append(part)
                if time.monotonic() > until:
                    raise TimeoutError
            if response.length:  # read1 does not mind an end before the promised length
                raise http.client.IncompleteRead(b"", response.length)
            return b"".join(parts)

    def _opener(self) -> urllib.request.OpenerDirector:
        here = urllib.parse.urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        return urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if here else []))

    def _refusal(self, error: urllib.error.HTTPError, key: str) -> Trouble:
        """What a status other than 200 means."""
        status = error.code
        try:
            said = _hidden(" ".join(error.read(CHUNK).decode("utf-8", "replace").split()), key)
        except (OSError, http.client.HTTPException):
            said = ""
        message = f"{self.base_url} answered {status}: {said[:SAID] or error.reason}"
        if status == 429 and "insufficient_quota" in said:
            return Trouble("fatal", f"{message}; the account has no money left")
        if status in (400, 422, 500) and _no_system(said):
            return Trouble("system", message)
        if status in (408, 409, 425, 429) or status >= 500:
            return Trouble("refused", message, _wait(error.headers.get("Retry-After")))
        if status in (400, 413, 422):
            return Trouble("rejected", message)
        hint = {401: f"check the key in {self.key_env}", 403: f"check the key in {self.key_env}"}
        return Trouble("fatal", f"{message}; {hint.get(status, 'check the address and the name of the model')}")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere with a key in hand."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _no_system(said: str) -> bool:
    """Whether a server's words say that the model takes no system turn."""
    sentences = re.split(r"[.;!?]\s", said)
    return bool(_ROLES.search(said)) or any(_SYSTEM.search(one) and _NOT.search(one) for one in sentences)


def _completion(raw: str) -> Completion:
    try:
        found = json.loads(raw)
        choice = found["choices"][0]
        text = choice["message"].get("content") or ""
        usage = found.get("usage") or {}
        tokens = (choice.get("logprobs") or {}).get("content") or None
        asked, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(text, str) and isinstance(asked, int | None) and isinstance(written, int | None)):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Trouble("unusable", f"the answer is no chat completion: {raw[:SAID]!r}") from None
    return Completion(text, choice.get("finish_reason") == "length", asked, written, tokens)


def _wait(header: str | None) -> float:
    """Seconds of a Retry-After, a number or a date; 0 without one."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _hidden(text: str, key: str) -> str:
    """The text without the key, should a server repeat it; a key too short to be a secret is none."""
    return text.replace(key, "[key]") if len(key) >= 8 else text


# answers: What an LLM judge was asked, in the ledger's file: one row a question, with its raw answer, tokens and
# cost.


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


# asking: Questions to an endpoint, several at a time: paced, asked again where that helps, stopped where it does not.


PATIENCE = 600.0  # seconds that a server may ask to be left alone
LOOK = 0.1  # seconds between looks at what another process is asking


@dataclass(frozen=True)
class Pace:
    """How hard an endpoint is pressed, and for how long.

    concurrency: requests at once. per_minute: requests a minute at most. retries: requests after a first one that was
    not answered, `backoff`, 2 · `backoff`, ... up to `longest` seconds apart, less up to a half by chance, and no
    sooner than the server asks. reasks: requests after an answer without a verdict. down: questions in a row that ended
    without a verdict after which the judge is taken not to work.
    """

    concurrency: int = 8
    per_minute: float | None = None
    retries: int = 6
    reasks: int = 2
    backoff: float = 1.0
    longest: float = 60.0
    down: int = 8

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("reasks", 0), ("backoff", 0), ("down", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.per_minute is not None and not self.per_minute > 0:
            raise ValueError(f"per_minute is {self.per_minute}; it must be positive")


@dataclass(frozen=True)
class Trade:
    """What is sent for some questions, what their answer says (None: no verdict, or not one for each), what it costs.

    price: money of an answer, None where the server does not count its tokens. risk: the most that a question can
    cost. limit: money of the ledger's file.
    """

    send: Callable[[Sequence[Question]], Completion]
    read: Callable[[Completion, int], Sequence[Said] | None]
    price: Callable[[Completion], float | None]
    risk: Callable[[Question], float]
    limit: float | None = None


class Turn(NamedTuple):
    """Questions of one request; how often nobody answered, and how often without a verdict; whether any of those
    answers was a completion."""

    questions: tuple[Question, ...]
    unanswered: int = 0
    useless: int = 0
    heard: bool = False


class Desk:
    """One round of questions. A question to be asked again keeps its place among the `concurrency` that are out."""

    def __init__(self, answers: Answers, trade: Trade, pace: Pace, advance: Callable[[int], object]) -> None:
        self.answers, self.trade, self.pace, self.advance = answers, trade, pace, advance
        self.line: deque[Turn] = deque()
        self.later: list[tuple[float, int, Turn]] = []
        self.busy: deque[tuple[float, Turn]] = deque()  # another process is asking these
        self.flying: dict[Future[Completion], Turn] = {}
        self.numbers = itertools.count()
        self.chance = random.Random()  # when, not what
        self.free = 0.0  # the earliest moment for the next request
        self.silent = 0  # questions in a row that ended without a verdict
        self.unanswered = 0  # those among them without any answer

    def ask(self, questions: Sequence[Question], *, batch: int = 1) -> None:
        """Ask, until every question has ended; the answers are then in the ledger.

        Raises GoldStopped where the server is down or will not have us, where its answers hold no verdicts, or money
        would run out. Answers in flight are awaited and kept, then too.
        """
        self.line.extend(Turn(tuple(questions[at : at + batch])) for at in range(0, len(questions), batch))
        with ThreadPoolExecutor(self.pace.concurrency, thread_name_prefix="judge") as pool:
            try:
                while self.line or self.later or self.busy or self.flying:
                    self._land(self._pause() if self._send(pool) else None)
            except BaseException:
                while self.flying:
                    with contextlib.suppress(GoldStopped):
                        self._land(None)
                raise

    def _send(self, pool: ThreadPoolExecutor) -> bool:
        """Send what may be sent now; False where answers in flight decide whether there is money for more."""
        while time.monotonic() >= self.free and (turn := self._next()):
            turn = self._claimed(turn)
            if turn is None:
                return False
            if turn.questions:
                self.flying[pool.submit(self.trade.send, turn.questions)] = turn
                self.free = time.monotonic() + (60 / self.pace.per_minute if self.pace.per_minute else 0.0)
        return True

    def _next(self) -> Turn | None:
        now = time.monotonic()
        if self.later and self.later[0][0] <= now:
            return heapq.heappop(self.later)[2]
        if len(self.flying) + len(self.later) >= self.pace.concurrency:
            return None
        if self.busy and self.busy[0][0] <= now:
            return self.busy.popleft()[1]
        return self.line.popleft() if self.line else None

    def _claimed(self, turn: Turn) -> Turn | None:
        """The questions that are ours to ask, written down; None where there may be money for them later."""
        ours: list[Question] = []
        for place, question in enumerate(turn.questions):
            risk = self.trade.risk(question)
            standing = self.answers.intend(question, risk=risk, limit=self.trade.limit)
            if standing == "ask":
                ours.append(question)
            elif standing == "known":
                self.advance(1)
            elif standing == "busy":
                self.busy.append((time.monotonic() + LOOK, turn._replace(questions=(question,))))
            elif ours:  # money for these at least
                self.line.appendleft(turn._replace(questions=turn.questions[place:]))
                break
            else:
                self.line.appendleft(turn._replace(questions=turn.questions[place:]))
                if self.flying:
                    return None
                raise GoldStopped(self._broke(risk))
        return turn._replace(questions=tuple(ours))

    def _pause(self) -> float | None:
        """Seconds until there is something to send; None where only an arrival can change that."""
        moments = [self.later[0][0]] if self.later else []
        if len(self.flying) + len(self.later) < self.pace.concurrency:
            moments += [self.busy[0][0]] if self.busy else []
            moments += [self.free] if self.line else []
        return max(0.0, max(self.free, min(moments)) - time.monotonic()) if moments else None

    def _land(self, pause: float | None) -> None:
        """Take in what has arrived within the pause."""
        if not self.flying:
            time.sleep(pause or 0.0)
            return
        for future in wait(self.flying, pause, return_when=FIRST_COMPLETED).done:
            turn = self.flying.pop(future)
            try:
                completion = future.result()
            except Trouble as trouble:
                if trouble.kind == "unusable":
                    self._useless(turn, None, str(trouble))
                elif trouble.kind == "system":
                    self._refolded(turn, trouble)
                else:
                    self._unanswered(turn, trouble)
            else:
                self._answered(turn, completion)

    def _answered(self, turn: Turn, completion: Completion) -> None:
        verdicts = self.trade.read(completion, len(turn.questions))
        if verdicts is None:
            self._useless(turn, completion, f"no verdict in the answer {_shown(completion)}")
            return
        self.silent = self.unanswered = 0
        kept = zip(self._paid(turn, completion), verdicts, strict=True)
        self._settle(turn, [replace(one, label=said.label, p=said.p) for one, said in kept])
        self.advance(len(turn.questions))

    def _useless(self, turn: Turn, completion: Completion | None, error: str) -> None:
        """An answer without a verdict, or not one for each question: those are asked one at a time.

        A question whose every answer was no completion at all, such as a web page, has failed: another run asks again.
        """
        single, heard = len(turn.questions) == 1, turn.heard or completion is not None
        end = single and turn.useless >= self.pace.reasks
        state, unusable = ("answered" if heard else "failed", 0) if end else ("open", 1)
        kept = self._paid(turn, completion or Completion(""))
        self._settle(turn, [replace(one, state=state, error=error, unusable=unusable) for one in kept])
        if end:
            self.advance(1)
            self._ended(1, error)
        elif single:
            self._again(turn._replace(useless=turn.useless + 1, heard=heard), self._backoff(turn.useless))
        else:
            self._singly(turn)

    def _unanswered(self, turn: Turn, trouble: Trouble) -> None:
        lost, single = trouble.kind == "lost", len(turn.questions) == 1
        end = turn.unanswered >= self.pace.retries or (single and trouble.kind == "rejected")
        kept = Outcome("failed" if end else "open", error=str(trouble), lost=int(lost))
        released = [0.0 if lost else self.trade.risk(question) for question in turn.questions]
        self._settle(turn, [replace(kept, released=risk) for risk in released])
        if trouble.kind == "fatal":
            raise GoldStopped(f"{trouble}; {self._rest()}")
        if end:
            self.unanswered += len(turn.questions)
            self.advance(len(turn.questions))
            self._ended(len(turn.questions), str(trouble))
        elif trouble.kind == "rejected":  # one of them may be too long
            self._singly(turn)
        else:
            delay = max(self._backoff(turn.unanswered), min(trouble.wait, PATIENCE))
            self._again(turn._replace(unanswered=turn.unanswered + 1), delay)

    def _refolded(self, turn: Turn, trouble: Trouble) -> None:
        """The model takes no system turn; nothing was charged, and what is sent from now on has none."""
        kept = Outcome("open", error=str(trouble))
        self._settle(turn, [replace(kept, released=self.trade.risk(question)) for question in turn.questions])
        self._again(turn, 0.0)

    def _ended(self, questions: int, error: str) -> None:
        """So many questions more ended without a verdict. Raises GoldStopped where there were too many in a row."""
        self.silent += questions
        if self.silent < self.pace.down:
            return
        if self.unanswered == self.silent:
            what = f"the judge does not answer: {self.silent} questions in a row had no answer, the last one because: "
            raise GoldStopped(f"{what}{error}; {self._rest()}")
        what = f"the judge gives no verdicts: {self.silent} questions in a row had none, the last one because: {error}"
        advice = "check the address, the model, --reply and --max-tokens"
        raise GoldStopped(f"{what}; {advice}; {self._rest()}")

    def _paid(self, turn: Turn, completion: Completion) -> list[Outcome]:
        """An answer's tokens and price, shared among its questions."""
        n = len(turn.questions)
        price = self.trade.price(completion)
        asked, written = completion.prompt_tokens or 0, completion.completion_tokens or 0
        return [
            Outcome(
                "answered",
                raw=completion.text,
                prompt_tokens=asked // n + (i < asked % n),
                completion_tokens=written // n + (i < written % n),
                cost=(price or 0.0) / n,
                released=0.0 if price is None else self.trade.risk(question),
            )
            for i, question in enumerate(turn.questions)
        ]

    def _settle(self, turn: Turn, outcomes: Sequence[Outcome]) -> None:
        keys = [question.key for question in turn.questions]
        self.answers.settle(dict(zip(keys, outcomes, strict=True)))

    def _again(self, turn: Turn, delay: float) -> None:
        heapq.heappush(self.later, (time.monotonic() + delay, next(self.numbers), turn))

    def _singly(self, turn: Turn) -> None:
        self.line.extendleft(Turn((question,)) for question in reversed(turn.questions))

    def _backoff(self, times: int) -> float:
        return min(self.pace.longest, self.pace.backoff * 2**times) * self.chance.uniform(0.5, 1.0)

    def _broke(self, risk: float) -> str:
        spent = f"{self.answers.spent():.6g} of max_cost={self.trade.limit:g} is spent or at risk"
        return f"{spent}, and the next answer may cost {risk:.3g}; raise max_cost; {self._rest()}"

    def _rest(self) -> str:
        turns = [*self.line, *(turn for *_, turn in [*self.later, *self.busy])]
        left = sum(len(turn.questions) for turn in turns)
        return f"{left} questions and those in flight are left; run again to go on from {self.answers.ledger.path}"


def _shown(completion: Completion) -> str:
    """The beginning of a judge's answer, for a message."""
    words = " ".join(completion.text.split())
    return (repr(words[:80]) if words else "(it is empty)") + (" (it was cut at max_tokens)" if completion.cut else "")


# costs: What questions to a judge cost: by tokens a server counted or, before, by the prompts as they will be sent.


MILLION = 1_000_000
TURN = 16  # tokens a chat template adds to a turn, at most
Counter = Callable[[Sequence[Message]], int]


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens read and a million written."""

    read: float = 0.0
    written: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("price_in", self.read), ("price_out", self.written)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; give money for a million tokens, at least 0")

    @property
    def paid(self) -> bool:
        """Whether anything costs money."""
        return self.read > 0 or self.written > 0

    def of(self, read: int, written: int) -> float:
        """The price of so many tokens.

        >>> Prices(read=30.0).of(4_000_000, 0)
        120.0
        """
        return (read * self.read + written * self.written) / MILLION


def most(messages: Sequence[Message]) -> int:
    """Tokens that no tokenizer exceeds: one a byte, and those of the template."""
    return sum(len(turn["content"].encode()) + TURN for turn in messages)


def by_characters(messages: Sequence[Message]) -> int:
    """About as many tokens as English text has: characters / 4."""
    return round(sum(len(turn["content"]) for turn in messages) / 4)


def by_tokenizer(name: str) -> Counter:
    """Counts tokens with a tokenizer, a folder or a Hub name, by its chat template if any. Raises ValueError.

    Where the template takes no system turn, its text is counted as part of the first user turn, as it will be sent.
    """
    from jinja2 import TemplateError

    tokenizer, _ = load_tokenizer(name)

    def rendered(messages: Sequence[Message]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def count(messages: Sequence[Message]) -> int:
        if tokenizer.chat_template:
            try:
                text = rendered(messages)
            except TemplateError:
                if messages[0]["role"] != "system":
                    raise
                text = rendered(folded(messages))
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return sum(len(tokenizer(turn["content"])["input_ids"]) for turn in messages)

    return count


# llm: A language model as a judge: two answers, one criterion, any OpenAI-compatible endpoint.


LEDGER = "judge.db"
ALTERNATIVES = 20  # likeliest tokens in each place, as many as servers give


@dataclass(frozen=True)
class Asking:
    """How a language model is asked to judge."""

    base_url: str = "https://api.openai.com/v1"
    """Address of the OpenAI-compatible server, up to and with its version."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key; it may be unset where a server wants none."""
    system: bool = True
    """Give the instructions as a system turn; otherwise, and for models that turn out to have no such role, they stand
    before the first user turn."""
    reply: Reply = "label"
    """label: the verdict on the first line; reasons: the verdict after its reasons; json: by a schema."""
    ties: bool = True
    """The judge may say that neither answer is better."""
    both_orders: bool = True
    """Ask about each pair in both orders, disagreement is a tie; otherwise once, in an order drawn by the seed."""
    batch: Count = 1
    """Pairs in one request, cheaper and coarser; needs reply label."""
    demonstrations: str | None = None
    """File of solved cases shown first: prompt, a, b, label (A, B or TIE), and optionally reason."""
    temperature: NonNegative = 0.0
    """Of the judge's answers; 0 for the likeliest one."""
    max_tokens: Count = 512
    """Longest reply, its reasons included."""
    logprobs: bool = False
    """Take P(a beats b) from the probabilities of the label, where the server offers them."""
    body: Text = ""
    """More fields of the request, as a JSON object; null leaves one out: '{"max_tokens": null, "seed": 1}'."""
    price_in: NonNegative = 0.0
    """Money for a million tokens read."""
    price_out: NonNegative = 0.0
    """Money for a million tokens written."""
    max_cost: NonNegative | None = None
    """Money that all answers in the ledger's file may cost; the judge stops before it is exceeded."""
    concurrency: Count = 8
    """Requests at once."""
    per_minute: Positive | None = None
    """Requests a minute, at most."""
    timeout: Positive = 60.0
    """Seconds to wait for an answer."""
    retries: Natural = 6
    """Requests after one that was not answered, further and further apart."""
    reasks: Natural = 2
    """Requests after an answer without a verdict."""
    backoff: NonNegative = 1.0
    """Seconds before the first retry; each next one waits twice as long, up to a minute."""
    seed: Natural = 0
    """Of the order of the answers."""


class Estimate(NamedTuple):
    """Questions still to be asked, those answered before, requests, tokens read and (at most) written, their price."""

    questions: int
    answered: int
    requests: int
    tokens_in: int
    tokens_out: int
    cost: float


class LanguageJudge:
    """A judge that is a language model; calling it judges.

    criterion_id: names the criterion in the ledger; its text by default. ledger: SQLite file of the answers. Raises
    ValueError for options out of range or against each other.
    """

    def __init__(self, model: str, criterion: str, criterion_id: str | None, asking: Asking, ledger: str) -> None:
        ranges.check(asking)
        self.model, self.criterion, self.asking, self.ledger = model, criterion_id or criterion, asking, ledger
        shown = demonstrations(asking.demonstrations) if asking.demonstrations else ()
        self.form = Form(criterion, asking.reply, asking.ties, shown)
        self.system = asking.system
        self.endpoint = Endpoint(asking.base_url, asking.key_env, asking.timeout)
        self.pace = Pace(asking.concurrency, asking.per_minute, asking.retries, asking.reasks, asking.backoff)
        self.prices = Prices(asking.price_in, asking.price_out)
        self.more = _more(asking.body)
        limits = [asking.max_tokens, self.more.get("max_tokens"), self.more.get("max_completion_tokens")]
        self.longest = max(limit for limit in limits if isinstance(limit, int))
        _refuse(model, asking, self.prices)

    def __call__(self, prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        """P(a beats b), (N,) float64; NaN where there is no verdict."""
        return torch.tensor([verdict.p for verdict in self.verdicts(prompts, a, b)], dtype=torch.float64)

    def verdicts(
        self,
        prompts: Sequence[str],
        a: Sequence[str],
        b: Sequence[str],
        *,
        advance: Callable[[int], object] = lambda _: None,
    ) -> list[Verdict]:
        """The verdicts on N pairs, from the ledger, and from the endpoint what it does not hold.

        Equal answers are a tie that nobody is asked about. advance: told of questions as they end. Raises GoldStopped.
        """
        asked = self.questions(prompts, a, b)
        different = {question.key: question for pair in asked for question in pair.values()}
        with Answers(self.ledger, paid=self.prices.paid) as answers:
            known = answers.find(different)
            advance(len(known))
            new = [question for key, question in different.items() if key not in known]
            Desk(answers, self._trade(), self.pace, advance).ask(new, batch=self.asking.batch)
            known |= answers.find(question.key for question in new)
        return [self._verdict({shown: known.get(question.key) for shown, question in pair.items()}) for pair in asked]

    def questions(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[dict[Shown, Question]]:
        """What is asked about each of N pairs, by the order in which its answers are shown."""
        return [self._pair(*texts) for texts in zip(prompts, a, b, strict=True)]

    def estimate(self, pairs: Sequence[dict[Shown, Question]], count: Counter = by_characters) -> Estimate:
        """What pairs will cost that the ledger does not answer; tokens by `count` of the messages that will be sent.

        Replies are taken to be as long as they may be. Asks nobody.
        """
        different = {question.key: question for pair in pairs for question in pair.values()}
        known: dict[str, Kept] = {}
        if Path(self.ledger).exists():
            with Answers(self.ledger) as answers:
                known = answers.find(different)
        cases = [question.case for key, question in different.items() if key not in known]
        requests = [cases[at : at + self.asking.batch] for at in range(0, len(cases), self.asking.batch)]
        read = sum(count(self.form.messages(some, system=self.system)) for some in requests)
        written = len(requests) * self.longest
        return Estimate(len(cases), len(known), len(requests), read, written, self.prices.of(read, written))

    def _pair(self, prompt: str, a: str, b: str) -> dict[Shown, Question]:
        if a == b:
            return {}
        orders = SHOWN if self.asking.both_orders else (shown(prompt, a, b, seed=self.asking.seed),)
        cases = {"ab": Case(prompt, a, b), "ba": Case(prompt, b, a)}
        return {order: self._question(cases[order]) for order in orders}

    def _question(self, case: Case) -> Question:
        named = json.dumps([self.criterion, self.asking.batch, self._body([case])], sort_keys=True)
        return Question(hashlib.sha256(named.encode()).hexdigest(), self.model, self.criterion, case)

    def _body(self, cases: Sequence[Case], *, system: bool = True) -> dict[str, Any]:
        """A request; null fields of --body leave one out."""
        asking = self.asking
        messages = self.form.messages(cases, system=system)
        body = {"model": self.model, "messages": messages, "temperature": asking.temperature}
        body["max_tokens"] = asking.max_tokens
        if asking.logprobs:
            body |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
        if asking.reply == "json":
            body["response_format"] = self.form.response_format()
        return {name: value for name, value in (body | self.more).items() if value is not None}

    def _trade(self) -> Trade:
        def risk(question: Question) -> float:
            return self.prices.of(most(self.form.messages([question.case])), self.longest)

        def price(completion: Completion) -> float | None:
            read, written = completion.prompt_tokens, completion.completion_tokens
            return None if read is None or written is None else self.prices.of(read, written)

        return Trade(self._send, self._read, price, risk, self.asking.max_cost)

    def _send(self, questions: Sequence[Question]) -> Completion:
        """The answer to questions. A model found to take no system turn is sent none from then on. Raises Trouble."""
        system = self.system
        try:
            return self.endpoint.complete(self._body([question.case for question in questions], system=system))
        except Trouble as trouble:
            if trouble.kind != "system":
                raise
            if not system:  # there was none to take offense at
                raise Trouble("rejected", str(trouble)) from None
            if self.system:
                say("judge: the model takes no system turn; from now on the instructions stand before the user's turn")
            self.system = False
            raise

    def _read(self, completion: Completion, count: int) -> list[Said] | None:
        """What was said of so many cases; None without a verdict on each."""
        asking, text = self.asking, completion.text
        if count > 1:
            labels = several(text, count, ties=asking.ties)
            return None if labels is None else [Said(label, WINS[label]) for label in labels]
        if completion.cut and asking.reply == "reasons":
            return None  # what it would have concluded is not known
        found = read_verdict(text, reply=asking.reply, ties=asking.ties)
        if found is None:
            return None
        p = probability(completion.tokens, text, found) if asking.logprobs and completion.tokens else None
        return [Said(found.label, WINS[found.label] if p is None else p)]

    def _verdict(self, answers: dict[Shown, Kept | None]) -> Verdict:
        """One verdict from the answers about a pair."""
        if not answers:
            return EQUAL
        raw = tuple(kept.raw or "" if kept else "" for kept in answers.values())
        return combined({order: _said(kept) for order, kept in answers.items()}, raw=raw, mean=self.asking.logprobs)


def llm(
    *,
    model: str,
    criterion: str,
    criterion_id: str | None = None,
    base_url: str = Asking.base_url,
    key_env: str = Asking.key_env,
    system: bool = Asking.system,
    reply: Reply = Asking.reply,
    ties: bool = Asking.ties,
    both_orders: bool = Asking.both_orders,
    batch: Count = Asking.batch,
    demonstrations: str | None = Asking.demonstrations,
    temperature: NonNegative = Asking.temperature,
    max_tokens: Count = Asking.max_tokens,
    logprobs: bool = Asking.logprobs,
    body: Text = Asking.body,
    price_in: NonNegative = Asking.price_in,
    price_out: NonNegative = Asking.price_out,
    max_cost: NonNegative | None = Asking.max_cost,
    concurrency: Count = Asking.concurrency,
    per_minute: Positive | None = Asking.per_minute,
    timeout: Positive = Asking.timeout,
    retries: Natural = Asking.retries,
    reasks: Natural = Asking.reasks,
    backoff: NonNegative = Asking.backoff,
    seed: Natural = Asking.seed,
    ledger: str = LEDGER,
) -> Judge:
    """Judge: a language model, at any OpenAI-compatible endpoint, says which answer is better by a criterion.

    criterion: a sentence, all that the judge is told; criterion_id: its name in the ledger. ledger: SQLite file in
    which every answer is kept with its text, tokens and cost; what it holds is never asked again: a model is known by
    its name, not its address. The other options are those of `pyrite judge ask`. NaN: the model gave no verdict, or
    no answer. Raises ValueError for options that cannot be, GoldStopped where the model cannot be asked.
    """
    given = {name: value for name, value in locals().items() if name in Asking.__dataclass_fields__}
    return LanguageJudge(model, criterion, criterion_id, Asking(**given), ledger)


def _refuse(model: str, asking: Asking, prices: Prices) -> None:
    if not model:
        raise ValueError("the judge's model has no name; give model, as its server knows it")
    if asking.max_cost is not None and not prices.paid:
        raise ValueError(f"max_cost is {asking.max_cost} without a price; give price_in and price_out")
    if asking.batch > 1 and (asking.reply != "label" or asking.logprobs):
        raise ValueError(f"batch is {asking.batch}; more than 1 needs reply label, no logprobs")


def _more(body: str) -> dict[str, Any]:
    try:
        found = json.loads(body or "{}")
    except ValueError as error:
        raise ValueError(
            f"--body {body}: the body is no JSON ({error}); write as in '{{\"max_completion_tokens\": 64}}'"
        ) from None
    if not isinstance(found, dict) or {"model", "messages", "stream", "n"} & set(found):
        raise ValueError("body must be a JSON object with further fields, not model, messages, stream or n")
    return found


def _said(kept: Kept | None) -> Said | None:
    return None if kept is None or kept.label is None or kept.p is None else Said(kept.label, kept.p)
