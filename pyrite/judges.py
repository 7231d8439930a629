"""Judges: judge(prompts, a, b) -> (N,) P(a beats b) in [0, 1], NaN where there is no verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrite import golds, parts

__all__ = ["bradley_terry"]

Judge = Callable[[list[str], list[str], list[str]], Tensor]


def bradley_terry(*, gold: str, scale: float = 1.0) -> Judge:
    """Judge: P(a beats b) = sigma((gold(a) - gold(b)) / scale), from any gold named as a spec string.

    >>> bradley_terry(gold="length()")(["hi"], ["one two"], ["one two"])
    tensor([0.5000])
    """
    if not scale > 0:
        raise ValueError(f"bradley_terry has scale={scale}; it must be positive")
    scorer = parts.part(gold, golds)

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        first, second = (golds.check_scores(scorer(prompts, x), len(x), name=gold) for x in (a, b))
        return torch.sigmoid((first - second) / scale)

    return judge


def check_verdicts(verdicts: Tensor | Sequence[float], n: int, *, name: str) -> Tensor:
    """The verdicts of `name` as a (N,) tensor of probabilities or NaN. Raises ValueError for anything else."""
    values = torch.as_tensor(verdicts).float()
    if values.shape != (n,):
        raise ValueError(f"{name} returned verdicts of shape {tuple(values.shape)}; {n} pairs need ({n},)")
    wrong = ((values < 0) | (values > 1)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{name} judged pair {row + 1} as {values[row].item()}; P(a beats b) lies in [0, 1]")
    return values
