"""Learning rate schedules: scheduler(lr, step, total, *, options) -> the learning rate of step `step` (from 0).

`lr` is the peak. The rate first rises linearly from 0 over `warmup_steps`; the schedule counts these steps too.
"""

from __future__ import annotations

import math

from pyrite.math.ranges import Natural, Share

__all__ = ["constant", "cosine", "linear"]


def cosine(lr: float, step: int, total: int, *, warmup_steps: Natural = 10, min_lr_ratio: Share = 0.1) -> float:
    """Half a cosine from the peak down to `min_lr_ratio` of it at step `total`.

    >>> [round(cosine(1.0, step, 4, warmup_steps=0), 3) for step in range(5)]
    [1.0, 0.868, 0.55, 0.232, 0.1]
    """
    share = min(step / max(total, 1), 1.0)
    return _falling(lr * _warm(step, warmup_steps), 0.5 * (1 + math.cos(math.pi * share)), min_lr_ratio)


def linear(lr: float, step: int, total: int, *, warmup_steps: Natural = 10, min_lr_ratio: Share = 0.1) -> float:
    """A line from the peak down to `min_lr_ratio` of it at step `total`."""
    return _falling(lr * _warm(step, warmup_steps), 1 - min(step / max(total, 1), 1.0), min_lr_ratio)


def constant(lr: float, step: int, total: int, *, warmup_steps: Natural = 10) -> float:
    """The peak, once it is reached."""
    return lr * _warm(step, warmup_steps)


def _warm(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / max(warmup_steps, 1))


def _falling(lr: float, shape: float, min_lr_ratio: float) -> float:
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * shape)
