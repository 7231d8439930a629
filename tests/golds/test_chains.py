"""The worked values of the math gold, and its parser against Python's own arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrite.feedback import scorers
from pyrite.feedback.scorers import FAILED, chain, evaluate, levenshtein

WORKED = [  # prompt, answer, points as published, points where a negative value is needed once
    ("(7 * 2) = ", "14", 0, 0),
    ("(7 * 2) = ", "15 = 15 = 15", -1, -1),
    ("(3 - 5) = ", "-2", -2, 0),
    ("(3 - 5) = ", "-2 = -2", 0, 0),
    ("(3 - 5) = ", "", -4, -2),
    ("((5 + 6) + 3) = ", "(3)", -7, -7),
    ("(((6 - 6) * (2 - 1)) + 8) = ", "((0 * (2 - 1)) + 8) = ((0 * 1) + 8) = (-0 + 8) = 8", -1, -1),
    ("(((3 * 8) * 1) * 3) = ", "((24 hi 1) * 3) = (23 * 3) = 89 = 72", -4, -4),
    ("((2 - 9) - (1 - 4)) = ", "(-7 - (1 - 4)) = (-7 - -3) = -4", -2, 0),
    ("(3 + ) = ", "3", -200, -200),
]


@pytest.mark.parametrize(("prompt", "answer", "published", "once"), WORKED)
def test_worked_values(prompt, answer, published, once):
    assert scorers.math_chain(repeat_negative=True)([prompt], [answer]).item() == published
    assert scorers.math_chain()([prompt], [answer]).item() == once
    for front, back in ((prompt.rstrip(), answer), ("", prompt + answer), (prompt[:-2], f"= {answer}")):
        assert scorers.math_chain()([front], [back]).item() == once


@pytest.mark.parametrize("more", [1, 2, 9])
def test_steps_beyond_the_last_are_free_unless_strict(more):
    prompts, answers = ["((5 + 6) + 3) = "], ["(11 + 3) = 14" + " = 14" * more]
    for repeat in (False, True):
        assert scorers.math_chain(repeat_negative=repeat)(prompts, answers).item() == 0
        assert scorers.math_chain(strict=True, repeat_negative=repeat)(prompts, answers).item() == -2 * more


def test_strict_differs_in_the_tail_only():
    for prompt, answer, _, once in WORKED[:-1]:
        extra = answer.count("=") + 1 > len(chain(prompt.split(" =")[0])) - 1
        assert (scorers.math_chain(strict=True)([prompt], [answer]).item() < once) == extra


def test_chain_by_hand():
    assert chain("((2 - 9) - (1 - 4))") == ["((2 - 9) - (1 - 4))", "(-7 - (1 - 4))", "(-7 - -3)", "-4"]
    assert chain("((1 + 2) * (1 + 2))") == ["((1 + 2) * (1 + 2))", "(3 * (1 + 2))", "(3 * 3)", "9"]
    assert chain("2 + 3 * 4") == ["2 + 3 * 4", "14"]
    assert chain("((7))") == ["((7))", "(7)", "7"]
    assert chain("-8") == ["-8"]


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        ")",
        "(",
        "()",
        "3 4",
        "(3 4)",
        "(3 + 4",
        "3 + 4)",
        "2 ** 3",
        "3 +",
        "* 3",
        "(3 + )",
        "x",
        "1 + x",
        "9" * 5000 + "*9",
    ],
)
def test_what_is_no_expression_is_refused_and_scores_the_least(expression):
    with pytest.raises(ValueError):
        chain(expression)
    assert scorers.math_chain()([f"{expression} = "], ["3"]).item() == FAILED


def test_a_response_is_never_run():
    """Powers would take forever, names would be looked up."""
    assert scorers.math_chain()(["9**9**9**9 = "], ["1"]).item() == FAILED
    assert (
        scorers.math_chain()(["(1 + 1) = "], ["__import__('os') 2"]).item()
        == scorers.math_chain()(["(1 + 1) = "], ["() 2"]).item()
    )


numbers = st.integers(-99, 99).map(str)


def joined(children):
    return st.tuples(children, st.sampled_from("+-*"), children).map(lambda t: f"({t[0]} {t[1]} {t[2]})")


@given(st.recursive(numbers, joined, max_leaves=12))
def test_chain_ends_at_pythons_value(expression):
    steps = chain(expression)
    assert steps[0] == expression and int(steps[-1]) == eval(expression)
    assert all(eval(step) == eval(expression) for step in steps)
    assert len(steps) == 1 + expression.count("(")
    text = " = ".join(steps[1:])
    for strict in (False, True):
        assert scorers.math_chain(strict=strict)([f"{expression} = "], [text]).item() == 0


@given(
    st.lists(numbers, min_size=1, max_size=6), st.lists(st.sampled_from([" + ", " - ", "*", " * -", "-"]), min_size=5)
)
def test_evaluate_is_pythons_arithmetic(values, operators):
    flat = "".join(part for pair in zip(values, [*operators, ""][-len(values) :], strict=False) for part in pair)
    flat = flat if flat[-1].isdigit() else flat + "1"
    assert evaluate(flat) == evaluate(f"({flat})") == eval(flat)


@pytest.mark.parametrize(
    ("a", "b", "d"), [("", "", 0), ("", "-2", 2), ("kitten", "sitting", 3), ("14", "15", 1), ("ab", "ba", 2)]
)
def test_levenshtein(a, b, d):
    assert levenshtein(a, b) == levenshtein(b, a) == d


short = st.text("ab(", max_size=6)


@given(short, short, short)
def test_levenshtein_is_a_metric(a, b, c):
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
