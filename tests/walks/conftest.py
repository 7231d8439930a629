"""The command line, for walks whose commands succeed or raise SystemExit as they do for a user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyrite import cli


@pytest.fixture
def pyrite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """The command line in this process, from a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["pyrite", *map(str, arguments)])
        cli.main()

    return command
