"""What the commands do: run a job, a sweep or a recipe; list, report, ledger."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pyrite.cli import sweeps
from pyrite.cli.help import KINDS, OLD_COMMANDS, OLD_KINDS, did_you_mean, help_text, names
from pyrite.cli.parse import make, read
from pyrite.core import processes, runs, specs
from pyrite.core.processes import say, world
from pyrite.math.ranges import declared

LINES = 20  # of a summary on a terminal
SIDE_BY_SIDE = 6  # figures in one of them
WIDTH = 100


def run(arguments: list[str], *, debug: bool) -> None:
    """Run a command. Expected errors are one line on standard error and exit status 2."""
    try:
        with processes.listening():
            _command(arguments)
    except (KeyboardInterrupt, processes.Stopped) as error:
        number = error.number if isinstance(error, processes.Stopped) else signal.SIGINT
        said = f"; {error.said}" if isinstance(error, processes.Stopped) and error.said else ""
        if os.environ.get("RANK", "0") == "0":  # one line of all the processes of a launcher
            _complain(f"stopped by {signal.Signals(number).name}{said}; run the same command again to go on")
        sys.exit(128 + number)
    except Exception as error:
        full = _disk_is_full(error)
        if not full and not isinstance(error, (ValueError, OSError, runs.TrainingError)):
            raise
        if debug:
            traceback.print_exc()
        if not isinstance(error, runs.RunError) or world().is_main_process:  # all processes are refused alike
            _complain(full or specs.line(error))
        sys.exit(2)


def _disk_is_full(error: BaseException) -> str | None:
    """What to say if a disk is full, whoever noticed; None for any other error."""
    said = " ".join(str(error).split())
    words = ("No space left on device", "File too large", "Disk quota exceeded", "disk is full")
    if any(word in said for word in words):
        return f"the disk is full ({said}); free some space and run the same command again to go on"
    return None


def _complain(line: str) -> None:
    sys.stderr.write(f"pyrite: {line}\n")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _command(arguments: list[str]) -> None:
    name, rest = arguments[0], arguments[1:]
    others: dict[str, Callable[[list[str]], None]] = {
        "recipe": _recipe,
        "list": _list,
        "report": _report,
        "ledger": _ledger,
    }
    if name in names("jobs"):
        _job(name, rest)
    elif name in others:
        others[name](rest)
    else:
        raise ValueError(f"unknown command {name!r}{did_you_mean(name, [*names('jobs'), *others])}")


def _job(name: str, arguments: list[str]) -> None:
    if gone := OLD_COMMANDS.get(typed := " ".join([name, *arguments[:1]])):
        raise ValueError(f"{typed} is gone: {gone}")
    module = importlib.import_module(f"pyrite.jobs.{name}")
    flags = {"--dry-run", "--json"} & set(arguments)
    schema, arguments, prog = _schema(name, module, [a for a in arguments if a not in flags])
    if _helped(schema, arguments, prog):
        return
    given = read(schema, arguments, job=name)
    axes = sweeps.axes(declared(schema), given)
    configs = {folder: make(schema, options, prog=prog) for folder, options in sweeps.points(given, axes).items()}
    first = next(iter(configs.values()))
    _quiet()
    if axes:
        configs = {folder: replace(config, out=first.out / folder) for folder, config in configs.items()}
        sweeps.check(first.out)
    if "--dry-run" in flags:
        with apart():
            plans = {folder: _planned(module, config) for folder, config in configs.items()}
        _print(json.dumps(plans if axes else plans[""], indent=1, default=str))
    elif axes:
        with apart():
            for folder in sweeps.covering(axes):
                _planned(module, configs[folder])
            table = sweeps.run(configs, module.run, first.out)
        done = f"{name}: {len(table)} runs done, in {first.out}; results side by side in {first.out / 'sweep.json'}"
        if world().is_main_process:
            _results(table, done, f"pyrite report {next(iter(configs.values())).out}", as_json="--json" in flags)
    else:
        with apart():
            run = module.run(first)
            if name == "bandit" and run.writes:  # a whole experiment in one job, so it gets its page at once
                from pyrite.report import convergence, save

                rows = runs.read_json(run.folder / "results.json")["curves"]
                for key in ("error", "value_gap"):
                    save(convergence(rows, key), run.folder / "figures", key)
                say(f"bandit: see {_page(run.folder)}")
        whole = all((run.folder / file).exists() for file in ("config.json", "done.json"))
        after = f"pyrite report {run.folder}" if whole else None
        if run.writes:
            _results(run.results or {}, f"{name}: done, in {run.folder}", after, as_json="--json" in flags)


def _schema(name: str, module: ModuleType, arguments: list[str]) -> tuple[type, list[str], str]:
    """The Config of a job, the rest of the arguments, and what was typed so far. A job may have several commands."""
    commands = {schema.__name__.lower(): schema for schema in get_args(module.Config)}
    if not commands:
        return module.Config, arguments, f"pyrite {name}"
    asked = arguments[0] if arguments else ""
    if asked in commands:
        return commands[asked], arguments[1:], f"pyrite {name} {asked}"
    if asked in ("-h", "--help"):
        what = [f"pyrite {name} {key:8} {(value.__doc__ or '').splitlines()[0]}" for key, value in commands.items()]
        _print("\n".join([(module.__doc__ or "").splitlines()[0], "", *what, "", "Each has --help."]))
        sys.exit()
    raise ValueError(f"{name} {asked!r}: choose one of {', '.join(commands)}{did_you_mean(asked, commands)}")


def _helped(schema: type, given: list[str], prog: str) -> bool:
    """Print help if it is asked for, or if nothing is given though something is required."""
    asked = {"-h", "--help", "--help-all"} & set(given)
    if not asked and (given or not any(one.required for one in declared(schema))):
        return False
    _print(help_text(schema, prog, everything="--help-all" in asked))
    return True


def _planned(module: ModuleType, config: Any) -> dict[str, Any]:
    """What a job would read and write, after all its checks."""
    plan = {
        "config": runs.plain_config(config),
        "reads": runs.reads(config, module.inputs(config)),
        "writes": module.OUTPUTS,
    }
    with runs.dry(), contextlib.suppress(runs.CheckedError):
        module.run(config)
    return plan


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What anybody prints in here goes to standard error, so that standard output holds results alone."""
    try:
        real = os.dup(1) if sys.stdout.fileno() == 1 else None
    except (OSError, ValueError, AttributeError):  # standard output is no file: a test, or a notebook
        real = None
    with contextlib.redirect_stdout(sys.stderr):
        if real is not None:
            os.dup2(2, 1)  # also what libraries in other languages and processes of the user's own print
        try:
            yield
        finally:
            if real is not None:
                os.dup2(real, 1)
                os.close(real)


