"""The published claims about samplers, each as a number with an interval and a verdict.

Source: Shi et al. 2024, "The crucial role of samplers in online direct preference optimization", arXiv:2409.19605.
Of the language models' results only what the abstracts say (the current one, and the first version's) is claimed here.
Claims about the exact world have an interval over repetitions (each with its own reward tables); claims about the
language model over held-out prompts of one chain (a bootstrap), or over whole chains of several (Student's t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.math import statistics
from pyrite.recipes.samplers.settings import CAPPED

SOURCE = "arXiv:2409.19605"
NO_HELD_OUT = f"not in {SOURCE}, where the scorer that labels is also the one that measures"


@dataclass(frozen=True)
class Exact:
    """The races: race -> sampler -> column -> (R,) by repetition."""

    races: dict[str, dict[str, dict[str, Tensor]]]

    def of(self, race: str, sampler: str, column: str) -> Tensor:
        return self.races[race][sampler][column]


@dataclass(frozen=True)
class Measured:
    """One chain: at the end, proxy, gold and KL (Q,) by prompt for each method; (rounds+1,) means by round."""

    end: dict[str, dict[str, Tensor]]
    rounds: dict[str, dict[str, Tensor]]

    def ahead(self, name: str, first: str, second: str) -> Tensor:
        """Of one method ahead of another, (Q,)."""
        return self.end[first][name] - self.end[second][name]


@dataclass(frozen=True)
class Claim:
    """What was published, a number for each repetition, prompt or chain, and where its mean must lie to hold here."""

    id: str
    source: str
    statement: str
    value: Callable[[Any], Tensor]
    low: float = 0.0
    high: float = math.inf
    universal: bool = False
    """Said of every reward table: values are 1 where it is so, and one 0 is enough against it."""

    def verdict(self, lo: float, hi: float) -> bool | None:
        """Holds where the whole interval lies inside, does not where it lies outside."""
        if self.low < lo and hi < self.high:
            return True
        return False if hi < self.low or lo > self.high else None


def _order(sampler: str, order: int, statement: str) -> Claim:
    return Claim(
        f"order-{sampler.replace('_', '-')}",
        f"{SOURCE}, theorems on exact DPO",
        statement,
        lambda exact: exact.of("orders", sampler, "order"),
        order - 0.1,
        order + 0.1,
    )


def _sooner(sampler: str) -> Claim:
    return Claim(
        f"fewer-updates-{sampler.replace('_', '-')}",
        f"{SOURCE}, theorems and figure on exact DPO",
        f"{sampler} needs fewer updates than uniform to an error of 1e-6, each at its best constant rate",
        lambda exact: exact.of("best", "uniform", "steps_to_1e-06") - exact.of("best", sampler, "steps_to_1e-06"),
    )


def _parts_lose(sampler: str) -> Claim:
    """The theory's own weights against the second pair of arms alone."""
    return Claim(
        f"both-parts-{sampler.replace('_', '-')}",
        f"{SOURCE}, definition of the samplers",
        f"{sampler} with the weights of the theory needs fewer updates to 1e-6 than its second pair of arms alone",
        lambda exact: (
            exact.of("best", f"{sampler}(share=1.0)", "steps_to_1e-06") - exact.of("best", sampler, "steps_to_1e-06")
        ),
    )


def _floor_slope(exact: Exact) -> Tensor:
    """d log error / d log N at the last update, from the fewest pairs to the most, mix_p with its cap, (R,)."""
    races = {int(race.split()[-1]): race for race in exact.races if race.startswith("floor ")}
    few, many = (exact.of(races[n], CAPPED, "last_mean_error") for n in (min(races), max(races)))
    return (many / few).log() / math.log(max(races) / min(races))


def _early(sampler: str) -> Callable[[Exact], Tensor]:
    return lambda exact: (
        exact.of("sooner", "uniform", "last_mean_error") - exact.of("sooner", sampler, "last_mean_error")
    )


EXACT = [
    _order("uniform", 1, "DPO with uniform pairs converges linearly (order 1)"),
    _order("mix_r", 2, "DPO with mix_r converges quadratically (order 2)"),
    _order("mix_p", 2, "DPO with mix_p converges quadratically (order 2)"),
    *(
        Claim(
            f"bound-{name.replace('_', '-')}",
            f"{SOURCE}, theorems on exact DPO",
            f"{name}: on every reward table the error stays within the bound of the theorem (share of them)",
            lambda exact, name=name: exact.of("bounds", name, "bound"),
            universal=True,
        )
        for name in ("uniform", "mix_r", "mix_p")
    ),
    _sooner("mix_r"),
    _sooner("mix_p"),
    _parts_lose("mix_r"),
    _parts_lose("mix_p"),
    Claim(
        "fixed-rate",
        f"{SOURCE}, figure on exact DPO: one learning rate, 10, for every sampler",
        "At that one rate mix_p converges quadratically on a typical reward table too (order 2)",
        lambda exact: exact.of("fixed", "mix_p", "order"),
        1.9,
        2.1,
    ),
    Claim(
        "floor",
        f"{SOURCE}, empirical DPO: noise in the gradient ends convergence; the exponent is derived",
        "With N sampled pairs an update, DPO stops at an error that falls as N^(-1/2) (exponent)",
        _floor_slope,
        -0.55,
        -0.45,
    ),
    Claim(
        "sooner-mix-r",
        f"{SOURCE}, figure on empirical DPO",
        "With sampled pairs, mix_r has a smaller error than uniform after 20 updates at a tenth of the best rate",
        _early("mix_r"),
    ),
    Claim(
        "sooner-mix-p",
        f"{SOURCE}, figure on empirical DPO",
        "With sampled pairs, mix_p with its cap has a smaller error than uniform after those updates",
        _early(CAPPED),
    ),
]


