"""A job that is asked to end: training stops after its step and keeps a checkpoint, other work stops at once.

Batch schedulers and `torchrun` send SIGTERM, a terminal sends SIGINT. The second signal stops at once in any case.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate.utils import gather

from pyrite.processes import world
from pyrite.progress import say

_asked = 0  # the signal that came meanwhile
_units: list[str] = []  # what is being done, the innermost last


class Stopped(BaseException):
    """The job was asked to end by a signal; `said` tells how far it came."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(said)
        self.number, self.said = number, said


@contextmanager
def listening() -> Iterator[None]:
    """In here SIGTERM and SIGINT end in order what this process does."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody listen
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
    """While steps are done: yields a function that returns the signal that asked to end, or 0, alike in all processes.

    Call it after each step, and raise Stopped once what the step made is kept.
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
