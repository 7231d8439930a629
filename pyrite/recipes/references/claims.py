"""The published claims about references, each as a number with an interval and a verdict.

Source: Liu, Liu, Cohan 2024, "Understanding Reference Policies in Direct Preference Optimization", arXiv:2407.13709.
The best beta of a reference is found on one half of the prompts and measured on the other, so that looking for it
does not create it. Their win rates against GPT-4 become the exact gold reward here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.math import statistics

SOURCE = "arXiv:2407.13709"
Ref = str


@dataclass(frozen=True)
class Measured:
    """One chain's answers: for each reference its betas, falling, and gold and length (M, Q) by beta and prompt.

    accuracy, policy_accuracy: (M,) on held-out pairs, of the reward beta log pi/pi_ref and of the policy.
    """

    betas: dict[Ref, list[float]]
    gold: dict[Ref, Tensor]
    length: dict[Ref, Tensor]
    policy_accuracy: dict[Ref, Tensor]


@dataclass(frozen=True)
class Halves:
    """Means (B, 2, M) over resampled prompts of each half."""

    measured: Measured
    gold: dict[Ref, Tensor]
    length: dict[Ref, Tensor]

    def best(self, ref: Ref, of: str = "gold") -> Tensor:
        """Gold (or length) of the beta with most gold on the other half, (B,)."""
        values = self.gold if of == "gold" else self.length
        chosen = self.gold[ref].argmax(-1, keepdim=True).flip(1)
        return values[ref].gather(-1, chosen).squeeze(-1).mean(1)

    def at(self, ref: Ref, beta: float) -> Tensor:
        """Gold at one beta, (B,)."""
        return self.gold[ref][:, :, self.measured.betas[ref].index(beta)].mean(1)

    def best_beta(self, ref: Ref) -> Tensor:
        """log10 of the beta with most gold over all prompts, (B,)."""
        chosen = self.gold[ref].mean(1).argmax(-1)
        return torch.tensor(self.measured.betas[ref], dtype=torch.float64).log10()[chosen]


Value = Callable[[Halves], Tensor]


@dataclass(frozen=True)
class Claim:
    """What was published, and a number that is positive where it holds here."""

    id: str
    source: str
    statement: str
    value: Value


def _accuracy_rises(halves: Halves) -> Tensor:
    """Policy accuracy at the smallest beta less that at 0.1; one number a chain."""
    accuracy = halves.measured.policy_accuracy["self"]
    return (accuracy[-1] - accuracy[halves.measured.betas["self"].index(0.1)])[None].double()


CLAIMS = [
    Claim(
        "smaller-beta",
        f"{SOURCE}, table 1",
        "With its own SFT reference, a beta below the usual 0.1 brings more gold",
        lambda h: h.best("self") - h.at("self", 0.1),
    ),
    Claim(
        "collapse",
        f"{SOURCE}, table 1",
        "Lowered further, beta loses that gold again",
        lambda h: h.best("self") - h.at("self", h.measured.betas["self"][-1]),
    ),
    Claim(
        "policy-accuracy",
        f"{SOURCE}, table 2",
        "The policy itself ranks held-out pairs better at the smallest beta than at 0.1",
        _accuracy_rises,
    ),
    Claim(
        "reference-helps",
        f"{SOURCE}, table 3",
        "DPO with its reference brings more gold than without one (posterior), each at its best beta",
        lambda h: h.best("self") - h.best("none"),
    ),
    Claim(
        "posterior-is-long",
        f"{SOURCE}, table 3",
        "Without a reference answers are longer (tokens), each at its best beta",
        lambda h: h.best("none", "length") - h.best("self", "length"),
    ),
    Claim(
        "reference-beats-prior",
        f"{SOURCE}, table 3",
        "DPO with its reference brings more gold than with the unconditional prior (likelihood)",
        lambda h: h.best("self") - h.best("prior"),
    ),
    Claim(
        "stronger-helps",
        f"{SOURCE}, table 4",
        "A stronger reference of the same family brings more gold than the policy's own",
        lambda h: h.best("family") - h.best("self"),
    ),
    Claim(
        "stronger-wants-more",
        f"{SOURCE}, table 4",
        "A stronger reference of the same family wants a larger beta than the policy's own (decades)",
        lambda h: h.best_beta("family") - h.best_beta("self"),
    ),
    Claim(
        "compatible",
        f"{SOURCE}, table 5",
        "A stronger reference helps more where it comes from the same family than where it does not",
        lambda h: h.best("family") - h.best("stranger"),
    ),
    Claim(
        "other-tokenizer",
        f"{SOURCE}, table 5",
        "A stronger reference may have another tokenizer: it still brings more gold than the policy's own",
        lambda h: h.best("tokenizer") - h.best("self"),
    ),
]


def check(chains: list[Measured]) -> list[dict[str, Any]]:
    """Every claim: over prompts (a bootstrap) of one chain, over whole chains (a t interval) of several."""
    rows = []
    for claim in CLAIMS:
        points = [claim.value(_halves(chain)).item() for chain in chains]
        if len(chains) > 1:
            measured, lo, hi = (v.item() for v in statistics.t_interval(torch.tensor(points, dtype=torch.float64)))
        else:
            resampled = claim.value(_resampled(chains[0]))
            measured, ends = points[0], torch.tensor([0.025, 0.975], dtype=torch.float64)
            lo, hi = torch.quantile(resampled, ends).tolist() if len(resampled) > 1 else (math.nan, math.nan)
        row = {"id": claim.id, "source": claim.source, "statement": claim.statement, "by_seed": points}
        known = math.isfinite(lo + hi)
        row |= {"measured": measured, "interval": [lo, hi] if known else None}
        rows.append({**row, "holds": (True if lo > 0 else False if hi < 0 else None) if known else None})
    return rows


def _halves(chain: Measured) -> Halves:
    """The means themselves, B = 1."""
    split = [
        {ref: _split(values).mean(-1)[None] for ref, values in part.items()} for part in (chain.gold, chain.length)
    ]
    return Halves(chain, *split)


def _resampled(chain: Measured, *, times: int = 2000) -> Halves:
    """Means over prompts drawn again within each half."""
    g = torch.Generator().manual_seed(0)
    each = chain.gold["self"].shape[1] // 2
    drawn = torch.randint(0, each, (2, times, each), generator=g)
    weight = torch.zeros(2, times, each, dtype=torch.float64)
    weight.scatter_add_(2, drawn, torch.full_like(weight, 1 / each))
    split = [
        {ref: torch.einsum("hmq,hbq->bhm", _split(values), weight) for ref, values in part.items()}
        for part in (chain.gold, chain.length)
    ]
    return Halves(chain, *split)


def _split(values: Tensor) -> Tensor:
    """(M, Q) to (2, M, Q/2): even and odd prompts; an odd one out is left out."""
    each = values.shape[1] // 2
    return torch.stack([values[:, 0 : 2 * each : 2], values[:, 1 : 2 * each : 2]]).double()
