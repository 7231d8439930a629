"""The command line: `pyrite <job> [options]`, `pyrite recipe NAME`, `pyrite list KIND`, `pyrite report DIR`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import itertools
import json
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import tyro
import yaml
from rich.console import Console

from pyrite import jobs, ledger, parts, recipes, report, runs, sweeps
from pyrite import options as ranges
from pyrite.progress import say
from pyrite.train import TrainingError

KINDS = ("discriminators", "ensembles", "golds", "jobs", "judges", "losses", "recipes", "reward_losses", "samplers")
KINDS += ("schedules", "selectors")
PAGES = {
    "bandit": report.bandit_page,
    "live_reward": report.live_reward_page,
    "overoptimization": report.overoptimization_page,
    "references": report.references_page,
    "samplers": report.samplers_page,
    "soups": report.soups_page,
}
USAGE = """\
pyrite {jobs}   run one job; --help lists its options
pyrite recipe {recipes}   run a whole experiment and write its report
pyrite list {kinds}   what can be named in an option
pyrite report DIR   write DIR/report.html for a run or a recipe
pyrite ledger show FILE | export FILE OUT.parquet [--pairs]   what was asked of golds, and what it cost
Every job takes --config FILE.yaml (the command line wins) and --dry-run. Several values for an option that takes
one make a sweep: one run for each combination, in folders of their own below --out."""


def main() -> None:
    """Run a command; expected errors are one line on standard error and exit status 2."""
    arguments = sys.argv[1:]
    try:
        _quiet()
        _command(arguments)
    except (ValueError, TrainingError, OSError) as error:
        line = " ".join(str(error).split())
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"pyrite: {line}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("pyrite: stopped; run the same command again to go on", markup=False)
        sys.exit(130)


def _command(arguments: list[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help", "help"):
        _print(USAGE.format(jobs="|".join(_names(jobs)), recipes="|".join(_names(recipes)), kinds="|".join(KINDS)))
    elif name in _names(jobs):
        _job(name, rest)
    elif name == "recipe":
        _recipe(rest)
    elif name == "list":
        _list(rest)
    elif name == "report":
        _report(rest)
    elif name == "ledger":
        _ledger(rest)
    else:
        known = [*_names(jobs), "recipe", "list", "report", "ledger"]
        raise ValueError(f"unknown command {name!r}{_nearest(name, known)}")


def _job(name: str, arguments: list[str]) -> None:
    module = importlib.import_module(f"pyrite.jobs.{name}")
    schema, given, prog = _schema(name, module, [a for a in arguments if a != "--dry-run"])
    dry, given = "--dry-run" in arguments, with_yaml(schema, given)
    sweep = sweeps.split(schema, given)
    if sweep.axes and "out" in _options(schema) and not {"-h", "--help"} & set(given):
        _sweep(name, module, schema, sweep, dry=dry)
        return
    config = parse(schema, given, prog=prog)
    if dry:
        _plan(module, config)
        return
    run = module.run(config)
    if name == "bandit" and run.writes:  # a whole experiment in one job, so it gets its page at once
        report.save_bandit(runs.read_json(run.folder / "results.json"), run.folder / "figures")
        say(f"bandit: see {_page(run.folder)}")
    say(json.dumps(run.results, indent=1))
    say(f"{name}: done, in {run.folder}")


def _schema(name: str, module: ModuleType, arguments: list[str]) -> tuple[type, list[str], str]:
    """The options of a job; a job with several commands is told which one first."""
    commands = {schema.__name__.lower(): schema for schema in get_args(module.Config)}
    if not commands:
        return module.Config, arguments, f"pyrite {name}"
    asked = arguments[0] if arguments else ""
    if asked in commands:
        return commands[asked], arguments[1:], f"pyrite {name} {asked}"
    if asked in ("-h", "--help"):
        what = "\n".join(
            f"pyrite {name} {key:8} {(value.__doc__ or '').splitlines()[0]}" for key, value in commands.items()
        )
        _print(f"{(module.__doc__ or '').splitlines()[0]}\n\n{what}\n\nEach has --help.")
        sys.exit()
    raise ValueError(f"{name}: choose one of {', '.join(commands)}{_nearest(asked, commands)}")


def _sweep(name: str, module: ModuleType, schema: type, sweep: sweeps.Sweep, *, dry: bool) -> None:
    """Every combination parsed before the first one runs."""
    configs = {point: parse(schema, options, prog=f"pyrite {name}") for point, options in sweep.points()}
    out = next(iter(configs.values())).out
    if dry:
        for point, config in configs.items():
            _plan(module, replace(config, out=out / point))
        return
    table = sweeps.run({point: replace(config, out=out / point) for point, config in configs.items()}, module.run, out)
    say(json.dumps(table, indent=1))
    say(f"{name}: {len(table)} runs done, in {out}; results side by side in {out / 'sweep.json'}")


def _plan(module: ModuleType, config: Any) -> None:
    plan = {
        "config": runs.plain_config(config),
        "reads": runs.reads(config, module.inputs(config)),
        "writes": module.OUTPUTS,
    }
    _print(json.dumps(plan, indent=1, default=str))


def parse(schema: type, arguments: list[str], *, prog: str) -> Any:
    """A config from options, over those of `--config FILE.yaml`, over the defaults."""
    options = with_yaml(schema, arguments)
    _refuse_unknown(schema, options)
    _refuse_empty(schema, options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(schema, args=options, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        if not error.code:
            raise  # --help
        raise ValueError(_checked(error) or _unboxed(said.getvalue())) from None
    config = at_home(config)
    ranges.check(config)
    return config


def at_home(value: Any) -> Any:
    """A config with the user's home in place of every ~ that begins a path, also inside spec strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: at_home(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, tuple):
        return tuple(at_home(item) for item in value)
    if isinstance(value, (str, Path)):
        return type(value)(re.sub(r"""(?<![^\s('"=*])~(?=/|$)""", str(Path.home()), str(value)))
    return value


