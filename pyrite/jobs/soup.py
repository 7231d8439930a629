"""Soups: one model from several by weights, of LoRA adapters on one base or of whole models.

Policies and reward models alike. Modes of adapters, Δ_i = s_i B_i A_i: `delta`, base + Σ w_i Δ_i exactly, at rank
Σ r_i; `svd`, the same cut to --rank; `factor`, A and B averaged apart as in Personalized Soups (`pyrite.math.merging`).
Mode of whole models: `full`, Σ w_i θ_i tensor by tensor.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft import set_peft_model_state_dict
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
from pyrite.models.decoder import adapter_layers
from pyrite.models.loading import OWN, Dtype, adapters_of, is_classifier, settings, tokenizer_of, verify
from pyrite.models.policy import Policy

# adapters: LoRA adapter folders as records: read, refused where they do not go together, merged with weights,
# written.


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
    whole = {name: merging.weighted([a.whole[name] for a in adapters], weights) for name in first.whole}
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
        exact = merging.deltas(parts, weights)
        near = merging.similarity(merging.factors(parts, weights), exact) if alike else (math.nan, math.nan)
        values = zip(("error", "cosine", "norm_ratio"), (merging.distance(part, exact), *near), strict=True)
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
            write(merged(adapters, merging.shares(None, len(adapters)), mode="delta"), folder)
            return cls(Policy.load(folder, dtype=dtype), adapters)

    def set(self, weights: Sequence[float], *, normalize: bool = True) -> Policy:
        """The policy at these weights: the object it always was, its adapters overwritten."""
        soup = merged(self.adapters, merging.shares(weights, len(self.adapters), normalize=normalize), mode="delta")
        model: Any = self.policy.model
        own = model.peft_config["default"]
        full = {name: merging.padded(part, own.r) for name, part in soup.low.items()}
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
        return merging.factors(parts, weights)
    exact = merging.deltas(parts, weights)
    return merging.truncated(exact, rank) if mode == "svd" else exact


def _config(first: dict[str, Any], low: dict[str, LowRank]) -> dict[str, Any]:
    """Of a soup: rank and scale its own, modules by their full names."""
    part = next(iter(low.values()))
    found = {"r": part.rank, "lora_alpha": part.scale * part.rank, "use_rslora": False, "init_lora_weights": True}
    named = {"target_modules": sorted(map(_module, low)), "exclude_modules": None, "layers_to_transform": None}
    return {**first, **found, **named, "layers_pattern": None}


def _module(name: str) -> str:
    """The module that a low-rank matrix belongs to, as the base names it."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


# soup: Soups: one model from several by weights, of LoRA adapters on one base or of whole models.


NEAR = 0.99  # cosine of averaged factors with averaged adapters that needs no remark
TABLE = ("weights", "rank", "largest_error", "lowest_cosine")  # of every soup of a grid, in the results
OUTPUTS = {
    "model/": "the soup: an adapter folder, or a whole model; soup.json tells what is in it",
    "models/WEIGHTS/": "with --steps, such a folder for each point of the grid",
}


@dataclass(frozen=True)
class Config:
    """Merge models by weights."""

    ingredients: tuple[str, ...]
    """Folders with adapters, or of whole models; several."""
    out: Path
    """Folder of the run, new or empty."""
    weights: tuple[Real, ...] = ()
    """One for each ingredient, at least 0, of sum 1; none: all alike."""
    normalize: bool = True
    """--no-normalize takes any weights as they stand: base + Σ w_i Δ_i, so a sum below 1 stays nearer to the base."""
    mode: Literal["delta", "factor", "svd", "full"] = "delta"
    """Adapters: their exact mean, A and B averaged apart, or the mean cut to --rank. Whole models: full."""
    rank: Count | None = None
    """Of mode svd; by default the ingredients' largest."""
    steps: Count | None = None
    """A soup for every way of dealing out 1/steps among the ingredients, in place of one at --weights."""


