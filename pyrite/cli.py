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
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
import yaml
from rich.console import Console

from pyrite import jobs, parts, recipes, report, runs
from pyrite.progress import say
from pyrite.train import TrainingError

KINDS = ("ensembles", "golds", "jobs", "judges", "losses", "recipes", "reward_losses")
USAGE = """\
pyrite {jobs}   run one job; --help lists its options
pyrite recipe {recipes}   run a whole experiment and write its report
pyrite list {kinds}   what can be named in an option
pyrite report DIR   write DIR/report.html for a run or a recipe
Every job takes --config FILE.yaml (the command line wins) and --dry-run."""


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
    else:
        raise ValueError(f"unknown command {name!r}{_nearest(name, [*_names(jobs), 'recipe', 'list', 'report'])}")


def _job(name: str, arguments: list[str]) -> None:
    module = importlib.import_module(f"pyrite.jobs.{name}")
    dry = "--dry-run" in arguments
    config = parse(module.Config, [a for a in arguments if a != "--dry-run"], prog=f"pyrite {name}")
    if dry:
        plan = {"config": runs.plain_config(config), "reads": module.inputs(config), "writes": module.OUTPUTS}
        _print(json.dumps(plan, indent=1, default=str))
        return
    run = module.run(config)
    say(json.dumps(run.results, indent=1))
    say(f"{name}: done, in {run.folder}")


def parse(schema: type, arguments: list[str], *, prog: str) -> Any:
    """A config from options, over those of `--config FILE.yaml`, over the defaults."""
    options = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in options:
        at = options.index("--config")
        if at + 1 >= len(options):
            raise ValueError("--config needs a YAML file")
        options = _from_yaml(schema, Path(options[at + 1])) + options[:at] + options[at + 2 :]
    _refuse_unknown(schema, options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(schema, args=options, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        if not error.code:
            raise  # --help
        raise ValueError(_unboxed(said.getvalue())) from None


def _refuse_unknown(schema: type, options: list[str]) -> None:
    known = _options(schema)
    for option in options:
        name = option.removeprefix("--").partition("=")[0].replace("_", "-")
        if option.startswith("--") and name not in known and name.removeprefix("no-") not in known and name != "help":
            raise ValueError(f"unknown option --{name}{_nearest(name, known)}")


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


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("report: give one folder, of a run or a recipe")
    folder = Path(arguments[0])
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no run here (no config.json); give the --out folder of a job or a recipe")
    results = folder / "results.json"
    page = report.overoptimization_page(runs.read_json(results)) if results.exists() else report.run_page(folder)
    runs.write_text(folder / "report.html", page)
    _print(f"report: {folder / 'report.html'}")


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
