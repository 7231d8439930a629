"""The published claims about PPO, each a number for every chain, a t interval over chains, and a verdict.

Source: Coste et al. 2024, arXiv:2310.02743, section 5.2. Curves are jagged, so each is first smoothed over three
measurements. The peak of a curve is the step at which the other chains, averaged, have theirs: looking for it does not
create it. One run is one draw, so with a single chain every claim stays undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.math import statistics
from pyrite.recipes.overoptimization.claims import NEGLIGIBLE, SOURCE, Rule, verdict
from pyrite.recipes.overoptimization.ppo import Optimized

Curves = dict[tuple[float, float, str], Tensor]  # noise, beta, objective -> (C, M): chains, measurements
Value = Callable[["Study"], Tensor]  # (C,)
NAMES = {"mean": "the mean", "wco": "the worst case (WCO)", "uwo": "the uncertainty-weighted mean (UWO)"}
NOISE = 0.25


@dataclass(frozen=True)
class Study:
    """Smoothed gold, and the members' variance as it was, of every policy of C chains."""

    gold: Curves
    variance: Curves


@dataclass(frozen=True)
class Claim:
    """What was published, and how it is measured here."""

    id: str
    source: str
    statement: str
    value: Value
    rule: Rule = "positive"


def study(chains: Sequence[Sequence[Optimized]]) -> Study:
    """The curves that all chains have; single is the average over the members optimized against."""
    every = [_by_policy(chain) for chain in chains]
    known = [key for key in every[0] if all(key in chain for chain in every)]
    gold = {key: smoothed(torch.stack([_mean(chain[key], "gold") for chain in every])) for key in known}
    ensembles = [key for key in known if key[2] != "single"]
    variance = {key: torch.stack([_mean(chain[key], "variance", 1) for chain in every]) for key in ensembles}
    return Study(gold, variance)


def smoothed(curve: Tensor) -> Tensor:
    """Each point (C, M) with its neighbors, three or at the ends two of them, averaged."""
    total, count = curve.clone(), torch.ones_like(curve)
    total[:, 1:] += curve[:, :-1]
    total[:, :-1] += curve[:, 1:]
    count[:, 1:] += 1
    count[:, :-1] += 1
    return total / count


def fall(curve: Tensor) -> Tensor:
    """Gold at the peak of the other chains less gold at the end, (C,); of one chain, at its own peak."""
    if len(curve) == 1:
        return curve.amax(1) - curve[:, -1]
    others = (curve.sum(0) - curve) / (len(curve) - 1)
    return curve.gather(1, others.argmax(1, keepdim=True)).squeeze(1) - curve[:, -1]


def falls(objective: str, beta: float) -> Value:
    return lambda s: fall(s.gold[NOISE, beta, objective])


def falls_less(objective: str, beta: float) -> Value:
    return lambda s: fall(s.gold[NOISE, beta, "single"]) - fall(s.gold[NOISE, beta, objective])


def gain(objective: str, beta: float) -> Value:
    """Gold at the end above that of single reward models."""
    return lambda s: (s.gold[NOISE, beta, objective] - s.gold[NOISE, beta, "single"])[:, -1]


def cost(objective: str, beta: float) -> Value:
    """What the KL penalty costs: the best gold of the run without it, above the best gold with it (peaks of others)."""

    def value(s: Study) -> Tensor:
        free, held = (s.gold[NOISE, b, objective] for b in (0.0, beta))
        return (fall(free) + free[:, -1]) - (fall(held) + held[:, -1])

    return value


def growth(objective: str) -> Value:
    """ln of the members' variance at the end over that at the start, without a KL penalty."""
    return lambda s: (s.variance[NOISE, 0.0, objective][:, -1] / s.variance[NOISE, 0.0, objective][:, 0]).log()


def best_beta(objective: str) -> Value:
    """Gold at the end under the KL strength that is best on the other chains, above that of single reward models."""

    def at_best(s: Study, name: str) -> Tensor:
        betas = sorted(b for noise, b, o in s.gold if noise == NOISE and o == name)
        if len(betas) < 3:
            raise KeyError("a sweep over KL strengths")
        ends = torch.stack([s.gold[NOISE, b, name][:, -1] for b in betas], 1)
        others = (ends.sum(0) - ends) / max(len(ends) - 1, 1) if len(ends) > 1 else ends
        return ends.gather(1, others.argmax(1, keepdim=True)).squeeze(1)

    return lambda s: at_best(s, objective) - at_best(s, "single")


