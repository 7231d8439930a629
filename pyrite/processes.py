"""The processes that work as one, however many `accelerate launch` or `torchrun` started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def world() -> PartialState:
    """This process among its siblings; without an accelerator they speak by gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def on_main(work: Callable[..., T]) -> Callable[..., T]:
    """Work that the main process does alone; all processes get what comes of it."""
    if world().num_processes == 1:
        return work

    def done(*given: Any) -> T:
        box: list[Any] = [work(*given) if world().is_main_process else None]
        return broadcast_object_list(box)[0]

    return done
