"""Where a loss meets the reference: log-ratios of the two responses, and their margin."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps


def log_ratios(pair: PairLogps, *, length_norm: bool = False) -> tuple[Tensor, Tensor]:
    """log π(y)/π_ref(y) of the chosen and of the rejected responses, (B,) each, in nats.

    With `length_norm`, each is divided by the response's own length: nats a token.
    Raises ValueError where the pairs carry no reference.
    """
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise ValueError(
            "this loss compares the policy with a reference, and these pairs have none: "
            "fill ref_chosen and ref_rejected of PairLogps, or choose a loss that needs no reference"
        )
    chosen, rejected = pair.chosen.sum - pair.ref_chosen.sum, pair.rejected.sum - pair.ref_rejected.sum
    if length_norm:
        return chosen / pair.chosen.length, rejected / pair.rejected.length
    return chosen, rejected


def margin(pair: PairLogps, *, length_norm: bool = False) -> Tensor:
    """Δ = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l), (B,), in nats; 0 where policy = reference."""
    chosen, rejected = log_ratios(pair, length_norm=length_norm)
    return chosen - rejected
