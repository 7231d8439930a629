"""Golds that count nouns, by a tagger of one's choice."""

from __future__ import annotations

from pyrite import parts
from pyrite.golds import taggers
from pyrite.golds.scores import Scorer, each


def nouns(*, tagger: str = "textblob") -> Scorer:
    """Scorer: number of nouns in the response, repeats counted.

    tagger: "textblob" for English, "toy" for the toy world, or one of your own as a spec, "mine.py:tagger()".

    >>> nouns(tagger="toy")([""], ["the fox hid the fox ."])
    tensor([2.])
    """
    tag = parts.part(tagger, taggers)
    return each(lambda _, y: sum(kind == "noun" for _, kind in tag(y)))


def unique_nouns(*, tagger: str = "textblob") -> Scorer:
    """Scorer: number of distinct nouns in the response; case-sensitive. Singhal et al. 2024, Unique Nouns.

    tagger: "textblob" for English, "toy" for the toy world, or one of your own as a spec, "mine.py:tagger()".

    >>> unique_nouns(tagger="toy")([""], ["the fox hid the fox ."])
    tensor([1.])
    """
    tag = parts.part(tagger, taggers)
    return each(lambda _, y: len({word for word, kind in tag(y) if kind == "noun"}))
