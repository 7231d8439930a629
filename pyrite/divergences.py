"""How far a policy is from its reference at every position of its answers, over the whole vocabulary.

A draw's own log-ratio, log π(y)/π_ref(y), has the KL as its mean; so has the sum of the KLs of the positions it passed,
with less variance, since only the prefixes are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrite.logps import Logps
from pyrite.models import Policy
from pyrite.packing import Packed, Row, micro_batches

CHUNK = 1024  # positions whose logits are in memory at a time


@dataclass(frozen=True, eq=False)
class Divergences:
    """Of N answers: log-probabilities under the reference, and at every position, (T_i,) float32 nats each:

    kl       KL(π ‖ π_ref) = Σ_v π(v) log(π(v)/π_ref(v))
    entropy  −Σ_v π(v) log π(v)
    """

    ref: Logps
    kl: list[Tensor]
    entropy: list[Tensor]

    def summary(self) -> dict[str, Tensor]:
        """kl_exact (N,), nats an answer; entropy_exact (N,), nats a token, the mean over an answer's tokens."""
        kl = torch.stack([row.double().sum() for row in self.kl])
        return {"kl_exact": kl, "entropy_exact": torch.stack([row.double().mean() for row in self.entropy])}


@torch.inference_mode()
def divergences(policy: Policy, ref: Policy, rows: Sequence[Row], *, budget: int = 16384) -> Divergences:
    """Of each row's one response, as the policy drew it. ref: `policy` itself is the policy without its adapters."""
    policy.eval()
    ref.eval()
    parts: list[tuple[Tensor, ...]] = [()] * len(rows)
    for group in micro_batches(rows, budget=budget):
        some = [rows[i] for i in group]
        batch = packed if (packed := ref.pack(some)).padded else policy.pack(some)
        ours = policy.logits(batch)
        with policy.without_adapters() if ref is policy else nullcontext():
            found = _by_position(ours, ref.logits(batch), batch)
        for i, part in zip(group, found.cpu().split(batch.lengths.tolist(), dim=1), strict=True):
            parts[i] = tuple(part)
    logps, kl, entropy = (list(column) for column in zip(*parts, strict=True))
    return Divergences(Logps.from_tokens(logps), kl, entropy)


def _by_position(ours: Callable[[slice], Tensor], theirs: Callable[[slice], Tensor], batch: Packed) -> Tensor:
    """(3, R): log π_ref(target), KL(π ‖ π_ref), entropy of π."""
    found = []
    for begin in range(0, len(batch.target), CHUNK):
        rows = slice(begin, begin + CHUNK)
        p, q = (torch.log_softmax(logits(rows).float(), -1) for logits in (ours, theirs))
        weight, picked = p.exp(), q.gather(1, batch.target[rows, None]).squeeze(1)
        found.append(torch.stack([picked, (weight * (p - q)).sum(-1), -(weight * p).sum(-1)]))
    return torch.cat(found, dim=1)
