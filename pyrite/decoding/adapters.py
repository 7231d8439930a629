"""Adapters switched off for a moment, so that one base in memory is two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def adapter_layers(model: nn.Module) -> tuple[Any, ...]:
    """The modules of a model that adapters change."""
    return tuple(module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))


def innermost(model: Any) -> Any:
    """The transformers model that runs alike without its peft wrapper; the model itself where it would not."""
    wrapped = isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.LORA
    return model.get_base_model() if wrapped else model


def base_of(model: Any) -> tuple[Any, tuple[Any, ...]]:
    """A model with its adapters off: what to run, and which of its layers to silence meanwhile.

    Raises ValueError where there are no adapters, or where they are merged into the base.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return model.get_base_model(), ()  # virtual tokens are put before the base, not into it
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("ref_model=None means the policy with its adapters off, but it has none: give a ref_model")
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in layers):
        raise ValueError("the policy's adapters are merged into its weights: unmerge them, or give a ref_model")
    return model, layers


@contextmanager
def silent(layers: Sequence[Any]) -> Iterator[None]:
    """Within this block these layers work as if they had no adapters.

    Peft's own switch visits every module and resets requires_grad, too much for twice a decoding step.
    """
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off
