"""Soups: one model from several by weights, of LoRA adapters on one base or of whole models.

Policies and reward models alike. Modes of adapters, Δ_i = s_i B_i A_i: `delta`, base + Σ w_i Δ_i exactly, at rank
Σ r_i; `svd`, the same cut to --rank; `factor`, A and B averaged apart as in Personalized Soups (`pyrite.soups`).
Mode of whole models: `full`, Σ w_i θ_i tensor by tensor.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pyrite import adapters, checkpoints, runs, soups
from pyrite.loading import is_classifier, settings, verify
from pyrite.members import OWN
from pyrite.options import Count, Real
from pyrite.progress import say
from pyrite.runs import Run

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
        points = {"model": soups.shares(config.weights or None, k, normalize=config.normalize)}
    elif config.weights or not config.normalize:
        raise ValueError("--steps makes the weights of its grid, all of sum 1: leave out --weights and --no-normalize")
    else:
        grid = soups.simplex(k, config.steps)
        points = {"models/" + ",".join(f"{weight:.4g}" for weight in weights): [*weights] for weights in grid}
    return points


def _adapters(config: Config) -> Cook:
    """Ingredients with adapters, read and checked."""
    for path in config.ingredients:
        if not (Path(path) / adapters.ABOUT).exists():
            raise ValueError(f"{path}: no folder with adapters; --mode full merges whole models")
    ingredients = [adapters.read(path) for path in config.ingredients]
    mode: Any = config.mode
    adapters.check_alike(ingredients, mode=mode)
    if ingredients[0].whole:
        _check_sum(config)

    def cook(weights: Sequence[float], folder: Path) -> dict[str, Any]:
        soup = adapters.merged(ingredients, weights, mode=mode, rank=config.rank)
        adapters.write(soup, folder)
        modules = adapters.compared(ingredients, weights, soup)
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
        if (path / adapters.ABOUT).exists() or not (path / "config.json").exists():
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
        adapters.copy_beside(paths[0], folder)
        with _opened(paths) as models:
            for file in checkpoints.weight_files(paths[0]):
                with safe_open(file, "pt") as opened:
                    names = list(opened.keys())
                found = {n: soups.weighted([model[n].get_tensor(n) for model in models], weights) for n in names}
                save_file(found, folder / file.name, metadata={"format": "pt"})
        return {}

    return cook


def _check_sum(config: Config) -> None:
    if config.weights and not config.normalize:
        what = "a whole model" if config.mode == "full" else "a module saved whole beside low ranks, a reward head,"
        adapters.check_sum(config.weights, what=what)


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
    first, *others = ({**_config(path), **one, "mean": None, "std": None} for path, one in zip(paths, own, strict=True))
    for path, other in zip(paths[1:], others, strict=True):
        for key in sorted({*first, *other}):
            if (a := first.get(key)) != (b := other.get(key)):
                raise ValueError(f"{paths[0]} and {path} differ in {key}: {a} and {b}")
    return own


def _config(path: str) -> dict[str, Any]:
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