Cook = Callable[[Sequence[float], Path], dict[str, Any]]  # writes the soup of these weights, tells how it came out


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {f"ingredient {index}": path for index, path in enumerate(config.ingredients, 1)}


def run(config: Config) -> Run:
    """Check that the ingredients go together, merge, write; one soup, or a grid of them."""
    run = runs.start("soup", config, inputs=inputs)
    if run.done:
        return run
    points = _points(config)
    cook = _models(config) if config.mode == "full" else _adapters(config)
    own = _settings(config.ingredients)
    constants = {name: _constants(own, weights) for name, weights in points.items()}
    _check_tokenizers(config.ingredients)
    for path in config.ingredients:
        verify(AutoModelForSequenceClassification if is_classifier(path) else AutoModelForCausalLM, path)
    run.open()
    about = {"mode": config.mode, "ingredients": list(config.ingredients)}
    for name, weights in points.items():
        if run.writes and not (run.folder / name).exists():
            mix = zip(weights, config.ingredients, strict=True)
            say(f"soup: {name}: {' + '.join(f'{weight:g} {path}' for weight, path in mix)}")
            with _at_once(run.folder / name) as folder:
                found = cook(weights, folder)
                _set_constants(folder, constants[name])
                runs.write_json(folder / "soup.json", {**about, "inputs": run.inputs, "weights": weights, **found})
    run.wait()
    made = {name: runs.read_json(run.folder / name / "soup.json") for name in points}
    _remark(config.mode, made)
    if config.steps is None:
        return run.finish(**made["model"])
    rows = {name: {key: one[key] for key in TABLE if key in one} for name, one in made.items()}
    return run.finish(**about, soups=rows)


def _points(config: Config) -> dict[str, list[float]]:
    """Weights by the folder their soup goes to."""
    k = len(config.ingredients)
    if k < 2:
        raise ValueError(f"--ingredients names {k}; a soup takes at least 2")
    if config.rank is not None and (config.mode != "svd" or config.rank < 1):
        raise ValueError(f"--rank {config.rank}: a rank of at least 1, for --mode svd alone")
    if config.steps is None:
        points = {"model": merging.shares(config.weights or None, k, normalize=config.normalize)}
    elif config.weights or not config.normalize:
        raise ValueError("--steps makes the weights of its grid, all of sum 1: leave out --weights and --no-normalize")
    else:
        grid = merging.simplex(k, config.steps)
        points = {"models/" + ",".join(f"{weight:.4g}" for weight in weights): [*weights] for weights in grid}
    return points


def _adapters(config: Config) -> Cook:
    """Ingredients with adapters, read and checked."""
    for path in config.ingredients:
        if not (Path(path) / ABOUT).exists():
            raise ValueError(f"{path}: no folder with adapters; --mode full merges whole models")
    ingredients = [read(path) for path in config.ingredients]
    mode: Any = config.mode
    check_alike(ingredients, mode=mode)
    if ingredients[0].whole:
        _check_sum(config)

    def cook(weights: Sequence[float], folder: Path) -> dict[str, Any]:
        soup = merged(ingredients, weights, mode=mode, rank=config.rank)
        write(soup, folder)
        modules = compared(ingredients, weights, soup)
        return {"rank": soup.config["r"], **_summary(modules), "modules": modules}

    return cook


