"""The command line: `pyrite <job> [options]`, `pyrite recipe NAME`, `pyrite list KIND`, `pyrite report DIR`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import signal
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

from pyrite import __version__, jobs, recipes, report
from pyrite.cli import help as usage
from pyrite.cli import sweeps
from pyrite.core import processes, runs, specs
from pyrite.core.processes import say, world
from pyrite.feedback import ledger
from pyrite.math import ranges
from pyrite.training.loop import TrainingError

KINDS = sorted([*specs.REGISTRIES, "jobs", "recipes"])
PLAIN = (  # what tyro says, and what we say
    (r"Error parsing (--[\w-]+): invalid literal for int\(\) with base 10: '(.*)'", r"\1 \2: is no whole number"),
    (r"Error parsing (--[\w-]+): could not convert string to float: '(.*)'", r"\1 \2: is no number"),
    (r"Error parsing [\w.-]+: (?:--)?(\w+) is (\S+); (.*)", r"--\1 \2: \3"),
    (r"Error parsing (?:[\w.]+): (--.*)", r"\1"),
    (r"Error parsing (--[\w-]+): (.*)", r"\1: \2"),
    (
        r"invalid choice (.*) for argument '(--[\w-]+)'. Expected one of \('(.*)'\).*",
        r"\2: invalid choice \1; choose \3",
    ),
    (r"Missing value for argument '(--[\w-]+)'. Expected 1 values?.*", r"\1: a value is missing"),
    (r"Missing value for argument '(--[\w-]+)'. Expected (\d+) values?.*", r"\1: \2 values are needed"),
    (r"Unrecognized (?:options|arguments?): (.*)", r"\1: no such option; write every option as --name value"),
)
USAGE = """\
pyrite {jobs}   run one job; --help lists its options
pyrite recipe {recipes}   run a whole experiment and write its report
pyrite list {kinds}   what can be named in an option
pyrite report DIR   write DIR/report.html for a run or a recipe
pyrite ledger show FILE | export FILE OUT.parquet [--pairs]   what was asked of golds, and what it cost
Every job takes --config FILE (YAML, or the config.json of a run; the command line wins), --dry-run, --json and --debug.
Several values for an option that takes one make a sweep: one run for each combination, in folders of their own below
--out. Results are JSON on standard output if that is no terminal; everything else goes to standard error."""


def main() -> None:
    """Run a command; expected errors are one line on standard error and exit status 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with processes.listening():
            _quiet()
            _command(arguments)
    except (ValueError, TrainingError, OSError) as error:
        if full := _full(error):
            error = OSError(full)
        if "--debug" in sys.argv:
            traceback.print_exc()
        if not isinstance(error, runs.RunError) or world().is_main_process:  # all processes are refused alike
            _complain(f"pyrite: {specs.line(error)}")
        sys.exit(2)
    except Exception as error:
        if "--debug" in sys.argv or not (full := _full(error)):
            raise
        _complain(f"pyrite: {full}")
        sys.exit(2)
    except (KeyboardInterrupt, processes.Stopped) as error:
        number = error.number if isinstance(error, processes.Stopped) else signal.SIGINT
        said = f"; {error.said}" if isinstance(error, processes.Stopped) and error.said else ""
        if os.environ.get("RANK", "0") == "0":  # one line of all the processes of a launcher
            _complain(f"pyrite: stopped by {signal.Signals(number).name}{said}; run the same command again to go on")
        sys.exit(128 + number)


def _full(error: BaseException) -> str | None:
    """What to say where a disk is full, whoever noticed; None of any other error."""
    said = " ".join(str(error).split())
    words = ("No space left on device", "File too large", "Disk quota exceeded", "disk is full")
    if any(word in said for word in words):
        return f"the disk is full ({said}); free some space and run the same command again to go on"
    return None


