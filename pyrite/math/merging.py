"""Soups: weighted combinations of weights, and of low-rank adapters. Pure functions; sums in float64.

Three readings of "the average of k adapters", Δ_i = s_i B_i A_i with weights w_i:
deltas, Σ_i w_i Δ_i, what averaging the adapted models would give, exact at rank Σ r_i;
factors, s (Σ_i w_i B_i)(Σ_j w_j A_j) = s Σ_ij w_i w_j B_i A_j, what Personalized Soups computes, own terms weighted
w_i² beside cross terms, equal to the first where all A_i are one, and changed by A → cA, B → B/c though no model is;
truncated, the first cut to a smaller rank. Jang et al. 2023, arXiv:2310.11564; Wortsman et al. 2022, arXiv:2203.05482.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
ROUNDING = 0.01  # by how much shares written with few decimals, 0.33 0.33 0.33, may miss 1


@dataclass(frozen=True)
class LowRank:
    """The matrix scale · up @ down, down (r, in) and up (out, r): LoRA's A and B.

    Raises ValueError for factors that do not fit each other.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            a, b = tuple(self.down.shape), tuple(self.up.shape)
            raise ValueError(f"a low-rank matrix needs A (r, in) and B (out, r); these are {a} and {b}")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.up.shape[0], self.down.shape[1]

    def matrix(self) -> Tensor:
        """The whole (out, in) matrix, float64."""
        return self.scale * self.up.double() @ self.down.double()


def shares(weights: Sequence[float] | None, k: int, *, normalize: bool = True) -> list[float]:
    """The weights of k ingredients; None: 1/k each.

    normalize: they are ≥ 0 and sum to 1; what rounding left over, up to 0.01, is divided away. Without, any finite
    weights as they stand: a sum below 1 keeps some of the base, a negative weight moves away from an ingredient.
    Raises ValueError for another number of weights, weights that are no such shares, or all 0.

    >>> shares([0.5, 0.25, 0.25], 3)
    [0.5, 0.25, 0.25]
    """
    given = [1 / k] * k if weights is None else [float(weight) for weight in weights]
    if len(given) != k:
        raise ValueError(
            f"--weights {_listed(given)}: {len(given)} weights for {k} ingredients; give one weight for each"
        )
    if not all(map(math.isfinite, given)) or not any(given):
        raise ValueError(f"--weights {_listed(given)}: they must be finite numbers, not all 0")
    if not normalize:
        return given
    total = math.fsum(given)
    if min(given) < 0 or abs(total - 1) > ROUNDING + 1e-9:
        raise ValueError(
            f"weights {_listed(given)} sum to {total:g}; normalized weights are at least 0 and sum to 1, "
            "without normalizing they are taken as they stand"
        )
    return [weight / total for weight in given]


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_i w_i θ_i in float64, returned in the tensors' widest type; integers must be equal and stay.

    Raises ValueError for tensors of several shapes, or integers that differ.
    """
    _same([tuple(tensor.shape) for tensor in tensors], "shapes")
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, other) for other in tensors[1:]):
            raise ValueError("integer tensors differ between the ingredients; these cannot be averaged")
        return first.clone()
    kind = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    total = sum(weight * tensor.double() for weight, tensor in _present(weights, tensors))
    return torch.as_tensor(total).to(kind)


def deltas(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ_i w_i s_i B_i A_i exactly, at rank Σ r_i over the parts of weight other than 0.

    The weights go into B, and so do the scales where they differ: (1, 0, 0) gives the first part, bit for bit.
    Raises ValueError for parts of several shapes.
    """
    _same([part.shape for part in parts], "shapes")
    kept = _present(weights, parts)
    scale = kept[0][1].scale if len({part.scale for _, part in kept}) == 1 else None
    up = [(weight if scale else weight * part.scale) * part.up.double() for weight, part in kept]
    kind = _precision(parts)
    return LowRank(torch.cat([part.down.to(kind) for _, part in kept]), torch.cat(up, 1).to(kind), scale or 1.0)


