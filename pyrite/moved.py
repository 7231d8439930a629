"""Did training move the model? A run says so when neither its weights nor what it measures have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pyrite.progress import say

__all__ = ["Shift", "Weights", "shift", "tell"]

SAMPLE = 4096  # entries of each weight that are remembered
ROWS = 512  # held-out rows that are compared before and after
STILL = 1e-3  # of their size: weights that changed less have hardly moved


@dataclass(frozen=True)
class Shift:
    """By how much something measured has changed over a run, with its standard error; what is hardly any change."""

    name: str
    mean: float
    se: float
    least: float

    @property
    def seen(self) -> bool:
        """Whether it is more than its noise, and more than hardly any."""
        return abs(self.mean) > max(2 * self.se, self.least)


def shift(name: str, before: Tensor, after: Tensor, *, least: float) -> Shift:
    """Of values (N,) of the same rows before and after."""
    change = after.double() - before.double()
    se = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else 0.0
    return Shift(name, change.mean().item() if len(change) else 0.0, se, least)


@dataclass(frozen=True)
class Weights:
    """What is remembered of a model's trained weights as they were before training.

    Of each whole weight some entries, evenly spread; of adapters both factors, since their product is what changes.
    """

    entries: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """As they are now."""
        entries = {name: _some(parameter).clone() for name, parameter in _whole(model)}
        return cls(entries, {name: (a.clone(), b.clone()) for name, a, b, _ in _factors(model)})

    @torch.no_grad()
    def change(self, model: nn.Module) -> float:
        """||now - then|| / ||then|| over the trained weights; of weights with adapters, that of their sum."""
        moved, size = 0.0, 0.0
        for name, parameter in _whole(model):
            then, each = self.entries[name].double(), parameter.numel() / len(self.entries[name])
            moved += each * (_some(parameter).double() - then).square().sum().item()
            size += each * then.square().sum().item()
        for name, a, b, layer in _factors(model):
            (a0, b0), scale = self.factors[name], layer.scaling[name.rpartition(" ")[2]]
            left, right = torch.cat([b, -b0], 1).double(), torch.cat([a, a0]).double()
            moved += scale**2 * ((left.T @ left) * (right @ right.T)).sum().item()
            base: Any = layer.get_base_layer()  # type: ignore[operator]
            size += base.weight.detach().double().square().sum().item()
        return math.sqrt(max(moved, 0.0) / size) if size else 0.0


def tell(job: str, weights: float, lr: float, *seen: Shift) -> dict[str, Any]:
    """Say so if nothing moved; the numbers, for the results of the run."""
    if weights < STILL and not any(one.seen for one in seen):
        shifts = ", ".join(f"{one.name} by {one.mean:+.2g} (standard error {one.se:.1g})" for one in seen)
        more = min(1000, 10 ** math.ceil(math.log10(5 * STILL / max(weights, 1e-12))))
        say(
            f"{job}: this run hardly moved the model: its weights by {weights:.1g} of their size"
            f"{', ' if shifts else ''}{shifts}; --lr was {lr:g}: give a larger one, such as --lr {more * lr:.0e}, "
            "or more steps"
        )
    return {"weights": weights} | {k: v for one in seen for k, v in ((one.name, one.mean), (f"{one.name}_se", one.se))}


def _whole(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trained parameters that are no factor of an adapter."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)


def _some(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _factors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, LoraLayer]]:
    """Trained adapters of linear layers: "layer adapter", both factors, the layer."""
    for path, layer in model.named_modules():
        for adapter in layer.lora_A if isinstance(layer, LoraLayer) else ():
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[union-attr]
            if a.requires_grad:  # type: ignore[union-attr]
                yield f"{path} {adapter}", a.detach(), b.detach(), layer  # type: ignore[operator,misc]
