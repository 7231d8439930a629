"""Samplers of preference pairs: raced in an exact world, and in rounds of a language model (arXiv:2409.19605).

Orders, bounds and floors where the optimum is known; then offline, on-policy, hybrid and mixed pairs at equal cost,
measured by the scorer that labels them and by a gold that does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.math.ranges import Count, Natural
from pyrite.recipes import study
from pyrite.recipes.samplers import chain, results, settings
from pyrite.recipes.samplers.claims import CLAIMS
from pyrite.recipes.samplers.page import samplers_charts, samplers_page
from pyrite.recipes.samplers.settings import Scale, Settings
from pyrite.report import charts

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

SETTINGS: dict[str, Settings] = {"toy": settings.TOY}


@dataclass(frozen=True)
class Config:
    """Samplers: the races of the exact world, and one or more whole chains."""

    scale: Scale = "toy"
    """The embedded world in minutes on 2 cores."""
    out: Path = Path("runs/samplers")
    """Folder of the run, new or empty."""
    seeds: Count = 1
    """Independent whole chains."""
    first_seed: Natural = 0
    """Seed of the first chain; the next ones follow it."""


def run(config: Config) -> Path:
    """Run the races and every chain, and write the page; what is done already is not done again. Returns its path."""
    wanted = SETTINGS[config.scale]
    run = study.start("samplers", config, wanted)
    page = config.out / "report.html"
    if run.done:
        return page
    run.open()
    say("samplers: races in the exact world")
    races = chain.races(config.out / "races", wanted, seed=config.first_seed)
    chains = study.chains(
        "samplers",
        config.out,
        config.first_seed,
        config.seeds,
        lambda folder, seed: chain.run(folder, wanted, seed=seed),
    )
    report(run, races, chains, config)
    run.finish(chains=len(chains))
    return page


def report(run: Run, races: dict[str, Run], chains: list[chain.Chain], config: Config) -> None:
    """results.json, figures and report.html."""
    raced = sum(done.results["seconds"] for done in races.values() if done.results)
    wanted = SETTINGS[config.scale]
    found = study.results(
        "samplers",
        run,
        config,
        wanted,
        seconds=raced + sum(c.seconds for c in chains),
        found=results.collect(races, chains, wanted),
    )
    for name, chart in samplers_charts(found).items():
        charts.save(chart, run.folder / "figures", name)
    runs.write_text(run.folder / "report.html", samplers_page(found))
    study.tell(found["claims"])