def _complain(line: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


def _command(arguments: list[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-V", "--version", "version"):
        _print(f"pyrite {__version__}")
        return
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
    flags = {"--dry-run", "--json"} & set(arguments)
    schema, given, prog = _schema(name, module, [a for a in arguments if a not in flags])
    if _helped(schema, given, prog):
        return
    given = with_yaml(schema, given, job=name)
    sweep = sweeps.split(schema, given)
    if sweep.axes and "out" in _options(schema):
        _sweep(name, module, schema, sweep, flags)
        return
    config = parse(schema, given, prog=prog)
    if "--dry-run" in flags:
        with apart():
            plan = _planned(module, config)
        _print(json.dumps(plan, indent=1, default=str))
        return
    with apart():
        run = module.run(config)
        if name == "bandit" and run.writes:  # a whole experiment in one job, so it gets its page at once
            report.save_bandit(runs.read_json(run.folder / "results.json"), run.folder / "figures")
            say(f"bandit: see {_page(run.folder)}")
    has_folder = (run.folder / "config.json").exists() and (run.folder / "done.json").exists()
    after = f"pyrite report {run.folder}" if has_folder else None
    if run.writes:
        _results(run.results or {}, f"{name}: done, in {run.folder}", after, as_json="--json" in flags)


def _helped(schema: type, given: list[str], prog: str) -> bool:
    """Print help where it is asked for, or where nothing is given though something is required."""
    everything, asked = "--help-all" in given, {"-h", "--help", "--help-all"} & set(given)
    if not asked and (given or not any(one.required for one in usage.described(schema))):
        return False
    _print(usage.help_text(schema, prog, everything=everything))
    return True


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


def on_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def _results(results: dict[str, Any], done: str, after: str | None, *, as_json: bool) -> None:
    """Results as JSON, or on a terminal the figures that matter and the next command."""
    if as_json or not on_terminal():
        _print(json.dumps(results, indent=1))
        say(done)
        return
    for line in usage.summary(results):
        _print(line)
    _print(done)
    if after:
        _print(f"next: {after}")


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
    raise ValueError(f"{name} {asked!r}: choose one of {', '.join(commands)}{_nearest(asked, commands)}")


def _sweep(name: str, module: ModuleType, schema: type, sweep: sweeps.Sweep, flags: set[str]) -> None:
    """Every combination is parsed, and every value checked, before the first one runs."""
    configs = {point: parse(schema, options, prog=f"pyrite {name}") for point, options in sweep.points()}
    out = next(iter(configs.values())).out
    points = {point: replace(config, out=out / point) for point, config in configs.items()}
    if "--dry-run" in flags:
        with apart():
            sweeps.check(out)
            plans = {point: _planned(module, config) for point, config in points.items()}
        _print(json.dumps(plans, indent=1, default=str))
        return
    with apart():
        sweeps.check(out)
        for point in sweep.covering():
            _planned(module, points[point])
        table = sweeps.run(points, module.run, out)
    done = f"{name}: {len(table)} runs done, in {out}; results side by side in {out / 'sweep.json'}"
    if world().is_main_process:
        _results(table, done, f"pyrite report {next(iter(points.values())).out}", as_json="--json" in flags)


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


def parse(schema: type, arguments: list[str], *, prog: str) -> Any:
    """A config from options, over those of `--config FILE.yaml`, over the defaults."""
    options = with_yaml(schema, arguments)
    _refuse_unknown(schema, options)
    _refuse_missing(schema, options, prog)
    _refuse_empty(schema, options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
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


def with_yaml(schema: type, arguments: list[str], *, job: str | None = None) -> list[str]:
    """The arguments with the options of `--config FILE.yaml` before them, so that those given here win."""
    options = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in options:
        return options
    at = options.index("--config")
    if at + 1 >= len(options):
        raise ValueError("--config needs a YAML file, or the config.json of a run")
    return _from_yaml(schema, Path(options[at + 1]).expanduser(), job) + options[:at] + options[at + 2 :]


def _refuse_unknown(schema: type, options: list[str]) -> None:
    known = _options(schema)
    for option in options:
        name = option.removeprefix("--").partition("=")[0].replace("_", "-")
        if option.startswith("--") and name not in known and name.removeprefix("no-") not in known and name != "help":
            raise ValueError(usage.renamed(name, known) or f"unknown option --{name}{usage.nearest(name, known)}")


def _refuse_missing(schema: type, options: list[str], prog: str) -> None:
    given = {option.removeprefix("--").partition("=")[0].replace("-", "_") for option in options}
    for one in usage.described(schema):
        if one.required and one.name not in given:
            told = one.text.split(". ")[0].rstrip(".:")
            why = f" ({told})" if told else ""
            raise ValueError(f"--{one.name.replace('_', '-')} is missing{why}; `{prog} --help` shows an example")


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
    """What a parser says in a box, in one line of plain words that begins with the option."""
    lines = " ".join(line.strip("│ ") for line in message.splitlines() if not line.startswith(("╭", "╰")))
    _, *said = [part.strip() for part in re.split(r"[-─]{5,}", " ".join(lines.split())) if part.strip()] or [message]
    told = said[0] if said else lines
    for pattern, words in PLAIN:
        if match := re.fullmatch(pattern, told):
            return match.expand(words).replace("', '", ", ")
    return told


def _from_yaml(schema: type, path: Path, job: str | None) -> list[str]:
    """The options of a YAML file as they would stand on the command line; also of the config of a run of this job."""
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: give one option a line, as in batch_size: 8")
    known = _options(schema)
    if "job" in given and "job" not in known and isinstance(made := given.pop("job"), str):
        if made != job:
            raise ValueError(f"{path}: is the config of `pyrite {made}`, not of `pyrite {job}`; use it with that")
        given.pop("settings", None)  # of a recipe, which its scale stands for
    known = _options(schema)
    arguments: list[str] = []
    for key, value in _flat(given, _groups(schema), path):
        option = key.replace("_", "-")
        if option not in known:
            wrong = usage.renamed(option, known) or f"unknown option {key!r}{usage.nearest(option, known)}"
            raise ValueError(f"{path}: {wrong}")
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
        elif any(usage.is_old(str(inner)) for inner in value):
            yield from _flat(value, groups, path)  # a group of an earlier version
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
    name, module = arguments[0], importlib.import_module(f"pyrite.recipes.{arguments[0]}")
    recipe = getattr(module, "RECIPE", module)
    schema = getattr(module, "Config", None) or importlib.import_module("pyrite.recipes.study").Config
    flags = {"--dry-run", "--json"} & set(arguments)
    given, prog = [argument for argument in arguments[1:] if argument not in flags], f"pyrite recipe {name}"
    if {"-h", "--help", "--help-all"} & set(given):
        _print(usage.help_text(schema, prog, everything="--help-all" in given))
        _print(f"\nscales: {', '.join(module.SETTINGS)}")
        return
    config = parse(schema, with_yaml(schema, given, job=name), prog=prog)
    out = config.out or recipe.folder(config)
    if "--dry-run" in flags:
        with apart(), runs.dry(), contextlib.suppress(runs.CheckedError):
            recipe.run(config)
        _print(json.dumps({"config": runs.plain_config(config), "out": str(out)}, indent=1, default=str))
        return
    with apart():
        page = recipe.run(config)
    if world().is_main_process:
        _results(
            {"report": str(page), "results": str(out / "results.json")},
            f"report: {page}",
            None,
            as_json="--json" in flags,
        )


def _list(arguments: list[str]) -> None:
    kind = arguments[0] if arguments else ""
    if kind not in KINDS:
        raise ValueError(f"list {kind!r}: choose one of {', '.join(KINDS)}{_nearest(kind, KINDS)}")
    if arguments[1:]:
        raise ValueError(f"list {kind} takes nothing more, and there is {' '.join(arguments[1:])!r}")
    if kind in ("jobs", "recipes"):
        package = jobs if kind == "jobs" else recipes
        for name in _names(package):
            doc = importlib.import_module(f"{package.__name__}.{name}").__doc__ or ""
            _print(f"{name:18} {doc.splitlines()[0]}")
        return
    for member in specs.members(importlib.import_module(specs.REGISTRIES[kind])):
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
            typed = " ".join(["ledger", *arguments])
            raise ValueError(f"{typed}: write `ledger show FILE` or `ledger export FILE OUT.parquet [--pairs]`")


def _page(folder: Path) -> Path:
    """The page of a run or a recipe, written into its folder."""
    results = folder / "results.json"
    if results.exists():
        found = runs.read_json(results)
        page = report.bandit_page(found) if found["recipe"] == "bandit" else _recipe_page(found)
    else:
        page = report.run_page(folder)
    runs.write_text(folder / "report.html", page)
    return folder / "report.html"


def _recipe_page(found: dict[str, Any]) -> str:
    name = found["recipe"]
    recipe = getattr(importlib.import_module(f"pyrite.recipes.{name}"), "RECIPE", None)
    if recipe:
        return recipe.page(found)
    return getattr(importlib.import_module(f"pyrite.recipes.{name}.page"), f"{name}_page")(found)


def _names(package: ModuleType) -> list[str]:
    """The jobs, or the recipes: packages of their own, beside what they share."""
    return list(recipes.NAMES) if package is recipes else sorted(m.name for m in pkgutil.iter_modules(package.__path__))


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
