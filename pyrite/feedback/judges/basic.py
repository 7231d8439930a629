"""Judges made of what is there already: any scorer, or a file of verdicts, such as people gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.data.files import DataError, read
from pyrite.data.text import plain
from pyrite.feedback import scorers
from pyrite.math.ranges import Half, Positive, require

Judge = Callable[[list[str], list[str], list[str]], Tensor]


def bradley_terry(*, gold: str, scale: Positive = 1.0, noise: Half = 0.0, hard: bool = False) -> Judge:
    """Judge: P(a beats b) = (1 − noise) σ((gold(a) − gold(b)) / scale) + noise σ((gold(b) − gold(a)) / scale).

    gold: any scorer named as a spec string, a reward model among them; each text is scored once a call. scale: score
    points to an odds ratio of e. noise in [0, ½]: how often this judge says the opposite. hard: 1, 0, ½ at a tie, in
    place of σ. Raises ValueError for options out of range.

    >>> bradley_terry(gold="length()")(["hi"], ["one two"], ["one two"])
    tensor([0.5000])
    """
    require(bradley_terry, scale=scale, noise=noise)
    scorer = specs.part(gold, scorers)

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        texts = list(dict.fromkeys([*zip(prompts, a, strict=True), *zip(prompts, b, strict=True)]))
        if not texts:
            return torch.empty(0)
        scores = scorers.check_scores(scorer([p for p, _ in texts], [y for _, y in texts]), len(texts), name=gold)
        place = {text: i for i, text in enumerate(texts)}
        first, second = (scores[[place[text] for text in zip(prompts, side, strict=True)]] for side in (a, b))
        better = (0.5 + 0.5 * (first - second).sign()) if hard else torch.sigmoid((first - second) / scale)
        return (1 - noise) * better + noise * (1 - better)

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


def human(*, path: str) -> Judge:
    """Judge: the labels of a file of verdicts, such as people gave: rows of prompt, a, b and p = P(a beats b).

    path: verdicts as `pyrite judge import` and `pyrite judge ask` write them. Several verdicts on a pair count by
    their mean; a pair without one is NaN. Raises DataError for a file that holds no verdicts.
    """
    known: dict[tuple[str, str, str], list[float]] = {}
    for prompt, a, b, p in _verdicts(path):
        known.setdefault((prompt, a, b), []).append(p)
        known.setdefault((prompt, b, a), []).append(1 - p)

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        found = [known.get(texts, [math.nan]) for texts in zip(prompts, a, b, strict=True)]
        return torch.tensor([sum(values) / len(values) for values in found], dtype=torch.float64)

    return judge


def _verdicts(path: str) -> list[tuple[str, str, str, float]]:
    source = read(path)
    rows = []
    for i, row in enumerate(source.rows):
        missing = [name for name in ("prompt", "a", "b", "p") if name not in row]
        if missing:
            raise DataError(f"{source.at(i)}: verdicts need prompt, a, b and p; missing {', '.join(missing)}")
        p = row["p"]
        if p is None or p != p:
            continue
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise DataError(f"{source.at(i)}: p is {p!r:.40}; it must be a probability")
        rows.append((plain(row["prompt"]), row["a"], row["b"], float(p)))
    if not rows:
        raise DataError(f"{path}: no verdict in it")
    return rows
