"""Taggers: tagger(text) -> [(word, part of speech), ...], for the golds that count nouns.

A part of speech is "noun", "verb", "adjective", "adverb" or anything else the tagger tells apart.
"""

from __future__ import annotations

from collections.abc import Callable

from pyrite.golds.words import tokens
from pyrite.toy_words import TAGS

Tagger = Callable[[str], list[tuple[str, str]]]

__all__ = ["textblob", "toy"]

_PENN = {"NN": "noun", "VB": "verb", "JJ": "adjective", "RB": "adverb"}


def toy() -> Tagger:
    """Tagger: the toy world's own, exact there; a word of any other language is "unknown".

    >>> toy()("the velvet fox slept .")[1:4]
    [('velvet', 'adjective'), ('fox', 'noun'), ('slept', 'verb')]
    """
    return lambda text: [(word, TAGS.get(word, "unknown")) for word in tokens(text)]


def textblob() -> Tagger:
    """Tagger: TextBlob's PatternTagger for English, which brings its lexicon along; counts differ a little from NLTK's.

    Raises ValueError where TextBlob is not installed.
    """
    try:
        from textblob.taggers import PatternTagger  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tagging English needs the package {error.name}: install Pyrite's extra [nlp] "
            "(pip install textblob), or give tagger='toy' for texts of the toy world"
        ) from None
    tagger = PatternTagger()
    return lambda text: [(str(word), _PENN.get(str(tag)[:2], str(tag))) for word, tag in tagger.tag(text)]
