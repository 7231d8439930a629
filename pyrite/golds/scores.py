"""What a scorer is, how one is made of a function of one text, and the check on what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scorer = Callable[[list[str], list[str]], Tensor]


def each(points: Callable[[str, str], float]) -> Scorer:
    """The scorer that gives every row points(prompt, response) of its own. Raises ValueError for unequal lists."""

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        return torch.tensor([points(p, y) for p, y in zip(prompts, responses, strict=True)], dtype=torch.float32)

    return score


def check_rows(prompts: list[str], responses: list[str]) -> None:
    """Raises ValueError where prompts and responses are not one for one."""
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
