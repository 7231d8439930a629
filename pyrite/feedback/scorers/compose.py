"""Golds made of golds: weighted, noisy, cut short, or reading the prompt as well."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.data.responses import Responses
from pyrite.data.text import plain
from pyrite.feedback.scorers.words import Scorer, check_rows, check_scores
from pyrite.math.ranges import AnyText, Count, Natural, NonNegative, Real, require
from pyrite.math.seeds import derive


def weighted_sum(*, golds: Sequence[str], weights: Sequence[Real]) -> Scorer:
    """Scorer: Σ_i weights_i · golds_i, of golds named as spec strings. Raises ValueError unless one weight each.

    >>> weighted_sum(golds=["length()", "word_collector(words=['fox'])"], weights=[-0.5, 3])([""], ["a fox"])
    tensor([2.])
    """
    if isinstance(golds, str) or not golds or len(golds) != len(weights):
        raise ValueError("weighted_sum needs as many weights as golds, as in golds=['length()'], weights=[1.0]")
    scorers = [named(gold) for gold in golds]

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        scored = [scorer(prompts, responses) for scorer in scorers]
        return torch.stack([weight * some for weight, some in zip(weights, scored, strict=True)]).sum(0)

    return score


def noisy(*, gold: str, sd: NonNegative, seed: Natural = 0) -> Scorer:
    """Scorer: gold + sd · ε, ε ~ N(0, 1) a function of (seed, prompt, response): a text asked twice answers the same.

    >>> score = noisy(gold="length()", sd=1.0)
    >>> bool((score(["p", "p"], ["one", "two"]) == score(["p", "p"], ["two", "one"]).flip(0)).all())
    True
    """
    require(noisy, sd=sd)
    scorer = named(gold)

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        clean = scorer(prompts, responses)
        keys = (derive(seed, "noisy", p, y) for p, y in zip(prompts, responses, strict=True))
        return clean + sd * torch.tensor([random.Random(key).gauss() for key in keys], dtype=clean.dtype)

    return score


def truncated(*, gold: str, words: Count = 50) -> Scorer:
    """Scorer: gold of the first `words` words of the response; the prompt stays whole.

    >>> truncated(gold="length()", words=2)(["one two three"], ["one two three"])
    tensor([2.])
    """
    require(truncated, words=words)
    scorer = named(gold)
    return lambda prompts, responses: scorer(prompts, [_first(y, words) for y in responses])


def with_prompt(*, gold: str, separator: AnyText = " ") -> Scorer:
    """Scorer: gold of prompt + separator + response, as the response to an empty prompt.

    >>> with_prompt(gold="word_collector()")(["data hope"], ["nothing"])
    tensor([2.])
    """
    scorer = named(gold)

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        whole = [prompt + separator + response for prompt, response in zip(prompts, responses, strict=True)]
        return scorer([""] * len(whole), whole)

    return score


def scorer(gold: str | Scorer) -> Callable[..., Tensor]:
    """A gold that also reads a record of answers: score(answers) is a table (P, K), a row for each prompt.

    gold: a spec string, or a function scorer(prompts, responses) of one's own. With lists of texts, score(prompts,
    responses), it is that scorer: (N,). Raises ValueError for an unknown gold.
    """
    function = named(gold) if isinstance(gold, str) else gold

    def score(prompts: Responses | list[str], responses: list[str] | None = None) -> Tensor:
        if responses is not None:
            return torch.as_tensor(function(prompts, responses))  # type: ignore[arg-type]
        assert isinstance(prompts, Responses)
        texts = [str(said) for said in prompts.texts]
        found = check_scores(function([plain(one) for one in prompts.prompts], texts), len(texts), name=str(gold))
        return prompts.table(found)

    if isinstance(gold, str):
        score.spec = gold  # type: ignore[attr-defined]
    return score


def named(gold: str) -> Scorer:
    """The gold of a spec string, its scores checked. Raises ValueError for one that is unknown, or cannot be read."""
    scorer = specs.part(gold, sys.modules["pyrite.feedback.scorers"])

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        return check_scores(scorer(prompts, responses), len(responses), name=gold)

    return score


def _first(text: str, words: Count) -> str:
    """A text up to the end of its n-th word, its spaces as they are."""
    said = text.split()
    if len(said) <= words:
        return text
    rest = text.split(maxsplit=words)[words]
    return text[: len(text) - len(rest)].rstrip()
