"""Members of an ensemble that keep in memory once what they have in common: a trunk with several heads, or one base
with several adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from pyrite import checkpoints
from pyrite.loading import add_adapters

HEAD = "score."
OWN = ("pyrite", "_name_or_path", "transformers_version", "dtype")  # what configs may differ in


def member_paths(folder: str | Path) -> list[Path]:
    """Folders of the members of a reward run, in order."""
    folder = Path(folder)
    members = sorted(folder.glob("member_*"), key=lambda path: int(path.name.split("_")[1]))
    if members and not (folder / "done.json").exists():
        raise ValueError(f"{folder}: this reward run is not done; run `pyrite reward` again to finish it")
    if members:
        return members
    if (
        any((folder / name).exists() for name in ("config.json", checkpoints.ABOUT))
        and (folder / "tokenizer_config.json").exists()
    ):
        return [folder]
    raise ValueError(f"{folder}: no reward model here; expected member_0/ ... as `pyrite reward` writes them")


def beside(model: Any, path: str | Path) -> tuple[Any, str | None] | None:
    """The saved reward model of a folder on the weights of a loaded one, and its adapter's name if it has adapters.

    None where they have nothing in common: another base, another trunk, or a head that is no decoder classifier's.
    Adapters share one model: activate one by its name before each use.
    """
    if isinstance(model, PeftModel):
        name = _adapter_beside(model, Path(path))
        return None if name is None else (model, name)
    head = _head_beside(model, Path(path))
    return None if head is None else (_with_head(model, head), None)


def active_adapter(model: Any) -> str | None:
    """The name of the adapters in use; None of a model without."""
    return str(model.active_adapter) if isinstance(model, PeftModel) else None


def one_trunk(models: list[Any]) -> bool:
    """Whether these models, all without adapters, run the very same trunk."""
    if any(isinstance(model, PeftModel) for model in models):
        return False
    first, *others = (list(model.base_model.parameters()) for model in models)
    return all(len(first) == len(other) and all(map(_is, first, other)) for other in others)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _adapter_beside(model: PeftModel, path: Path) -> str | None:
    """The name under which the folder's adapters were added to the model; None if they are for another base."""
    base = checkpoints.base_name(path)
    if base is None or checkpoints.check_base(path, base) != getattr(model, "base_identity", None):
        return None
    own = [key for key in checkpoints.shapes(checkpoints.adapter_file(path)) if "lora_" not in key]
    if any(part in key for key in own for part in (".base_layer.", ".embed", ".wte.")):
        return None  # embeddings of its own would take the place of those that both read
    name = f"member_{len(model.peft_config)}"
    add_adapters(model, path, name=name)
    return name


def _head_beside(model: PreTrainedModel, path: Path) -> nn.Module | None:
    """The folder's head; None if anything else than the head differs from the model."""
    mine = getattr(model, "score", None)
    whole = (path / "config.json").exists() and not (path / checkpoints.ABOUT).exists()
    if not isinstance(mine, nn.Module) or not whole:
        return None
    files = checkpoints.weight_files(path)
    if _shape(checkpoints.config(path)) != _shape(model.config):
        return None
    own, seen, head = model.state_dict(), set(), {}
    for name, value in (one for file in files for one in checkpoints.tensors(file)):
        seen.add(name)
        if name.startswith(HEAD):
            head[name.removeprefix(HEAD)] = value.clone()
        elif name not in own or not torch.equal(own[name].cpu(), value.to(own[name].dtype)):
            return None
    twin = copy.deepcopy(mine)
    if seen != own.keys() or any(head[name].shape != value.shape for name, value in twin.state_dict().items()):
        return None
    twin.load_state_dict(head)
    return twin


def _with_head(model: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """The same model, parameter for parameter, but for its head."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "score": head}
    return twin


def _shape(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in OWN}
