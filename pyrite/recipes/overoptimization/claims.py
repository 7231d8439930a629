"""The published claims about best-of-n, each as a number with an interval and a verdict.

Source: Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743. Ends are read at
the largest n <= N/4, where the estimate still rests on several answers a prompt; the peak of a curve is found on one
half of the prompts and measured on the other, so that looking for it does not create it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite import estimators

Curves = dict[str, Tensor]  # objective -> gold (B, 2, M): resamples, halves of the prompts, values of n
Value = Callable[[Curves, int], Tensor]  # curves, index of the end -> (B,)
NEGLIGIBLE = 0.1  # standard deviations of gold: a fall below this counts as none
SOURCE = "arXiv:2310.02743"


@dataclass(frozen=True)
class Claim:
    """What was published, how it is measured here, and what its interval must do for it to hold."""

    id: str
    source: str
    statement: str
    noise: float
    value: Value
    rule: Literal["positive", "negligible"] = "positive"


def gain(objective: str, over: str = "single") -> Value:
    """Gold at the end of one objective less that of another."""
    return lambda curves, end: (curves[objective] - curves[over])[:, :, end].mean(1)


def fall(objective: str) -> Value:
    """Gold at the peak less gold at the end, the peak found on the other half of the prompts."""

    def value(curves: Curves, end: int) -> Tensor:
        gold = curves[objective][:, :, : end + 1]
        peak = gold.argmax(-1, keepdim=True).flip(1)
        return (gold.gather(-1, peak).squeeze(-1) - gold[:, :, -1]).mean(1)

    return value


def _ensembles(noise: float, where: str) -> list[Claim]:
    named = {"mean": "the mean", "wco": "the worst case (WCO)", "uwo": "the uncertainty-weighted mean (UWO)"}
    percent = f"{100 * noise:g}"
    return [
        Claim(
            f"gain-{name}-{percent}",
            f"{SOURCE}, {where}",
            f"With {percent} % label noise {words} ends with more gold than the average single reward model",
            noise,
            gain(name),
        )
        for name, words in named.items()
    ]


CLAIMS = [
    Claim(
        "single-overoptimizes-25",
        f"{SOURCE}, fig. 3",
        "With 25 % label noise a single reward model is overoptimized: gold falls from its peak while proxy rises",
        0.25,
        fall("single"),
    ),
    Claim(
        "single-overoptimizes-0",
        f"{SOURCE}, fig. 3",
        "Without label noise a single reward model is overoptimized as well, if less visibly",
        0.0,
        fall("single"),
    ),
    *_ensembles(0.25, "fig. 3"),
    *_ensembles(0.0, "fig. 3"),
    Claim(
        "wco-does-not-overoptimize-25",
        f"{SOURCE}, section 5.1",
        f"With 25 % label noise WCO is not overoptimized (a fall below {NEGLIGIBLE} is none)",
        0.25,
        fall("wco"),
        "negligible",
    ),
    Claim(
        "uwo-does-not-overoptimize-25",
        f"{SOURCE}, section 5.1",
        f"With 25 % label noise UWO is not overoptimized (a fall below {NEGLIGIBLE} is none)",
        0.25,
        fall("uwo"),
        "negligible",
    ),
    Claim(
        "mean-overoptimizes-25",
        f"{SOURCE}, section 5.1",
        "With 25 % label noise the mean is still overoptimized",
        0.25,
        fall("mean"),
    ),
]


def check(chains: list[dict[float, dict[str, Tensor]]], *, end: int) -> list[dict[str, Any]]:
    """Every claim measured on chains: noise -> objective -> gold ("single" (E, M, Q), others (M, Q)).

    One chain: the interval is a bootstrap over prompts and members. More: a t interval over whole chains.
    """
    rows = []
    for claim in CLAIMS:
        golds = [chain[claim.noise] for chain in chains if claim.noise in chain]
        if not golds:
            continue
        points = [claim.value(_halves(gold), end).item() for gold in golds]
        if len(points) > 1:
            interval = estimators.t_interval(torch.tensor(points, dtype=torch.float64))
            measured, lo, hi = (value.item() for value in interval)
        else:
            resampled = claim.value(_resampled(golds[0]), end)
            measured = points[0]
            lo, hi = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        rows.append(
            {
                "id": claim.id,
                "source": claim.source,
                "statement": claim.statement,
                "measured": measured,
                "interval": [lo, hi],
                "holds": verdict(claim.rule, lo, hi),
                "by_seed": points,
            }
        )
    return rows


def verdict(rule: str, lo: float, hi: float) -> bool | None:
    """Whether an interval supports a claim, contradicts it, or leaves it open (None)."""
    if rule == "negligible":
        return True if hi < NEGLIGIBLE else False if lo > 0 else None
    return True if lo > 0 else False if hi < 0 else None


def _halves(gold: dict[str, Tensor]) -> Curves:
    """The curves themselves, by halves of the prompts."""
    return {name: _split(g if g.dim() == 3 else g[None]).mean((0, 3))[None] for name, g in gold.items()}


def _resampled(gold: dict[str, Tensor], *, times: int = 2000) -> Curves:
    """Curves from resampled prompts, within each half, and for single models from resampled members."""
    g = torch.Generator().manual_seed(0)
    members, _, prompts = gold["single"].shape
    each = prompts // 2
    weights = [_multinomial(times, each, g) for _ in range(2)]
    seats = _multinomial(times, members, g)
    curves = {}
    for name, values in gold.items():
        halves = _split(values if values.dim() == 3 else values[None])  # (E, 2, M, Q/2)
        by_half = [torch.einsum("emq,bq->bem", halves[:, h], weights[h]) for h in range(2)]
        both = torch.stack(by_half, 1)  # (B, 2, E, M)
        curves[name] = torch.einsum("bhem,be->bhm", both, seats) if values.dim() == 3 else both[:, :, 0]
    return curves


def _split(gold: Tensor) -> Tensor:
    """(E, M, Q) to (E, 2, M, Q/2): even and odd prompts; an odd one out is left out."""
    each = gold.shape[2] // 2
    return torch.stack([gold[:, :, 0 : 2 * each : 2], gold[:, :, 1 : 2 * each : 2]], 1)


def _multinomial(times: int, size: int, generator: torch.Generator) -> Tensor:
    """Bootstrap weights (times, size): how often each of `size` things is drawn, over size."""
    drawn = torch.randint(0, size, (times, size), generator=generator)
    return (
        torch.zeros(times, size, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(times, size, dtype=torch.float64)
        )
        / size
    )
