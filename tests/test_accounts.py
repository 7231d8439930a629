"""Accounts: worked books, budgets that hold, golds that fail, kills at any point, processes side by side."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from asking import begin, calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrite.feedback import ledger as accounts
from pyrite.feedback import pairing
from pyrite.feedback.ledger import Account, Books, Budget, Ledger, Pace

NAN = float("nan")
DOWN = Pace.down
FREE = Budget()


class Counted:
    """A scorer (length) or judge (the longer answer wins) that remembers the texts it was asked."""

    def __init__(self, *failures: object) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.calls = 0
        self.failures = list(failures)

    def __call__(self, prompts: list[str], *answers: list[str]) -> Tensor:
        self.calls += 1
        self.asked += zip(prompts, *answers, strict=True)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            if isinstance(failure, BaseException):
                raise failure
            return torch.tensor(failure)
        return direct(*answers)


def direct(*answers: list[str]) -> Tensor:
    sizes = [torch.tensor([float(len(text)) for text in side]) for side in answers]
    return sizes[0] if len(sizes) == 1 else torch.sigmoid((sizes[0] - sizes[1]) / 3)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "gold.db") as opened:
        yield opened


def account(ledger: Ledger, run: str = "r", *, kind: str = "score", budget: Budget = FREE, **pace: object) -> Account:
    return Account(ledger, run, "length()", kind, budget, Pace(**{"backoff": 0.0, **pace}))  # type: ignore


def texts(*sizes: int) -> tuple[list[str], list[str]]:
    return ["p"] * len(sizes), ["x" * size for size in sizes]


def same(found: Tensor, wanted: list[float]) -> bool:
    return torch.equal(found.nan_to_num(-9), torch.tensor(wanted, dtype=torch.float64).nan_to_num(-9))


def test_a_price_without_a_limit_of_money(ledger: Ledger) -> None:
    mine = account(ledger, budget=Budget(labels=3, cost=0.25))
    assert mine.left == 3
    mine.ask(Counted(), *texts(5))
    assert mine.left == 2
    assert account(ledger, run="other", budget=Budget(cost=0.25)).left == math.inf


def test_worked_books(ledger: Ledger) -> None:
    gold, mine = Counted(), account(ledger, budget=Budget(labels=3, money=1.0, cost=0.25))
    assert mine.left == 3
    assert same(mine.ask(gold, *texts(5, 2, 5), round=1), [5, 2, 5])  # asked once, though wanted twice
    assert [len(response) for _, response in gold.asked] == [5, 2]
    assert mine.books() == Books(answered=2, calls=2, cost=0.5)
    assert mine.left == 1
    assert same(mine.ask(gold, *texts(7, 5, 8, 2), round=2), [7, 5, NAN, 2])  # the first that is new
    assert mine.books() == Books(answered=3, calls=3, cost=0.75)
    assert mine.books(round=1) == Books(answered=2, calls=2, cost=0.5)
    assert mine.left == 0
    assert same(mine.ask(gold, *texts(9, 7), round=3), [NAN, 7])
    assert gold.calls == 3


def test_answers_of_another_run_are_free(ledger: Ledger) -> None:
    gold = Counted()
    account(ledger, "first").ask(gold, *texts(1, 2, 3))
    second = account(ledger, "second", budget=Budget(labels=1))
    for round in (1, 2):  # used twice, noted once
        assert same(second.ask(gold, *texts(1, 2, 4, 5), round=round), [1, 2, 4, NAN])
    assert second.books() == Books(answered=1, calls=1, reused=2)
    assert account(ledger, "first").books() == Books(answered=3, calls=3)
    assert gold.calls == 4


def test_another_gold_kind_or_text_is_another_question(ledger: Ledger) -> None:
    gold = Counted()
    account(ledger).ask(gold, ["p"], ["x"])
    Account(ledger, "r", "other()", "score").ask(gold, ["p"], ["x"])
    account(ledger).ask(gold, ["px"], [""])
    account(ledger, kind="verdict").ask(gold, ["p"], ["x"], [""])
    account(ledger, kind="verdict").ask(gold, ["p"], [""], ["x"])
    assert gold.calls == 5


def test_it_is_a_judge(ledger: Ledger) -> None:
    judge = partial(account(ledger, kind="verdict", budget=Budget(labels=1)).ask, Counted(), round=2)
    made = pairing.label(judge, ["p"] * 4, ["x", "xx", "xxx", "y"], [[0, 1], [2, 3]], pairing="consecutive")
    assert [(pair.chosen, pair.rejected) for pair in made.pairs] == [(1, 0)]
    assert (made.labels, made.missing) == (1, 1)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 12), max_size=12), max_size=5),
    budget=st.integers(0, 12) | st.none(),
    money=st.integers(0, 12) | st.none(),
    batch=st.integers(1, 5),
    kind=st.sampled_from(["score", "verdict"]),
)
def test_answers_are_the_golds_own_and_budgets_hold(
    requests: list, budget: int | None, money: int | None, batch: int, kind: str
) -> None:
    gold, bought = Counted(), set()
    with TemporaryDirectory() as folder, Ledger(Path(folder) / "gold.db") as ledger:
        allowed = Budget(budget, None if money is None else money * 0.1, cost=0.1)
        mine = account(ledger, kind=kind, budget=allowed, batch=batch)
        for number, sizes in enumerate(requests):
            prompts, answers = texts(*sizes)
            sides = (answers,) if kind == "score" else (answers, ["x"] * len(answers))
            room = min(x for x in (budget, money, 99) if x is not None)
            for size in sizes:
                if len(bought) < room:
                    bought.add(size)
            found = mine.ask(gold, prompts, *sides, round=number)
            wanted = [
                value if size in bought else NAN for size, value in zip(sizes, direct(*sides).tolist(), strict=True)
            ]
            assert same(found, wanted)
        assert len(gold.asked) == len(set(gold.asked)) == len(bought) == mine.books().answered
        assert mine.books().money == pytest.approx(len(bought) * 0.1)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError("out of order"), "RuntimeError: out of order"),
        ([NAN], "answered nan"),
        ([math.inf], "answered inf"),
        ([1.0, 2.0], "1 questions got answers of shape (2,)"),
        ([], "of shape (0,)"),
        (3.0, "of shape ()"),
        ([[1.0]], "of shape (1, 1)"),
    ],
)
def test_a_gold_that_gives_nothing(ledger: Ledger, failure: object, words: str) -> None:
    mine = account(ledger, budget=Budget(labels=1, money=10.0, cost=1.0), retries=2)
    gold = Counted(failure, failure, failure)
    assert same(mine.ask(gold, *texts(4, 5, 6)), [NAN, 5, NAN])  # a failure is no label; the next one is bought
    assert mine.books() == Books(answered=1, failed=1, calls=4, cost=4.0)  # but every call costs its price
    row = next(ledger.rows())
    assert (row["state"], row["answer"], row["attempts"], row["lost"]) == ("failed", None, 3, 0)
    assert words in row["error"]
    assert same(mine.ask(gold, *texts(4)), [NAN])  # settled for this round
    assert gold.calls == 4


def test_a_second_try_is_kept_and_counted(ledger: Ledger) -> None:
    mine = account(ledger, retries=1)
    assert same(mine.ask(Counted(RuntimeError("busy"), None, [NAN], None), *texts(4, 5)), [4, 5])
    assert [row["attempts"] for row in ledger.rows()] == [2, 2]
    assert mine.books() == Books(answered=2, calls=4)
    assert all(row["error"] is None for row in ledger.rows())


def test_a_verdict_must_be_a_probability(ledger: Ledger) -> None:
    mine = account(ledger, kind="verdict", retries=0)
    assert mine.ask(Counted([1.5]), ["p"], ["a"], ["b"]).isnan().all()
    assert next(ledger.rows())["error"] == "answered 1.5"


def test_one_bad_text_spoils_no_batch(ledger: Ledger) -> None:
    def gold(prompts: list[str], responses: list[str]) -> Tensor:
        if "xxx" in responses:
            raise KeyError("xxx")
        return direct(responses)

    mine = account(ledger, batch=4, retries=1)
    assert same(mine.ask(gold, *texts(1, 2, 3, 4, 5)), [1, 2, NAN, 4, 5])
    assert mine.books() == Books(answered=4, failed=1, calls=9)


def test_a_failed_question_is_open_again_later_and_to_others(ledger: Ledger) -> None:
    gold = Counted([NAN], None, [NAN], None)
    mine, other = (account(ledger, run, retries=0) for run in ("r", "other"))
    assert same(mine.ask(gold, *texts(4), round=1), [NAN])
    assert same(mine.ask(gold, *texts(4), round=2), [4])
    assert same(mine.ask(gold, *texts(5), round=2), [NAN])
    assert same(other.ask(gold, *texts(5), round=1), [5])
    assert (mine.books(), other.books()) == (Books(answered=1, calls=2), Books(answered=1, calls=2))


def test_a_gold_that_is_down_is_left_alone(ledger: Ledger) -> None:
    mine, gold = account(ledger, retries=0), Counted(*[RuntimeError("down")] * 8)
    assert mine.ask(gold, *texts(*range(20))).isnan().all()
    assert (gold.calls, mine.books().failed) == (DOWN, DOWN)
    assert mine.ask(gold, *texts(*range(20))).isnan().all()  # the same request finds the same
    assert gold.calls == DOWN
    assert not mine.ask(gold, *texts(*range(20)), round=1).isnan().any()


def test_back_off_doubles(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less up to a half by chance, and up to a minute."""
    slept: list[float] = []
    monkeypatch.setattr(accounts.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(accounts.time, "sleep", slept.append)
    account(ledger, retries=9, backoff=0.5).ask(Counted(*[[NAN]] * 10), *texts(1))
    whole = [min(60.0, 0.5 * 2**i) for i in range(9)]
    assert all(full / 2 <= seconds <= full for seconds, full in zip(slept, whole, strict=True))


def test_money_stops_a_retry(ledger: Ledger) -> None:
    mine = account(ledger, budget=Budget(money=0.2, cost=0.1), retries=5)
    assert same(mine.ask(Counted([NAN], [NAN]), *texts(1, 2)), [NAN, NAN])
    assert mine.books() == Books(failed=1, calls=2, cost=0.2)


def test_a_run_that_goes_back_sees_what_it_saw(ledger: Ledger) -> None:
    gold, mine = Counted(), account(ledger)
    asked = [(1, texts(1, 2, 3), 1), (2, texts(3, 2, 4), 3), (3, texts(5, 2, 6), 4)]

    def ask(round: int, sides: tuple[list[str], list[str]], labels: int) -> Tensor:
        return account(ledger, budget=Budget(labels=labels)).ask(gold, *sides, round=round)

    before = [ask(*one) for one in asked]
    assert [answer.tolist()[:2] for answer in before[1:]] == [[3, 2], [5, 2]]
    for _ in range(2):
        for one, answer in zip(asked, before, strict=True):
            round = one[0]
            assert same(ask(*one), answer.tolist())
            assert mine.books(round=round).answered == [1, 3, 4][round - 1]
    assert gold.calls == 4


def test_an_interrupted_call_is_anybodys_to_repeat(ledger: Ledger) -> None:
    gold, mine = Counted(None, KeyboardInterrupt()), account(ledger)
    with pytest.raises(KeyboardInterrupt):
        mine.ask(gold, *texts(1, 2, 3))
    assert mine.books() == Books(answered=1, in_flight=1, calls=2)
    assert same(mine.ask(gold, *texts(1, 2, 3)), [1, 2, 3])
    assert mine.books() == Books(answered=3, calls=4, lost=1)


def test_an_interrupted_call_holds_up_nobody(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(KeyboardInterrupt):
        account(ledger).ask(Counted(KeyboardInterrupt()), *texts(1), round=5)
    with Ledger(tmp_path / "gold.db") as other:  # while the first is still open
        again = account(other, budget=Budget(labels=1), patience=0.0).ask(Counted(), *texts(1, 2), round=5)
        assert same(again, [1, NAN])  # the question in flight was the run's one label


def in_flight(ledger: Ledger, run: str, size: int, budget: Budget) -> None:
    """A question whose process died."""
    with pytest.raises(KeyboardInterrupt):
        account(ledger, run, budget=budget).ask(Counted(KeyboardInterrupt()), *texts(size))


def test_what_is_in_flight_is_reserved(ledger: Ledger) -> None:
    budget = Budget(labels=2, money=0.2, cost=0.1)
    in_flight(ledger, "a", 1, budget)
    in_flight(ledger, "b", 2, budget)
    a, b = (account(ledger, run, budget=budget) for run in "ab")
    assert [a.left, b.left] == [1, 1]
    assert same(b.ask(Counted(), *texts(3, 2)), [3, NAN])  # no money to repeat
    free = account(ledger, "b", budget=Budget(labels=2))
    assert same(free.ask(Counted(), *texts(1, 2)), [NAN, 2])


def test_a_taken_over_question_brings_its_price(ledger: Ledger) -> None:
    in_flight(ledger, "a", 1, Budget(cost=0.1))
    tight, enough = (account(ledger, "b", budget=Budget(money=money, cost=0.1)) for money in (0.1, 0.2))
    assert same(tight.ask(Counted(), *texts(1)), [NAN])
    assert same(enough.ask(Counted(), *texts(1)), [1])
    assert enough.books() == Books(answered=1, calls=2, lost=1, cost=0.2)
    assert account(ledger, "a").books() == Books()


def test_a_question_of_a_living_process_is_waited_for(tmp_path: Path) -> None:
    calling, answer = threading.Event(), threading.Event()

    def slow(prompts: list[str], responses: list[str]) -> Tensor:
        calling.set()
        answer.wait(60)
        return direct(responses)

    def other() -> None:
        with Ledger(tmp_path / "gold.db") as theirs:
            account(theirs, "other").ask(slow, *texts(1))

    thread = threading.Thread(target=other)
    thread.start()
    assert calling.wait(60)
    with Ledger(tmp_path / "gold.db") as ledger:
        gold = Counted(None, None)
        assert same(account(ledger, patience=0.0).ask(gold, *texts(1, 2)), [NAN, 2])  # the others first
        threading.Timer(0.2, answer.set).start()
        assert same(account(ledger).ask(gold, *texts(1, 2)), [1, 2])
        assert gold.calls == 1
        assert account(ledger).books() == Books(answered=1, calls=1, reused=1)
    thread.join()


def test_an_edited_file_is_another_gold(tmp_path: Path, ledger: Ledger) -> None:
    path, gold = tmp_path / "mine.py", Counted()
    for code in ("one", "two", "one"):
        path.write_text(code)
        named = Account(ledger, "r", f"bradley_terry(gold='{path}:score(a=1)')", "score")
        named.ask(gold, *texts(1))
        assert f"{path} " in named.gold
    assert gold.calls == 2
    assert accounts.with_own_code("length()") == "length()"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ledger: Budget(labels=-1), "labels=-1"),
        (lambda ledger: Budget(money=NAN), "money=nan"),
        (lambda ledger: Pace(concurrency=0), "concurrency is 0"),
        (lambda ledger: Pace(batch=0), "batch is 0"),
        (lambda ledger: Pace(retries=-1), "retries is -1"),
        (lambda ledger: Pace(reasks=-1), "reasks is -1"),
        (lambda ledger: Pace(backoff=-1.0), "backoff is -1"),
        (lambda ledger: Pace(per_minute=0.0), "per_minute is 0"),
        (
            lambda ledger: account(ledger).ask(Counted(), ["p"], ["a"], ["b"]),
            r"prompts and responses, N each; got \[1, 1",
        ),
        (lambda ledger: account(ledger, kind="verdict").ask(Counted(), ["p"], ["a"], []), "prompts, a and b"),
        (lambda ledger: account(ledger).ask(Counted(), [[{"role": "user"}]], ["a"]), "question 1"),
    ],
)
def test_wrong_use_is_one_line(ledger: Ledger, make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(ledger)  # type: ignore


@pytest.mark.parametrize("batch", [1, 4])
def test_fifty_kills_lose_nothing_and_buy_nothing_twice(tmp_path: Path, batch: int) -> None:
    kills, budget, draw = 50, 800, random.Random(batch)
    arguments = (tmp_path, "r", list(range(2 * budget)), Budget(labels=budget), batch, 0.001)
    for _ in range(kills):
        life, until = begin(*arguments), len(calls(tmp_path)) + draw.randrange(10)
        while life.is_alive() and len(calls(tmp_path)) < until:
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.004)
        assert life.is_alive(), "the run ended before it was killed; raise the budget"
        os.kill(life.pid or 0, signal.SIGKILL)
        life.join()
    last = begin(*arguments)
    last.join()
    assert last.exitcode == 0
    with Ledger(tmp_path / "gold.db") as ledger:
        rows, made = list(ledger.rows()), calls(tmp_path)
        books = Account(ledger, "r", "log", "score").books()
        assert [row["answer"] for row in rows] == list(range(budget))  # the first ones asked for, in their order
        assert {row["state"] for row in rows} == {"answered"}
    assert set(made) == set(range(budget))
    assert books == Books(answered=budget, calls=budget + books.lost, lost=books.lost)
    assert len(made) - budget <= books.lost <= kills * batch  # a kill may come between intent and call
    assert all(made.count(row["answer"]) <= row["attempts"] == 1 + row["lost"] for row in rows)
    assert not list(tmp_path.glob("gold.db-owner-*"))


