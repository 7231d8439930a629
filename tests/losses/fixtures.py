"""Pairs the tests of every loss share."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pyrite.math.logps import Logps, PairLogps, Running

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
    """Pairs with everything a loss may read; what is made up for a response depends on its tokens alone."""
    chosen, rejected, ref_chosen, ref_rejected = (Logps.from_tokens(rows) for rows in sides)

    def whole(side: Logps) -> Logps:
        made_up = 0.1 + side.length.to(side.sum) / 8
        return replace(side, kl=made_up, collision=-made_up)

    strength = 0.5 + chosen.length.to(chosen.sum) / 4
    running = Running(*torch.tensor([0.1, 0.3, 1.0], dtype=F64))
    return PairLogps(whole(chosen), whole(rejected), ref_chosen, ref_rejected, strength, running)


def at_reference(pair: PairLogps) -> PairLogps:
    """The same pairs before the first step: policy = reference, no KL, statistics at zero, collisions none."""
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    zero = torch.zeros_like(pair.chosen.sum)
    chosen, rejected = (replace(ref, kl=zero, collision=zero) for ref in (pair.ref_chosen, pair.ref_rejected))
    return replace(pair, chosen=chosen, rejected=rejected, running=Running.zero())


def pair_with(
    *,
    ratios: tuple[Sequence[float], Sequence[float]],
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    strength: Sequence[float] | None = None,
) -> PairLogps:
    """Pairs of given log-ratios u, v to a reference of -20 nats; the policy's sums are leaves with gradients."""
    u, v = (torch.tensor(values, dtype=F64) for values in ratios)
    first, second = (torch.tensor(n) for n in lengths) if lengths else (torch.ones(len(u)), torch.ones(len(u)))
    ref = torch.full_like(u, -20.0)
    return PairLogps(
        Logps.from_sums((u + ref).requires_grad_(), first),
        Logps.from_sums((v + ref).requires_grad_(), second),
        Logps.from_sums(ref, first),
        Logps.from_sums(ref, second),
        None if strength is None else torch.tensor(strength, dtype=F64),
    )


def slopes(pair: PairLogps) -> tuple[list[float], list[float]]:
    """Gradients of the policy's sums, chosen and rejected; nothing flowed to a side without one."""
    sides = [side.sum.grad for side in (pair.chosen, pair.rejected)]
    chosen, rejected = ([0.0] * len(pair) if grad is None else grad.tolist() for grad in sides)
    return chosen, rejected
