"""Several values for one option: one run for every combination, each in a folder named after its values."""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pyrite.core import runs
from pyrite.core.processes import on_main, say
from pyrite.core.runs import Run


@dataclass(frozen=True)
class Sweep:
    """Options that stay, and the values of those that vary, all as on the command line."""

    fixed: list[str]
    axes: dict[str, list[str]]

    def points(self) -> Iterator[tuple[str, list[str]]]:
        """(folder name, arguments) of every combination."""
        for values in itertools.product(*self.axes.values()):
            point = dict(zip(self.axes, values, strict=True))
            options = [part for key, value in point.items() for part in (f"--{key}", value)]
            yield _name(point), [*self.fixed, *options]

    def covering(self) -> list[str]:
        """Names of a few combinations in which every value of every axis occurs, the first of each axis elsewhere."""
        firsts = {name: values[0] for name, values in self.axes.items()}
        wanted = [firsts | {name: value} for name, values in self.axes.items() for value in values]
        return list(dict.fromkeys(_name(point) for point in wanted))


def _name(point: dict[str, str]) -> str:
    """The folder of one combination."""
    return ",".join(f"{key.replace('-', '_')}={_plain(value)}" for key, value in point.items())


def split(schema: type, arguments: list[str]) -> Sweep:
    """Options that take one value but were given several become axes.

    Raises ValueError where two combinations would share a folder, or `--out` has several values.
    """
    single = _single(schema)
    given = {option.removeprefix("--").replace("_", "-"): (option, values) for option, values in grouped(arguments)}
    axes = {name: list(dict.fromkeys(values)) for name, (_, values) in given.items() if name in single and values[1:]}
    fixed = [part for name, (option, values) in given.items() if name not in axes for part in (option, *values)]
    if "out" in axes:
        raise ValueError(
            f"--out {' '.join(axes['out'])}: --out takes one folder; runs of a sweep get folders of their own below it"
        )
    sweep = Sweep(fixed, axes)
    names = [name for name, _ in sweep.points()]
    if len(set(names)) < len(names):
        raise ValueError(f"the values of {', '.join(axes)} give two runs the same folder name: sweep them separately")
    return sweep


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


def grouped(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Options with the values that follow them."""
    option, values = "", []
    for argument in arguments:
        if re.match(r"--[A-Za-z]", argument):
            if option or values:
                yield option, values
            option, equals, value = argument.partition("=") if re.match(r"--[\w-]+=", argument) else (argument, "", "")
            values = [value] if equals else []
        else:
            values.append(argument)
    if option or values:
        yield option, values


def _single(schema: Any) -> set[str]:
    """Names of the options that take exactly one value."""
    hints = get_type_hints(schema)
    names: set[str] = set()
    for field in fields(schema):
        kind = hints[field.name]
        if is_dataclass(kind):
            names |= _single(kind)
        elif not any(get_origin(part) in (tuple, list) for part in _alternatives(kind)) and kind is not bool:
            names.add(field.name.replace("_", "-"))
    return names


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.()=+-]+", "_", value)