def _ahead(name: str, first: str, second: str, source: str, scorer: str) -> Claim:
    words = {"offline": "offline", "on_policy": "on-policy", "hybrid": "hybrid", "mixed": "mixed"}
    return Claim(
        f"{first}-over-{second}-{name}".replace("_", "-"),
        source,
        f"At the last round {words[first]} pairs have brought more reward than {words[second]} ones, by {scorer}",
        lambda chain: chain.ahead(name, first, second),
    )


def at_equal_kl(chain: Measured, name: str, first: str, second: str) -> Tensor:
    """How far one method's curve of reward over KL is above another's, at the KL where the shorter one ends, (1,)."""
    kl = min(chain.rounds[method]["kl"].max().item() for method in (first, second))
    ours, theirs = (_along(chain.rounds[method]["kl"], chain.rounds[method][name], kl) for method in (first, second))
    return torch.tensor([ours - theirs], dtype=torch.float64)


def _along(kl: Tensor, reward: Tensor, at: float) -> float:
    """Reward where the curve, round by round, first reaches a KL; linear between rounds."""
    for i in range(1, len(kl)):
        if kl[i] >= at:
            share = (at - kl[i - 1].item()) / max((kl[i] - kl[i - 1]).item(), 1e-12)
            return reward[i - 1].item() + share * (reward[i] - reward[i - 1]).item()
    return reward[-1].item()


BY_SCORER = {
    ("mixed", "offline"): f"{SOURCE}, abstract: over 7.4 % above vanilla DPO on Safe-RLHF",
    ("mixed", "on_policy"): f"{SOURCE}, abstract of the first version: 3.0 % above on-policy on Safe-RLHF",
    ("mixed", "hybrid"): f"{SOURCE}, abstract of the first version: over 4.2 % above hybrid on Iterative-Prompt",
    ("on_policy", "offline"): f"{SOURCE}, implied by the abstract of the first version",
}
MODEL = [
    *(_ahead("proxy", *pair, source, "the scorer that labels") for pair, source in BY_SCORER.items()),
    *(_ahead("gold", *pair, NO_HELD_OUT, "held-out gold") for pair in BY_SCORER),
    Claim(
        "farther",
        f"{SOURCE}, figure of reward over KL",
        "Mixed pairs lead farther from the start than offline ones (KL, nats)",
        lambda chain: chain.ahead("kl", "mixed", "offline"),
    ),
    Claim(
        "equal-kl-offline",
        f"{SOURCE}, figure of reward over KL",
        "At equal KL, where the shorter curve ends, mixed pairs bring more reward than offline ones, by that scorer",
        lambda chain: at_equal_kl(chain, "proxy", "mixed", "offline"),
    ),
    Claim(
        "equal-kl-on-policy",
        f"{SOURCE}, figure of reward over KL",
        "At equal KL, where the shorter curve ends, mixed pairs bring more reward than on-policy ones, by that scorer",
        lambda chain: at_equal_kl(chain, "proxy", "mixed", "on_policy"),
    ),
]
CLAIMS = [*EXACT, *MODEL]


def check(exact: Exact, chains: Sequence[Measured]) -> list[dict[str, Any]]:
    """Every claim as a row: what was measured, its interval where there is one, the verdict."""
    rows = [_row(claim, [claim.value(exact)], over="repetitions") for claim in EXACT]
    return rows + [_row(claim, [claim.value(chain) for chain in chains], over="chains") for claim in MODEL]


def _row(claim: Claim, values: list[Tensor], *, over: str) -> dict[str, Any]:
    """Repetitions are independent as they are; prompts of several chains are averaged chain by chain."""
    row: dict[str, Any] = {"id": claim.id, "source": claim.source, "statement": claim.statement}
    if claim.universal:
        return row | _universal(values[0])
    units = values[0] if over == "repetitions" else torch.stack([v.mean() for v in values])
    row["by_seed"] = units.tolist()
    if len(units) > 1:
        found = statistics.t_interval(units)
    elif over == "chains" and len(values[0]) > 1:
        over, found = "prompts", statistics.bootstrap(values[0])
    else:
        return row | {"over": None, "measured": units.mean().item(), "interval": None, "holds": None}
    lo, hi = found.lo.item(), found.hi.item()
    if not math.isfinite(lo + hi):
        return row | {"over": None, "measured": None, "interval": None, "holds": None}
    return row | {"over": over, "measured": found.mean.item(), "interval": [lo, hi], "holds": claim.verdict(lo, hi)}


def _universal(values: Tensor) -> dict[str, Any]:
    """All of N tables: then at least 0.05^(1/N) of all that could be drawn, with 95 % confidence."""
    share = values.mean().item()
    holds = share == 1.0
    interval = [0.05 ** (1 / len(values)), 1.0] if holds else None
    return {"over": "tables", "measured": share, "interval": interval, "holds": holds}
