"""Reading verdicts: labels where they belong, reasoning left alone, several cases, probabilities of labels."""

from __future__ import annotations

import doctest
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyrite.feedback.judges
from pyrite.feedback.judges import PREFERENCES, WINS, Found, Reply, other, probability, read_verdict, several

FIRST_LINE = {
    "A": "A",
    "b": "B",
    " \n\n(a)\n": "A",
    "Output (b)": "B",
    "**Tie**": "TIE",
    "a tie": "TIE",
    "Verdict: B": "B",
    "### Result: Output (a)": "A",
    "A: since it is short": "A",
    "B. It is short, unlike A": "B",
    "A - because B is long": "A",
    "Answer A is better.": "A",
    "The winner is B": "B",
    "1. B": "B",
    "A\nB would have been better with a joke.": "A",
    "<think>Verdict: A</think>\n\nB": "B",
}
NOTHING = (
    "",
    "  \n",
    "A better question would be which.",
    "A and B are both fine",
    "A, B",
    "A/B",
    "A-B",
    "A+",
    "As an AI",
    "A: 7/10\nB: 8/10",
    "A is better than B in style but B wins overall",
    "Both are good. B.",
    "Answers A and B are alike",
    "<think>Verdict: A",
    "I cannot say",
    "Output (a): concise\nOutput (b): verbose",
)
REASONED = {
    "Output (a) is long.\nOutput (b) is short.\nResult:\nOutput (b)": "B",  # after the newline
    "Output (a) is long.\nResult for example 4: Output (b)": "B",  # on the heading line
    "## Reasoning EXAMPLE 4\nOutput (a): good\nOutput (b): bad\n## RESULT FOR EXAMPLE 4\n\nOutput (a)": "A",
    "## Reasoning Example 4\nOutput (b)\n## Result of Example 4: tie": "TIE",
    "Verdict: A would be rash.\nB is fine.\n**Verdict:** B": "B",
    "Result: A\nOn second thought.\nFinal verdict: B": "B",
    "Output (b) has the facts.\n\nOutput (a)": "A",  # the last line
    "Output (a): concise\nOutput (b): verbose": None,
    "Result: A\nOn second thought.\nFinal verdict: unclear": None,
    "Result:": None,
    "A is short and B is long.": None,
}


@pytest.mark.parametrize("text", FIRST_LINE)
def test_a_label_on_the_first_line(text: str) -> None:
    found = read_verdict(text)
    assert found and found.label == FIRST_LINE[text]
    assert text[found.at :].upper().startswith(found.label)


@pytest.mark.parametrize("text", NOTHING)
@pytest.mark.parametrize("reply", ["label", "reasons", "json"])
def test_what_holds_no_verdict_gives_none(text: str, reply: Reply) -> None:
    assert read_verdict(text, reply=reply) is None


@pytest.mark.parametrize("text", REASONED)
def test_a_label_after_reasons(text: str) -> None:
    found = read_verdict(text, reply="reasons")
    assert (found and found.label) == REASONED[text]


@given(st.text(alphabet="AB .,abi\n:()TE", max_size=30), st.sampled_from(["A", "B", "TIE"]))
def test_reasons_do_not_change_the_result_after_them(reasons: str, label: str) -> None:
    found = read_verdict(f"{reasons}\nVerdict: {label}", reply="reasons")
    assert found and found.label == label


def test_json_verdicts() -> None:
    text = '```json\n{"reason": "A, \\"verdict\\": is", "verdict": " b"}\n```'
    found = read_verdict(text, reply="json")
    assert found == Found("B", text.index('b"'))
    assert read_verdict('{"verdict": "C"}', reply="json") is None
    assert read_verdict('{"verdict": {"A": 1}}', reply="json") is None
    assert read_verdict("[1]", reply="json") is None
    label = read_verdict("A", reply="json")
    assert label and label.label == "A"  # a server that knows no schemas


def test_ties_only_where_offered() -> None:
    assert read_verdict("TIE", ties=False) is None
    assert several("A\nTIE", 2, ties=False) is None


def test_five_labels() -> None:
    """Spec check 15, first half."""
    text = "Output (a)\nOutput (b)\nOutput (b)\nOutput (a)\nOutput (b)\n"
    labels = several(text, 5)
    assert labels and [PREFERENCES[label] for label in labels] == [1, 2, 2, 1, 2]
    assert several("Here they are:\n3. Output (a)\n4. Output (b)", 2) == ["A", "B"]
    assert several(text, 4) is None
    assert several("A\nB\nA\nB\nneither", 5) is None


def test_unswap() -> None:
    """Spec check 17: 1 and 2 change places, a tie stays one."""
    assert [PREFERENCES[other(label)] for label in ("A", "B", "TIE")] == [2, 1, 0]
    assert [WINS[other(label)] for label in WINS] == [1 - p for p in WINS.values()]


def _tokens(*words: str, **odds: float) -> list[dict]:
    """Tokens, the last one with its alternatives."""
    top = [{"token": word, "logprob": math.log(p)} for word, p in odds.items()]
    first = [{"token": word, "logprob": -0.1, "top_logprobs": []} for word in words[:-1]]
    return [*first, {"token": words[-1], "logprob": math.log(odds[words[-1]]), "top_logprobs": top}]


def test_probability_worked() -> None:
    tokens = _tokens("A", **{"A": 0.5, " B": 0.2, "b": 0.1, "T": 0.2, "Both": 0.1, "The": 0.05})
    found = read_verdict("A")
    assert found
    assert probability(tokens, "A", found) == pytest.approx((0.5 + 0.1) / 1.0)
    tokens = _tokens('{"', "verdict", '": "', "B", A=0.25, B=0.75)
    text = '{"verdict": "B'
    assert probability(tokens, text, Found("B", text.index("B"))) == pytest.approx(0.25)
    tie = _tokens("TIE", A=0.1, B=0.1, TIE=0.8)
    assert probability(tie, "TIE", Found("TIE", 0)) == pytest.approx(0.5)


def test_no_probability_from_tokens_of_another_text() -> None:
    tokens = _tokens("A", A=0.5, B=0.5)
    assert probability(tokens, "B", Found("B", 0)) is None
    assert probability(tokens, "A B", Found("B", 2)) is None
    assert probability(_tokens("As", As=0.5, B=0.5), "As", Found("A", 0)) is None
    assert probability([], "A", Found("A", 0)) is None


def test_json_schema_of_a_reply_can_be_read_back() -> None:
    for label in WINS:
        found = read_verdict(json.dumps({"verdict": label}), reply="json")
        assert found and found.label == label


def test_examples() -> None:
    assert doctest.testmod(pyrite.feedback.judges).failed == 0
