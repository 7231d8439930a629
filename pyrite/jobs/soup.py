"""Soups: one model from several by weights, of LoRA adapters on one base or of whole models.

Policies and reward models alike. Modes of adapters, Δ_i = s_i B_i A_i: `delta`, base + Σ w_i Δ_i exactly, at rank
Σ r_i; `svd`, the same cut to --rank; `factor`, A and B averaged apart as in Personalized Soups (`pyrite.math.merging`).
Mode of whole models: `full`, Σ w_i θ_i tensor by tensor.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pyrite.core import checkpoints, runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.math import merging
from pyrite.math.merging import LowRank
from pyrite.math.ranges import Count, Real
from pyrite.models.loading import OWN, adapters_of, is_classifier, settings, verify

NEAR = 0.99  # averaged factors with a lower cosine to averaged adapters get a remark
FACTOR = re.compile(r"(.+\.lora_(?:embedding_)?)([AB])(?:\.weight)?")
PREFIX = "base_model.model."
HELD = {  # options of an adapter config that a soup can keep; any other that is turned on is refused
    *("base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "auto_mapping"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("megatron_core", "qalora_group_size", "loftq_config", "runtime_config"),
}
OUTPUTS = {"model/": "the soup: an adapter folder, or a whole model; soup.json tells what is in it"}
Mix = Callable[[Path], dict[str, Any]]  # writes the weights of the soup to a folder and returns its measures


@dataclass(frozen=True)
class Config:
    """Merge models by weights."""

    ingredients: tuple[str, ...]
    """Two or more folders with adapters, or with whole models."""
    out: Path
    """Folder of the run, new or empty."""
    weights: tuple[Real, ...] = ()
    """One weight for each ingredient, at least 0, with sum 1. By default all are equal."""
    normalize: bool = True
    """Require weights that sum to 1. --no-normalize uses any weights: base + Σ w_i Δ_i."""
    mode: Literal["delta", "factor", "svd", "full"] = "delta"
    """For adapters: delta, their exact mean; factor, A and B averaged separately; svd, the mean cut to --rank. For
    whole models: full."""
    rank: Count | None = None
    """Rank for --mode svd; by default the largest of the ingredients."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {f"ingredient {index}": path for index, path in enumerate(config.ingredients, 1)}


def run(config: Config) -> Run:
    """Check that the ingredients go together, merge, write."""
    run = runs.start("soup", config, inputs=inputs)
    if run.done:
        return run
    weights, paths = _weights(config), [Path(path) for path in config.ingredients]
    mix = (_whole_models if config.mode == "full" else _adapters)(config, paths, weights)
    constants = _constants(config.ingredients, weights)
    _check_tokenizers(paths)
    for path in config.ingredients:
        verify(AutoModelForSequenceClassification if is_classifier(path) else AutoModelForCausalLM, path)
    run.open()
    parts = zip(weights, config.ingredients, strict=True)
    say(f"soup: {' + '.join(f'{weight:g} {path}' for weight, path in parts)}")
    folder = run.folder / "model"
    if run.writes:
        _copy_beside(paths[0], folder)
        told = {"mode": config.mode, "ingredients": list(config.ingredients), "inputs": run.inputs, "weights": weights}
        runs.write_json(folder / "soup.json", {**told, **mix(folder)})
        if constants:
            saved = runs.read_json(folder / "config.json")
            runs.write_json(folder / "config.json", {**saved, "pyrite": constants})
    run.wait()
    made = runs.read_json(folder / "soup.json")
    cosine = made.get("lowest_cosine")
    if config.mode == "factor" and cosine is not None and cosine < NEAR:
        say(f"  note: averaged factors are not averaged adapters: cosine {cosine:.2f} with them in the worst module;")
        say("  they are near only while all A are alike, as soon after a start from one draw. --mode delta is exact")
    return run.finish(**made)


