"""A model as it speaks in a decoding loop: how it is run, and with its adapters or without."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pyrite.decoding.adapters import base_of, silent
from pyrite.decoding.engines import Engine, open_engine, transformers_model, without_adapters
from pyrite.forwards import Ways, forget
from pyrite.linears import FastLinears
from pyrite.ways import CLOSE, told, ways

ANY = Ways(padded=True)
VAST = 1 << 30  # no token
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voice:
    """A model, its engine (None: it cannot decode from our cache), and the adapted layers to silence while it runs.

    ways: which texts may share a forward of it. alone: `generate` takes prompts of one length only, without pads.
    """

    model: Any
    engine: Engine | None = None
    silenced: tuple[Any, ...] = ()
    ways: Ways = ANY
    alone: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, ids: Tensor, last: int) -> Tensor:
        """Logits (N, last, V) of the last columns of whole texts ids (N, T), padded at the right, nothing masked."""
        takes = inspect.signature(transformers_model(self.model).forward).parameters
        keep = {"logits_to_keep": last} if "logits_to_keep" in takes else {}
        if self.ways.dynamic:
            forget(self.model)
        with silent(self.silenced), FastLinears():
            return self.model(input_ids=ids, use_cache=False, **keep).logits[:, -last:]


def open_voice(model: Any, columns: int) -> Voice:
    """A model over texts of up to `columns` tokens, in the fastest way it can be run."""
    stock = transformers_model(model)
    found = ways(stock)
    if found.dynamic:
        forget(stock)
    engine = open_engine(model, min(columns, found.turn))
    if engine is None:
        log.warning("%s cannot decode from our cache: using transformers' generate", type(model).__name__)
    alone = columns > found.turn or (engine is None and not told(stock, _ignores_pads))
    return Voice(model, engine, ways=found, alone=alone)


def _ignores_pads(model: PreTrainedModel) -> bool:
    """Whether `generate` gives a prompt behind pads the logits that it gives the prompt alone."""
    config = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=[VAST], pad_token_id=0)
    show: dict[str, Any] = {"generation_config": config, "output_logits": True, "return_dict_in_generate": True}
    size = model.config.get_text_config().vocab_size
    long, short = [[token % size for token in tokens] for tokens in ([5, 3, 8, 4, 9, 7], [6, 10, 11])]
    try:
        alone = torch.stack(model.generate(torch.tensor([short]), **show).logits)[:, 0]  # type: ignore[attr-defined,operator]
        both, mask = torch.tensor([long, [0, 0, 0, *short]]), torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
        padded = torch.stack(model.generate(both, attention_mask=mask, **show).logits)[:, 1]  # type: ignore[attr-defined,operator]
    except Exception:  # whatever a foreign model raises, it cannot be run so
        return False
    return bool((alone - padded).abs().max() <= CLOSE * alone.abs().max())


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
    engine = without_adapters(policy.engine, layers) if policy.engine else None
    return Voice(model, engine, layers, policy.ways, policy.alone)
