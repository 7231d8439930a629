"""Prices, and tokens counted before anything is sent."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import pyrite.feedback.judges.llm
from pyrite.feedback.judges.llm import Prices, by_characters, by_tokenizer, most

MESSAGES = [{"role": "system", "content": "tell me"}, {"role": "user", "content": "about the cat ää"}]


def test_the_worked_price() -> None:
    """Spec check 21: 1,000,000 tokens at 0.03 a thousand, four times over, are 120."""
    assert Prices(read=30.0).of(4 * 1_000_000, 0) == 120.0
    assert Prices(read=2.0, written=8.0).of(500_000, 250_000) == 3.0
    assert not Prices().paid
    with pytest.raises(ValueError, match="price_out is -1"):
        Prices(written=-1.0)


def test_counting(tiny: Path) -> None:
    assert by_characters(MESSAGES) == round((7 + 16) / 4)
    assert by_tokenizer(str(tiny))(MESSAGES) == 2 + 4
    assert most(MESSAGES) == 7 + 18 + 2 * 16
    with pytest.raises(ValueError, match="holds no tokenizer"):
        by_tokenizer(str(tiny.parent))


def test_examples() -> None:
    assert doctest.testmod(pyrite.feedback.judges.llm).failed == 0
