import pytest

from pyrite.data import toy_words
from pyrite.feedback import scorers
from pyrite.recipes import toy

LEAKS = "ignore::pytest.PytestUnraisableExceptionWarning"  # TextBlob leaves the file of its lexicon open
DOGS = "The cat chased the cat and the Dog saw a dog."


def test_toy_nouns_are_those_of_its_lexicon():
    rows = toy.demos(300, seed=3)
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    found = [[word for word in text.split() if toy_words.TAGS[word] == "noun"] for text in responses]
    assert scorers.nouns(tagger="toy")(prompts, responses).tolist() == [len(words) for words in found]
    assert scorers.unique_nouns(tagger="toy")(prompts, responses).tolist() == [len(set(words)) for words in found]


def test_repeats_are_free_for_unique_nouns_only():
    text = "the fox hid the old lantern ."
    for k in (1, 3):
        assert scorers.unique_nouns(tagger="toy")([""], [" ".join([text] * k)]).item() == 2
        assert scorers.nouns(tagger="toy()")([""], [" ".join([text] * k)]).item() == 2 * k


@pytest.mark.filterwarnings(LEAKS)
def test_english_nouns():
    pytest.importorskip("textblob")
    assert scorers.unique_nouns()(["a cat"], [DOGS]).item() == 3  # cat, Dog, dog
    assert scorers.unique_nouns()([""], [f"{DOGS} {DOGS}"]).item() == 3
    assert scorers.nouns()(["", ""], [DOGS, ""]).tolist() == [4, 0]


def test_a_tagger_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def shout():\n    return lambda text: [(w, 'noun') for w in text.split('!')]\n")
    assert scorers.nouns(tagger=f"{tmp_path}/mine.py:shout()")([""], ["a!b!a"]).item() == 3
    assert scorers.unique_nouns(tagger=f"{tmp_path}/mine.py:shout()")([""], ["a!b!a"]).item() == 2
    with pytest.raises(ValueError, match="unknown name 'toys': did you mean toy"):
        scorers.nouns(tagger="toys")
