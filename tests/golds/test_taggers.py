import sys

import pytest

from pyrite.data.toy_words import TAGS
from pyrite.feedback import scorers as taggers

LEAKS = "ignore::pytest.PytestUnraisableExceptionWarning"  # TextBlob leaves the file of its lexicon open


def test_toy_tags():
    text = "hello my friend ! the velvet fox , quickly found zeppelins ."
    assert taggers.toy()(text) == [(word, TAGS.get(word, "unknown")) for word in text.split()]
    assert taggers.toy()("") == []


@pytest.mark.filterwarnings(LEAKS)
def test_textblob_tags():
    pytest.importorskip("textblob")
    tagged = dict(taggers.textblob()("The quick dog and/or cat quietly chased Anna."))
    assert [tagged[word] for word in ("quick", "dog", "cat", "quietly", "chased", "Anna")] == [
        "adjective",
        "noun",
        "noun",
        "adverb",
        "verb",
        "noun",
    ]
    assert taggers.textblob()("") == []


def test_a_missing_package_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob", None)
    monkeypatch.setitem(sys.modules, "textblob.taggers", None)
    with pytest.raises(ValueError, match=r"textblob.*\[nlp\].*tagger='toy'"):
        taggers.textblob()