def with_yaml(schema: type, arguments: list[str]) -> list[str]:
    """The arguments with the options of `--config FILE.yaml` before them, so that those given here win."""
    options = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in options:
        return options
    at = options.index("--config")
    if at + 1 >= len(options):
        raise ValueError("--config needs a YAML file")
    return _from_yaml(schema, Path(options[at + 1])) + options[:at] + options[at + 2 :]


def _refuse_unknown(schema: type, options: list[str]) -> None:
    known = _options(schema)
    for option in options:
        name = option.removeprefix("--").partition("=")[0].replace("_", "-")
        if option.startswith("--") and name not in known and name.removeprefix("no-") not in known and name != "help":
            raise ValueError(f"unknown option --{name}{_nearest(name, known)}")


def _refuse_empty(schema: type, options: list[str]) -> None:
    """A path that is empty would be the current folder."""
    hints = get_type_hints(schema)
    for option, values in sweeps.grouped(options):
        kind = hints.get(option.removeprefix("--").replace("-", "_"))
        if kind is not None and Path in (kind, *get_args(kind)) and (not values or "" in values):
            raise ValueError(f"{option} is empty: give a path")


def _checked(error: BaseException) -> str | None:
    """What a group of options itself said when it was made, without the parser's words around it."""
    inner = error.__context__
    while inner and not (type(inner) is ValueError and _place(inner).is_relative_to(Path(__file__).parent)):
        inner = inner.__context__
    return str(inner) if inner else None


