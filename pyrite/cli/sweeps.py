"""Several values for one option: one run for every combination, each in a folder named after its values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pyrite.cli.parse import Given
from pyrite.core import runs
from pyrite.core.processes import on_main, say
from pyrite.core.runs import Run
from pyrite.math.ranges import ConfigOption


def axes(known: Iterable[ConfigOption], given: Given) -> Given:
    """The options that take one value but were given several.

    Raises ValueError if two combinations would share a folder, or if `--out` has several values.
    """
    single = {one.name for one in known if not one.several and one.hint is not bool}
    if "out" not in single:  # nowhere to put the runs
        return {}
    found = {name: list(dict.fromkeys(values)) for name, values in given.items() if name in single and values[1:]}
    if "out" in found:
        raise ValueError(
            f"--out {' '.join(found['out'])}: --out takes one folder; runs of a sweep get folders of their own below it"
        )
    folders = [_folder(point) for point in _product(found)]
    if len(set(folders)) < len(folders):
        raise ValueError(f"the values of {', '.join(found)} give two runs the same folder name: sweep them separately")
    return found


def points(given: Given, axes: Given) -> dict[str, Given]:
    """The options of every combination, by the name of its folder."""
    return {_folder(point): given | {name: [value] for name, value in point.items()} for point in _product(axes)}


def covering(axes: Given) -> list[str]:
    """A few combinations in which every value of every axis occurs: one axis varies, the others keep their first."""
    firsts = {name: values[0] for name, values in axes.items()}
    return list(dict.fromkeys(_folder(firsts | {name: value}) for name, values in axes.items() for value in values))


def _product(axes: Given) -> list[dict[str, str]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _folder(point: Mapping[str, str]) -> str:
    return ",".join(name + "=" + re.sub(r"[^\w.()=+-]+", "_", value) for name, value in point.items())


def run(configs: dict[str, Any], job: Callable[[Any], Run], out: Path) -> dict[str, Any]:
    """Every config in turn; their results by name, kept up to date in `out`/sweep.json."""
    check(out)
    table: dict[str, Any] = {}
    release = runs.hold(out, job)
    try:
        for number, (name, config) in enumerate(configs.items(), 1):
            say(f"sweep: run {number} of {len(configs)}, {name}")
            done = job(config)
            table[name] = done.results
            if done.writes:
                runs.write_json(out / "sweep.json", table)
    finally:
        release()
    return table


def check(out: Path) -> None:
    """Refuse a folder that is no place for a sweep."""
    if on_main(_holds_others)(out):
        raise runs.RunError(f"{out}: holds files that are no sweep's; choose another --out, one that is new or empty")


def _holds_others(out: Path) -> bool:
    """Whether a folder holds a run, or files of somebody's own, and so is no place for a sweep."""
    if not out.is_dir():
        return out.exists()
    if (out / "sweep.json").exists():
        table = runs.read_json(out / "sweep.json")
        ours = isinstance(table, dict) and all("=" in name for name in table)
        return (out / "config.json").exists() or not ours
    runs_only = (path.is_dir() for path in out.glob("[!.]*"))
    return (out / "config.json").exists() or not all(runs_only)