def _weights(config: Config) -> list[float]:
    """One weight for each ingredient."""
    if len(config.ingredients) < 2:
        raise ValueError(f"--ingredients names {len(config.ingredients)}; a soup takes at least 2")
    if config.rank is not None and (config.mode != "svd" or config.rank < 1):
        raise ValueError(f"--rank {config.rank}: a rank of at least 1, for --mode svd alone")
    return merging.shares(config.weights or None, len(config.ingredients), normalize=config.normalize)


def _copy_beside(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights of a model: its tokenizer and config, but not its card."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != checkpoints.ABOUT
        if path.is_file() and wanted:
            shutil.copyfile(path, folder / path.name)


def _check_sum(weights: Sequence[float], what: str) -> None:
    """Refuse weights that do not sum to 1: they would scale tensors that are saved whole."""
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"{what} is averaged whole, so the weights must sum to 1; these sum to {math.fsum(weights):g}")


# Adapters ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """One folder's adapters: its config, the low-rank matrices by name, and tensors saved whole beside them."""

    path: Path
    config: dict[str, Any]
    low: dict[str, LowRank]
    whole: dict[str, Tensor]


def _adapters(config: Config, paths: Sequence[Path], weights: Sequence[float]) -> Mix:
    for path in paths:
        if not (path / checkpoints.ABOUT).exists():
            raise ValueError(f"{path}: no folder with adapters; --mode full merges whole models")
    ingredients = [_read(path) for path in paths]
    _check_alike(ingredients, factors=config.mode == "factor")
    if ingredients[0].whole:
        _check_sum(weights, "a module saved whole beside low ranks, a reward head,")
    rank = config.rank or max(int(adapter.config["r"]) for adapter in ingredients)

    def soup(parts: Sequence[LowRank]) -> LowRank:
        if config.mode == "factor":
            return merging.factors(parts, weights)
        exact = merging.deltas(parts, weights)
        return merging.truncated(exact, rank) if config.mode == "svd" else exact

    def mix(folder: Path) -> dict[str, Any]:
        first = ingredients[0]
        low = {name: soup([one.low[name] for one in ingredients]) for name in first.low}
        whole = {name: merging.weighted([one.whole[name] for one in ingredients], weights) for name in first.whole}
        part = next(iter(low.values()))
        about = first.config | {"r": part.rank, "lora_alpha": part.scale * part.rank, "use_rslora": False}
        about |= {"init_lora_weights": True, "target_modules": sorted(map(_module, low))}
        about |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        save_file(_named(low) | whole, folder / checkpoints.ADAPTER, metadata={"format": "pt"})
        runs.write_json(folder / checkpoints.ABOUT, about)
        return {"rank": part.rank, **_compared(ingredients, weights, low)}

    return mix


