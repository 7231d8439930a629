"""The language judge against a real server: right verdicts, cached answers, orders, probabilities, money, the key."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from judges.conftest import Make, pairs, wanted
from judges.server import Server, tokens
from pyrite.core import specs
from pyrite.data.files import DataError
from pyrite.feedback import judges
from pyrite.feedback.judges import JudgeOptions, LanguageJudge, llm
from pyrite.feedback.ledger import Account, GoldStopped, Ledger, Pace

TEXTS = pairs(12)


@pytest.mark.parametrize("reply", ["label", "reasons", "json"])
@pytest.mark.parametrize("both_orders", [True, False])
def test_right_verdicts(make: Make, server: Server, reply: str, both_orders: bool) -> None:
    judge = make(reply=reply, both_orders=both_orders)
    assert judge(*TEXTS).tolist() == wanted(TEXTS)
    assert len(server.bodies) == (24 if both_orders else 12)
    assert all(("response_format" in body) == (reply == "json") for body in server.bodies)
    flipped = judge(TEXTS[0], TEXTS[2], TEXTS[1])
    assert flipped.tolist() == [1 - p for p in wanted(TEXTS)]
    assert len(server.bodies) == (24 if both_orders else 12)  # the same questions


def test_a_spec_string_is_the_same_judge(make: Make, server: Server, tmp_path: Path) -> None:
    spec = f"llm(model='toy', criterion='more words', base_url='{server.url}', ledger='{tmp_path / 'judge.db'}')"
    judge = specs.part(spec, judges)
    assert judge(*TEXTS).tolist() == wanted(TEXTS)
    asked = len(server.bodies)
    assert make()(*TEXTS).tolist() == wanted(TEXTS)
    assert len(server.bodies) == asked
    made = llm(model="m", criterion="c", temperature=0.5, seed=3)
    assert isinstance(made, LanguageJudge)
    assert made.options == replace(JudgeOptions(), temperature=0.5, seed=3)


def test_what_the_ledger_holds_is_never_asked(make: Make, server: Server) -> None:
    """Spec check 19."""
    first = make()(*TEXTS)
    assert len(server.bodies) == 24
    assert torch.equal(make(concurrency=2, seed=5, price_in=3.0)(*TEXTS), first)
    assert len(server.bodies) == 24
    others = (
        {"criterion": "fewer words"},
        {"criterion_id": "P2A"},
        {"model": "other"},
        {"temperature": 1.0},
        {"max_tokens": 7},
        {"reply": "json"},
        {"batch": 3},
        {"body": '{"seed": 1}'},
    )
    for number, other in enumerate(others, 1):
        before = len(server.bodies)
        make(**other)(*TEXTS)
        assert len(server.bodies) - before == (8 if "batch" in other else 24), (number, other)
    one = make(both_orders=False)
    one(*TEXTS)
    assert len(server.bodies) == before + 24  # both orders are known already
    make(both_orders=False, model="new")(*TEXTS)
    make(both_orders=True, model="new")(*TEXTS)
    assert len(server.bodies) == before + 48  # the other order makes a call


def test_requests_are_as_asked(make: Make, server: Server, tmp_path: Path) -> None:
    shown = tmp_path / "shown.jsonl"
    shown.write_text(json.dumps({"prompt": "why", "a": "x y", "b": "z", "label": "A"}))
    judge = make(demonstrations=str(shown), body='{"max_tokens": null, "max_completion_tokens": 900}', logprobs=True)
    judge(*pairs(1))
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("toy", 0.0, 900)
    assert "max_tokens" not in body
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert [turn["role"] for turn in body["messages"]] == ["system", "user", "assistant", "user"]
    assert "more words" in body["messages"][0]["content"]
    assert judge.estimate(judge.questions(*pairs(1, start=5)))["tokens_out"] == 2 * 900


def test_five_in_one_request(make: Make, server: Server) -> None:
    assert make(batch=5)(*TEXTS).tolist() == wanted(TEXTS)
    assert len(server.bodies) == 5  # 24 questions


def test_a_judge_that_likes_the_first_answer_sees_ties(make: Make, server: Server) -> None:
    server.words = lambda body, text: "A"  # type: ignore
    verdicts = make().verdicts(*TEXTS)
    assert {verdict.preference for verdict in verdicts} == {0}
    assert {(verdict.p_ab, verdict.p_ba) for verdict in verdicts} == {(1.0, 0.0)}
    assert {verdict.raw for verdict in verdicts} == {("A", "A")}


def test_probabilities_where_offered(make: Make, server: Server) -> None:
    longer = ["p"], ["w w w"], ["w"]
    server.odds = {"A": math.log(0.6), "B": math.log(0.2), "TIE": math.log(0.2)}
    verdict = make(logprobs=True, both_orders=False).verdicts(*longer)[0]
    assert verdict.p == pytest.approx(0.7 if verdict.order == "ab" else 0.3)
    both = make(logprobs=True, model="both").verdicts(*longer)[0]
    assert both.p == pytest.approx((0.7 + 1 - 0.7) / 2)
    assert both.label == "A"  # what it said, in both orders
    server.odds = None
    assert make(logprobs=True, model="silent")(*longer).tolist() == [1.0]


def test_equal_answers_are_a_tie_nobody_is_asked_about(make: Make, server: Server) -> None:
    verdict = make().verdicts(["p"], ["same"], ["same"])[0]
    assert (verdict.p, verdict.preference, verdict.order, server.bodies) == (0.5, 0, "equal", [])
    assert make()([], [], []).shape == (0,)


def test_no_verdict_is_nan_and_free_the_next_time(make: Make, server: Server) -> None:
    few = pairs(3)
    server.always = "label"
    assert make(reasks=1)(*few).isnan().all()
    assert len(server.bodies) == 12
    server.always = ""
    assert make(reasks=1)(*few).isnan().all()
    assert len(server.bodies) == 12


def test_a_tie_that_was_not_offered_is_no_verdict(make: Make) -> None:
    found = make(ties=False, reasks=0)(*TEXTS)
    assert [p.item() if p == p else None for p in found] == [p if p != 0.5 else None for p in wanted(TEXTS)]


def test_a_reply_cut_before_its_verdict_is_none(make: Make, server: Server) -> None:
    whole = server.completion

    def cut(body: dict, text: str) -> dict:
        found = whole(body, f"A is long.\nVerdict: {text}")
        found["choices"][0]["finish_reason"] = "length"
        return found

    server.completion = cut  # type: ignore
    assert make(reply="reasons", reasks=0)(*pairs(3)).isnan().all()
    server.completion = lambda body, text: whole(body, f"A is long.\nVerdict: {text}")  # type: ignore
    assert make(reply="reasons", model="whole")(*TEXTS).tolist() == wanted(TEXTS)


def test_tokens_and_money(make: Make, server: Server, tmp_path: Path) -> None:
    judge = make(price_in=3.0, price_out=5.0)
    asked = judge.questions(*TEXTS)
    before = judge.estimate(asked)
    assert not (tmp_path / "judge.db").exists()
    judge(*TEXTS)
    with Ledger(judge.ledger) as ledger:
        books, rows = ledger.books(), list(ledger.rows())
    assert books.tokens_in == sum(tokens(t["content"]) for b in server.bodies for t in b["messages"])
    assert before["tokens_in"] == sum(judges.about(b["messages"]) for b in server.bodies)
    assert books.tokens_out == 24
    assert books.cost == pytest.approx((3 * books.tokens_in + 5 * 24) / 1e6)
    assert books.at_risk == pytest.approx(0.0, abs=1e-12)
    assert before["cost"] == pytest.approx((3 * before["tokens_in"] + 5 * 24 * 512) / 1e6)
    assert all(row["text"] in ("A", "B", "TIE") and row["cost"] > 0 for row in rows)
    after = judge.estimate(asked)
    assert (after["questions"], after["answered"], after["tokens_in"], after["cost"]) == (0, 24, 0, 0.0)


def test_max_cost_is_never_exceeded_and_can_be_raised(make: Make, server: Server) -> None:
    price = {"price_in": 1000.0, "max_tokens": 1, "concurrency": 3}
    with pytest.raises(GoldStopped, match="max_cost"):
        make(max_cost=2.0, **price)(*TEXTS)
    with Ledger(make().ledger) as ledger:
        assert 0 < ledger.books().money <= 2.0
        kept = ledger.books().answered
    assert 0 < kept < 24
    assert make(max_cost=20.0, **price)(*TEXTS).tolist() == wanted(TEXTS)
    assert len(server.bodies) == 24


def test_a_server_that_counts_no_tokens_leaves_all_at_risk(make: Make, server: Server) -> None:
    server.usage = False
    judge = make(price_in=1.0)
    judge(*TEXTS)
    with Ledger(judge.ledger) as ledger:
        books = ledger.books()
    assert books.cost == 0
    assert books.at_risk > 0


def test_the_key_is_nowhere(make: Make, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "sk-nobody-may-see-this"
    monkeypatch.setenv("MY_KEY", secret)
    judge = make(key_env="MY_KEY")
    judge(*TEXTS)
    assert server.keys == {f"Bearer {secret}"}
    server.always = "401"
    with pytest.raises(GoldStopped, match=r"answered 401: .*check the key in MY_KEY; .* left") as caught:
        judge(*pairs(12, start=20))
    assert secret not in str(caught.value)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()


def test_a_missing_model_stops_at_once(make: Make, server: Server) -> None:
    server.always = "404"
    with pytest.raises(GoldStopped, match="check the address and the name of the model"):
        make()(*TEXTS)
    assert len(server.bodies) <= 8


def test_an_account_lets_a_stop_pass_and_goes_on(make: Make, server: Server, tmp_path: Path) -> None:
    with Ledger(tmp_path / "judge.db") as ledger:
        account = Account(ledger, "run", "llm()", "verdict", pace=Pace(batch=12, backoff=0.0))
        server.always = "404"
        with pytest.raises(GoldStopped):
            account.ask(make(), *TEXTS)
        server.always = ""
        assert account.ask(make(), *TEXTS).tolist() == wanted(TEXTS)
        assert account.books().answered == 12


def test_what_cannot_be_is_refused(make: Make, tmp_path: Path) -> None:
    for options, words in (
        ({"model": ""}, "has no name"),
        ({"criterion": ""}, "criterion is empty"),
        ({"max_cost": 1.0}, "without a price"),
        ({"batch": 0}, "--batch 0: give at least 1"),
        ({"batch": 2, "reply": "json"}, "more than 1 needs reply label"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"body": "{"}, "body is no JSON"),
        ({"body": '{"model": "x"}'}, "not model"),
        ({"base_url": "somewhere"}, "base_url"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    with pytest.raises(DataError, match="no file"):
        make(demonstrations=str(tmp_path / "nothing.jsonl"))
    assert list(tmp_path.iterdir()) == []
