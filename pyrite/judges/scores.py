"""A judge made of any scorer, and the check on verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrite import golds, parts
from pyrite.options import Half, Positive, require

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
    scorer = parts.part(gold, golds)

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        texts = list(dict.fromkeys([*zip(prompts, a, strict=True), *zip(prompts, b, strict=True)]))
        if not texts:
            return torch.empty(0)
        scores = golds.check_scores(scorer([p for p, _ in texts], [y for _, y in texts]), len(texts), name=gold)
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
