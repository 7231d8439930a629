"""Models from disk: opened whole or refused, given adapters or a new head, saved; an ensemble shares what it can."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyrite.core import checkpoints, specs
from pyrite.core.processes import say, world
from pyrite.data.text import PLAIN, Template, end_id, load_tokenizer, stop_ids
from pyrite.math.ranges import Count, Fraction, Positive, fault

Dtype = Literal["float32", "bfloat16"]
OWN = ("pyrite", "_name_or_path", "transformers_version", "dtype")  # what the configs of like models may differ in
# no weights, but old versions of transformers saved them too; a mask as (1, 1, L, L)
BUFFER = re.compile(r"(^|\.)(masked_bias|inv_freq|cos_cached|sin_cached|position_ids)$")
MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers, trained in place of the weights.

    r: their rank. alpha: they are scaled by alpha / r. dropout: of what they read. target_modules: names of linear
    layers, comma separated, or all of them.
    """

    r: Count = 16
    alpha: Positive = 16.0
    dropout: Fraction = 0.0
    target_modules: str = "all-linear"

    @classmethod
    def parse(cls, spec: str | None) -> Lora | None:
        """Adapters from a spec string, such as "lora(r=8, alpha=32)"; None for None."""
        try:
            made: Any = specs.part(spec, {"lora": lora}).function if spec else None
        except ValueError as error:
            raise ValueError(f"--lora {spec}: {error}") from None
        return made


def lora(*, r: Count = 16, alpha: Positive = 16.0, dropout: Fraction = 0.0, target_modules: str = "all-linear") -> Lora:
    """Low-rank adapters; see `Lora`."""
    return Lora(r, alpha, dropout, target_modules)


