"""The desk: several requests at once, paced, asked again, stopped; what it did is in the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pyrite.feedback.judges.llm import Answers, Completion, Desk, Outcome, Pace, Question, Tally, Trade, Trouble
from pyrite.feedback.judges.questions import WINS, Case, Said, several
from pyrite.feedback.ledger import GoldStopped

FAST = Pace(backoff=0.001)
GOOD = Completion("A", False, 10, 1)


class Line:
    """An endpoint that does what it is told, question by question, then answers A."""

    def __init__(self, **plans: list[Trouble | Completion]) -> None:
        self.plans = plans
        self.sent: list[str] = []
        self.times: list[float] = []
        self.out = self.most = 0
        self.lock = threading.Lock()
        self.hold = 0.0

    def __call__(self, questions: Sequence[Question]) -> Completion:
        with self.lock:
            self.sent.append("+".join(question.key for question in questions))
            self.times.append(time.monotonic())
            self.out += 1
            self.most = max(self.most, self.out)
            plan = self.plans.get(self.sent[-1], self.plans.get("every", []))
            step = plan.pop(0) if plan else Completion("\n".join("A" for _ in questions), False, 10, 1)
        time.sleep(self.hold)
        with self.lock:
            self.out -= 1
        if isinstance(step, Trouble):
            raise step
        return step


def asked(*keys: str) -> list[Question]:
    return [Question(key, "m", "c", Case("p", f"a{key}", f"b{key}")) for key in keys]


def trade(line: Line, *, price: float = 0.0, limit: float | None = None) -> Trade:
    def read(completion: Completion, count: int) -> list[Said] | None:
        labels = several(completion.text, count)
        return labels and [Said(label, WINS[label]) for label in labels]  # type: ignore

    def paid(completion: Completion) -> float | None:
        return price if completion.prompt_tokens is not None else None

    return Trade(line, read, paid, lambda _: 2 * price, limit)


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    with Answers(tmp_path / "j.db") as opened:
        yield opened


Ask = Callable[..., list[int]]


@pytest.fixture
def ask(answers: Answers) -> Ask:
    def run(line: Line, *keys: str, pace: Pace = FAST, batch: int = 1, **options: float) -> list[int]:
        told: list[int] = []
        Desk(answers, trade(line, **options), pace, told.append).ask(asked(*keys), batch=batch)
        assert sum(told) == len(keys)
        return told

    return run


def trouble(kind: str, wait: float = 0.0) -> Trouble:
    return Trouble(kind, f"it is {kind}", wait)  # type: ignore


def test_each_question_once(answers: Answers, ask: Ask) -> None:
    line = Line()
    ask(line, "k0", "k1", "k2", price=0.5)
    assert sorted(line.sent) == ["k0", "k1", "k2"]
    assert answers.tally() == Tally(answered=3, requests=3, prompt_tokens=30, completion_tokens=3, cost=1.5)
    ask(line, "k0", "k1", "k2", "k3")
    assert line.sent[3:] == ["k3"]


def test_trouble_passes(answers: Answers, ask: Ask) -> None:
    plan = [trouble("refused"), trouble("lost"), trouble("unusable"), Completion("hm", False, 10, 4), GOOD]
    ask(Line(k0=plan), "k0", price=0.5)
    tally = answers.tally()
    assert tally == Tally(1, 0, 0, 5, 2, 1, 20, 5, 1.0, 2.0)  # the lost one, and one whose tokens nobody counted
    assert answers.find(["k0"])["k0"].raw == "A"


def test_an_answer_without_a_verdict_is_none(answers: Answers, ask: Ask) -> None:
    ask(Line(k0=[Completion(text, False, 10, 1) for text in ("x", "y", "z")]), "k0", price=0.5)
    assert answers.tally() == Tally(0, 1, 0, 3, 2, 0, 30, 3, 1.5, 0.0)
    assert answers.find(["k0"])["k0"].raw == "z"
    line = Line()
    ask(line, "k0")
    assert line.sent == []  # it was paid for


def test_retries_end_and_another_run_asks_again(answers: Answers, ask: Ask) -> None:
    line = Line(k0=[trouble("refused")] * 3)
    ask(line, "k0", "k1", pace=Pace(backoff=0.001, retries=2))
    assert line.sent.count("k0") == 3
    assert (answers.tally().failed, answers.tally().answered) == (1, 1)
    ask(line, "k0", "k1")
    assert (answers.tally().failed, answers.tally().answered, len(line.sent)) == (0, 2, 5)


def test_a_rejected_question_is_not_asked_again(answers: Answers, ask: Ask) -> None:
    line = Line(k0=[trouble("rejected")] * 9)
    ask(line, "k0", "k1")
    assert line.sent.count("k0") == 1
    assert answers.tally().failed == 1


def test_a_server_that_will_not_have_us_stops_the_run_at_once(answers: Answers, ask: Ask) -> None:
    line = Line(every=[trouble("fatal")] * 99)
    with pytest.raises(
        GoldStopped, match=r"it is fatal; 9\d questions and those in flight are left; run again .*j\.db"
    ):
        ask(line, *(f"k{i}" for i in range(100)))
    assert len(line.sent) <= FAST.concurrency
    assert answers.tally().answered == 0


def test_a_dead_server_stops_the_run_and_it_goes_on(answers: Answers, ask: Ask) -> None:
    keys = [f"k{i}" for i in range(60)]
    line = Line(every=[])
    ask(line, *keys[:20])
    line.plans["every"] = [trouble("refused")] * 999
    with pytest.raises(GoldStopped, match=r"does not answer: 8 questions in a row .* because: it is refused"):
        ask(line, *keys, pace=Pace(backoff=0.001, retries=3))
    assert len(line.sent) <= 20 + (8 + FAST.concurrency) * 4  # no wave of requests over the whole line
    assert answers.tally().answered == 20
    line.plans["every"] = []
    ask(line, *keys)
    assert answers.tally().answered == 60
    assert answers.tally().failed == 0


def test_one_answer_is_a_sign_of_life(answers: Answers, ask: Ask) -> None:
    line = Line(**{f"k{i}": [trouble("refused")] * 9 for i in range(40) if i % 8})
    ask(line, *(f"k{i}" for i in range(40)), pace=Pace(backoff=0.0, retries=1, concurrency=1))
    assert (answers.tally().answered, answers.tally().failed) == (5, 35)


def test_requests_at_once(ask: Ask) -> None:
    line = Line()
    line.hold = 0.02
    ask(line, *(f"k{i}" for i in range(20)), pace=Pace(concurrency=4))
    assert line.most == 4


def test_requests_a_minute(ask: Ask) -> None:
    line = Line(k0=[trouble("refused")])
    ask(line, *(f"k{i}" for i in range(10)), pace=Pace(per_minute=60 / 0.02, backoff=0.0))
    gaps = [later - sooner for sooner, later in zip(line.times, line.times[1:], strict=False)]
    assert len(gaps) == 10
    assert sum(gaps) >= 0.02 * 10 * 0.95


def test_a_server_is_left_alone_as_long_as_it_asks(ask: Ask) -> None:
    line = Line(k0=[trouble("refused", wait=0.2)])
    ask(line, "k0")
    assert line.times[1] - line.times[0] >= 0.2


def test_back_off_grows_and_has_jitter(answers: Answers) -> None:
    desk = Desk(answers, trade(Line()), Pace(backoff=1.0, longest=8.0), lambda _: None)
    for times in range(6):
        full = min(8.0, 2.0**times)
        drawn = [desk._backoff(times) for _ in range(200)]
        assert full / 2 <= min(drawn) < 0.6 * full < 0.9 * full < max(drawn) <= full


def test_money_is_never_exceeded(answers: Answers, ask: Ask) -> None:
    line = Line()
    line.hold = 0.005
    keys = [f"k{i}" for i in range(50)]
    with pytest.raises(GoldStopped, match=r"of max_cost=10 is spent or at risk, and the next answer may cost 2; raise"):
        ask(line, *keys, price=1.0, limit=10.0)
    assert answers.tally().cost == 9.0  # a tenth could have cost 2
    assert answers.tally().at_risk == 0.0
    ask(line, *keys, price=1.0, limit=51.0)
    assert answers.tally().cost == 50.0


def test_lost_requests_count_as_spent(answers: Answers, ask: Ask) -> None:
    line = Line(k0=[trouble("lost")] * 9)
    with pytest.raises(GoldStopped, match="max_cost"):
        ask(line, "k0", price=1.0, limit=5.0)
    assert len(line.sent) == 2
    assert answers.spent() == 4.0


def test_five_in_one_request(answers: Answers, ask: Ask) -> None:
    ask(Line(), *(f"k{i}" for i in range(5)), batch=5, price=0.5)
    assert answers.tally() == Tally(answered=5, requests=5, prompt_tokens=10, completion_tokens=1, cost=0.5)


def test_four_labels_for_five_questions(answers: Answers, ask: Ask) -> None:
    """Spec check 15, second half: all are asked again, one at a time."""
    keys = [f"k{i}" for i in range(5)]
    line = Line(**{"+".join(keys): [Completion("A\nB\nA\nB", False, 10, 4)]})
    ask(line, *keys, batch=5)
    assert sorted(line.sent) == ["k0", "k0+k1+k2+k3+k4", "k1", "k2", "k3", "k4"]
    assert [kept.label for kept in answers.find(keys).values()] == ["A"] * 5
    assert answers.tally().unusable == 5


def test_a_rejected_batch_is_asked_one_by_one(answers: Answers, ask: Ask) -> None:
    line = Line(**{"k0+k1": [trouble("rejected")], "k1": [trouble("rejected")]})
    ask(line, "k0", "k1", batch=2)
    assert (answers.tally().answered, answers.tally().failed) == (1, 1)


def test_another_process_s_answer_is_awaited(tmp_path: Path, answers: Answers, ask: Ask) -> None:
    path, ready, go = tmp_path / "j.db", threading.Event(), threading.Event()

    def other() -> None:
        with Answers(path) as theirs:
            theirs.intend(asked("k0")[0], risk=0.0, limit=None)
            ready.set()
            go.wait()
            theirs.settle({"k0": Outcome("answered", "B", 0.0, "B")})

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    threading.Timer(0.15, go.set).start()
    line = Line()
    ask(line, "k0", "k1")
    thread.join()
    assert line.sent == ["k1"]
    assert answers.find(["k0"])["k0"].label == "B"


def test_answers_in_flight_are_kept_when_the_run_is_stopped(answers: Answers) -> None:
    line = Line()
    line.hold = 0.1
    told: list[int] = []

    def stop(n: int) -> None:
        told.append(n)
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Desk(answers, trade(line), Pace(concurrency=4), stop).ask(asked(*(f"k{i}" for i in range(20))))
    assert answers.tally().answered == len(line.sent) == 4


def test_wrong_paces() -> None:
    for option in ({"concurrency": 0}, {"retries": -1}, {"reasks": -1}, {"backoff": -1.0}, {"per_minute": 0.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))} is"):
            Pace(**option)  # type: ignore
