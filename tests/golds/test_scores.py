import pytest
import torch

from pyrite.core import specs
from pyrite.feedback import scorers
from pyrite.feedback.scorers import each


def test_check_scores_passes_good_scores_as_they_are():
    scores = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert scorers.check_scores(scores, 2, name="gold") is scores
    assert scorers.check_scores([1, 2], 2, name="gold").dtype == torch.float32


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, float("nan"), float("inf")], r"gold scored row 2 of 3 as nan \(2 such rows\)"),
        ([0.0, 1.0, float("-inf")], r"gold scored row 3 of 3 as -inf"),
        ([0.0, 1.0], r"shape \(2,\); 3 responses"),
        ([[0.0], [1.0], [2.0]], r"shape \(3, 1\)"),
    ],
)
def test_check_scores_names_the_fault(scores, message):
    with pytest.raises(ValueError, match=message) as caught:
        scorers.check_scores(torch.tensor(scores), 3, name="gold")
    assert "\n" not in str(caught.value)


def test_a_scorer_of_single_texts_refuses_unequal_lists():
    score = each(lambda prompt, response: len(prompt) - len(response))
    assert score(["ab", "a"], ["a", "ab"]).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        score(["a", "b"], ["c"])


@pytest.mark.parametrize("spec", ["word_colector()", "nothing()"])
def test_an_unknown_gold_is_named(spec):
    with pytest.raises(ValueError, match=rf"unknown name '{spec[:-2]}': .*known: .*word_collector"):
        specs.part(spec, scorers)


def test_a_gold_of_earlier_versions_names_what_ranks_alike():
    with pytest.raises(ValueError, match=r"it is gone; weighted_sum\(") as caught:
        specs.part("reverse_word_collector()", scorers)
    assert "did you mean" not in str(caught.value)
    instead = specs.part(str(caught.value).partition("; ")[2].removesuffix(" ranks answers alike"), scorers)
    assert instead([""] * 3, ["", "the the of", "and so on"]).tolist() == [0, -2, -1]
