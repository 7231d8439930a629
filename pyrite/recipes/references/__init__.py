"""Which reference, and how strongly: the three questions of RefDPO on a toy world (arXiv:2407.13709).

One policy for every reference and beta: its own, none (posterior), the prior (likelihood), a stronger model of the
same family, one of another family, one with another tokenizer. Gold, KL, length and degeneration side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.math.ranges import Count, Natural
from pyrite.recipes import study
from pyrite.recipes.references import chain, results, settings
from pyrite.recipes.references.claims import CLAIMS
from pyrite.recipes.references.page import against_beta, references_page
from pyrite.recipes.references.settings import Scale, Settings
from pyrite.report import charts

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

SETTINGS: dict[str, Settings] = {"toy": settings.TOY}


@dataclass(frozen=True)
class Config:
    """References: one or more whole chains."""

    scale: Scale = "toy"
    """The embedded world in minutes on 2 cores."""
    out: Path = Path("runs/references")
    """Folder of the run, new or empty."""
    seeds: Count = 1
    """Independent whole chains."""
    first_seed: Natural = 0
    """Seed of the first chain; the next ones follow it."""


def run(config: Config) -> Path:
    """Run every chain and write the page; what is done already is not done again. Returns the page's path."""
    wanted = SETTINGS[config.scale]
    return study.conduct(
        "references",
        study.start("references", config, wanted),
        config.out,
        config.first_seed,
        config.seeds,
        chain=lambda folder, seed: chain.run(folder, wanted, seed=seed),
        report=lambda run, chains: report(run, chains, config),
    )


def report(run: Run, chains: list[chain.Chain], config: Config) -> None:
    """results.json, a figure and report.html."""
    wanted = SETTINGS[config.scale]
    found = study.results(
        "references", run, config, wanted, seconds=sum(c.seconds for c in chains), found=results.collect(chains)
    )
    drawn = against_beta(found["curves"], "gold", refs=("self", "none", "prior"), level=found["start"]["gold"])
    charts.save(drawn, run.folder / "figures", "gold_against_beta")
    runs.write_text(run.folder / "report.html", references_page(found))
    for row in found["claims"]:
        shown = {True: "holds", False: "does not hold", None: "undecided"}[row["holds"]]
        interval = " [{:+.2f}, {:+.2f}]".format(*row["interval"]) if row["interval"] else " (one chain)"
        say(f"  {shown:14} {row['measured']:+.2f}{interval}  {row['statement']}")
