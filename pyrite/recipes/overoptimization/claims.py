"""The published claims about best-of-n, each as a number with an interval and a verdict.

Source: Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743. Ends are read at
the largest n <= N/4, where the estimate still rests on several answers a prompt; the peak of a curve is found on one
half of the prompts and measured on the other, so that looking for it does not create it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite.math import statistics

Curves = dict[str, Tensor]  # objective -> gold (B, 2, M): resamples, halves of the prompts, values of n
Rule = Literal["positive", "negligible", "published"]
Value = Callable[[Curves, int], Tensor]  # curves, index of the end -> (B,)
NEGLIGIBLE = 0.1  # standard deviations of gold: a fall or a difference below this counts as none
SOURCE = "arXiv:2310.02743"


@dataclass(frozen=True)
class Claim:
    """What was published, how it is measured here, and what its interval must do for it to hold."""

    id: str
    source: str
    statement: str
    noise: float
    value: Value
    rule: Rule = "positive"
    published: float | None = None


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


def relative_gain(objective: str) -> Value:
    """Gold at the end of one objective over that of the average single model, less 1; NaN where that is small."""

    def value(curves: Curves, end: int) -> Tensor:
        ours, single = (curves[name][:, :, end].mean(1) for name in (objective, "single"))
        return torch.where(single > NEGLIGIBLE, ours / single - 1, torch.nan)

    return value


def above_half(objective: str) -> Value:
    """Share of prompts won against single models at the end, ties one half, less one half."""
    return lambda curves, end: curves[f"wins of {objective}"][:, :, end].mean(1) - 0.5


ENSEMBLES = {"mean": "the mean", "wco": "the worst case (WCO)", "uwo": "the uncertainty-weighted mean (UWO)"}
WIN_RATES = {(0.25, "mean"): 57.8, (0.25, "wco"): 58.3, (0.25, "uwo"): 58.2}
WIN_RATES |= {(0.0, "mean"): 54.9, (0.0, "wco"): 57.1, (0.0, "uwo"): 57.2}


def _of_ensembles(noise: float) -> list[Claim]:
    percent, about = f"{100 * noise:g}", {0.25: 0.75, 0.0: 0.30}[noise]
    claims = [
        Claim(
            f"single-overoptimizes-{percent}",
            f"{SOURCE}, fig. 3",
            f"With {percent} % label noise gold of a single reward model falls from its peak while the proxy rises",
            noise,
            fall("single"),
        )
    ]
    for name, words in ENSEMBLES.items():
        with_noise = f"With {percent} % label noise {words}"
        published = WIN_RATES[noise, name]
        claims += [
            Claim(
                f"gain-{name}-{percent}",
                f"{SOURCE}, fig. 3",
                f"{with_noise} ends with more gold than the average single reward model",
                noise,
                gain(name),
            ),
            Claim(
                f"wins-{name}-{percent}",
                f"{SOURCE}, appendix F.9",
                f"{with_noise} wins against single reward models on more than half of the prompts (share above one "
                f"half; published {published / 100 - 0.5:.3f})",
                noise,
                above_half(name),
            ),
        ]
        if name != "mean":
            claims.append(
                Claim(
                    f"{name}-does-not-overoptimize-{percent}",
                    f"{SOURCE}, section 5.1",
                    f"{with_noise} is not overoptimized (a fall below {NEGLIGIBLE} is none)",
                    noise,
                    fall(name),
                    "negligible",
                )
            )
    claims.append(
        Claim(
            f"size-of-gain-{percent}",
            f"{SOURCE}, section 5.1",
            f"With {percent} % label noise UWO ends with about {100 * about:g} % more gold than single models",
            noise,
            relative_gain("uwo"),
            "published",
            about,
        )
    )
    return claims


CLAIMS = [
    *_of_ensembles(0.25),
    Claim(
        "mean-overoptimizes-25",
        f"{SOURCE}, section 5.1",
        "With 25 % label noise the mean is still overoptimized",
        0.25,
        fall("mean"),
    ),
    Claim(
        "four-members-beat-three-25",
        f"{SOURCE}, fig. 11",
        "With 25 % label noise WCO of four members ends with more gold than of three",
        0.25,
        gain("wco of 4", "wco of 3"),
    ),
    Claim(
        "five-members-like-four-25",
        f"{SOURCE}, fig. 11",
        f"With 25 % label noise a fifth member adds less than {NEGLIGIBLE} to WCO",
        0.25,
        gain("wco", "wco of 4"),
        "negligible",
    ),
    Claim(
        "weight-matters-little-25",
        f"{SOURCE}, fig. 12",
        f"With 25 % label noise UWO with weight 1 ends less than {NEGLIGIBLE} above UWO with weight 0.5",
        0.25,
        gain("uwo", "uwo at 0.5"),
        "negligible",
    ),
    *_of_ensembles(0.0),
]


def check(chains: list[dict[float, dict[str, Tensor]]], *, end: int) -> list[dict[str, Any]]:
    """Every claim measured on chains: noise -> objective -> gold ("single" (E, M, Q), others (M, Q)).

    One chain: the interval is a bootstrap over prompts and members. More: a t interval over whole chains.
    """
    rows = []
    for claim in CLAIMS:
        golds = [chain[claim.noise] for chain in chains if claim.noise in chain]
        try:
            points = [claim.value(_halves(gold), end).item() for gold in golds]
        except KeyError:  # about an ensemble that was not run, or larger than was trained
            continue
        if not points:
            continue
        measured, lo, hi = _over_chains(points) if len(points) > 1 else _over_prompts(claim, golds[0], end)
        known = {"id": claim.id, "source": claim.source, "statement": claim.statement}
        known |= {"measured": measured, "interval": [lo, hi], "by_seed": points}
        rows.append(
            {**known, "holds": verdict(claim.rule, lo, hi, published=claim.published)}
            if math.isfinite(lo + hi)
            else _undefined(known)
        )
    return rows


def _over_chains(points: list[float]) -> tuple[float, float, float]:
    interval = statistics.t_interval(torch.tensor(points, dtype=torch.float64))
    return interval.mean.item(), interval.lo.item(), interval.hi.item()


def _over_prompts(claim: Claim, gold: dict[str, Tensor], end: int) -> tuple[float, float, float]:
    resampled = claim.value(_resampled(gold), end)
    lo, hi = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return claim.value(_halves(gold), end).item(), lo, hi


def _undefined(known: dict[str, Any]) -> dict[str, Any]:
    """A ratio to nothing: single models end with no gold to speak of."""
    return {**known, "measured": None, "interval": None, "by_seed": None, "holds": None}


def verdict(rule: Rule, lo: float, hi: float, *, published: float | None = None) -> bool | None:
    """Whether an interval supports a claim, contradicts it, or leaves it open (None)."""
    if rule == "published":
        return lo <= (published or 0.0) <= hi
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