def backbone(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model below any adapters (which stay active inside it)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def tokenizer_of(path: str | Path, *, template_args: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name. Prints its note, if it has one."""
    tokenizer, note = load_tokenizer(path, template_args=template_args)
    if note:
        say(f"  note: {path}: {note}")
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """A pad id other than the end token's: classifiers read the last token that is no pad, the end token."""
    pad, end = tokenizer.pad_token_id, end_id(tokenizer)
    return pad if pad is not None and pad != end else int(end == 0)


def opened(
    auto: Any, path: str | Path, *, dtype: Dtype, new_head: bool = False, template: Template = PLAIN
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder or Hub name that fit each other, loaded as by `load_model`."""
    tokenizer = tokenizer_of(path, template_args=template.template_args)
    model = load_model(auto, path, dtype=dtype, new_head=new_head)
    check_ids(tokenizer, model, path)
    return model, tokenizer


def verify(auto: Any, path: str | Path) -> None:
    """Refuse what `opened` would refuse. Reads one tensor at a time and allocates no model."""
    tokenizer, _ = load_tokenizer(path)
    check_ids(tokenizer, load_model(auto, path, dtype="float32", device="meta"), path)


def load_model(
    auto: Any, path: str | Path, *, dtype: Dtype, new_head: bool = False, device: Any = None
) -> PreTrainedModel | PeftModel:
    """From a folder or Hub name, on this process's device. A folder with adapters loads its base below them.

    auto: the Auto class. new_head: the head may be missing, as it will be drawn or is not read. Raises ValueError if
    the files are not a whole and finite model of this kind: no missing tensor is ever drawn at random.
    """
    folder = checkpoints.place(path)
    about = checkpoints.adapter_settings(folder)
    if about is None:
        return _whole(auto, folder, name=checkpoints.name_of(path), dtype=dtype, new_head=new_head, device=device)
    _check_task(auto, path, about.get("task_type"))
    tensors = checkpoints.shapes(checkpoints.adapter_file(folder))
    name = str(checkpoints.base_name(folder))
    identity = checkpoints.check_base(folder, name)
    below = checkpoints.place(name, revision=about.get("revision"))
    brought = {key.removeprefix("base_model.model.") for key in tensors}  # a head that is saved beside the adapters
    model = _whole(auto, below, name=name, dtype=dtype, new_head=new_head, device=device, brought=brought)
    made = add_adapters(model, folder)
    made.base_identity = identity
    return made


def add_adapters(model: Any, path: str | Path, *, name: str = "default") -> Any:
    """The model with a folder's adapters, beside those it has. Raises ValueError if any tensor is missing, left over or
    of another shape."""
    folder = Path(path)
    saved = checkpoints.shapes(checkpoints.adapter_file(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are refused below
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, ignore_mismatched_sizes=True)
            else:
                model = PeftModel.from_pretrained(
                    model, str(folder), name, is_trainable=True, ignore_mismatched_sizes=True
                )
            wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            if saved.keys() - wanted.keys():  # peft saves whole embeddings beside the adapters on them
                whole = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)
                wanted |= {key: whole[key] for key in whole.keys() & saved.keys()}
                model.own_embeddings = True  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(
            f"{path}: these adapters do not go onto their base ({checkpoints.first_line(error)})"
        ) from error
    have = {key: tuple(value.shape) for key, value in wanted.items()}
    shared = saved.keys() & have.keys()
    other = [f"{k}: {list(saved[k])} in the file, {list(have[k])} here" for k in shared if saved[k] != have[k]]
    advice = "they were made for another model, or the file is incomplete: copy them again, with their base"
    _refuse(path, "adapters on their base", have.keys() - saved.keys(), saved.keys() - have.keys(), other, advice)
    _check_finite(checkpoints.tensors(checkpoints.adapter_file(folder)), path)
    return model


def _whole(
    auto: Any,
    folder: Path,
    *,
    name: str,
    dtype: Dtype,
    new_head: bool,
    device: Any,
    brought: Iterable[str] | None = None,
) -> PreTrainedModel:
    """A model without adapters. brought: names of tensors that the adapters on it bring along."""
    files = checkpoints.weight_files(folder)
    if wrong := fault(dtype, Dtype):
        raise ValueError(f"dtype {dtype!r}: {wrong}")
    classifier = auto is AutoModelForSequenceClassification
    options: dict[str, Any] = {"num_labels": 1} if classifier else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = auto.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                device_map=device,
                **options,
            )
    except Exception as error:
        raise ValueError(f"{name}: no model could be loaded from its files: {checkpoints.first_line(error)}") from error
    report["unexpected_keys"] = _weights(report["unexpected_keys"], files)
    _check_report(model, report, name, classifier=classifier, new_head=new_head, brought=set(brought or ()))
    model.name_or_path = model.config.name_or_path = name  # adapters note it as their base
    if device is None:
        model.to(world().device)
        _check_finite(model.named_parameters(), name)
    else:
        _check_finite((one for file in files for one in checkpoints.tensors(file)), name)
    return model


def _weights(names: Iterable[str], files: Iterable[Path]) -> list[str]:
    """The weights among some tensors, without the buffers that old versions of transformers saved."""
    left = [name for name in names if not BUFFER.search(name)]
    if not any(MASK.search(name) for name in left):
        return left
    shapes = {name: shape for file in files for name, shape in checkpoints.shapes(file).items()}
    return [name for name in left if not (MASK.search(name) and len(shapes.get(name, ())) == 4)]


def _check_report(
    model: Any, report: dict[str, Any], name: str, *, classifier: bool, new_head: bool, brought: set[str]
) -> None:
    """Refuse tensors that are missing, left over or of another shape, except those of a head that may be new."""
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    other = {
        key: f"{key}: {list(there)} in the file, {list(here)} here" for key, there, here in report["mismatched_keys"]
    }
    model.new_modules = sorted({_module(model, key) for key in missing | other.keys()})  # adapters save them whole
    if new_head or (brought and classifier):
        unexpected = {key for key in unexpected if not _is_head(model, key)}
        free = {key for key in missing | other.keys() if _is_head(model, key)}
        if not new_head:
            free &= brought
        missing, other = missing - free, {key: text for key, text in other.items() if key not in free}
    if classifier and missing and all(_is_head(model, key) for key in missing):
        advice = "it is no trained reward model: train one with `pyrite reward`, or give the folder of one"
    elif not classifier and any(key.startswith(("score.", "classifier.")) for key in unexpected):
        advice = "it is a reward model or a classifier: give a language model here"
    else:
        advice = "the files are incomplete or of another model than their config says: save or copy the model again"
    _refuse(name, type(model).__name__, missing, unexpected, list(other.values()), advice)


def _refuse(
    path: str | Path, what: str, missing: Iterable[str], unexpected: Iterable[str], other: list[str], advice: str
) -> None:
    found = {"missing": list(missing), "left over": list(unexpected), "of another shape": other}
    if any(found.values()):
        counts = "; ".join(f"{len(k)} {word} ({checkpoints.listed(k)})" for word, k in found.items() if k)
        raise ValueError(f"{path}: its tensors are not those of {what}: {counts}; {advice}")


def _is_head(model: Any, key: str) -> bool:
    """Whether a tensor belongs to the head, with which an encoder's pooler is trained."""
    first, _, rest = key.partition(".")
    if first == model.base_model_prefix and model.base_model is not model:
        return rest.startswith("pooler.")
    return first == "pooler" or first not in dict(model.base_model.named_children())


def _module(model: Any, key: str) -> str:
    """The part of a head that a tensor belongs to, by the name under which adapters save it."""
    parts = key.split(".")
    return parts[1] if parts[0] == model.base_model_prefix and len(parts) > 2 else parts[0]


def _check_task(auto: Any, path: str | Path, task: str | None) -> None:
    wanted, what = {
        AutoModelForCausalLM: ("CAUSAL_LM", "a language model"),
        AutoModelForSequenceClassification: ("SEQ_CLS", "a reward model"),
    }.get(auto, (None, ""))
    if task and wanted and task != wanted:
        raise ValueError(
            f"{path}: holds adapters for {task}, and {what} ({wanted}) is needed here; give another folder, or merge "
            "them into their base by `pyrite merge` first"
        )


def _check_finite(tensors: Iterable[tuple[str, torch.Tensor]], path: str | Path) -> None:
    for name, value in tensors:
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite; the model is broken: copy it again")


def check_ids(tokenizer: Any, model: Any, path: str | Path) -> None:
    """Raises ValueError for a tokenizer with ids that the model has no embedding for.

    Special tokens that never appear in text are allowed, such as those of images in the text model of a family.
    """
    table = backbone(model).get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) or backbone(model).config.get_text_config().vocab_size
    beyond = {token: last for token, last in tokenizer.get_vocab().items() if last >= rows}
    used = {*stop_ids(tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = {} if not beyond else tokenizer.added_tokens_decoder
    spare = {token for token, last in beyond.items() if last not in used and last in added and added[last].special}
    spare = {token for token in spare if token not in str(tokenizer.chat_template)}
    if beyond.keys() - spare:
        token, last = max(beyond.items(), key=lambda item: item[1])
        raise ValueError(
            f"{path}: its tokenizer has ids up to {last} ({token!r}), its embedding {rows} rows: they do not belong "
            "together; give the model its own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save"
        )


# What a folder says of its model -------------------------------------------------------------------------------------


def adapters_of(path: str | Path) -> dict[str, Any]:
    """The settings of a folder's adapters. Raises ValueError for a model without."""
    folder = checkpoints.place(path)
    about = checkpoints.adapter_settings(folder)
    if about is None:
        hint = checkpoints.inside(folder) or "; it is a whole model already"
        raise ValueError(f"{path}: no adapters here (no adapter_config.json){hint}")
    return about


def is_classifier(path: str | Path) -> bool:
    """Whether a model has the head of a reward model, in its files or beside its adapters."""
    folder = checkpoints.place(path)
    about = checkpoints.adapter_settings(folder)
    if about is not None:
        return about.get("task_type") == "SEQ_CLS"
    names = checkpoints.read_json(folder / "config.json").get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def settings(path: str | Path) -> dict[str, Any]:
    """What a saved reward model says of itself, beside its adapters if it has some. {} for any other model."""
    folder = checkpoints.place(path)
    if not (folder / "config.json").exists() and (folder / checkpoints.ABOUT).exists():
        return {}
    return checkpoints.read_json(folder / "config.json").get("pyrite") or {}


def member_paths(folder: str | Path) -> list[Path]:
    """Folders of the members of a reward run, in order."""
    folder = Path(folder)
    members = sorted(folder.glob("member_*"), key=lambda path: int(path.name.split("_")[1]))
    if members and not (folder / "done.json").exists():
        raise ValueError(f"{folder}: this reward run is not done; run `pyrite reward` again to finish it")
    if members:
        return members
    some = any((folder / name).exists() for name in ("config.json", checkpoints.ABOUT))
    if some and (folder / "tokenizer_config.json").exists():
        return [folder]
    raise ValueError(f"{folder}: no reward model here; expected member_0/ ... as `pyrite reward` writes them")


def save(model: Any, folder: str | Path, tokenizer: Any) -> None:
    """Hugging Face layout, safetensors, tokenizer included; adapters note which weights they were trained on."""
    if isinstance(model, PeftModel):
        own = getattr(model, "own_embeddings", False)  # else they are the base's, which are not trained
        model.save_pretrained(str(folder), save_embedding_layers=own)
        name = model.peft_config[str(model.active_adapter)].base_model_name_or_path
        if identity := getattr(model, "base_identity", None):
            checkpoints.write_base(Path(folder), str(name), str(identity))
        ends: Any = getattr(backbone(model), "generation_config", None)
        if ends is not None:  # adapters alone would leave behind at which tokens an answer ends
            ends.to_json_file(Path(folder) / "generation_config.json")
    else:
        model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


# What is trained: adapters, a new head -------------------------------------------------------------------------------


def has_bare_head(model: Any) -> bool:
    """Whether the vocabulary head is its weight alone. The probe misses a bias or an adapter that is 0 at first."""
    head = backbone(model).get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None


def adapted(model: Any, lora: Lora | None, *, task: str) -> Any:
    """The model with new adapters, which always start with the same numbers."""
    if lora is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            "--lora: the model has adapters already, and training goes on with them: leave "
            "--lora out, or merge them into their base by `pyrite merge` first"
        )
    _check_targets(model, lora.target_modules)
    whole = [name for name in getattr(model, "new_modules", ()) if task == "SEQ_CLS" and name != "score"]
    left_out = _not_adaptable(model) if lora.target_modules == "all-linear" else []
    if left_out:
        names = checkpoints.listed({name.rpartition(".")[2] for name in left_out})
        say(f"  note: no adapters on {names}: this family's kernels read their weights past any adapter")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes floats, its annotation says int
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.target_modules == "all-linear" else lora.target_modules.split(","),
        exclude_modules=[*left_out, *_below(model, whole)] or None,
        modules_to_save=whole or None,
        task_type=task,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that it has deprecated
        torch.manual_seed(0)
        try:
            made: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(
                f"--lora: target_modules {lora.target_modules!r}: {' '.join(str(error).split())}"
            ) from error
    base = model.name_or_path
    made.base_identity = checkpoints.identity(checkpoints.place(base)) if base else None
    return made


def _check_targets(model: Any, targets: str) -> None:
    """Refuse a name that no layer has: peft ignores it silently if another name is found."""
    layers = {name for name, module in model.named_modules() if not list(module.children())}
    for target in targets.split(",") if targets != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            linear = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, nn.Linear)}
            known = checkpoints.listed(linear, most=12)
            raise ValueError(
                f"--lora: target_modules {targets}: no layer is called {target!r}; linear layers are {known}"
            )


def _not_adaptable(model: Any) -> list[str]:
    """Full names of linear layers that adapters would not reach.

    A state-space mixer hands the weights of three of its layers to its kernels and never calls the layers.
    """
    mixers = [name for name, module in model.named_modules() if hasattr(module, "conv1d") and hasattr(module, "A_log")]
    names = {f"{mixer}.{name}" for mixer in mixers for name in ("x_proj", "dt_proj", "out_proj")}
    return [name for name, module in model.named_modules() if name in names and isinstance(module, nn.Linear)]


def _below(model: Any, whole: Sequence[str]) -> list[str]:
    """Full names of linear layers inside modules that are trained whole."""
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in inside if set(name.split(".")) & set(whole)]


