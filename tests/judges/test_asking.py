"""Asking: several calls at once, paced, asked again, stopped; what was done is in the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import SERVER

from pyrite.feedback.ledger import Asker, Books, Budget, GoldStopped, Ledger, Outcome, Pace, Question, Trouble

FAST = Pace(concurrency=8, retries=6, reasks=2, backoff=0.001)
Plan = Trouble | tuple[str, bool]  # what goes wrong; or what is written, and whether its tokens are counted
GOOD: Plan = ("A", True)


def pace(**options: float) -> Pace:
    return replace(FAST, **options)  # type: ignore


class Line:
    """An endpoint that does what it is told, question by question, then answers A."""

    def __init__(self, **plans: list[Plan]) -> None:
        self.plans, self.price = plans, 0.0
        self.sent: list[str] = []
        self.times: list[float] = []
        self.out = self.most = 0
        self.lock = threading.Lock()
        self.hold = 0.0

    def __call__(self, questions: Sequence[Question]) -> list[Outcome]:
        with self.lock:
            self.sent.append("+".join(question.key for question in questions))
            self.times.append(time.monotonic())
            self.out += 1
            self.most = max(self.most, self.out)
            plan = self.plans.get(self.sent[-1], self.plans.get("every", []))
            step: Plan = plan.pop(0) if plan else ("".join("A" for _ in questions), True)
        time.sleep(self.hold)
        with self.lock:
            self.out -= 1
        if isinstance(step, Trouble):
            raise step
        (text, counted), n = step, len(questions)
        cost = {"cost": self.price / n, "released": 2 * self.price} if counted else {}
        tokens = {"tokens_in": 10 // n, "tokens_out": 1}
        if len(text) == n and set(text) <= {"A", "B"}:
            return [Outcome("answered", 1.0, label, text, **tokens, **cost) for label in text]
        return [Outcome("open", text=text, error=f"no verdict in {text}", unusable=1, **tokens, **cost)] * n


def asked(*keys: str) -> list[Question]:
    return [Question(key, ("p", f"a{key}", f"b{key}")) for key in keys]


def asker(
    ledger: Ledger,
    line: Line,
    pace: Pace = FAST,
    advance: Callable[[int], object] = print,
    *,
    price: float = 0.0,
    limit: float | None = None,
) -> Asker:
    line.price = price
    budget = Budget(money=limit)
    return Asker(
        *(ledger, line, "completion", "m", pace, "c"),
        budget=budget,
        risk=lambda _: 2 * price,
        strict=True,
        advance=advance,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "j.db") as opened:
        yield opened


Ask = Callable[..., list[int]]


@pytest.fixture
def ask(ledger: Ledger) -> Ask:
    def run(line: Line, *keys: str, pace: Pace = FAST, **options: float) -> list[int]:
        told: list[int] = []
        asker(ledger, line, pace, told.append, **options).ask(asked(*keys))
        assert sum(told) == len(keys)
        return told

    return run


def trouble(kind: str, wait: float = 0.0) -> Trouble:
    return Trouble(kind, f"it is {kind}", wait)  # type: ignore


def test_each_question_once(ledger: Ledger, ask: Ask) -> None:
    line = Line()
    ask(line, "k0", "k1", "k2", price=0.5)
    assert sorted(line.sent) == ["k0", "k1", "k2"]
    assert ledger.books() == Books(answered=3, calls=3, tokens_in=30, tokens_out=3, cost=1.5)
    ask(line, "k0", "k1", "k2", "k3")
    assert line.sent[3:] == ["k3"]


def test_trouble_passes(ledger: Ledger, ask: Ask) -> None:
    plan = [trouble("refused"), trouble("lost"), trouble("unusable"), ("hm", True), GOOD]
    ask(Line(k0=plan), "k0", price=0.5)
    books = Books(answered=1, calls=5, unusable=2, lost=1, tokens_in=20, tokens_out=2, cost=1.0, at_risk=2.0)
    assert ledger.books() == books  # at risk: the lost one, and one whose tokens nobody counted
    assert ledger.find(["k0"])["k0"].text == "A"


def test_an_answer_without_a_verdict_is_none(ledger: Ledger, ask: Ask) -> None:
    ask(Line(k0=[(text, True) for text in ("x", "y", "z")]), "k0", price=0.5)
    assert ledger.books() == Books(answered=1, no_verdict=1, calls=3, unusable=2, tokens_in=30, tokens_out=3, cost=1.5)
    assert ledger.find(["k0"])["k0"].text == "z"
    line = Line()
    ask(line, "k0")
    assert line.sent == []  # it was paid for


def test_retries_end_and_another_run_asks_again(ledger: Ledger, ask: Ask) -> None:
    line = Line(k0=[trouble("refused")] * 3)
    ask(line, "k0", "k1", pace=pace(backoff=0.001, retries=2))
    assert line.sent.count("k0") == 3
    assert (ledger.books().failed, ledger.books().answered) == (1, 1)
    ask(line, "k0", "k1")
    assert (ledger.books().failed, ledger.books().answered, len(line.sent)) == (0, 2, 5)


def test_a_rejected_question_is_not_asked_again(ledger: Ledger, ask: Ask) -> None:
    line = Line(k0=[trouble("rejected")] * 9)
    ask(line, "k0", "k1")
    assert line.sent.count("k0") == 1
    assert ledger.books().failed == 1


def test_a_server_that_will_not_have_us_stops_the_run_at_once(ledger: Ledger, ask: Ask) -> None:
    line = Line(every=[trouble("fatal")] * 99)
    with pytest.raises(
        GoldStopped, match=r"it is fatal; 9\d questions and those in flight are left; run again .*j\.db"
    ):
        ask(line, *(f"k{i}" for i in range(100)))
    assert len(line.sent) <= FAST.concurrency
    assert ledger.books().answered == 0


def test_a_dead_server_stops_the_run_and_it_goes_on(ledger: Ledger, ask: Ask) -> None:
    keys = [f"k{i}" for i in range(60)]
    line = Line(every=[])
    ask(line, *keys[:20])
    line.plans["every"] = [trouble("refused")] * 999
    with pytest.raises(GoldStopped, match=r"does not answer: 8 questions in a row .* because: it is refused"):
        ask(line, *keys, pace=pace(backoff=0.001, retries=3))
    assert len(line.sent) <= 20 + (8 + FAST.concurrency) * 4  # no wave of requests over the whole line
    assert ledger.books().answered == 20
    line.plans["every"] = []
    ask(line, *keys)
    assert ledger.books().answered == 60
    assert ledger.books().failed == 0


def test_one_answer_is_a_sign_of_life(ledger: Ledger, ask: Ask) -> None:
    line = Line(**{f"k{i}": [trouble("refused")] * 9 for i in range(40) if i % 8})
    ask(line, *(f"k{i}" for i in range(40)), pace=pace(backoff=0.0, retries=1, concurrency=1))
    assert (ledger.books().answered, ledger.books().failed) == (5, 35)


def test_requests_at_once(ask: Ask) -> None:
    line = Line()
    line.hold = 0.02
    ask(line, *(f"k{i}" for i in range(20)), pace=pace(concurrency=4))
    assert line.most == 4


def test_requests_a_minute(ask: Ask) -> None:
    line = Line(k0=[trouble("refused")])
    ask(line, *(f"k{i}" for i in range(10)), pace=pace(per_minute=60 / 0.02, backoff=0.0))
    gaps = [later - sooner for sooner, later in zip(line.times, line.times[1:], strict=False)]
    assert len(gaps) == 10
    assert sum(gaps) >= 0.02 * 10 * 0.95


def test_a_server_is_left_alone_as_long_as_it_asks(ask: Ask) -> None:
    line = Line(k0=[trouble("refused", wait=0.2)])
    ask(line, "k0")
    assert line.times[1] - line.times[0] >= 0.2


def test_money_is_never_exceeded(ledger: Ledger, ask: Ask) -> None:
    line = Line()
    line.hold = 0.005
    keys = [f"k{i}" for i in range(50)]
    with pytest.raises(GoldStopped, match=r"of max_cost=10 is spent or at risk, and the next answer may cost 2; raise"):
        ask(line, *keys, price=1.0, limit=10.0)
    assert ledger.books().cost == 9.0  # a tenth could have cost 2
    assert ledger.books().at_risk == 0.0
    ask(line, *keys, price=1.0, limit=51.0)
    assert ledger.books().cost == 50.0


def test_lost_requests_count_as_spent(ledger: Ledger, ask: Ask) -> None:
    line = Line(k0=[trouble("lost")] * 9)
    with pytest.raises(GoldStopped, match="max_cost"):
        ask(line, "k0", price=1.0, limit=5.0)
    assert len(line.sent) == 2
    assert ledger.books().money == 4.0


def test_five_in_one_request(ledger: Ledger, ask: Ask) -> None:
    ask(Line(), *(f"k{i}" for i in range(5)), pace=pace(batch=5), price=0.5)
    assert ledger.books() == Books(answered=5, calls=5, tokens_in=10, tokens_out=5, cost=0.5)


def test_four_labels_for_five_questions(ledger: Ledger, ask: Ask) -> None:
    """Spec check 15, second half: all are asked again, one at a time."""
    keys = [f"k{i}" for i in range(5)]
    line = Line(**{"+".join(keys): [("ABAB", True)]})
    ask(line, *keys, pace=pace(batch=5))
    assert sorted(line.sent) == ["k0", "k0+k1+k2+k3+k4", "k1", "k2", "k3", "k4"]
    assert [kept.label for kept in ledger.find(keys).values()] == ["A"] * 5
    assert ledger.books().unusable == 5


def test_a_rejected_batch_is_asked_one_by_one(ledger: Ledger, ask: Ask) -> None:
    line = Line(**{"k0+k1": [trouble("rejected")], "k1": [trouble("rejected")]})
    ask(line, "k0", "k1", pace=pace(batch=2))
    assert (ledger.books().answered, ledger.books().failed) == (1, 1)


def test_another_process_s_answer_is_awaited(tmp_path: Path, ledger: Ledger, ask: Ask) -> None:
    path, ready, go = tmp_path / "j.db", threading.Event(), threading.Event()

    def slow(questions: Sequence[Question]) -> list[Outcome]:
        ready.set()
        go.wait()
        return [Outcome("answered", 0.0, "B", "B")]

    def other() -> None:
        with Ledger(path) as theirs:
            Asker(theirs, slow, "completion", "m", Pace()).ask(asked("k0"))

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    threading.Timer(0.15, go.set).start()
    line = Line()
    ask(line, "k0", "k1")
    thread.join()
    assert line.sent == ["k1"]
    assert ledger.find(["k0"])["k0"].label == "B"


def test_answers_in_flight_are_kept_when_the_run_is_stopped(ledger: Ledger) -> None:
    line = Line()
    line.hold = 0.1
    told: list[int] = []

    def stop(n: int) -> None:
        told.append(n)
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asker(ledger, line, pace(concurrency=4), stop).ask(asked(*(f"k{i}" for i in range(20))))
    assert ledger.books().answered == len(line.sent) == 4


def never_heard_of_again(path: Path, sending: Any) -> None:
    def sent(_: Sequence[Question]) -> list[Outcome]:
        sending.send(True)
        time.sleep(600)
        return []

    with Ledger(path) as theirs:
        Asker(theirs, sent, "completion", "m", Pace(), risk=lambda _: 2.0).ask(asked("k0"))


def test_what_a_killed_process_had_asked_is_lost_and_at_risk(tmp_path: Path, ledger: Ledger, ask: Ask) -> None:
    heard, sending = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=never_heard_of_again, args=(tmp_path / "j.db", sending))
    process.start()
    assert heard.recv()
    line = Line()
    try:
        with pytest.raises(GoldStopped, match="max_cost"):
            threading.Timer(0.2, process.kill).start()
            ask(line, "k0", price=1.0, limit=3.0)
    finally:
        process.kill()
        process.join()
    assert line.sent == []  # first another process was asking it, then its risk left no money to ask again
    ask(line, "k0", price=1.0, limit=4.0)
    assert line.sent == ["k0"]
    assert ledger.books() == Books(answered=1, calls=2, lost=1, tokens_in=10, tokens_out=1, cost=1.0, at_risk=2.0)