def _summary(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worst module of each measure; None where no module has it."""
    known = {key: [row[key] for row in modules.values() if row[key] is not None] for key in ("error", "cosine")}
    return {"largest_error": max(known["error"], default=None), "lowest_cosine": min(known["cosine"], default=None)}


def _models(config: Config) -> Cook:
    """Whole models, checked; tensors are read one at a time, and written in the files of the first."""
    paths = [Path(path) for path in config.ingredients]
    for path in paths:
        if (path / ABOUT).exists() or not (path / "config.json").exists():
            raise ValueError(f"{path}: no folder of a whole model; modes other than full merge adapters")
    _check_sum(config)
    with _opened(paths) as models:
        for path, model in zip(paths[1:], models[1:], strict=True):
            if odd := sorted(models[0].keys() ^ model.keys()):
                raise ValueError(f"{paths[0]} and {path} are different models: only one has {odd[0]}")
            for name in model:
                a, b = (one[name].get_slice(name).get_shape() for one in (models[0], model))
                if a != b:
                    raise ValueError(f"{paths[0]} and {path} are different models: {name} is {a} and {b}")

    def cook(weights: Sequence[float], folder: Path) -> dict[str, Any]:
        copy_beside(paths[0], folder)
        with _opened(paths) as models:
            for file in checkpoints.weight_files(paths[0]):
                with safe_open(file, "pt") as opened:
                    names = list(opened.keys())
                found = {n: merging.weighted([model[n].get_tensor(n) for model in models], weights) for n in names}
                save_file(found, folder / file.name, metadata={"format": "pt"})
        return {}

    return cook


def _check_sum(config: Config) -> None:
    if config.weights and not config.normalize:
        what = "a whole model" if config.mode == "full" else "a module saved whole beside low ranks, a reward head,"
        check_sum(config.weights, what=what)


@contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
    """Of every model: the file that holds a tensor, by the tensor's name."""
    with ExitStack() as stack:
        models: list[dict[str, Any]] = []
        for path in paths:
            files = [stack.enter_context(safe_open(file, "pt")) for file in checkpoints.weight_files(path)]
            models.append({name: file for file in files for name in file.keys()})  # noqa: SIM118, no dict
        yield models


@contextmanager
def _at_once(folder: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.replace(folder)


def _settings(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What every reward model says of how it reads and standardizes; {} of a policy.

    Raises ValueError for models whose configs differ in more than mean and std.
    """
    own = [settings(path) for path in paths]
    first, *others = (
        {**_soup_config(path), **one, "mean": None, "std": None} for path, one in zip(paths, own, strict=True)
    )
    for path, other in zip(paths[1:], others, strict=True):
        for key in sorted({*first, *other}):
            if (a := first.get(key)) != (b := other.get(key)):
                raise ValueError(f"{paths[0]} and {path} differ in {key}: {a} and {b}")
    return own


def _soup_config(path: str) -> dict[str, Any]:
    """What a model folder says of what it computes; adapters of a policy say nothing, their base does."""
    if not (Path(path) / "config.json").exists():
        return {}
    found = checkpoints.config(Path(path)).to_dict()
    return {key: value for key, value in found.items() if key not in (*OWN, "use_cache")}


def _constants(own: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """Settings of a soup of reward models, {} of policies; mean and std are weighted means of the ingredients'.

    As far as scores are linear in the weights, this mean is exact, and this std is not below the true one.
    """
    if not own[0]:
        return {}
    mean, std = (math.fsum(w * one[key] for w, one in zip(weights, own, strict=True)) for key in ("mean", "std"))
    if std <= 0:
        raise ValueError(f"by these weights the scores would have standard deviation {std:g}; give others")
    return {**own[0], "mean": mean, "std": std}


def _set_constants(folder: Path, constants: dict[str, Any]) -> None:
    if constants:
        config = runs.read_json(folder / "config.json")
        runs.write_json(folder / "config.json", {**config, "pyrite": constants})


def _check_tokenizers(paths: Sequence[str]) -> None:
    """Raises ValueError for models that read texts differently; the soup gets the tokenizer of the first."""
    first, *others = (_reading(Path(path)) for path in paths)
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


def _remark(mode: str, made: dict[str, dict[str, Any]]) -> None:
    """Says where averaging factors was not averaging adapters."""
    cosine = min((one["lowest_cosine"] for one in made.values() if one.get("lowest_cosine") is not None), default=1.0)
    if mode == "factor" and cosine < NEAR:
        say(f"  note: averaged factors are not averaged adapters: cosine {cosine:.2f} with them in the worst module;")
        say("  they are near only while all A are alike, as soon after a start from one draw. --mode delta is exact")
