"""Prices, and tokens counted before anything is sent."""

from __future__ import annotations

import pytest

from judges.conftest import Make
from pyrite.feedback.judges import about, most

MESSAGES = [{"role": "system", "content": "tell me"}, {"role": "user", "content": "about the cat ää"}]


def test_the_worked_price(make: Make) -> None:
    """Spec check 21: 1,000,000 tokens at 0.03 a thousand, four times over, are 120."""
    assert make(price_in=30.0).price(4 * 1_000_000, 0) == 120.0
    assert make(price_in=2.0, price_out=8.0).price(500_000, 250_000) == 3.0
    assert not make().paid
    with pytest.raises(ValueError, match="--price-out -1"):
        make(price_out=-1.0)


def test_counting() -> None:
    assert about(MESSAGES) == round((7 + 16) / 4)
    assert most(MESSAGES) == 7 + 18 + 2 * 16
