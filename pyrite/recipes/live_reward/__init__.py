"""A reward model that learns while the policy does: what a budget of gold labels can buy (arXiv:2405.01511).

Words, nouns, the contrast of two language models, arithmetic; every method with the same number of labels, the x-axis
the labels spent. Gold, proxy and KL side by side, and how well live and static reward models rank fresh answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyrite.core import runs
from pyrite.core.runs import Run
from pyrite.math.ranges import Count, Natural
from pyrite.recipes import study
from pyrite.recipes.live_reward import chain, results, settings
from pyrite.recipes.live_reward.claims import CLAIMS
from pyrite.recipes.live_reward.page import live_reward_charts, live_reward_page
from pyrite.recipes.live_reward.settings import Scale, Settings
from pyrite.report import charts

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

SETTINGS: dict[str, Settings] = {"toy": settings.TOY}


@dataclass(frozen=True)
class Config:
    """Live reward: one or more whole chains."""

    scale: Scale = "toy"
    """The embedded worlds in minutes on 2 cores."""
    out: Path = Path("runs/live_reward")
    """Folder of the run, new or empty."""
    seeds: Count = 1
    """Independent whole chains."""
    first_seed: Natural = 0
    """Seed of the first chain; the next ones follow it."""


def run(config: Config) -> Path:
    """Run every chain and write the page; what is done already is not done again. Returns its path."""
    wanted = SETTINGS[config.scale]
    return study.conduct(
        "live_reward",
        study.start("live_reward", config, wanted),
        config.out,
        config.first_seed,
        config.seeds,
        chain=lambda folder, seed: chain.run(folder, wanted, seed=seed),
        report=lambda run, chains: report(run, chains, config),
    )


def report(run: Run, chains: list[chain.Chain], config: Config) -> None:
    """results.json, figures and report.html."""
    wanted = SETTINGS[config.scale]
    found = study.results(
        "live_reward",
        run,
        config,
        wanted,
        seconds=sum(c.seconds for c in chains),
        found=results.collect(chains, wanted),
    )
    for name, chart in live_reward_charts(found).items():
        charts.save(chart, run.folder / "figures", name)
    runs.write_text(run.folder / "report.html", live_reward_page(found))
    study.tell(found["claims"])
