"""A model as it speaks in a decoding loop: how it is run, and with its adapters or without."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrite.decoding.adapters import base_of, silent
from pyrite.decoding.engines import Engine, open_engine, transformers_model, without_adapters
from pyrite.linears import FastLinears

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voice:
    """A model, its engine (None: it cannot decode from our cache), and the adapted layers to silence while it runs."""

    model: Any
    engine: Engine | None = None
    silenced: tuple[Any, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, ids: Tensor, last: int) -> Tensor:
        """Logits (N, last, V) of the last columns of whole texts ids (N, T), padded at the right, nothing masked."""
        takes = inspect.signature(transformers_model(self.model).forward).parameters
        keep = {"logits_to_keep": last} if "logits_to_keep" in takes else {}
        with silent(self.silenced), FastLinears():
            return self.model(input_ids=ids, use_cache=False, **keep).logits[:, -last:]


def open_voice(model: Any, columns: int) -> Voice:
    """A model over texts of up to `columns` tokens, in the fastest way it can be run."""
    engine = open_engine(model, columns)
    if engine is None:
        log.warning("%s cannot decode from our cache: using transformers' generate", type(model).__name__)
    return Voice(model, engine)


def open_reference(ref_model: Any, policy: Voice, columns: int) -> Voice:
    """The reference beside a policy: a model of its own, or None for the policy with its adapters off.

    Adapters off, both run on the same weights in memory, the policy's engine included.
    """
    if ref_model is not None:
        same = ref_model is policy.model and policy.engine is not None
        return policy if same else open_voice(ref_model, columns)
    model, layers = base_of(policy.model)
    if not layers:
        return open_voice(model, columns)
    return Voice(model, without_adapters(policy.engine, layers) if policy.engine else None, layers)
