"""Verdicts on pairs: two orders put together, ids, and an order that every process draws alike."""

from __future__ import annotations

import doctest
import math
import os
import subprocess
import sys

import pyrite.feedback.judges
from pyrite.feedback.judges import EQUAL, Said, combined, pair_id, request, shown, verdict_row

A, B, TIE = Said("A", 1.0), Said("B", 0.0), Said("TIE", 0.5)


def test_both_orders_worked() -> None:
    agreed = combined({"ab": A, "ba": B})  # a was preferred in both places
    assert (agreed.p, agreed.label, agreed.preference) == (1.0, "A", 1)
    assert (agreed.p_ab, agreed.p_ba, agreed.order) == (1.0, 1.0, "both")
    for said in ({"ab": A, "ba": A}, {"ab": B, "ba": B}, {"ab": A, "ba": TIE}, {"ab": TIE, "ba": TIE}):
        assert combined(said).preference == 0
        assert combined(said).p == 0.5
    for said in ({"ab": None, "ba": A}, {"ab": A, "ba": None}, {"ab": None}):
        assert math.isnan(combined(said).p)
        assert combined(said).preference is None


def test_one_order() -> None:
    assert combined({"ba": A}).preference == 2
    assert combined({"ba": B}).preference == 1
    assert combined({"ba": TIE}).preference == 0
    assert combined({"ab": A}).p_ba is None


def test_probabilities_are_averaged() -> None:
    said = combined({"ab": Said("A", 0.9), "ba": Said("A", 0.6)}, mean=True)
    assert math.isclose(said.p, (0.9 + 0.4) / 2)
    assert said.preference == 0
    assert combined({"ab": Said("A", 0.9), "ba": Said("A", 0.6)}).p == 0.5


def test_the_order_is_the_seed_s_and_the_texts_alone() -> None:
    """Spec check 18."""
    code = "from pyrite.feedback.judges import shown\n"
    code += "print([shown(f'p{i}', f'a {i}', f'b {i}', seed=3) for i in range(1000)])"
    here, other = ([shown(f"p{i}", f"a {i}", f"b {i}", seed=seed) for i in range(1000)] for seed in (3, 4))
    env = {**os.environ, "PYTHONHASHSEED": "7" if hash("a") % 2 else "8"}
    there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, text=True).stdout
    assert there.strip() == str(here)
    assert 450 <= here.count("ba") <= 550
    assert here != other


def test_the_same_answer_comes_first_whichever_is_called_a() -> None:
    for i in range(50):
        one, two = shown("p", f"x{i}", f"y{i}", seed=0), shown("p", f"y{i}", f"x{i}", seed=0)
        assert {one, two} == {"ab", "ba"}


def test_rows_and_ids() -> None:
    assert pair_id("p", "x", "y") == pair_id([{"role": "user", "content": "p"}], "y", "x") != pair_id("q", "x", "y")
    assert not pair_id("p", "x", "y")[0].isdigit()
    row = {"prompt_id": 1, "prompt": "p. Be brief.", "asked": "p", "a": "x", "b": "y"}
    assert request(row) == "p"
    made = verdict_row(row, combined({"ba": A}, raw=("A",)), criterion="short", model="m")
    assert {
        **row,
        "preference": 2,
        "p": 0.0,
        "order": "ba",
        "p_ab": None,
        "p_ba": 0.0,
        "raw": ["A"],
    }.items() <= made.items()
    none = verdict_row(row, combined({"ab": None}), criterion="short", model="m")
    assert none["p"] is None and none["preference"] is None
    assert EQUAL.preference == 0


def test_examples() -> None:
    assert doctest.testmod(pyrite.feedback.judges).failed == 0
