"""Identity preference optimization."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps
from pyrite.losses.ratios import margin
from pyrite.options import Positive

__all__ = ["ipo"]


def ipo(pair: PairLogps, *, tau: Positive = 0.1, length_norm: bool = False) -> Tensor:
    """Identity preference optimization: a margin to reach, not to exceed.

    loss = (Δ − 1/(2τ))²,   Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

    PairLogps of B pairs -> (B,), nats²; 1/(4τ²) at policy = reference. With `length_norm` each
    log-ratio is divided by its response's length (nats a token), as some trainers do: the same τ
    then asks for a margin about a response's length times larger. Raises ValueError without a reference
    or, with `length_norm`, for one of another tokenizer.

    Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    return (margin(pair, length_norm=length_norm) - 1 / (2 * tau)) ** 2