def draw_head(model: Any, *, seed: int, std: float) -> None:
    """Draw a new head from its own stream: N(0, std), bias 0."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters() if head is not None else ():
        zero = name.endswith("bias")
        drawn = torch.empty(parameter.shape).normal_(0, std, generator=generator)
        parameter.data.copy_(torch.zeros_like(drawn) if zero else drawn)


# Members of an ensemble: a trunk with several heads, or one base with several adapters, is in memory once -------------


def beside(model: Any, path: str | Path) -> tuple[Any, str | None] | None:
    """Load a reward model so that it shares its trunk, or its base below adapters, with one already in memory.

    Returns it with the name of its adapters, which must be activated before each use (None without adapters). Returns
    None if the two share nothing: another base, another trunk, or a head that is no decoder classifier's.
    """
    if isinstance(model, PeftModel):
        name = _adapter_beside(model, Path(path))
        return None if name is None else (model, name)
    head = _head_beside(model, Path(path))
    if head is None:
        return None
    twin = copy.copy(model)  # the same model, parameter for parameter, but for its head
    twin._modules = {**model._modules, "score": head}
    return twin, None


def active_adapter(model: Any) -> str | None:
    """The name of the active adapters, None for a model without."""
    return str(model.active_adapter) if isinstance(model, PeftModel) else None


def one_trunk(models: list[Any]) -> bool:
    """Whether these models, all without adapters, run the very same trunk."""
    if any(isinstance(model, PeftModel) for model in models):
        return False
    first, *others = (list(model.base_model.parameters()) for model in models)
    return all([*map(id, first)] == [*map(id, other)] for other in others)


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
    """The folder's head. None if anything but the head differs from the model."""
    mine = getattr(model, "score", None)
    whole = (path / "config.json").exists() and not (path / checkpoints.ABOUT).exists()
    if not isinstance(mine, nn.Module) or not whole:
        return None
    files = checkpoints.weight_files(path)
    here, there = ({**one.to_dict(), **dict.fromkeys(OWN)} for one in (model.config, checkpoints.config(path)))
    if here != there:
        return None
    own, seen, head = model.state_dict(), set(), {}
    for name, value in (one for file in files for one in checkpoints.tensors(file)):
        seen.add(name)
        if name.startswith("score."):
            head[name.removeprefix("score.")] = value.clone()
        elif name not in own or not torch.equal(own[name].cpu(), value.to(own[name].dtype)):
            return None
    twin = copy.deepcopy(mine)
    if seen != own.keys() or any(head[name].shape != value.shape for name, value in twin.state_dict().items()):
        return None
    twin.load_state_dict(head)
    return twin
