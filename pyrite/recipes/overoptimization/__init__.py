"""Overoptimization of a reward model by best-of-n and PPO, and what ensembles do about it (arXiv:2310.02743).

SFT, candidates, gold labels with noise, reward models, best-of-n, PPO: gold, proxy and KL on one page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyrite.core import runs
from pyrite.core.runs import Run
from pyrite.math.ranges import Count, Natural
from pyrite.recipes import study
from pyrite.recipes.overoptimization import chain, claims, ppo_claims, results, settings
from pyrite.recipes.overoptimization.page import overoptimization_page
from pyrite.recipes.overoptimization.policies import policies
from pyrite.recipes.overoptimization.settings import Scale, Settings
from pyrite.report import charts

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

CLAIMS = [*claims.CLAIMS, *ppo_claims.CLAIMS]
SETTINGS: dict[str, Settings] = {
    "toy": settings.TOY,
    "toy_wide": settings.TOY_WIDE,
    "small": settings.SMALL,
    "paper": settings.PAPER,
}


@dataclass(frozen=True)
class Config:
    """Overoptimization: one or more whole chains."""

    scale: Scale = "toy"
    """The embedded world in minutes on 2 cores, or the published setting."""
    out: Path = Path("runs/overoptimization")
    """Folder of the run, new or empty."""
    seeds: Count = 1
    """Independent whole chains."""
    first_seed: Natural = 0
    """Seed of the first chain; the next ones follow it."""


def run(config: Config) -> Path:
    """Run every chain and write the page; what is done already is not done again. Returns the page's path."""
    wanted = SETTINGS[config.scale]
    return study.conduct(
        "overoptimization",
        study.start("overoptimization", config, wanted),
        config.out,
        config.first_seed,
        config.seeds,
        chain=lambda folder, seed: chain.run(folder, wanted, seed=seed),
        report=lambda run, chains: report(run, chains, config),
    )


def report(run: Run, chains: list[chain.Chain], config: Config) -> None:
    """results.json, figures and report.html."""
    wanted = SETTINGS[config.scale]
    seconds = sum(done.results["seconds"] for c in chains for done in c.runs.values() if done.results)
    found = study.results(
        "overoptimization", run, config, wanted, seconds=seconds, found=results.collect(chains, wanted)
    )
    for noise in wanted.noise:
        for x in ("sqrt_kl", "n"):
            drawn = charts.overoptimization([row for row in found["curves"] if row["noise"] == noise], x=x)
            charts.save(drawn, run.folder / "figures", f"overoptimization_{x}_noise_{100 * noise:g}")
    for noise, beta in dict.fromkeys((row["noise"], row["beta"]) for row in found["policies"]):
        rows = [row for row in found["policies"] if (row["noise"], row["beta"]) == (noise, beta)]
        for y in ("gold", "proxy"):
            name = f"ppo_{y}_noise_{100 * noise:g}_beta_{beta:g}"
            charts.save(policies(rows, y=y), run.folder / "figures", name)
    runs.write_text(run.folder / "report.html", overoptimization_page(found))
    study.tell(found["claims"])
