"""Judges: probabilities from any gold, and the check on verdicts."""

from __future__ import annotations

import doctest

import pytest
import torch

import pyrite.judges
from pyrite.judges import bradley_terry, check_verdicts


def test_bradley_terry_worked_and_antisymmetric() -> None:
    judge = bradley_terry(gold="length()", scale=2.0)
    a, b = ["x x x", "x"], ["x", "x x x x x"]
    verdicts = judge(["p", "p"], a, b)
    assert verdicts.tolist() == pytest.approx([0.731059, 0.119203], abs=1e-6)  # sigma(1), sigma(-2)
    assert torch.allclose(verdicts + judge(["p", "p"], b, a), torch.ones(2))


def test_wrong_verdicts_are_refused_and_none_is_kept() -> None:
    assert check_verdicts([0.0, float("nan"), 1.0], 3, name="j").isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"judged pair 2 as 1\.5"):
        check_verdicts([0.5, 1.5], 2, name="j")
    with pytest.raises(ValueError, match=r"need \(3,\)"):
        check_verdicts([0.5], 3, name="j")
    with pytest.raises(ValueError, match="must be positive"):
        bradley_terry(gold="length()", scale=0.0)


def test_examples() -> None:
    assert doctest.testmod(pyrite.judges).failed == 0
