"""The command line: `pyrite JOB [options]`, `pyrite recipe NAME`, `pyrite list KIND`, `pyrite report DIR`.

What needs no job is answered here, without loading torch; `pyrite.cli.commands` does the rest.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import sys
from pathlib import Path

from pyrite import __version__

KINDS = {  # what `pyrite list KIND` lists, and the module that holds it
    "discriminators": "pyrite.training.annotators",
    "ensembles": "pyrite.math.ensembles",
    "golds": "pyrite.feedback.scorers",
    "jobs": "pyrite.jobs",
    "judges": "pyrite.feedback.judges",
    "losses": "pyrite.math.losses",
    "lr_schedulers": "pyrite.math.lr_schedulers",
    "optimizers": "pyrite.training.optimizers",
    "recipes": "pyrite.recipes",
    "reward_losses": "pyrite.math.reward_losses",
    "samplers": "pyrite.math.samplers",
    "schedules": "pyrite.feedback.schedules",
    "selectors": "pyrite.feedback.selectors",
}
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
    """Run a command. Expected errors are one line on standard error and exit status 2."""
    match [argument for argument in sys.argv[1:] if argument != "--debug"]:
        case [] | ["-h" | "--help" | "help", *_]:
            _tell(USAGE.format(jobs="|".join(names("jobs")), recipes="|".join(names("recipes")), kinds="|".join(KINDS)))
        case ["-V" | "--version" | "version", *_]:
            _tell(f"pyrite {__version__}")
        case ["list", "jobs" | "recipes" as kind]:
            for name in names(kind):
                _tell(f"{name:18} {_summary(f'pyrite.{kind}.{name}')}")
        case arguments:
            from pyrite.cli import commands

            commands.run(arguments, debug="--debug" in sys.argv)


def names(kind: str) -> list[str]:
    """The jobs, or the recipes."""
    package = importlib.import_module(KINDS[kind])
    return sorted(getattr(package, "NAMES", None) or (module.name for module in pkgutil.iter_modules(package.__path__)))


def _summary(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())) or "").partition("\n")[0]


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
