"""Samplers of preference pairs: raced in an exact world, and in rounds of a language model (arXiv:2409.19605).

Orders, bounds and floors where the optimum is known; then offline, on-policy, hybrid and mixed pairs at equal cost,
measured by the scorer that labels them and by a gold that does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pyrite import runs
from pyrite.progress import say
from pyrite.recipes.samplers import chain, results, settings
from pyrite.recipes.samplers.claims import CLAIMS
from pyrite.recipes.samplers.settings import Scale, Settings
from pyrite.report import charts
from pyrite.report.samplers import samplers_charts, samplers_page
from pyrite.runs import Run

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

SETTINGS: dict[str, Settings] = {"toy": settings.TOY}


@dataclass(frozen=True)
class Config:
    """Samplers: the races of the exact world, and one or more whole chains."""

    scale: Scale = "toy"
    """The embedded world in minutes on 2 cores."""
    out: Path = Path("runs/samplers")
    seeds: int = 1
    """Independent whole chains."""
    first_seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What identifies a run of this recipe: a change of its settings is a change of the run."""

    out: Path
    scale: Scale
    seeds: int
    first_seed: int
    settings: Settings


def run(config: Config) -> Path:
    """Run the races and every chain, and write the page; what is done already is not done again. Returns its path."""
    wanted = SETTINGS[config.scale]
    run = runs.start("samplers", Plan(**vars(config), settings=wanted), inputs={})
    page = config.out / "report.html"
    if run.done:
        return page
    run.open()
    say("samplers: races in the exact world")
    races = chain.races(config.out / "races", wanted, seed=config.first_seed)
    chains = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        say(f"samplers: chain with seed {seed}")
        chains.append(chain.run(config.out / f"seed_{seed}", wanted, seed=seed))
    say("samplers: curves, claims and the page")
    report(run, races, chains, config)
    run.finish(chains=len(chains))
    return page


def report(run: Run, races: dict[str, Run], chains: list[chain.Chain], config: Config) -> None:
    """results.json, figures and report.html."""
    raced = sum(done.results["seconds"] for done in races.values() if done.results)
    found = {
        "recipe": "samplers",
        "scale": config.scale,
        "seeds": [c.seed for c in chains],
        "seconds": round(raced + sum(c.seconds for c in chains), 1),
        **results.collect(races, chains, SETTINGS[config.scale]),
        "config": asdict(SETTINGS[config.scale]),
        "manifest": runs.read_json(run.folder / "manifest.json"),
    }
    runs.write_json(run.folder / "results.json", found)
    for name, chart in samplers_charts(found).items():
        charts.save(chart, run.folder / "figures", name)
    runs.write_text(run.folder / "report.html", samplers_page(found))
    for row in found["claims"]:
        shown = {True: "holds", False: "does not hold", None: "undecided"}[row["holds"]]
        interval = " [{:+.3f}, {:+.3f}]".format(*row["interval"]) if row["interval"] else ""
        measured = "–" if row["measured"] is None else f"{row['measured']:+.3f}"
        say(f"  {shown:14} {measured}{interval}  {row['statement']}")
