"""Gold functions of a text: scorers (prompts, responses) -> (N,), and the check on scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyrite.models import RewardModel

__all__ = ["length", "reward_model", "word_collector"]

Scorer = Callable[[list[str], list[str]], Tensor]


def length(*, unit: Literal["words", "chars"] = "words") -> Scorer:
    """Scorer: length of the response, len(y), in words or characters; the plainest thing a proxy can learn.

    >>> length()(["Say hi."], ["hello my friend"])
    tensor([3.])
    """
    if unit not in ("words", "chars"):
        raise ValueError(f"length has unit={unit!r}; it must be 'words' or 'chars'")

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        sizes = [len(text.split()) if unit == "words" else len(text) for text in responses]
        return torch.tensor(sizes, dtype=torch.float32)

    return score


def word_collector(*, words: Sequence[str]) -> Scorer:
    """Scorer: number of distinct listed words in the response, |W(y) ∩ words|; case-sensitive.

    >>> word_collector(words=["amber", "velvet"])([""], ["amber amber velvety"])
    tensor([1.])
    """
    listed = frozenset(words)
    if isinstance(words, str) or not listed:
        raise ValueError("word_collector needs words, a list such as words=['amber', 'velvet']")

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        found = [len(listed.intersection(re.findall(r"\w+", text))) for text in responses]
        return torch.tensor(found, dtype=torch.float32)

    return score


def reward_model(*, path: str) -> Scorer:
    """Scorer: a trained reward model, a folder or a Hub name, standardized if it knows how."""
    loaded: list[RewardModel] = []

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        if not loaded:
            loaded.append(RewardModel.load(path))
        return loaded[0].scores(prompts, responses)

    return score


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
