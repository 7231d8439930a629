"""Judges: probabilities from any gold, and the check on verdicts."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import pyrite.feedback.judges
from pyrite.feedback.judges import bradley_terry
from pyrite.feedback.pairing import check_verdicts


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
    with pytest.raises(ValueError, match=r"scale=0\.0: give a number above 0"):
        bradley_terry(gold="length()", scale=0.0)


def test_noise_hardness_and_one_score_a_text(tmp_path: Path) -> None:
    a, b = ["x x x", "x", "x"], ["x", "x x", "x"]
    noisy = bradley_terry(gold="length()", noise=0.25)(["p"] * 3, a, b)
    clean = bradley_terry(gold="length()")(["p"] * 3, a, b)
    torch.testing.assert_close(noisy, 0.75 * clean + 0.25 * (1 - clean))
    assert bradley_terry(gold="length()", hard=True)(["p"] * 3, a, b).tolist() == [1.0, 0.0, 0.5]
    assert bradley_terry(gold="length()", hard=True, noise=0.5)(["p"] * 3, a, b).tolist() == [0.5] * 3
    (tmp_path / "count.py").write_text(
        "import torch\nasked = []\ndef score(prompts, responses):\n    asked.append(len(responses))\n"
        "    return torch.tensor([float(len(r) + 100 * (p == 'q')) for p, r in zip(prompts, responses)])\n"
    )
    counted = bradley_terry(gold=f"{tmp_path}/count.py:score()", scale=100.0)
    verdicts = counted(["p", "q", "p"], ["x", "x", "x"], ["y y", "y y", "y y"])
    assert verdicts[0] == verdicts[2]
    assert verdicts.tolist() == pytest.approx([0.495] * 3, abs=1e-3)
    for wrong, words in ((-0.1, "0 to 0.5"), (0.6, "0 to 0.5")):
        with pytest.raises(ValueError, match=words):
            bradley_terry(gold="length()", noise=wrong)
    assert counted([], [], []).shape == (0,)


def test_examples() -> None:
    assert doctest.testmod(pyrite.feedback.judges).failed == 0