def factors(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """s (Σ_i w_i B_i)(Σ_j w_j A_j): the factors averaged apart, as published, at the rank of one part.

    Raises ValueError for parts of several shapes, ranks or scales.
    """
    _same([part.shape for part in parts], "shapes")
    _same([part.rank for part in parts], "ranks")
    _same([part.scale for part in parts], "scales")
    kind = _precision(parts)
    down, up = ([getattr(part, name).to(kind) for part in parts] for name in ("down", "up"))
    return LowRank(weighted(down, weights), weighted(up, weights), parts[0].scale)


def truncated(low: LowRank, rank: int) -> LowRank:
    """The nearest matrix of this rank; `distance` to the whole one is ‖cut singular values‖ / ‖all‖.

    B = Q_B R_B, Aᵀ = Q_A R_A, R_B R_Aᵀ = U S Vᵀ: the whole matrix is never formed. Both factors take √S; a matrix too
    small for the rank is padded with zeros. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: give at least 1")
    q_up, r_up = torch.linalg.qr(low.up.double())
    q_down, r_down = torch.linalg.qr(low.down.double().T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = q_up @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ q_down.T
    kind = _precision([low])
    return padded(LowRank(down.to(kind), up.to(kind), low.scale), rank)


def padded(low: LowRank, rank: int) -> LowRank:
    """The same matrix at a rank at least its own: zero rows of A, zero columns of B."""
    more = rank - low.rank
    return replace(low, down=F.pad(low.down, (0, 0, 0, more)), up=F.pad(low.up, (0, more))) if more > 0 else low


def similarity(x: LowRank, y: LowRank) -> tuple[float, float]:
    """(cosine, ‖x‖ / ‖y‖) as matrices, from their factors alone; NaN where a zero matrix leaves one undefined."""
    xx, yy = _norm(x), _norm(y)
    cosine = max(-1.0, min(1.0, _inner(x, y) / (xx * yy))) if xx and yy else math.nan
    return cosine, xx / yy if yy else math.nan


def distance(x: LowRank, y: LowRank) -> float:
    """‖x − y‖ / ‖y‖ in Frobenius norms, from their factors alone; NaN where y is 0 and x is not."""
    apart, whole = _norm(deltas([_double(x), _double(y)], [1.0, -1.0])), _norm(y)
    return apart / whole if whole else math.nan if apart else 0.0


def _double(low: LowRank) -> LowRank:
    return replace(low, down=low.down.double(), up=low.up.double())


def _norm(low: LowRank) -> float:
    """‖s B A‖ = s ‖R_B R_Aᵀ‖, the triangles of both factors: without the cancellation of a Gram matrix."""
    _, up = torch.linalg.qr(low.up.double(), mode="r")
    _, down = torch.linalg.qr(low.down.double().T, mode="r")
    return abs(low.scale) * (up @ down.T).norm().item()


def _inner(x: LowRank, y: LowRank) -> float:
    """⟨x, y⟩ = s_x s_y Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ)."""
    up, down = x.up.double().T @ y.up.double(), x.down.double() @ y.down.double().T
    return x.scale * y.scale * (up * down).sum().item()


def _present(weights: Sequence[float], parts: Sequence[T]) -> list[tuple[float, T]]:
    """The parts that count, with their weights."""
    if len(weights) != len(parts):
        raise ValueError(f"{len(weights)} weights for {len(parts)} ingredients; give one weight for each")
    kept = [(weight, part) for weight, part in zip(weights, parts, strict=True) if weight]
    if not kept:
        raise ValueError("all weights are 0: nothing is left to combine")
    return kept


def _precision(parts: Sequence[LowRank]) -> torch.dtype:
    """At least float32, so that weights are not rounded to a few bits."""
    kinds = [tensor.dtype for part in parts for tensor in (part.down, part.up)]
    return reduce(torch.promote_types, kinds, torch.float32)


def _same(values: Sequence, what: str) -> None:
    for index, value in enumerate(values):
        if value != values[0]:
            raise ValueError(f"{what} differ: {value} of ingredient {index + 1}, {values[0]} of the first")


def _listed(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)