def _results(results: dict[str, Any], done: str, after: str | None, *, as_json: bool) -> None:
    """Results as JSON, or on a terminal the figures that matter and the next command."""
    if as_json or not on_terminal():
        _print(json.dumps(results, indent=1))
        say(done)
        return
    figures = [f"  {name:24} {told}" for name, value in results.items() if (told := _figure(value)) is not None]
    more = [f"  ... {len(figures) - LINES} more with --json"] if len(figures) > LINES else []
    _print("\n".join([*figures[:LINES], *more, done, *([f"next: {after}"] if after else [])]))


def on_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def _figure(value: Any) -> str | None:
    """A value of the results in a line, or None if it takes more: a mean with its error, groups side by side."""
    match value:
        case bool():
            return None
        case float():
            return f"{value:.4g}"
        case int():
            return str(value)
        case str():
            return value if len(value) < WIDTH else None
        case list() if value and all(isinstance(one, (int, float)) for one in value):
            return " ".join(f"{one:.4g}" for one in value[:SIDE_BY_SIDE]) + (" ..." if value[SIDE_BY_SIDE:] else "")
        case list():
            return " | ".join(told for one in value[:3] if (told := _figure(one))) or None
        case {"mean": mean, "se": error}:
            return f"{mean:.4g} ± {error:.2g}"
        case Mapping():
            plain = {name: one for name, one in value.items() if not isinstance(one, (Mapping, list))}
            inner = [f"{name} {told}" for name, one in plain.items() if (told := _figure(one))]
            return ", ".join(inner[:SIDE_BY_SIDE]) or None
    return None


