"""Values against annotations: ranges, types, lists, groups, and the words for what is wrong."""

from __future__ import annotations

import doctest
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Len

from pyrite.math import ranges
from pyrite.math.ranges import AnyText, Count, Fraction, Minority, Natural, NonNegative, Positive, Real, Share


@dataclass(frozen=True)
class Group:
    batch_size: Count = 8
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)


@dataclass(frozen=True)
class Config:
    out: Path
    model: str
    note: str = ""
    held_out: Share | str = 0.1
    cap: Positive | None = None
    n: Annotated[tuple[Count, ...], Len(1)] = (1, 2)
    how: Literal["a", "b"] = "a"
    group: Group = Group()


def test_examples() -> None:
    result = doctest.testmod(ranges)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, Positive),
        (0.0, NonNegative),
        (0, Share),
        (1, Share),
        (0.49, Minority),
        (-3.5, Real),
        (1, Count),
        (0, Natural),
        (None, Positive | None),
        ("file.jsonl", Share | str),
        ([1, 2], tuple[Count, ...]),
        (Path("x"), str),
        ("", AnyText),
        ("x", Path),
        ({"a": 1.0}, Any),
        (lambda: 1, object),
    ],
)
def test_sense(value: Any, hint: Any) -> None:
    assert ranges.fault(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (0, Positive, "give a number above 0"),
        (-0.1, NonNegative, "give at least 0"),
        (1.1, Share, "give 0 to 1"),
        (1, Fraction, "give at least 0 and below 1"),
        (0.5, Minority, "give at least 0 and below 0.5"),
        (math.nan, Real, "give a finite number"),
        (math.inf, Positive, "give a finite number"),
        (math.nan, float, "give a finite number"),
        ([1.0, math.inf], Any, "give a finite number"),
        (0, Count, "give at least 1"),
        (1.5, Count, "is float, give int"),
        (True, Count, "is bool, give int"),
        (True, Positive, "is bool, give float"),
        ("1", Positive | None, "is str, give float or None"),
        (None, Positive, "is NoneType, give float"),
        (-1, Share | str, "give 0 to 1"),
        ("", Share | str, "must not be empty"),
        ((), Annotated[tuple[Count, ...], Len(1)], "give at least one"),
        ((1, 0), tuple[Count, ...], "give at least 1"),
        ((0.1,), tuple[Share, Share], "give 2 values"),
        (3, tuple[Count, ...], "is int, give a list"),
        ("c", Literal["a", "b"], "give 'a' or 'b'"),
    ],
)
def test_nonsense(value: Any, hint: Any, words: str) -> None:
    assert ranges.fault(value, hint) == words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group": Group(batch_size=0)}, "--batch-size 0: give at least 1"),
        ({"group": Group(betas=(0.9, 1.0))}, "--betas 0.9 1.0: give at least 0 and below 1"),
        ({"group": 3}, "--group 3 is int, give Group"),
        ({"model": ""}, "--model '': must not be empty"),
        ({"cap": 0}, "--cap 0: give a number above 0"),
        ({"n": ()}, "--n (nothing): give at least one"),
    ],
)
def test_a_config_is_refused_by_the_option_as_typed(given: dict[str, Any], message: str) -> None:
    ranges.check(Config(**{"out": Path("o"), "model": "m"}))
    with pytest.raises(ValueError) as error:
        ranges.check(Config(**{"out": Path("o"), "model": "m", **given}))
    assert str(error.value) == message


def test_ranges_in_words() -> None:
    assert [ranges.words(hint) for hint in (Positive, Share | None, Minority, Count, str)] == [
        "above 0",
        "0 to 1",
        "at least 0 and below 0.5",
        "at least 1",
        "",
    ]
