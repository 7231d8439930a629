"""What every recipe does around chains of its own: one run for its settings, seed after seed, results, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run

Chain = TypeVar("Chain")


class Config(Protocol):
    """The options of every recipe."""

    @property
    def scale(self) -> str: ...
    @property
    def out(self) -> Path: ...
    @property
    def seeds(self) -> int: ...
    @property
    def first_seed(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """What identifies a run of a recipe: a change of its settings is a change of the run."""

    out: Path
    scale: str
    seeds: int
    first_seed: int
    settings: Any


def start(recipe: str, config: Config, settings: Any) -> Run:
    """The run of a recipe, new or done."""
    plan = Plan(config.out, config.scale, config.seeds, config.first_seed, settings)
    return runs.start(recipe, plan, inputs={})


def conduct(
    recipe: str,
    run: Run,
    out: Path,
    first: int,
    count: int,
    *,
    chain: Callable[[Path, int], Chain],
    report: Callable[[Run, list[Chain]], object],
) -> Path:
    """Run whole chains and report on them; what is done already is not done again. Returns the page's path."""
    page = out / "report.html"
    if run.done:
        return page
    run.open()
    made = chains(recipe, out, first, count, chain)
    report(run, made)
    run.finish(chains=len(made))
    return page


def chains(recipe: str, out: Path, first: int, count: int, chain: Callable[[Path, int], Chain]) -> list[Chain]:
    """Whole chains, one after another: chain(folder, seed) for `count` seeds from the first on."""
    made = []
    for seed in range(first, first + count):
        say(f"{recipe}: chain with seed {seed}")
        made.append(chain(out / f"seed_{seed}", seed))
    say(f"{recipe}: curves, claims and the page")
    return made


def results(
    recipe: str, run: Run, config: Config, settings: Any, *, seconds: float, found: Mapping[str, Any]
) -> dict[str, Any]:
    """What was found with all that tells where it comes from, written to results.json."""
    head = {
        "recipe": recipe,
        "scale": config.scale,
        "seeds": list(range(config.first_seed, config.first_seed + config.seeds)),
        "seconds": round(seconds, 1),
    }
    whole = {
        **head,
        **found,
        "config": asdict(settings),
        "manifest": runs.read_json(run.folder / "manifest.json"),
    }
    runs.write_json(run.folder / "results.json", whole)
    return whole


def tell(claims: Sequence[Mapping[str, Any]]) -> None:
    """A line for each claim: verdict, what was measured, interval."""
    for row in claims:
        shown = {True: "holds", False: "does not hold", None: "undecided"}[row["holds"]]
        interval = " [{:+.3f}, {:+.3f}]".format(*row["interval"]) if row["interval"] else ""
        measured = "–" if row["measured"] is None else f"{row['measured']:+.3f}"
        say(f"  {shown:14} {measured}{interval}  {row['statement']}")
