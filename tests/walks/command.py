"""A command as a user types it, in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from unittest.mock import patch

from pyrite import cli


def pyrite(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    typed = patch.object(sys, "argv", ["pyrite", *map(str, arguments)])
    with typed, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
    return status, out.getvalue(), err.getvalue()
