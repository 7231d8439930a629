import sys
from types import SimpleNamespace

import pytest

from pyrite.feedback import scorers
from pyrite.feedback.scorers.words import depth


def sentence(heads: list[int]) -> list[SimpleNamespace]:
    words = [SimpleNamespace(i=i) for i in range(len(heads))]
    for word, head in zip(words, heads, strict=True):
        word.head = words[head]
    return words


def fake(monkeypatch, parse):
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: parse))


def test_depth_counts_the_heads_above():
    assert [depth(word) for word in sentence([1, 1, 1, 4, 2])] == [1, 0, 1, 3, 2]


def test_the_deepest_word_counts(monkeypatch):
    fake(monkeypatch, lambda text: sentence([max(i - 1, 0) for i in range(len(text.split()))]))
    assert scorers.dependency_depth()(["a b c"] * 3, ["one", "", "one two three"]).tolist() == [0, 0, 2]


def test_spacy_itself():
    spacy = pytest.importorskip("spacy")
    doc = spacy.tokens.Doc(spacy.blank("en").vocab, words="the fox hid".split(), heads=[1, 2, 2], deps=["d", "s", "R"])
    assert [depth(word) for word in doc] == [2, 1, 0]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"needs spaCy.*\[nlp\]"):
        scorers.dependency_depth()

    def load(name):
        raise OSError("no such pipeline")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(ValueError, match=r"finds no spaCy pipeline 'en_tiny'.*download en_tiny"):
        scorers.dependency_depth(model="en_tiny")
