"""LoRA adapter folders as records: read, refused where they do not go together, merged with weights, written.

What is written is an ordinary peft folder. `Blend` holds one base and changes the weights in place.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyrite import checkpoints, runs, soups
from pyrite.decoding.adapters import adapter_layers
from pyrite.loading import Dtype, adapters_of, tokenizer_of
from pyrite.models import Policy
from pyrite.soups import LowRank

Mode = Literal["delta", "factor", "svd"]

WEIGHTS, ABOUT = checkpoints.ADAPTER, checkpoints.ABOUT
FACTOR = re.compile(r"(.+\.lora_(?:embedding_)?)([AB])(?:\.weight)?")
PREFIX = "base_model.model."
HELD = {  # what a config may ask for and a soup answers; anything else it turns on is refused
    *("base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "auto_mapping"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("megatron_core", "qalora_group_size", "loftq_config", "runtime_config"),
}


@dataclass(frozen=True)
class Adapter:
    """One folder's adapters: its config, the low-rank matrices by name, and whole tensors saved beside them."""

    path: str  # its folder; of a soup, the first ingredient's
    config: dict[str, Any]
    low: dict[str, LowRank]
    whole: dict[str, Tensor]


def read(path: str | Path) -> Adapter:
    """The adapters of a folder, on the processor.

    Raises ValueError for a folder without, for what no low-rank soup can hold (DoRA, trained biases, ranks by module,
    a base changed at the start), and for tensors that are not finite or not low-rank pairs.
    """
    config, folder = adapters_of(path), checkpoints.place(path)
    _check_plain(path, config)
    tensors = load_file(checkpoints.adapter_file(folder))
    config["base_model_name_or_path"] = checkpoints.base_name(folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    low, whole = _paired(path, tensors, scale)
    if any(part.rank != config["r"] for part in low.values()):
        raise ValueError(f"{path}: its config says rank {config['r']}, its tensors do not; it is broken")
    return Adapter(str(folder), config, low, whole)


def write(adapter: Adapter, folder: str | Path) -> None:
    """An ordinary peft folder; tokenizer and further files are those of `adapter.path`."""
    copy_beside(adapter.path, folder)
    save_file(tensors(adapter), Path(folder) / WEIGHTS, metadata={"format": "pt"})
    runs.write_json(Path(folder) / ABOUT, adapter.config)


def copy_beside(source: str | Path, folder: str | Path) -> None:
    """What lies beside the weights of a model: tokenizer, config; not its card, which tells of its training."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != ABOUT:
            shutil.copyfile(path, Path(folder) / path.name)


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Under the names peft saves them by."""
    low = {}
    for name, part in adapter.low.items():
        end = "" if name.endswith("embedding_") else ".weight"
        low |= {f"{name}A{end}": part.down.contiguous(), f"{name}B{end}": part.up.contiguous()}
    return {**low, **adapter.whole}


def check_alike(adapters: Sequence[Adapter], *, mode: Mode = "delta") -> None:
    """Raises ValueError, naming both folders, where a soup would be silently wrong.

    Another base, task, modules or shapes; in mode factor also another rank or scale.
    """
    first = adapters[0]
    for other in adapters[1:]:
        both = f"{first.path} and {other.path}"
        if not _same_base(first.config, other.config):
            raise ValueError(
                f"{both} adapt different bases, {_base(first)} and {_base(other)}: merge those of one base"
            )
        if odd := sorted((first.low.keys() | first.whole.keys()) ^ (other.low.keys() | other.whole.keys())):
            raise ValueError(f"{both} adapt different modules: only one has {odd[0].removeprefix(PREFIX).rstrip('_.')}")
        for (what, a), (_, b) in zip(_traits(first, mode), _traits(other, mode), strict=True):
            if a != b:
                hint = "; mode factor averages A and B apart and needs them equal" if mode == "factor" else ""
                raise ValueError(f"{both} differ in {what}: {a} and {b}{hint}")


def merged(adapters: Sequence[Adapter], weights: Sequence[float], *, mode: Mode, rank: int | None = None) -> Adapter:
    """The soup of adapters that `check_alike` lets pass, by `soups.deltas`, `factors` or `truncated` module by module.

    rank: of mode svd; by default the ingredients' largest. Modules saved whole, as a head, take their weighted mean.
    Raises ValueError for those where the weights do not sum to 1.
    """
    first = adapters[0]
    if first.whole:
        check_sum(weights, what=min(first.whole).removeprefix(PREFIX))
    rank = rank or max(int(adapter.config["r"]) for adapter in adapters)
    low = {name: _soup([a.low[name] for a in adapters], weights, mode, rank) for name in first.low}
    whole = {name: soups.weighted([a.whole[name] for a in adapters], weights) for name in first.whole}
    return Adapter(first.path, _config(first.config, low), low, whole)


def check_sum(weights: Sequence[float], *, what: str) -> None:
    """Raises ValueError for weights by which tensors saved whole would be scaled: Σ w_i θ_i is no change of a base."""
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"{what} is averaged whole, so the weights must sum to 1; these sum to {math.fsum(weights):g}")