def test_two_processes_ten_thousand_labels(tmp_path: Path) -> None:
    draw, shares = random.Random(0), {"a": list(range(7000)), "b": list(range(3000, 10000))}
    lives = []
    for run, wanted in shares.items():
        draw.shuffle(wanted)
        lives.append(begin(tmp_path, run, wanted, Budget(), 20, 0.0))
    for life in lives:
        life.join()
        assert life.exitcode == 0
    assert sorted(calls(tmp_path)) == list(range(10000))
    with Ledger(tmp_path / "gold.db") as ledger:
        rows = list(ledger.rows())
        books = {run: Account(ledger, run, "log", "score").books() for run in shares}
        found = account(ledger).ask(Counted(), [], [])
        assert found.shape == (0,)
    assert sorted(int(row["a"]) for row in rows) == list(range(10000))
    assert all(row["answer"] == int(row["a"]) for row in rows)
    assert all(some.answered + some.reused == 7000 and some.answered >= 3000 for some in books.values())
    assert sum(some.answered for some in books.values()) == 10000


def test_each_process_keeps_its_budget(tmp_path: Path) -> None:
    budget = Budget(labels=300, money=30.0, cost=0.1)
    shares = {run: list(range(1000 * i, 1000 * (i + 1))) for i, run in enumerate("abc")}
    lives = [begin(tmp_path, run, wanted, budget, 7, 0.0005) for run, wanted in shares.items()]
    for life in lives:
        life.join()
        assert life.exitcode == 0
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 900


