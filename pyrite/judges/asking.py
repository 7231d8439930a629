"""Questions to an endpoint, several at a time: paced, asked again where that helps, stopped where it does not.

All decisions and the ledger are this thread's; the others only send. No answer is invented: a question ends with an
answer, with an answer that holds no verdict, or failed.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import NamedTuple

from pyrite.judges.answers import Answers, Outcome, Question
from pyrite.judges.endpoints import Completion, Trouble
from pyrite.judges.pairs import Said
from pyrite.ledger import GoldStopped

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
