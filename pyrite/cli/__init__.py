"""The command line: `pyrite JOB [options]`, `pyrite recipe NAME`, `pyrite list KIND`, `pyrite report DIR`.

What needs no job is answered here, without loading torch; `pyrite.cli.commands` does the rest.
"""

from __future__ import annotations

import sys

from pyrite.cli.help import KINDS, names, overview

__all__ = ["KINDS", "main", "names"]


def main() -> None:
    """Run a command. Expected errors are one line on standard error and exit status 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if (told := overview(arguments)) is not None:
        sys.stdout.write(f"{told}\n")
        return
    from pyrite.cli import commands

    commands.run(arguments, debug="--debug" in sys.argv)
