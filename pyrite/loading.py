"""Models from disk: transformers' Auto classes, adapters, tokenizers, and how a new head begins."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from pyrite.processes import world
from pyrite.progress import say
from pyrite.text import end_id, load_tokenizer

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers; rank 0 trains the whole model."""

    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"
    """Names of linear layers, comma separated, or all of them."""


def backbone(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model below any adapters (which stay active inside it)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def tokenizer_of(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name, its note told to the user."""
    tokenizer, note = load_tokenizer(path)
    if note:
        say(f"  note: {path}: {note}")
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """An id other than the end token's: classifiers read the last token that is not a pad, which is the end token."""
    pad, end = tokenizer.pad_token_id, end_id(tokenizer)
    return pad if pad is not None and pad != end else int(end == 0)


def load_model(auto: Any, path: str | Path, *, dtype: Dtype, **options: Any) -> PreTrainedModel | PeftModel:
    """From a folder or Hub name, on this process's device; a folder with adapters loads its base below them."""
    adapter = Path(path) / "adapter_config.json"
    where = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(path)
    try:
        model = auto.from_pretrained(where, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: no model could be loaded (a folder or a Hub name?): {reason}") from error
    model.to(world().device)
    with _quiet():
        return PeftModel.from_pretrained(model, str(path), is_trainable=True) if adapter.exists() else model


def adapters_of(path: str | Path) -> dict[str, Any]:
    """What a folder's adapters say of themselves. Raises ValueError for a model without."""
    about = Path(path) / "adapter_config.json"
    if not about.exists():
        raise ValueError(f"{path}: no adapters here (no adapter_config.json); it is a whole model already")
    return json.loads(about.read_text())


def settings(path: str | Path) -> dict[str, Any]:
    """What a saved reward model says of itself, beside the adapters where it has any; {} of any other model."""
    if not (Path(path) / "config.json").exists() and (Path(path) / "adapter_config.json").exists():
        return {}
    return getattr(AutoConfig.from_pretrained(str(path)), "pyrite", None) or {}


@contextmanager
def _quiet() -> Iterator[None]:
    """peft asks transformers by names that transformers has deprecated; nothing a user could do about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def has_bare_head(model: Any) -> bool:
    """Whether the vocabulary head is its weight alone: a bias or an adapter, 0 at first, the probe would not see."""
    head = backbone(model).get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None


def adapted(model: Any, lora: Lora | None, *, task: str) -> Any:
    """The model with new adapters, which always start from the same draw."""
    if lora is None or lora.lora_rank == 0:
        return model
    config = LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft takes floats, its annotation says int
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_targets if lora.lora_targets == "all-linear" else lora.lora_targets.split(","),
        task_type=task,
    )
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(0)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"lora_targets {lora.lora_targets!r}: {' '.join(str(error).split())}") from error


def draw_head(model: Any, *, seed: int, std: float) -> None:
    """A new head from its own stream: N(0, std), bias 0."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters() if head is not None else ():
        zero = name.endswith("bias")
        drawn = torch.empty(parameter.shape).normal_(0, std, generator=generator)
        parameter.data.copy_(torch.zeros_like(drawn) if zero else drawn)


def context_of(model: PreTrainedModel) -> int:
    """Longest sequence in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def train_top(model: PreTrainedModel, top: int) -> None:
    """Of the trunk, only the last `top` layers and what comes behind them keep their gradients; the head keeps its own.

    A head tied to the input embedding is the trunk's. Raises ValueError beyond the model's layers, or where nothing
    would be trained.
    """
    trunk = model.base_model
    stacks = [m for m in trunk.children() if isinstance(m, nn.ModuleList)]
    layers = max(stacks, key=len, default=nn.ModuleList())
    if not 0 <= top <= len(layers):
        raise ValueError(f"top = {top}: the model has {len(layers)} layers; give 0, for the head alone, or more")
    trunk.requires_grad_(False)
    behind = [m for m in trunk.children() if m is not layers and not isinstance(m, nn.Embedding)]
    for module in [*list(layers)[len(layers) - top :], *(behind if top else [])]:
        module.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"top = {top}: the head is tied to the frozen embedding, so nothing is trained; give 1 or more"
        )
