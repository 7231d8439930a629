import pytest

from pyrite.data.toy_words import VIVID
from pyrite.feedback import scorers
from pyrite.feedback.scorers import LISTS, tokens
from pyrite.recipes import toy

HOPE = "I hope this information can help. However, first have data; data!"


def test_length_counts_words_or_characters():
    texts = ["hello my friend", "", "  spaced   out "]
    assert scorers.length()([""] * 3, texts).tolist() == [3, 0, 2]
    assert scorers.length(unit="chars")([""] * 3, texts).tolist() == [15, 0, 15]
    with pytest.raises(ValueError, match="'words' or 'chars'"):
        scorers.length(unit="tokens")  # type: ignore[arg-type]


def test_tokens_are_words_and_marks():
    assert tokens("It's 3.5, well-made (really)...") == "It ' s 3 . 5 , well-made ( really ) ...".split()
    assert tokens(" \n") == []


def test_word_collector_counts_distinct_whole_words_with_case():
    score = scorers.word_collector(words=["amber", "velvet", "lullaby"])
    assert score([""] * 4, ["amber amber, velvet!", "Amber ambers", "", "lullaby velvet amber"]).tolist() == [
        2,
        0,
        0,
        3,
    ]


@pytest.mark.parametrize("words", ["amber", "", []])
def test_word_collector_refuses_no_list(words):
    with pytest.raises(ValueError, match=r"word_collector needs words.*d2po, toy"):
        scorers.word_collector(words=words)


@pytest.mark.parametrize(
    ("response", "points"),
    [
        (HOPE, 6),  # hope information help first have data
        ("Your best example: the code contains two questions.", 5),
        ("However", 0),
        ("however", 1),
        ("a first-class question", 1),
        (" ".join(LISTS["d2po"]), 30),
        (" ".join(LISTS["d2po"]).upper(), 0),
    ],
)
def test_the_published_list(response, points):
    score = scorers.word_collector()
    assert score([""], [response]).item() == points
    for k in (2, 7):
        assert score([""], [" ".join([response] * k)]).item() == points


def test_word_lists():
    assert {name: len(set(words)) for name, words in LISTS.items()} == {"d2po": 30, "toy": 30, "common": 9}
    assert set(LISTS["toy"]) == VIVID


def test_word_collector_reads_the_response_alone_unless_told_otherwise():
    prompt, response = ["Question: data hope\n\nAnswer:"], ["nothing"]
    assert scorers.word_collector()(prompt, response).item() == 0
    assert scorers.with_prompt(gold="word_collector()")(prompt, response).item() == 2


def test_toy_words_are_collected_about_once_an_answer():
    rows = toy.demos(2000, seed=0)
    points = scorers.word_collector(words="toy")([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert 0.9 < points.mean() < 1.15
    assert 0.55 < (points > 0).float().mean() < 0.7