def _recipe(arguments: list[str]) -> None:
    name = arguments[0] if arguments else ""
    if name not in names("recipes"):
        raise ValueError(f"unknown recipe {name!r}; there is {', '.join(names('recipes'))}")
    module, prog = importlib.import_module(f"pyrite.recipes.{name}"), f"pyrite recipe {name}"
    recipe, schema = module.RECIPE, importlib.import_module("pyrite.recipes.study").Config
    flags = {"--dry-run", "--json"} & set(arguments)
    given = [argument for argument in arguments[1:] if argument not in flags]
    if {"-h", "--help", "--help-all"} & set(given):
        _print(help_text(schema, prog, everything="--help-all" in given))
        _print(f"\nscales: {', '.join(recipe.scales)}")
        return
    config = make(schema, read(schema, given, job=name), prog=prog)
    out = recipe.folder(config)
    _quiet()
    if "--dry-run" in flags:
        with apart(), runs.dry(), contextlib.suppress(runs.CheckedError):
            recipe.run(config)
        _print(json.dumps({"config": runs.plain_config(config), "out": str(out)}, indent=1, default=str))
        return
    with apart():
        page = recipe.run(config)
    if world().is_main_process:
        found = {"report": str(page), "results": str(out / "results.json")}
        _results(found, f"report: {page}", None, as_json="--json" in flags)


def _list(arguments: list[str]) -> None:
    kind = arguments[0] if arguments else ""
    if kind in OLD_KINDS:
        raise ValueError(f"list {kind}: is now `pyrite list {OLD_KINDS[kind]}`")
    if kind not in KINDS:
        raise ValueError(f"list {kind!r}: choose one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    if arguments[1:]:
        raise ValueError(f"list {kind} takes nothing more, and there is {' '.join(arguments[1:])!r}")
    for member in specs.members(importlib.import_module(KINDS[kind])):
        empty = inspect.Parameter.empty
        options = ", ".join(f"{k}=..." if v is empty else f"{k}={v!r}" for k, v in member.options.items())
        _print(f"{member.name}({options})\n    {member.summary}")
        if member.ranges:
            _print(f"    {'; '.join(f'{option}: {words}' for option, words in member.ranges.items())}")


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("report: give one folder, of a run, a sweep or a recipe")
    folder = Path(arguments[0])
    single = (folder / "config.json").exists()
    found = [folder] if single else [path.parent for path in sorted(folder.glob("*/config.json")) if _is_run(path)]
    if not found:
        raise ValueError(f"{folder}: no run here (no config.json); give the --out folder of a job, a sweep or a recipe")
    for one in found:
        _print(f"report: {_page(one)}")


def _is_run(config: Path) -> bool:
    """Whether a config.json is a run's. Models have one too."""
    found = runs.read_json(config)
    return isinstance(found, dict) and "job" in found


def _page(folder: Path) -> Path:
    """The page of a run or a recipe, written into its folder."""
    from pyrite import report

    results = folder / "results.json"
    found = runs.read_json(results) if results.exists() else {"recipe": ""}
    if not found["recipe"]:
        page = report.run_page(folder)
    elif found["recipe"] == "bandit":
        page = report.bandit_page(found)
    else:
        page = importlib.import_module(f"pyrite.recipes.{found['recipe']}").RECIPE.page(found)
    runs.write_text(folder / "report.html", page)
    return folder / "report.html"


def _ledger(arguments: list[str]) -> None:
    from pyrite.feedback import ledger

    match [a for a in arguments if a != "--pairs"]:
        case ["show", path] if "--pairs" not in arguments:
            _print(ledger.show(path))
        case ["export", path, out]:
            rows = ledger.export(path, out, pairs="--pairs" in arguments)
            _print(f"ledger: {rows} {'pairs' if '--pairs' in arguments else 'questions'} in {out}")
        case _:
            typed = " ".join(["ledger", *arguments])
            raise ValueError(f"{typed}: write `ledger show FILE` or `ledger export FILE OUT.parquet [--pairs]`")


def _quiet() -> None:
    """Libraries keep their bars and hints to themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