def test_money_is_one_for_all_golds_of_a_run(ledger: Ledger) -> None:
    budget = Budget(money=0.3, cost=0.1)
    labels, scores = account(ledger, kind="verdict", budget=budget), account(ledger, budget=budget)
    labels.ask(Counted(), ["p"], ["a"], ["b"], round=1)
    assert same(scores.ask(Counted(), *texts(1, 2, 3), round=2), [1, 2, NAN])
    assert [labels.left, labels.books().cost, scores.books().cost] == pytest.approx([0, 0.1, 0.2])
    assert [labels.broke(round=1), labels.broke(round=2)] == [False, True]


def test_what_is_wanting_is_what_asking_would_buy(ledger: Ledger) -> None:
    mine, other = account(ledger, budget=Budget(labels=9)), account(ledger, "other")
    gold = Counted(None, RuntimeError("no"), RuntimeError("no"), RuntimeError("no"))
    assert mine.wanting(["p"] * 3, ["a", "b", "a"]) == 2  # each once
    mine.ask(gold, ["p"], ["a"], round=3)
    other.ask(Counted(), ["p"], ["b"])
    mine.ask(gold, ["p"], ["failing"], round=3)
    asked = (["p"] * 4, ["a", "b", "c", "failing"])
    assert mine.wanting(*asked, round=3) == 1  # failed for this run and round: not asked again in it
    assert mine.wanting(*asked, round=4) == 2
    assert mine.wanting(*asked, round=2) == 3  # a run that went back does not know its later answers
    assert other.wanting(*asked, round=2) == 2
    assert mine.left == 8


def test_what_is_in_flight_is_not_wanting_again(ledger: Ledger) -> None:
    """The label of a question that a killed process had asked is counted already, in its run."""
    mine = account(ledger, budget=Budget(labels=5))
    with pytest.raises(KeyboardInterrupt):
        mine.ask(Counted(KeyboardInterrupt()), ["p"], ["a"])
    assert mine.left == 4 and mine.wanting(["p"] * 2, ["a", "b"]) == 1
    assert account(ledger, "other").wanting(["p"] * 2, ["a", "b"]) == 2
