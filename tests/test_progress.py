"""A bar on a terminal, plain lines elsewhere, nothing from other processes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pyrite.core import processes as module
from pyrite.core.processes import progress, say


def test_plain_lines_come_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = iter([0.0, 1.0, 12.0, 13.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("score", 100, unit="answers", done=10) as advance:
        for _ in range(4):
            advance(12)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  score: 34/100 answers, 2/s, about 33 s left",
        "  score: 58/100 answers, 2/s, about 26 s left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    with progress("train", 40, unit="steps", done=4) as advance:
        advance(16)
    shown = screen.getvalue()
    assert "train" in shown
    assert "20/40" in shown
    assert "steps" in shown


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Other:
        is_main_process = False

    monkeypatch.setattr(module, "world", Other)
    say("hello")
    with progress("x", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_say_prints_one_plain_line(capsys: Any) -> None:
    say("a [bold]line[/bold] of " + "x" * 200)
    assert capsys.readouterr().err == "a [bold]line[/bold] of " + "x" * 200 + "\n"