FREE = "With 25 % label noise and no KL penalty, PPO against"
SMALL = "With 25 % label noise and a small KL penalty (beta 0.05), PPO against"
SECTION = f"{SOURCE}, section 5.2"


def _of_conservative(name: str) -> list[Claim]:
    """What is said of WCO and UWO."""
    words = NAMES[name]
    return [
        Claim(
            f"ppo-{name}-reduces",
            SECTION,
            f"{FREE} {words} loses less gold from its peak than against a single reward model",
            falls_less(name, 0.0),
        ),
        Claim(
            f"ppo-{name}-does-not-eliminate",
            SECTION,
            f"{FREE} {words} still loses gold from its peak",
            falls(name, 0.0),
        ),
        Claim(
            f"ppo-{name}-prevents",
            SECTION,
            f"{SMALL} {words} is not overoptimized (a fall below {NEGLIGIBLE} is none)",
            falls(name, 0.05),
            "negligible",
        ),
        Claim(
            f"ppo-{name}-free",
            SECTION,
            f"{SMALL} {words} reaches a peak at most {NEGLIGIBLE} below that without a penalty",
            cost(name, 0.05),
            "negligible",
        ),
    ]


def _of_ensemble(name: str) -> list[Claim]:
    words = NAMES[name]
    than = "ends with more gold than against a single reward model"
    return [
        Claim(f"ppo-{name}-gain-free", f"{SOURCE}, fig. 7", f"{FREE} {words} {than}", gain(name, 0.0)),
        Claim(f"ppo-{name}-gain-small", f"{SOURCE}, fig. 7", f"{SMALL} {words} {than}", gain(name, 0.05)),
        Claim(
            f"ppo-{name}-best-beta",
            f"{SOURCE}, fig. 4",
            f"With 25 % label noise, each at its best KL strength, PPO against {words} {than}",
            best_beta(name),
        ),
    ]


CLAIMS = [
    Claim(
        "ppo-single-overoptimizes",
        f"{SOURCE}, fig. 3 and 4",
        f"{FREE} a single reward model loses gold from its peak while the proxy rises",
        falls("single", 0.0),
    ),
    Claim(
        "ppo-single-needs-more",
        SECTION,
        f"{SMALL} a single reward model still loses gold from its peak: alone it needs a much larger penalty",
        falls("single", 0.05),
    ),
    *(claim for name in ("wco", "uwo") for claim in _of_conservative(name)),
    *(claim for name in NAMES for claim in _of_ensemble(name)),
    Claim(
        "ppo-variance-mean",
        f"{SOURCE}, fig. 10",
        f"{FREE} the mean, the members' variance grows (natural logarithm of the ratio; published about 0.9)",
        growth("mean"),
    ),
    Claim(
        "ppo-variance-uwo",
        f"{SOURCE}, fig. 10",
        f"{FREE} UWO, the members' variance grows less than against the mean (difference of logarithms)",
        lambda s: growth("mean")(s) - growth("uwo")(s),
    ),
]


def check(chains: Sequence[Sequence[Optimized]]) -> list[dict[str, Any]]:
    """Every claim for which the policies were trained."""
    if not chains[0]:
        return []
    made, rows = study(chains), []
    for claim in CLAIMS:
        try:
            points = claim.value(made)
        except KeyError:  # a policy that was not trained
            continue
        known = {"id": claim.id, "source": claim.source, "statement": claim.statement, "by_seed": points.tolist()}
        if len(points) == 1:
            rows.append(known | {"measured": points.item(), "interval": None, "holds": None})
            continue
        mean, lo, hi = (value.item() for value in statistics.t_interval(points))
        rows.append(known | {"measured": mean, "interval": [lo, hi], "holds": verdict(claim.rule, lo, hi)})
    return rows


def _by_policy(chain: Sequence[Optimized]) -> dict[tuple[float, float, str], list[Optimized]]:
    found: dict[tuple[float, float, str], list[Optimized]] = {}
    for one in chain:
        found.setdefault((one.noise, one.beta, one.target.objective), []).append(one)
    return found


def _mean(runs: Sequence[Optimized], name: str, begin: int = 0) -> Tensor:
    """A column of the measurements, averaged over runs; the variance is unknown before the first step."""
    return torch.tensor([[row[name] for row in run.rows[begin:]] for run in runs], dtype=torch.float64).mean(0)
