"""Optimizers: optimizer(parameters, *, options) -> torch.optim.Optimizer. Every step sets its learning rate."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer

from pyrite.math.ranges import Fraction, NonNegative

__all__ = ["adamw"]


def adamw(
    parameters: list[nn.Parameter],
    *,
    weight_decay: NonNegative = 0.0,
    betas: tuple[Fraction, Fraction] = (0.9, 0.98),
) -> Optimizer:
    """AdamW; only matrices decay. betas: of the running means of gradients and of their squares."""
    matrices, others = ([p for p in parameters if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], betas=betas, fused=True)
