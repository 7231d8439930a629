"""Candidates to pairs: who is compared, ties and missing verdicts, sampled labels with the right frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyrite.feedback.judges import bradley_terry
from pyrite.feedback.pairing import Pair, decided, label, paired

PROMPTS = ["p"] * 4
ANSWERS = ["x", "x x x x", "x x", "x x x"]  # lengths 1 4 2 3
LENGTH = bradley_terry(gold="length()")


def odds(p: float) -> float:
    return math.log(p / (1 - p))


def test_best_against_worst() -> None:
    made = label(LENGTH, PROMPTS, ANSWERS, [[0, 1, 2, 3]], pairing="best_worst")
    assert [(pair.chosen, pair.rejected) for pair in made.pairs] == [(1, 0)]
    assert made.pairs[0].strength == pytest.approx(3.0, abs=1e-5)
    assert made.labels == 6


def test_consecutive_and_all_pairs() -> None:
    made = label(LENGTH, PROMPTS, ANSWERS, [[0, 1, 2, 3]], pairing="consecutive")
    assert [(pair.chosen, pair.rejected) for pair in made.pairs] == [(1, 0), (3, 2)]
    assert [pair.strength for pair in made.pairs] == pytest.approx([3.0, 1.0], abs=1e-5)
    every = label(LENGTH, PROMPTS, ANSWERS, [[0, 1, 2, 3]], pairing="all")
    assert len(every.pairs) == every.labels == 6
    assert all(len(ANSWERS[p.chosen]) > len(ANSWERS[p.rejected]) for p in every.pairs)


@pytest.mark.parametrize("pairing", ["consecutive", "all", "best_worst"])
def test_the_order_of_two_answers_does_not_matter(pairing: str) -> None:
    one = label(LENGTH, PROMPTS[:2], ANSWERS[:2], [[0, 1]], pairing=pairing)  # type: ignore[arg-type]
    two = label(LENGTH, PROMPTS[:2], ANSWERS[1::-1], [[0, 1]], pairing=pairing)  # type: ignore[arg-type]
    assert (one.pairs[0].chosen, two.pairs[0].chosen) == (1, 0)
    assert one.pairs[0].strength == pytest.approx(two.pairs[0].strength)


def test_ties_and_missing_verdicts_make_no_pair() -> None:
    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        return torch.tensor([0.5 if "tie" in x else math.nan if "nan" in x else 0.9 for x in a])

    answers = ["tie", "b", "nan", "c", "good", "d", "same", "same"]
    made = label(judge, ["p"] * 8, answers, [[0, 1], [2, 3], [4, 5], [6, 7]], pairing="consecutive")
    assert [(pair.chosen, pair.rejected) for pair in made.pairs] == [(4, 5)]
    assert (made.labels, made.ties, made.missing) == (2, 2, 1)  # equal texts are not asked about, and are a tie
    nothing = label(judge, ["p"] * 2, ["same", "same"], [[0, 1]])
    assert nothing.pairs == []
    assert nothing.ties == 1


def test_a_group_of_one_makes_no_pair() -> None:
    assert label(LENGTH, ["p"], ["x"], [[0]]).pairs == []


def test_sampled_labels_have_the_judge_s_frequencies() -> None:
    n = 4000
    answers = [text for _ in range(n) for text in ("x x", "x")]
    groups = [[2 * i, 2 * i + 1] for i in range(n)]
    made = label(LENGTH, ["p"] * (2 * n), answers, groups, labels="sampled", seed=3)
    share = sum(pair.chosen % 2 == 0 for pair in made.pairs) / n
    p = torch.sigmoid(torch.tensor(1.0)).item()
    error = math.sqrt(p * (1 - p) / n)
    assert abs(share - p) < 4 * error
    assert abs(share - 0.6) > 4 * error  # a wrong probability would be seen
    assert all(pair.strength == pytest.approx(1.0 if pair.chosen % 2 == 0 else -1.0, abs=1e-5) for pair in made.pairs)
    again = label(LENGTH, ["p"] * (2 * n), answers, groups, labels="sampled", seed=3)
    assert again.pairs == made.pairs


def test_certain_verdicts_have_finite_strength() -> None:
    sure = bradley_terry(gold="length()", hard=True)
    made = label(sure, PROMPTS[:2], ANSWERS[:2], [[0, 1]])
    assert made.pairs == [Pair(1, 0, pytest.approx(odds(1 - 1e-4)))]


def test_wrong_verdicts_are_refused() -> None:
    with pytest.raises(ValueError, match="mine returned verdicts of shape"):
        label(lambda *_: torch.ones(3), PROMPTS[:2], ANSWERS[:2], [[0, 1]], name="mine")


def test_highest_against_lowest_score() -> None:
    """Published cases: two of two; a tie, which keeps two different answers; the ends of four."""
    assert paired([[0, 1], [2, 3]], "best_worst", torch.tensor([3.0, 1.0, 2.0, 2.0])) == [(0, 1), (2, 3)]
    (pair,) = decided([(0, 1), (2, 3)], [0.88, 0.5], 4)
    assert (pair.chosen, pair.rejected, pair.strength) == (0, 1, pytest.approx(odds(0.88)))
    assert paired([[0, 1, 2, 3]], "best_worst", torch.tensor([0.1, 0.9, -0.5, 0.3])) == [(1, 2)]
    assert paired([[5]], "best_worst", torch.zeros(6)) == []


@pytest.mark.parametrize(("gap", "kept"), [(0.0, 2), (1.0, 2), (1.1, 1), (3.0, 1), (3.1, 0)])
def test_pairs_closer_than_the_gap_are_ties(gap: float, kept: int) -> None:
    """Log-odds of 3 and 1: a pair is kept if and only if it exceeds the gap."""
    made = label(exact, PROMPTS, ANSWERS, [[0, 1, 2, 3]], pairing="consecutive", min_margin=gap)
    assert (len(made.pairs), made.ties) == (kept, 2 - kept)


def exact(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
    """Log-odds of a little more than the difference of lengths."""
    difference = [len(x.split()) - len(y.split()) for x, y in zip(a, b, strict=True)]
    return torch.tensor([1 / (1 + math.exp(-1.001 * d)) for d in difference])