def _read(path: Path) -> Adapter:
    """Load the adapters of a folder.

    Raises ValueError for what a low-rank soup cannot hold: DoRA, trained biases, ranks by module, a base changed at the
    start, tensors that are no low-rank pairs.
    """
    config = adapters_of(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} holds {config.get('peft_type')} adapters; soups are made of LoRA")
    if on := [key for key, value in config.items() if key not in HELD and value and value != "none"]:
        raise ValueError(f"{path} is trained with {on[0]}={config[on[0]]!r}, which a soup of low ranks cannot hold")
    if (start := config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise ValueError(f"{path} starts from init_lora_weights={start!r}, which changes the base; convert it to LoRA")
    config["base_model_name_or_path"] = checkpoints.base_name(path)
    tensors = load_file(checkpoints.adapter_file(path))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := FACTOR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise ValueError(f"{path}: no low-rank tensors in {checkpoints.ADAPTER}; a soup of it would be the base")
    low = {}
    for name, pair in pairs.items():
        if len(pair) < 2 or any(tensor.ndim != 2 for tensor in pair.values()):
            raise ValueError(f"{path}: {_module(name)} is no pair of matrices A and B")
        low[name] = LowRank(pair["A"], pair["B"], scale)
    if any(part.rank != config["r"] for part in low.values()):
        raise ValueError(f"{path}: its config says rank {config['r']}, its tensors do not; it is broken")
    return Adapter(path, config, low, {name: tensor for name, tensor in tensors.items() if not FACTOR.fullmatch(name)})


def _named(low: dict[str, LowRank]) -> dict[str, Tensor]:
    """The factors under the names peft saves them by."""
    found = {}
    for name, part in low.items():
        end = "" if name.endswith("embedding_") else ".weight"
        found |= {f"{name}A{end}": part.down.contiguous(), f"{name}B{end}": part.up.contiguous()}
    return found


def _module(name: str) -> str:
    """The module that a low-rank matrix belongs to, as the base names it."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def _check_alike(adapters: Sequence[Adapter], *, factors: bool) -> None:
    """Refuse adapters of different bases, tasks, modules or shapes. With `factors`, their ranks and scales must be
    equal, too."""
    first = adapters[0]
    for other in adapters[1:]:
        both = f"{first.path} and {other.path}"
        if not _same_base(first.config, other.config):
            bases = " and ".join(map(_base, (first.config, other.config)))
            raise ValueError(f"{both} adapt different bases, {bases}: merge those of one base")
        if odd := sorted((first.low.keys() | first.whole.keys()) ^ (other.low.keys() | other.whole.keys())):
            raise ValueError(f"{both} adapt different modules: only one has {odd[0].removeprefix(PREFIX).rstrip('_.')}")
        mine, theirs = (_traits(adapter, factors=factors) for adapter in (first, other))
        for what, value in mine.items():
            if value != theirs[what]:
                hint = "; mode factor averages A and B apart and needs them equal" if factors else ""
                raise ValueError(f"{both} differ in {what}: {value} and {theirs[what]}{hint}")


def _traits(adapter: Adapter, *, factors: bool) -> dict[str, Any]:
    """What must be equal in all ingredients, by name."""
    found = {key: adapter.config.get(key) for key in ("task_type", "fan_in_fan_out")}
    found |= {f"shapes, {_module(name)}": part.shape for name, part in sorted(adapter.low.items())}
    found |= {f"shapes, {name.removeprefix(PREFIX)}": tuple(one.shape) for name, one in sorted(adapter.whole.items())}
    part = next(iter(adapter.low.values()))
    return found | ({"rank": part.rank, "scale": part.scale} if factors else {})


def _same_base(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two bases are the same: by name and revision, or by content if both are folders."""
    names = [Path(config["base_model_name_or_path"]) for config in (a, b)]
    if names[0] == names[1]:
        return a.get("revision") == b.get("revision")
    return all(name.is_dir() for name in names) and checkpoints.identity(names[0]) == checkpoints.identity(names[1])


def _base(config: dict[str, Any]) -> str:
    revision = config.get("revision")
    return config["base_model_name_or_path"] + (f" at {revision}" if revision else "")


def _compared(adapters: Sequence[Adapter], weights: Sequence[float], soup: dict[str, LowRank]) -> dict[str, Any]:
    """Each module's relative distance from Σ w_i Δ_i, with the cosine and norm ratio of the average of the factors.

    The last two are None if the ingredients' ranks or scales differ; any is None if a zero matrix leaves it undefined.
    """
    alike = len({(part.rank, part.scale) for adapter in adapters for part in adapter.low.values()}) == 1
    modules: dict[str, dict[str, float | None]] = {}
    for name, part in soup.items():
        parts = [adapter.low[name] for adapter in adapters]
        exact = merging.deltas(parts, weights)
        near = merging.similarity(merging.factors(parts, weights), exact) if alike else (math.nan, math.nan)
        values = zip(("error", "cosine", "norm_ratio"), (merging.distance(part, exact), *near), strict=True)
        modules[_module(name)] = {key: None if math.isnan(value) else value for key, value in values}
    errors, cosines = ([v for row in modules.values() if (v := row[key]) is not None] for key in ("error", "cosine"))
    worst = {"largest_error": max(errors, default=None), "lowest_cosine": min(cosines, default=None)}
    return {**worst, "modules": modules}


# Whole models --------------------------------------------------------------------------------------------------------


def _whole_models(config: Config, paths: Sequence[Path], weights: Sequence[float]) -> Mix:
    """Read the tensors one at a time, and write them to files like those of the first model."""
    for path in paths:
        if (path / checkpoints.ABOUT).exists() or not (path / "config.json").exists():
            raise ValueError(f"{path}: no folder of a whole model; modes other than full merge adapters")
    _check_sum(weights, "a whole model")
    files = checkpoints.weight_files(paths[0])
    first, *others = (_shapes(path) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        if odd := sorted(first.keys() ^ other.keys()):
            raise ValueError(f"{paths[0]} and {path} are different models: only one has {odd[0]}")
        if odd := [name for name in first if first[name] != other[name]]:
            shapes = f"{odd[0]} is {[*first[odd[0]]]} and {[*other[odd[0]]]}"
            raise ValueError(f"{paths[0]} and {path} are different models: {shapes}")

    def mix(folder: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            models: list[dict[str, Any]] = []
            for path in paths:
                opened = [stack.enter_context(safe_open(file, "pt")) for file in checkpoints.weight_files(path)]
                models.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118, no dict
            for file in files:
                names = checkpoints.shapes(file)
                mean = {n: merging.weighted([model[n].get_tensor(n) for model in models], weights) for n in names}
                save_file(mean, folder / file.name, metadata={"format": "pt"})
        return {}

    return mix


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for file in checkpoints.weight_files(path) for name, shape in checkpoints.shapes(file).items()}


# How the ingredients read and standardize ----------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    """What a model folder says of the function it computes; adapters of a policy have no config of their own."""
    found = checkpoints.config(path).to_dict() if (path / "config.json").exists() else {}
    return {key: value for key, value in found.items() if key not in (*OWN, "use_cache")}


def _constants(paths: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """How a soup of reward models reads and standardizes; {} for policies. Refuses ingredients that read differently.

    mean and std are the weighted means of the ingredients'. If scores are linear in the weights, this mean is exact,
    and this std is not below the true one.
    """
    own = [settings(path) for path in paths]
    plain = {"mean": None, "std": None}
    first, *others = ({**_config(Path(path)), **one, **plain} for path, one in zip(paths, own, strict=True))
    for path, other in zip(paths[1:], others, strict=True):
        for key in sorted({*first, *other}):
            if (a := first.get(key)) != (b := other.get(key)):
                raise ValueError(f"{paths[0]} and {path} differ in {key}: {a} and {b}")
    if not own[0]:
        return {}
    mean, std = (math.fsum(w * one[key] for w, one in zip(weights, own, strict=True)) for key in ("mean", "std"))
    if std <= 0:
        raise ValueError(f"by these weights the scores would have standard deviation {std:g}; give others")
    return {**own[0], "mean": mean, "std": std}


def _check_tokenizers(paths: Sequence[Path]) -> None:
    """Refuse models that read texts differently. The soup gets the tokenizer of the first one."""
    first, *others = map(_reading, paths)
    for path, other in zip(paths[1:], others, strict=True):
        if odd := [name for name in first.keys() & other.keys() if first[name] != other[name]]:
            raise ValueError(f"{paths[0]} and {path} read texts differently: their {min(odd)} differ")


def _reading(path: Path) -> dict[str, Any]:
    """The files that decide how texts become tokens, without how batches are padded or cut."""
    found: dict[str, Any] = {}
    if (path / "tokenizer.json").exists():
        saved = checkpoints.read_json(path / "tokenizer.json")
        found["tokenizer.json"] = {key: saved[key] for key in saved if key not in ("padding", "truncation")}
    if (path / "chat_template.jinja").exists():
        found["chat_template.jinja"] = (path / "chat_template.jinja").read_text()
    return found
