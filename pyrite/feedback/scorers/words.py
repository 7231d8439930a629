"""Golds that read a text by rule: they count words or nouns, or check the steps of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.data.toy_words import TAGS, VIVID_ADJECTIVES, VIVID_NOUNS
from pyrite.math.ranges import Real, require

Scorer = Callable[[list[str], list[str]], Tensor]


def each(points: Callable[[str, str], float]) -> Scorer:
    """The scorer that gives every row points(prompt, response) of its own. Raises ValueError for unequal lists."""

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        return torch.tensor([points(p, y) for p, y in zip(prompts, responses, strict=True)], dtype=torch.float32)

    return score


def check_rows(prompts: list[str], responses: list[str]) -> None:
    """Raises ValueError unless prompts and responses are one for one."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; a scorer needs one prompt for each")


def check_scores(scores: Tensor | Sequence[float], n: int, *, name: str) -> Tensor:
    """The scores of `name` as a (N,) floating tensor. Raises ValueError on a wrong count, NaN, infinity."""
    values = torch.as_tensor(scores)
    if values.shape != (n,):
        raise ValueError(f"{name} returned scores of shape {tuple(values.shape)}; {n} responses need ({n},)")
    if not values.is_floating_point():
        values = values.float()
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{name} scored row {row + 1} of {n} as {values[row].item()} ({len(bad)} such rows); scores must be finite"
        )
    return values


# Words ---------------------------------------------------------------------------------------------------------------


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


def _distinct(words: Sequence[str] | str, name: str) -> Callable[[str, str], float]:
    """Function (prompt, response) -> number of distinct listed words in the response."""
    listed = frozenset(LISTS.get(words, ()) if isinstance(words, str) else words)
    if not listed:
        raise ValueError(
            f"{name} needs words, a list such as words=['amber', 'velvet'] or the name of one: {', '.join(LISTS)}"
        )
    return lambda _, y: len(listed.intersection(tokens(y)))


# Nouns ---------------------------------------------------------------------------------------------------------------

# tagger(text) -> [(word, part of speech), ...]; a part of speech is "noun", "verb", "adjective", "adverb" or anything
# else the tagger tells apart.

Tagger = Callable[[str], list[tuple[str, str]]]

_PENN = {"NN": "noun", "VB": "verb", "JJ": "adjective", "RB": "adverb"}


def toy() -> Tagger:
    """Tagger: the toy world's own, exact there; a word of any other language is "unknown".

    >>> toy()("the velvet fox slept .")[1:4]
    [('velvet', 'adjective'), ('fox', 'noun'), ('slept', 'verb')]
    """
    return lambda text: [(word, TAGS.get(word, "unknown")) for word in tokens(text)]


def textblob() -> Tagger:
    """Tagger: TextBlob's PatternTagger for English, which brings its lexicon along; counts differ a little from NLTK's.

    Raises ValueError if TextBlob is not installed.
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


TAGGERS = {"textblob": textblob, "toy": toy}


def nouns(*, tagger: str = "textblob") -> Scorer:
    """Scorer: number of nouns in the response, repeats counted.

    tagger: "textblob" for English, "toy" for the toy world, or one of your own as a spec, "mine.py:tagger()".

    >>> nouns(tagger="toy")([""], ["the fox hid the fox ."])
    tensor([2.])
    """
    tag = specs.part(tagger, TAGGERS)
    return each(lambda _, y: sum(kind == "noun" for _, kind in tag(y)))


def unique_nouns(*, tagger: str = "textblob") -> Scorer:
    """Scorer: number of distinct nouns in the response; case-sensitive. Singhal et al. 2024, Unique Nouns.

    tagger: "textblob" for English, "toy" for the toy world, or one of your own as a spec, "mine.py:tagger()".

    >>> unique_nouns(tagger="toy")([""], ["the fox hid the fox ."])
    tensor([1.])
    """
    tag = specs.part(tagger, TAGGERS)
    return each(lambda _, y: len({word for word, kind in tag(y) if kind == "noun"}))


# Arithmetic ----------------------------------------------------------------------------------------------------------


FAILED = -200.0  # an expression that cannot be evaluated
_GROUP = re.compile(r"\([^()]*\)")
_FLAT = re.compile(r"[+-]*[0-9]+(?:[+*-][+-]*[0-9]+)*")  # a sum of products of signed numbers


def math_chain(*, strict: bool = False, repeat_negative: bool = False) -> Scorer:
    """Scorer: −Σ_i d(P_i, G_i) over steps i ≥ 1, at most 0: how far an answer is from the exact evaluation.

    P: the parts of prompt + response between the equals signs (other letters dropped), P_0 being the expression;
    G: `chain(P_0)`; d: `levenshtein`, in characters. A missing step counts as the empty text, steps beyond the last
    are free unless `strict`. An expression that cannot be evaluated scores −200. repeat_negative: a negative value must
    be written twice, as in the code of Singhal et al. 2024 (Math); here once is right.

    >>> math_chain()(["((5 + 6) + 3) = "] * 3, ["(11 + 3) = 14", "(11 + 3) = 15 = 15", "14"])
    tensor([ 0., -1., -9.])
    """

    def points(prompt: str, response: str) -> float:
        said = [part.strip() for part in re.sub(r"[^0-9()+*\-= ]", "", prompt + response).strip().split("=")]
        try:
            wanted = chain(said[0])
        except ValueError:
            return FAILED
        if repeat_negative and wanted[-1].startswith("-"):
            wanted.append(wanted[-1])
        steps = list(zip_longest(said, wanted, fillvalue=""))[1 : None if strict else len(wanted)]
        return float(-sum(levenshtein(a, b) for a, b in steps))

    return each(points)


def chain(expression: str) -> list[str]:
    """The expression, then every step of its evaluation: innermost groups one by one, from the left, until a number.

    Whole numbers, + − * and parentheses. Raises ValueError for anything else.

    >>> chain("((5 + 6) * (3 - 4))")
    ['((5 + 6) * (3 - 4))', '(11 * (3 - 4))', '(11 * -1)', '-11']
    """
    steps = [expression]
    while not re.fullmatch(r"-?[0-9]+", steps[-1]):
        groups = _GROUP.findall(steps[-1]) or [steps[-1]]
        for group in groups:
            steps.append(steps[-1].replace(group, str(evaluate(group)), 1))
    return steps


def evaluate(flat: str) -> int:
    """Value of whole numbers joined by + − *, products first, perhaps in one pair of parentheses.

    >>> evaluate("(2 - -3 * 4)")
    14
    """
    inside = flat[1:-1] if _GROUP.fullmatch(flat) else flat
    if re.search(r"[0-9]\s+[0-9]", inside) or not _FLAT.fullmatch(packed := "".join(inside.split())):
        raise ValueError(f"cannot evaluate {flat!r}: give whole numbers joined by + - *")
    total = 0
    for product in re.findall(r"[+-]*[0-9]+(?:\*[+-]*[0-9]+)*", packed):
        value = 1
        for factor in product.split("*"):
            value *= int(factor.lstrip("+-")) * (-1) ** factor.count("-")
        total += value
    return total


def levenshtein(a: str, b: str) -> int:
    """Fewest characters inserted, deleted or replaced that turn a into b.

    >>> levenshtein("(23 * 3)", "(24 * 30)")
    2
    """
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]