def compared(adapters: Sequence[Adapter], weights: Sequence[float], soup: Adapter) -> dict[str, dict[str, Any]]:
    """Of every module: the soup's relative distance from Σ w_i Δ_i; cosine and norm ratio of the factor-wise average.

    The last two are None where the ingredients' ranks or scales differ; any is None where a zero matrix leaves it so.
    """
    alike = len({(part.rank, part.scale) for adapter in adapters for part in adapter.low.values()}) == 1
    found = {}
    for name, part in soup.low.items():
        parts = [adapter.low[name] for adapter in adapters]
        exact = soups.deltas(parts, weights)
        near = soups.similarity(soups.factors(parts, weights), exact) if alike else (math.nan, math.nan)
        values = zip(("error", "cosine", "norm_ratio"), (soups.distance(part, exact), *near), strict=True)
        found[_module(name)] = {key: None if math.isnan(value) else value for key, value in values}
    return found


class Blend:
    """A policy on one base in memory, its adapters the soup of k ingredients at any weights, changed in place.

    Every setting is `merged` in mode delta, exact, so it computes what that soup does saved and loaded; its adapters
    are of rank Σ r_i throughout, zeros where an ingredient has no weight.
    """

    def __init__(self, policy: Policy, adapters: Sequence[Adapter]) -> None:
        self.policy = policy
        self.adapters = list(adapters)

    @classmethod
    def load(cls, ingredients: Sequence[str | Path], *, dtype: Dtype = "float32") -> Blend:
        """From adapter folders of policies, at equal weights. Raises ValueError as `read` and `check_alike` do."""
        adapters = [read(path) for path in ingredients]
        check_alike(adapters)
        if (task := adapters[0].config.get("task_type")) != "CAUSAL_LM":
            raise ValueError(f"{adapters[0].path} has adapters for {task}; a blend takes those of policies")
        tokenizer_of(adapters[0].path)  # a missing one is named before a folder of ours would be
        with TemporaryDirectory() as folder:
            write(merged(adapters, soups.shares(None, len(adapters)), mode="delta"), folder)
            return cls(Policy.load(folder, dtype=dtype), adapters)

    def set(self, weights: Sequence[float], *, normalize: bool = True) -> Policy:
        """The policy at these weights: the object it always was, its adapters overwritten."""
        soup = merged(self.adapters, soups.shares(weights, len(self.adapters), normalize=normalize), mode="delta")
        model: Any = self.policy.model
        own = model.peft_config["default"]
        full = {name: soups.padded(part, own.r) for name, part in soup.low.items()}
        set_peft_model_state_dict(model, tensors(replace(soup, low=full)))
        scale = next(iter(full.values())).scale
        own.lora_alpha = scale * own.r  # as it is saved
        for layer in adapter_layers(model):
            layer.scaling["default"] = scale
        return self.policy


def _check_plain(path: str | Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} holds {config.get('peft_type')} adapters; soups are made of LoRA")
    if on := [key for key, value in config.items() if key not in HELD and value and value != "none"]:
        raise ValueError(f"{path} is trained with {on[0]}={config[on[0]]!r}, which a soup of low ranks cannot hold")
    if (start := config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise ValueError(f"{path} starts from init_lora_weights={start!r}, which changes the base; convert it to LoRA")


def _paired(path: str | Path, found: dict[str, Tensor], scale: float) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """The low-rank matrices, and what is left: tensors saved whole."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        if match := FACTOR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise ValueError(f"{path}: no low-rank tensors in {WEIGHTS}; a soup of it would be the base")
    low = {}
    for name, pair in pairs.items():
        if len(pair) < 2 or any(tensor.ndim != 2 for tensor in pair.values()):
            raise ValueError(f"{path}: {_module(name)} is no pair of matrices A and B")
        low[name] = LowRank(pair["A"], pair["B"], scale)
    return low, {name: tensor for name, tensor in found.items() if not FACTOR.fullmatch(name)}


def _same_base(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """By name and revision, or by content for two folders."""
    names = [Path(config["base_model_name_or_path"]) for config in (a, b)]
    if names[0] == names[1]:
        return a.get("revision") == b.get("revision")
    return all(name.is_dir() for name in names) and checkpoints.identity(names[0]) == checkpoints.identity(names[1])


def _base(adapter: Adapter) -> str:
    revision = adapter.config.get("revision")
    return adapter.config["base_model_name_or_path"] + (f" at {revision}" if revision else "")


def _traits(adapter: Adapter, mode: Mode) -> Iterator[tuple[str, Any]]:
    """What must be equal in all ingredients, by name."""
    for key in ("task_type", "fan_in_fan_out"):
        yield key, adapter.config.get(key)
    for name, part in sorted(adapter.low.items()):
        yield f"shapes, {_module(name)}", part.shape
        if mode == "factor":
            yield "rank", part.rank
            yield "scale", part.scale
    for name, tensor in sorted(adapter.whole.items()):
        yield f"shapes, {name.removeprefix(PREFIX)}", tuple(tensor.shape)


def _soup(parts: Sequence[LowRank], weights: Sequence[float], mode: Mode, rank: int) -> LowRank:
    if mode == "factor":
        return soups.factors(parts, weights)
    exact = soups.deltas(parts, weights)
    return soups.truncated(exact, rank) if mode == "svd" else exact


def _config(first: dict[str, Any], low: dict[str, LowRank]) -> dict[str, Any]:
    """Of a soup: rank and scale its own, modules by their full names."""
    part = next(iter(low.values()))
    found = {"r": part.rank, "lora_alpha": part.scale * part.rank, "use_rslora": False, "init_lora_weights": True}
    named = {"target_modules": sorted(map(_module, low)), "exclude_modules": None, "layers_to_transform": None}
    return {**first, **found, **named, "layers_pattern": None}


def _module(name: str) -> str:
    """The module that a low-rank matrix belongs to, as the base names it."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]
