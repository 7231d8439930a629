"""Responses by prompt and sums in float64; whole models are tested in test_models."""

from __future__ import annotations

import pytest
import torch
from families import Row

from pyrite.data.responses import Responses
from pyrite.models.forward import by_prompt, by_response, pack


def test_sums_are_added_up_in_float64() -> None:
    batch = pack(Responses.of([Row([1], [[2] * 3000, [3, 4]])]))
    flat = torch.full((3002,), -0.1)
    found = by_response(flat, batch)
    assert found.length.tolist() == [3000, 2]
    assert found.sum.tolist() == [pytest.approx(-300.0000045, abs=1e-5), pytest.approx(-0.2)]
    tokens = by_response(flat, batch, tokens=True)
    assert tokens.tokens is not None
    assert tokens.tokens.shape == (2, 3000)


def test_texts_with_one_prompt_share_a_row_longest_first() -> None:
    texts = Responses.of([([1, 2], [[3]]), ([9], [[4]]), ([1, 2], [[5, 6]])])
    assert by_prompt(texts) == [[2, 0], [1]]
    assert by_prompt(texts, most=1) == [[2], [0], [1]]
