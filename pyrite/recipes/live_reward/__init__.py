"""A reward model that learns while the policy does: what a budget of gold labels can buy (arXiv:2405.01511).

Words, nouns, the contrast of two language models, arithmetic; every method with the same number of labels, the x-axis
the labels spent. Gold, proxy and KL side by side, and how well live and static reward models rank fresh answers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pyrite import runs
from pyrite.progress import say
from pyrite.recipes.live_reward import chain, results, settings
from pyrite.recipes.live_reward.claims import CLAIMS
from pyrite.recipes.live_reward.settings import Scale, Settings
from pyrite.report import charts
from pyrite.report.live_reward import live_reward_charts, live_reward_page
from pyrite.runs import Run

__all__ = ["CLAIMS", "SETTINGS", "Config", "report", "run"]

SETTINGS: dict[str, Settings] = {"toy": settings.TOY}


@dataclass(frozen=True)
class Config:
    """Live reward: one or more whole chains."""

    scale: Scale = "toy"
    """The embedded worlds in minutes on 2 cores."""
    out: Path = Path("runs/live_reward")
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
    """Run every chain and write the page; what is done already is not done again. Returns its path."""
    wanted = SETTINGS[config.scale]
    run = runs.start("live_reward", Plan(**vars(config), settings=wanted), inputs={})
    page = config.out / "report.html"
    if run.done:
        return page
    run.open()
    chains = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        say(f"live_reward: chain with seed {seed}")
        chains.append(chain.run(config.out / f"seed_{seed}", wanted, seed=seed))
    say("live_reward: curves, claims and the page")
    report(run, chains, config)
    run.finish(chains=len(chains))
    return page


def report(run: Run, chains: list[chain.Chain], config: Config) -> None:
    """results.json, figures and report.html."""
    found = {
        "recipe": "live_reward",
        "scale": config.scale,
        "seeds": [c.seed for c in chains],
        "seconds": round(sum(c.seconds for c in chains), 1),
        **results.collect(chains, SETTINGS[config.scale]),
        "config": asdict(SETTINGS[config.scale]),
        "manifest": runs.read_json(run.folder / "manifest.json"),
    }
    runs.write_json(run.folder / "results.json", found)
    for name, chart in live_reward_charts(found).items():
        charts.save(chart, run.folder / "figures", name)
    runs.write_text(run.folder / "report.html", live_reward_page(found))
    for row in found["claims"]:
        shown = {True: "holds", False: "does not hold", None: "undecided"}[row["holds"]]
        interval = " [{:+.3f}, {:+.3f}]".format(*row["interval"]) if row["interval"] else ""
        measured = "–" if row["measured"] is None else f"{row['measured']:+.3f}"
        say(f"  {shown:14} {measured}{interval}  {row['statement']}")
