"""What losses read of a pair: log-ratios to the reference, their margin, strengths, statistics; or why they cannot."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import Logps, PairLogps, Running


def references(pair: PairLogps, *, aligned: bool = False) -> tuple[Logps, Logps]:
    """Log-probabilities of the chosen and of the rejected responses under the reference.

    Raises ValueError where the pairs carry none and, with `aligned`, where another tokenizer counted its tokens.
    """
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise ValueError(
            "this loss compares the policy with a reference, and these pairs have none: "
            "fill ref_chosen and ref_rejected of PairLogps, or choose a loss that needs no reference"
        )
    if aligned and not (pair.ref_chosen.aligned and pair.ref_rejected.aligned):
        raise ValueError(
            "this loss reads lengths or tokens of the reference, which another tokenizer counted: "
            "choose a loss of sums, such as dpo, or a reference with the policy's tokenizer"
        )
    return pair.ref_chosen, pair.ref_rejected


def log_ratios(pair: PairLogps, *, length_norm: bool = False) -> tuple[Tensor, Tensor]:
    """u, v = log π(y)/π_ref(y) of the chosen and of the rejected responses, (B,) each, in nats.

    With `length_norm`, each is divided by the response's own length: nats a token.
    Raises ValueError where the pairs carry no reference or, with `length_norm`, one of another tokenizer.
    """
    ref_chosen, ref_rejected = references(pair, aligned=length_norm)
    chosen, rejected = pair.chosen.sum - ref_chosen.sum, pair.rejected.sum - ref_rejected.sum
    if length_norm:
        return chosen / pair.chosen.length, rejected / pair.rejected.length
    return chosen, rejected


def margin(pair: PairLogps, *, length_norm: bool = False) -> Tensor:
    """Δ = u − v = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l), (B,), in nats; 0 where policy = reference."""
    chosen, rejected = log_ratios(pair, length_norm=length_norm)
    return chosen - rejected


def strength(pair: PairLogps) -> Tensor:
    """How strongly chosen is preferred, (B,). Raises ValueError where the pairs do not say."""
    if pair.strength is None:
        raise ValueError(
            "this loss reads how strongly chosen is preferred, and these pairs do not say: "
            "fill strength of PairLogps (a strength column of the data), or choose a loss that does not read it"
        )
    return pair.strength


def running(pair: PairLogps) -> Running:
    """Statistics over the batches. Raises ValueError where nobody keeps them."""
    if pair.running is None:
        raise ValueError(
            "this loss reads statistics over the batches, and these pairs carry none: "
            "fill running of PairLogps (pyrite.losses.running.update), or choose a loss without them"
        )
    return pair.running
