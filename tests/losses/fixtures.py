"""Pairs the tests of every loss share."""

from dataclasses import replace

import torch

from pyrite.logps import Logps, PairLogps

F64 = torch.float64

POLICY_CHOSEN = [-0.9, -1.3, -0.5, -0.6]
POLICY_REJECTED = [-1.0, -0.9, -1.5, -0.7, -0.9, -0.4]
REF_CHOSEN = [-0.7, -1.1, -0.4, -0.8]
REF_REJECTED = [-0.6, -0.5, -1.0, -0.6, -0.5, -0.6]


def tokens(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=F64) for row in rows]


def worked_pair(chosen: list[torch.Tensor] | None = None, rejected: list[torch.Tensor] | None = None) -> PairLogps:
    """One pair with margin 1.3: log-ratios -0.3 and -1.6, lengths 4 and 6."""
    return PairLogps(
        Logps.from_tokens(chosen or tokens(POLICY_CHOSEN)),
        Logps.from_tokens(rejected or tokens(POLICY_REJECTED)),
        Logps.from_tokens(tokens(REF_CHOSEN)),
        Logps.from_tokens(tokens(REF_REJECTED)),
    )


def random_rows(pairs: int, seed: int, scale: float = 1.0) -> list[list[torch.Tensor]]:
    """Token log-probabilities of chosen, rejected, ref_chosen, ref_rejected for a number of pairs."""
    generator = torch.Generator().manual_seed(seed)
    sides: list[list[torch.Tensor]] = [[], [], [], []]
    for _ in range(pairs):
        for side in (0, 1):
            length = int(torch.randint(1, 9, (1,), generator=generator))
            for model in (side, side + 2):
                sides[model].append(-scale * torch.rand(length, dtype=F64, generator=generator))
    return sides


def pair_of(sides: list[list[torch.Tensor]]) -> PairLogps:
    chosen, rejected, ref_chosen, ref_rejected = (Logps.from_tokens(rows) for rows in sides)
    return PairLogps(chosen, rejected, ref_chosen, ref_rejected)


def at_reference(pair: PairLogps) -> PairLogps:
    """The same pairs with the policy put at the reference, its sums ready for gradients."""
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    chosen, rejected = (
        replace(ref, sum=ref.sum.clone().requires_grad_()) for ref in (pair.ref_chosen, pair.ref_rejected)
    )
    return replace(pair, chosen=chosen, rejected=rejected)
