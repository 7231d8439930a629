"""The processes that work as one, however many `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def world() -> PartialState:
    """This process among its siblings; without an accelerator they speak by gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())
