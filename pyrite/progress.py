"""Progress of long work: a bar on a terminal, plain lines elsewhere. All of it on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pyrite.processes import world

PATIENCE = 10.0  # seconds between plain lines
Advance = Callable[[int], None]


_SAID: set[str] = set()


def once(message: str) -> None:
    """`say` what this run has not said yet; nothing if it is empty."""
    if message and message not in _SAID:
        _SAID.add(message)
        say(message)


def anew() -> None:
    """A new run begins: `once` says everything again."""
    _SAID.clear()


def say(message: str) -> None:
    """One plain line, from the main process only."""
    if world().is_main_process:
        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


@contextmanager
def progress(label: str, total: int, *, unit: str = "rows", done: int = 0) -> Iterator[Advance]:
    """Yields `advance(n)`; shows rate and time left."""
    console = Console(stderr=True)
    if not world().is_main_process:
        yield lambda _: None
    elif console.is_terminal:
        columns = ("{task.description}", "{task.completed:.0f}/{task.total:.0f}", "{task.fields[unit]}")
        with Progress(
            *(TextColumn(column) for column in columns),
            BarColumn(),
            TextColumn("{task.fields[rate]}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bar:
            task = bar.add_task(label, total=total, completed=done, unit=unit, rate="-")
            begin = time.monotonic()

            def advance(n: int) -> None:
                bar.advance(task, n)
                seen = bar.tasks[0].completed - done
                bar.update(task, rate=f"{seen / max(time.monotonic() - begin, 1e-9):.0f}")

            yield advance
    else:
        yield _plain(label, total, unit, done)


def _plain(label: str, total: int, unit: str, done: int) -> Advance:
    begin = last = time.monotonic()
    count = done

    def advance(n: int) -> None:
        nonlocal last, count
        count += n
        now = time.monotonic()
        if now - last >= PATIENCE:
            rate = (count - done) / (now - begin)
            left = (total - count) / rate if rate else float("inf")
            say(f"  {label}: {count}/{total} {unit}, {rate:.0f}/s, about {left:.0f} s left")
            last = now

    return advance
