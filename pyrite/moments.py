"""Mean and variance of values that come batch by batch, or from several processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "merged", "moments", "normalized"]

EPS = 1e-8  # of a variance: what varies less is rounding


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the values seen so far, float64 tensors of one shape, so that a checkpoint can hold them.

    count; mean; square, the sum of squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def zero(cls, *shape: int, device: torch.device | str = "cpu") -> Moments:
        """Before the first value."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)))

    @property
    def var(self) -> Tensor:
        """Population variance; NaN before the first value."""
        return self.square / self.count


@torch.no_grad()
def moments(values: Tensor, mask: Tensor | None = None) -> Moments:
    """Of the last axis, of the values on the mask: values (..., N) -> Moments (...).

    What stands off the mask is never read. Raises ValueError for unequal shapes.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if values.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"moments: values {tuple(values.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) "
            "must have one shape, the mask of bools"
        )
    count = mask.sum(-1).double()
    mean = torch.where(mask, values, 0).sum(-1, dtype=torch.float64) / count.clamp(min=1)
    return Moments(count, mean, torch.where(mask, values.double() - mean[..., None], 0).square().sum(-1))


def merged(a: Moments, b: Moments) -> Moments:
    """Of the values of both, in whatever order: batch after batch, or process beside process.

    mean = m_a + δ n_b/n,   square = s_a + s_b + δ² n_a n_b/n,   δ = m_b − m_a.   Chan, Golub and LeVeque 1979.
    """
    count = a.count + b.count
    delta, share = b.mean - a.mean, b.count / count.clamp(min=1)
    return Moments(count, a.mean + delta * share, a.square + b.square + delta.square() * a.count * share)


@torch.no_grad()
def normalized(scores: Tensor, seen: Moments, *, center: bool = True) -> Tensor:
    """(r − mean) / std, constants of the scores seen so far; by custom these are merged first. center=False: r / std.

    scores (..., N), seen (...) -> (..., N). Population standard deviation; 1 where they hardly varied (variance below
    1e-8), as in a first batch of equal scores.
    """
    std = torch.where(seen.var > EPS, seen.var.sqrt(), 1.0)[..., None]
    shifted = scores.double() - seen.mean[..., None] if center else scores.double()
    return (shifted / std).to(scores.dtype)
