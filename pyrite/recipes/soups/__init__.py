"""One policy for each preference, merged for each person (arXiv:2310.11564).

Three dimensions of style with exact golds as judges; every method under every combination; an option added later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyrite.core import runs
from pyrite.core.runs import Run
from pyrite.math.ranges import Count, Natural
from pyrite.recipes import study
from pyrite.recipes.soups import chain, results, settings
from pyrite.recipes.soups.claims import CLAIMS
from pyrite.recipes.soups.page import soups_charts, soups_page
from pyrite.recipes.soups.settings import Scale, Settings
from pyrite.report import charts

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

SETTINGS: dict[str, Settings] = {"toy": settings.TOY}


@dataclass(frozen=True)
class Config:
    """Personalized soups: one or more whole chains."""

    scale: Scale = "toy"
    """The embedded world in minutes on 2 cores."""
    out: Path = Path("runs/soups")
    """Folder of the run, new or empty."""
    seeds: Count = 1
    """Independent whole chains."""
    first_seed: Natural = 0
    """Seed of the first chain; the next ones follow it."""


def run(config: Config) -> Path:
    """Run every chain and write the page; what is done already is not done again. Returns its path."""
    wanted = SETTINGS[config.scale]
    return study.conduct(
        "soups",
        study.start("soups", config, wanted),
        config.out,
        config.first_seed,
        config.seeds,
        chain=lambda folder, seed: chain.run(folder, wanted, seed=seed),
        report=lambda run, chains: report(run, chains, config),
    )


def report(run: Run, chains: list[chain.Chain], config: Config) -> None:
    """results.json, figures and report.html."""
    wanted = SETTINGS[config.scale]
    seconds = sum(one.seconds for one in chains)
    found = study.results("soups", run, config, wanted, seconds=seconds, found=results.collect(chains, wanted))
    for name, drawn in soups_charts(found).items():
        charts.save(drawn, run.folder / "figures", name)
    runs.write_text(run.folder / "report.html", soups_page(found))
    study.tell(found["claims"])
