"""Bounds inside losses, which keep numbers finite. A value beyond its bound has no gradient: such pairs are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["at_least", "at_most", "counting", "pairs"]

_beyond: ContextVar[list[Tensor] | None] = ContextVar("beyond", default=None)


def at_most(values: Tensor, bound: float) -> Tensor:
    """min(values, bound), noted for `counting`."""
    _note(values > bound)
    return values.clamp(max=bound)


def at_least(values: Tensor, bound: float) -> Tensor:
    """max(values, bound), noted for `counting`."""
    _note(values < bound)
    return values.clamp(min=bound)


@contextmanager
def counting() -> Iterator[list[Tensor]]:
    """Within this block every bound that a loss has notes where it holds: a bool tensor each, (B,) or 0-dim."""
    found: list[Tensor] = []
    token = _beyond.set(found)
    try:
        yield found
    finally:
        _beyond.reset(token)


def _note(where: Tensor) -> None:
    found = _beyond.get()
    if found is not None:
        found.append(where.detach())


def pairs(found: list[Tensor], count: int) -> Tensor:
    """How many of B pairs have a value beyond a bound, 0-dim float32."""
    return torch.stack([where.expand(count) for where in found]).any(0).sum().float()
