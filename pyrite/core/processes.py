"""The processes that work as one, what they say on standard error, and signals that ask them to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def world() -> PartialState:
    """This process among its siblings. Without an accelerator they communicate by gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def on_main(work: Callable[..., T]) -> Callable[..., T]:
    """The same function, called in the main process only. All processes get its result."""
    if world().num_processes == 1:
        return work

    def done(*given: Any) -> T:
        box: list[Any] = [work(*given) if world().is_main_process else None]
        return broadcast_object_list(box)[0]

    return done


# Progress of long work: a bar on a terminal, plain lines elsewhere.


PATIENCE = 10.0  # seconds between plain lines
Advance = Callable[[int], None]
_SAID: set[str] = set()


def once(message: str) -> None:
    """`say` a message that this run has not said yet. An empty one is not said."""
    if message and message not in _SAID:
        _SAID.add(message)
        say(message)


def anew() -> None:
    """Start a new run: `once` says everything again."""
    _SAID.clear()


def say(message: str) -> None:
    """One plain line, from the main process only."""
    if world().is_main_process:
        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


@contextmanager
def progress(label: str, total: int, *, unit: str = "rows", done: int = 0) -> Iterator[Advance]:
    """Show progress, rate and time left. Yields `advance(n)`."""
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


# Signals: training stops after its step and keeps a checkpoint, other work stops at once. Batch schedulers and
# `torchrun` send SIGTERM, a terminal sends SIGINT. The second signal stops at once in any case.


_asked = 0  # the signal that came meanwhile
_units: list[str] = []  # what is being done, the innermost last


class Stopped(BaseException):
    """A signal asked the job to stop. `said` tells how far it came."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(said)
        self.number, self.said = number, said


@contextmanager
def listening() -> Iterator[None]:
    """SIGTERM and SIGINT end the job in order within this block."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there only
        yield
        return
    before = {number: signal.signal(number, _heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def after_steps(unit: str) -> Iterator[Callable[[], int]]:
    """A signal waits for the end of the step within this block.

    Yields a function that returns the signal that came, or 0, the same in all processes. Call it after each step, and
    raise Stopped once the step is saved.
    """
    global _asked
    _units.append(unit)
    try:
        yield _seen
    finally:
        _units.pop()
        _asked = _asked if _units else 0


def _seen() -> int:
    if world().num_processes == 1:
        return _asked
    mine = torch.tensor([_asked], device=world().device)
    return int(gather(mine).max())  # type: ignore[union-attr]


def _heard(number: int, frame: FrameType | None) -> None:
    global _asked
    if not _units or _asked:
        raise Stopped(number)
    _asked = number
    say(f"{signal.Signals(number).name}: stopping after this {_units[-1]}; a second signal stops at once")
