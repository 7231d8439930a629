"""Find out which inputs a loss needs: call it with each input missing and see if it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyrite.math.logps import Logps, PairLogps, toy_pairs

__all__ = ["needs", "takes_ties"]


def needs(loss: Callable[[PairLogps], Tensor]) -> frozenset[str]:
    """The names of the inputs this loss needs.

    ref, strength, running: these fields of PairLogps; aligned: a reference with the policy's tokenizer;
    tokens, ref_tokens: log-probabilities of single tokens; kl, collision: these fields of the policy's Logps;
    batch: a pair's value depends on the other pairs, so a batch cannot be split.

    A loss needs an input if it raises any error without it. It also needs a reference if its value changes without
    one. An error with all inputs given is raised as it is.
    """
    full = toy_pairs()
    value, without = loss(full), _poorer(full)
    found = {name for name, poorer in without.items() if _objects(loss, poorer)}
    if "ref" not in found and not torch.equal(value, loss(without["ref"])):
        found.add("ref")
    alone = torch.cat([loss(_at(full, [i])) for i in range(len(full))])
    return frozenset(found if torch.allclose(value, alone) else {*found, "batch"})


def takes_ties(loss: Callable[[PairLogps], Tensor]) -> bool:
    """Whether this loss treats a strength of 0 as a tie.

    It does if it reads strengths and keeps its value when the two answers are exchanged and the strength changes sign.

    >>> from pyrite.math.losses import dpo, odpo, soft_dpo
    >>> takes_ties(soft_dpo), takes_ties(odpo), takes_ties(dpo)
    (True, False, False)
    """
    if "strength" not in needs(loss):
        return False
    full = toy_pairs()
    assert full.strength is not None
    turned = PairLogps(full.rejected, full.chosen, full.ref_rejected, full.ref_chosen, -full.strength, full.running)
    return torch.allclose(loss(full), loss(turned))


def _poorer(full: PairLogps) -> dict[str, PairLogps]:
    """The pairs with one input missing, by its name."""
    return {
        "ref": replace(full, ref_chosen=None, ref_rejected=None),
        "aligned": _sides(full, "ref_", lambda s: Logps.from_sums(s.sum, s.length, aligned=False)),
        "tokens": _sides(full, "", lambda s: replace(s, tokens=None, mask=None)),
        "ref_tokens": _sides(full, "ref_", lambda s: replace(s, tokens=None, mask=None)),
        "kl": _sides(full, "", lambda s: replace(s, kl=None)),
        "collision": _sides(full, "", lambda s: replace(s, collision=None)),
        "strength": replace(full, strength=None),
        "running": replace(full, running=None),
    }


def _sides(pair: PairLogps, prefix: str, change: Callable[[Logps], Logps]) -> PairLogps:
    names = (f"{prefix}chosen", f"{prefix}rejected")
    return replace(pair, **{name: change(getattr(pair, name)) for name in names})


def _objects(loss: Callable[[PairLogps], Tensor], pair: PairLogps) -> bool:
    try:
        loss(pair)
    except Exception:  # for example an AttributeError of None, in a loss that never expects None
        return True
    return False


def _at(pair: PairLogps, rows: list[int]) -> PairLogps:
    def part(side: Logps) -> Logps:
        values = {name: value[rows] for name, value in vars(side).items() if isinstance(value, Tensor)}
        return replace(side, **values)

    sides = {name: part(value) for name, value in vars(pair).items() if isinstance(value, Logps)}
    return replace(pair, **sides, strength=None if pair.strength is None else pair.strength[rows])