def _place(error: BaseException) -> Path:
    """The file in which an error was raised."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename)


def _unboxed(message: str) -> str:
    """The first paragraph of a message in a box, as one line."""
    lines = [line.strip("│ ") for line in message.splitlines() if not line.startswith(("╭", "╰"))]
    first = itertools.takewhile(lambda line: not line.startswith("──"), lines)
    return " ".join(" ".join(first).split())


def _from_yaml(schema: type, path: Path) -> list[str]:
    """The options of a YAML file as they would stand on the command line."""
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: give one option a line, as in batch_size: 8")
    known = _options(schema)
    arguments: list[str] = []
    for key, value in _flat(given, _groups(schema), path):
        option = key.replace("_", "-")
        if option not in known:
            raise ValueError(f"{path}: unknown option {key!r}{_nearest(option, known)}")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{option}", *(str(item) for item in values)]
    return arguments


def _flat(given: dict[str, Any], groups: set[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Nested groups ("training: {lr: ...}") read as if written flat."""
    for key, value in given.items():
        if not isinstance(value, dict):
            yield str(key), value
        elif key in groups:
            yield from _flat(value, groups, path)
        else:
            raise ValueError(f"{path}: unknown group {key!r}{_nearest(str(key), groups)}")


def _groups(schema: Any) -> set[str]:
    return {field.name for field in fields(schema) if is_dataclass(field.default)}


def _options(schema: Any) -> set[str]:
    names: set[str] = set()
    for field in fields(schema):
        if is_dataclass(field.default) and not isinstance(field.default, type):
            names |= _options(field.default)
        else:
            names.add(field.name.replace("_", "-"))
    return names


def _recipe(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in _names(recipes):
        asked = arguments[0] if arguments else ""
        raise ValueError(f"unknown recipe {asked!r}; there is {', '.join(_names(recipes))}")
    module = importlib.import_module(f"pyrite.recipes.{arguments[0]}")
    config = parse(module.Config, arguments[1:], prog=f"pyrite recipe {arguments[0]}")
    page = module.run(config)
    _print(f"report: {page}")


def _list(arguments: list[str]) -> None:
    kind = arguments[0] if arguments else ""
    if kind not in KINDS:
        raise ValueError(f"list {kind!r}: choose one of {', '.join(KINDS)}{_nearest(kind, KINDS)}")
    if kind in ("jobs", "recipes"):
        package = jobs if kind == "jobs" else recipes
        for name in _names(package):
            doc = importlib.import_module(f"{package.__name__}.{name}").__doc__ or ""
            _print(f"{name:18} {doc.splitlines()[0]}")
        return
    for member in parts.members(importlib.import_module(f"pyrite.{kind}")):
        empty = inspect.Parameter.empty
        options = ", ".join(f"{k}=..." if v is empty else f"{k}={v!r}" for k, v in member.options.items())
        _print(f"{member.name}({options})\n    {member.summary}")
        if member.ranges:
            _print(f"    {'; '.join(f'{option}: {words}' for option, words in member.ranges.items())}")


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("report: give one folder, of a run or a recipe")
    folder = Path(arguments[0])
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no run here (no config.json); give the --out folder of a job or a recipe")
    _print(f"report: {_page(folder)}")


def _ledger(arguments: list[str]) -> None:
    match [a for a in arguments if a != "--pairs"]:
        case ["show", path] if "--pairs" not in arguments:
            _print(ledger.show(path))
        case ["export", path, out]:
            rows = ledger.export(path, out, pairs="--pairs" in arguments)
            _print(f"ledger: {rows} {'pairs' if '--pairs' in arguments else 'questions'} in {out}")
        case _:
            raise ValueError("ledger: write `ledger show FILE` or `ledger export FILE OUT.parquet [--pairs]`")


def _page(folder: Path) -> Path:
    """The page of a run or a recipe, written into its folder."""
    results = folder / "results.json"
    if results.exists():
        found = runs.read_json(results)
        page = PAGES[found["recipe"]](found)
    else:
        page = report.run_page(folder)
    runs.write_text(folder / "report.html", page)
    return folder / "report.html"


def _names(package: ModuleType) -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _print(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _quiet() -> None:
    """Libraries keep their bars and hints to themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
