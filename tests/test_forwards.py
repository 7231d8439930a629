"""Responses by prompt and sums in float64; whole models are tested in test_models."""

from __future__ import annotations

import pytest
import torch

from pyrite.data.text import Encoded
from pyrite.models.forward import by_prompt, by_response
from pyrite.models.packing import Row, pack


def test_sums_are_added_up_in_float64() -> None:
    batch = pack([Row([1], [[2] * 3000, [3, 4]])])
    flat = torch.full((3002,), -0.1)
    found = by_response(flat, batch)
    assert found.length.tolist() == [3000, 2]
    assert found.sum.tolist() == [pytest.approx(-300.0000045, abs=1e-5), pytest.approx(-0.2)]
    tokens = by_response(flat, batch, tokens=True)
    assert tokens.tokens is not None
    assert tokens.tokens.shape == (2, 3000)


def test_texts_with_one_prompt_share_a_row_longest_first() -> None:
    texts = [Encoded([1, 2], [3], False), Encoded([9], [4], False), Encoded([1, 2], [5, 6], False)]
    rows, members = by_prompt(texts)
    assert [(list(row.prompt), [list(r) for r in row.responses]) for row in rows] == [
        ([1, 2], [[5, 6], [3]]),
        ([9], [[4]]),
    ]
    assert members == [[2, 0], [1]]
    rows, members = by_prompt(texts, most=1)
    assert members == [[2], [0], [1]]
