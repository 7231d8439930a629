import pytest
import torch

from pyrite import golds


def test_length_counts_words_or_characters():
    texts = ["hello my friend", "", "  spaced   out "]
    assert golds.length()([""] * 3, texts).tolist() == [3, 0, 2]
    assert golds.length(unit="chars")([""] * 3, texts).tolist() == [15, 0, 15]
    with pytest.raises(ValueError, match="'words' or 'chars'"):
        golds.length(unit="tokens")  # type: ignore[arg-type]


def test_word_collector_counts_distinct_whole_words_with_case():
    score = golds.word_collector(words=["amber", "velvet", "lullaby"])
    assert score([""] * 4, ["amber amber, velvet!", "Amber ambers", "", "lullaby velvet amber"]).tolist() == [
        2,
        0,
        0,
        3,
    ]


@pytest.mark.parametrize("words", ["amber", []])
def test_word_collector_refuses_no_list(words):
    with pytest.raises(ValueError, match="needs words"):
        golds.word_collector(words=words)


def test_check_scores_passes_good_scores_as_they_are():
    scores = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert golds.check_scores(scores, 2, name="gold") is scores
    assert golds.check_scores([1, 2], 2, name="gold").dtype == torch.float32


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
        golds.check_scores(torch.tensor(scores), 3, name="gold")
    assert "\n" not in str(caught.value)
