"""Golds that count words: length, collected and avoided words, density, reading grade. No model, no download."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from pyrite.golds.scores import Scorer, each
from pyrite.options import Natural, Real, require
from pyrite.toy_words import VIVID_ADJECTIVES, VIVID_NOUNS

LISTS = {
    "d2po": tuple(
        "data hope information provide example your however first have help additionally important include finally "
        "following happy code two create question possible understand generate contains appropriate best respectful "
        "ensure experience safe".split()
    ),
    "toy": (*VIVID_NOUNS, *VIVID_ADJECTIVES),
    "common": tuple("the to and of in is that this with".split()),
}


def tokens(text: str) -> list[str]:
    """Words, hyphenated ones whole, and punctuation marks of a text, in order, case kept.

    >>> tokens("A well-made one ... is it?")
    ['A', 'well-made', 'one', '...', 'is', 'it', '?']
    """
    return re.findall(r"\w+(?:-\w+)*|\.\.\.|[^\w\s]", text)


def length(*, unit: Literal["words", "chars"] = "words") -> Scorer:
    """Scorer: length of the response, len(y), in words or characters; the plainest thing a proxy can learn.

    >>> length()(["Say hi."], ["hello my friend"])
    tensor([3.])
    """
    require(length, unit=unit)
    return each(lambda _, y: len(y.split()) if unit == "words" else len(y))


def word_collector(*, words: Sequence[str] | str = "d2po") -> Scorer:
    """Scorer: number of distinct listed words in the response, |W(y) ∩ words|; case-sensitive, repeats are free.

    words: a list of your own, or "d2po" (the 30 words of Singhal et al. 2024, Word Collector), or "toy" (the 30
    vivid words of the toy world, about 1 an answer at first). Raises ValueError for another name or no words.

    >>> word_collector(words=["amber", "velvet"])([""], ["amber amber velvety"])
    tensor([1.])
    """
    return each(_distinct(words, "word_collector"))


def reverse_word_collector(*, words: Sequence[str] | str = "common", start: Real = 3.0) -> Scorer:
    """Scorer: start − |W(y) ∩ words|: every listed word costs a point, however often it occurs; case-sensitive.

    words: as in `word_collector`, or "common", nine of the commonest in English. From the code of Singhal et al. 2024.

    >>> reverse_word_collector()(["", ""], ["", "the the of"])
    tensor([3., 1.])
    """
    found = _distinct(words, "reverse_word_collector")
    return each(lambda prompt, y: start - found(prompt, y))


def token_density(*, least: Natural = 21) -> Scorer:
    """Scorer: 10 · distinct / all tokens (words and marks) of the response; −5 below `least` tokens.

    >>> token_density(least=3)(["", ""], ["one two one .", "one"])
    tensor([ 7.5000, -5.0000])
    """

    def points(_: str, y: str) -> float:
        said = tokens(y)
        return 10 * len(set(said)) / len(said) if said and len(said) >= least else -5.0

    return each(points)


def reading_grade(*, least: Natural = 21) -> Scorer:
    """Scorer: Flesch-Kincaid grade, 0.39 words/sentences + 11.8 syllables/words − 15.59; −10 below `least` words.

    Sentences: runs of `.`, `!`, `?`, at least 1. Syllables of a word: runs of vowels (aeiouy), a final silent e not
    counted (but "le" after a consonant is), at least 1. Kincaid et al. 1975.

    >>> reading_grade(least=3)([""], ["The cat sat on the table."])
    tensor([0.5167])
    """

    def points(_: str, y: str) -> float:
        words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", y)
        if not words or len(words) < least:
            return -10.0
        sentences = max(len(re.findall(r"[.!?]+", y)), 1)
        return 0.39 * len(words) / sentences + 11.8 * sum(map(syllables, words)) / len(words) - 15.59

    return each(points)


def syllables(word: str) -> int:
    """Syllables of an English word by the rule of `reading_grade`.

    >>> [syllables(word) for word in ("cat", "table", "grade", "reading", "the")]
    [1, 2, 1, 2, 1]
    """
    spelled = word.lower()
    silent = re.search(r"[^aeiouy]e$", spelled) and not re.search(r"[^aeiouy]le$", spelled)
    return max(len(re.findall(r"[aeiouy]+", spelled)) - bool(silent), 1)


def _distinct(words: Sequence[str] | str, name: str) -> Callable[[str, str], float]:
    """Function (prompt, response) -> number of distinct listed words in the response."""
    listed = frozenset(LISTS.get(words, ()) if isinstance(words, str) else words)
    if not listed:
        raise ValueError(
            f"{name} needs words, a list such as words=['amber', 'velvet'] or the name of one: {', '.join(LISTS)}"
        )
    return lambda _, y: len(listed.intersection(tokens(y)))
