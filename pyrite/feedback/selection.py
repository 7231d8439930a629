"""Which pairs are worth a gold label: selector(margins (E, B), generator, *, options) -> (B,) priority, highest first.

A margin is what a reward model says of a pair, r(a) − r(b) in nats of log-odds; E members, B pairs. All pairs of the
window compete, not those of one request; `pick` takes the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.math.ranges import Share, require

__all__ = ["confidence", "disagreement", "margin_top", "random", "with_random"]

Selector = Callable[..., Tensor]


def random(margins: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random pairs: uniform numbers. Margins (E, B) -> (B,)."""
    return torch.rand(margins.shape[1], generator=generator, dtype=torch.float64)


def confidence(margins: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The least certain first: −|mean_e margin|. Margins (E, B) -> (B,).

    Singhal et al. 2024, arXiv:2405.01511 (there within one request only).

    >>> confidence(torch.tensor([[0.9, 0.1, -0.5, 0.3]])).argsort(descending=True)
    tensor([1, 3, 2, 0])
    """
    return -margins.mean(0).abs()


def margin_top(margins: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The most certain first, where a wrong reward model is most wrong: |mean_e margin|. Margins (E, B) -> (B,)."""
    return margins.mean(0).abs()


def disagreement(margins: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pairs on which members disagree most: the variance of the margin over members (population). Margins (E, B) ->
    (B,).

    Raises ValueError for one member, which never disagrees.
    """
    if len(margins) < 2:
        raise ValueError("disagreement needs a reward ensemble of at least 2 members; use confidence() with one")
    return margins.var(0, correction=0)


def with_random(
    margins: Tensor, generator: torch.Generator | None = None, *, of: str = "confidence()", share: Share = 0.5
) -> Tensor:
    """Another selector with a share of random pairs: each place goes to a random pair with probability `share`.

    Margins (E, B) -> (B,), the ranks B, B−1, …, 1. Raises ValueError for a share outside [0, 1].
    """
    require(with_random, share=share)
    chosen = specs.part(of, sys.modules[__name__])
    best = _order(chosen(margins, generator=generator))
    any_ = _order(random(margins, generator=generator))
    coins = torch.rand(len(best), generator=generator, dtype=torch.float64) < share
    rank, taken, queues = torch.zeros(len(best), dtype=torch.float64), set(), (iter(best), iter(any_))
    for place, coin in enumerate(coins.tolist()):
        pair = next(i for i in queues[coin] if i not in taken)
        taken.add(pair)
        rank[pair] = len(best) - place
    return rank


def pick(selector: Selector, margins: Tensor, n: int, *, generator: torch.Generator) -> list[int]:
    """The n pairs of highest priority, the highest first; pairs of equal priority in their order.

    Margins (E, B). Raises ValueError if the selector does not give each pair one finite number.
    """
    priority = selector(margins, generator=generator)
    if priority.shape != margins.shape[1:] or not priority.isfinite().all():
        raise ValueError(
            f"{selector} gave {tuple(priority.shape)} for {margins.shape[1]} pairs; it must give each a finite number"
        )
    return _order(priority)[: max(n, 0)]


def _order(priority: Tensor) -> list[int]:
    return priority.argsort(descending=True, stable=True).tolist()
