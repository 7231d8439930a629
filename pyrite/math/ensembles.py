"""One score from several reward models: ensemble(scores (E, N), *, options) -> (N,).

Coste et al. 2023, arXiv:2310.02743, section 3. Members differ in offset and scale: standardize first.
"""

from __future__ import annotations

from torch import Tensor

from pyrite.math.ranges import NonNegative, part

__all__ = ["mean", "uwo", "wco"]


@part
def mean(scores: Tensor) -> Tensor:
    """Average of the members. Scores (E, N) -> (N,)."""
    return scores.mean(0)


@part
def wco(scores: Tensor) -> Tensor:
    """Worst-case optimization: the lowest member. Scores (E, N) -> (N,)."""
    return scores.amin(0)


@part
def uwo(scores: Tensor, *, weight: NonNegative = 0.5) -> Tensor:
    """Uncertainty-weighted optimization: the average less the members' disagreement.

    uwo = mean_j r_j − weight · mean_j (r_j − mean)²     (population variance, arXiv:2310.02743, eq. 5)

    Scores (E, N) -> (N,). The penalty grows with the square of the scores' scale.

    >>> uwo(torch.tensor([[1.0], [2.0], [3.0], [4.0], [10.0]]), weight=0.5)
    tensor([-1.])
    """
    return scores.mean(0) - weight * scores.var(0, correction=0)


def standardize(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """z = (r − mean_j) / std_j, member by member: scores (E, N), mean (E,), std (E,) -> (E, N).

    The constants are each member's over samples of the initial policy, so that 0 is where optimization
    starts. Raises ValueError for a member whose std is not positive.
    """
    if not (std > 0).all():
        member = int((~(std > 0)).nonzero()[0])
        raise ValueError(
            f"standardize: reward model {member} has standard deviation {std[member].item():g} over its "
            "samples; it scores every text alike, so leave it out or train it longer"
        )
    return (scores - mean[:, None]) / std[:, None]
