"""Processes that ask a gold through a ledger, for tests that kill them; imports little, so that they start fast."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

from pyrite.feedback.ledger import Account, Budget, Ledger, Pace

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pyrite.feedback.ledger"])


def log(path: Path, prompts: list[str], responses: list[str], *, seconds: float = 0.0) -> Tensor:
    """A gold whose calls are known even where its process is killed."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, "".join(f"{response}\n" for response in responses).encode())
    os.close(file)
    time.sleep(seconds)
    return torch.tensor([float(response) for response in responses])


def live(folder: Path, run: str, wanted: list[int], budget: Budget, batch: int, seconds: float) -> None:
    """One life of a process: asks for all it wants."""
    with Ledger(folder / "gold.db") as ledger:
        mine = Account(ledger, run, "log", "score", budget, Pace(batch=batch))
        mine.ask(partial(log, folder / "calls", seconds=seconds), ["p"] * len(wanted), list(map(str, wanted)))


def begin(*arguments: object) -> BaseProcess:
    """A process that lives."""
    process = SERVER.Process(target=live, args=arguments)
    process.start()
    return process


def calls(folder: Path) -> list[int]:
    """What the gold was asked, by anybody."""
    return [int(line) for line in (folder / "calls").read_text().split()] if (folder / "calls").exists() else []


def open_together(folder: Path, start: float) -> None:
    """Fifty new ledgers, each opened at a moment that processes agree on."""
    for number in range(50):
        while time.time() < start + number * 0.01:
            pass
        Ledger(folder / f"{number}.db").close()


def open_at(path: Path, start: float) -> None:
    """A ledger, opened at a moment that processes agree on."""
    while time.time() < start:
        pass
    Ledger(path).close()
