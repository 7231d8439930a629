"""Texts as one model reads them: its own tokens, its own chat template, its own limits."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from pyrite import __version__
from pyrite.core import checkpoints, runs
from pyrite.data import text
from pyrite.data.text import Encoded
from pyrite.models.loading import Dtype, backbone
from pyrite.models.policy import Policy
from pyrite.models.references import tables
from pyrite.models.references.tables import Text, digest, row_id

# identity: What makes two references the same: hashes of weights, tokenizer, template and settings, known before any
# scoring.


Conditioning = Literal["prompt", "prior"]

# of a model's config: where it came from and what generation reads, which no log-probability depends on
_IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id", "pyrite")


def weights_hash(model: Any) -> str:
    """sha256 of names, dtypes, shapes and bytes of all weights, adapters and architecture settings included.

    Adapters that add nothing yet (B = 0) are left out: a policy with fresh adapters is still its base model.
    """
    state = dict(_weights(model))
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock to the others
        hashes = list(pool.map(_bytes_hash, state.values()))
    named = [
        [name, str(value.dtype), list(value.shape), seen]
        for (name, value), seen in zip(state.items(), hashes, strict=True)
    ]
    config = {key: value for key, value in backbone(model).config.to_dict().items() if key not in _IDLE}
    scales = _adapter_scales(model) if any("lora_" in name for name in state) else {}
    return digest([named, json.loads(json.dumps(config, default=str), parse_constant=str), scales])


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what turns text to ids: vocabulary, merges, normalizer, added and special tokens; not the template."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {name: parts.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    else:
        parts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "unk")]
    return digest([parts, special])


def template_hash(tokenizer: Any) -> str | None:
    """sha256 of the chat template, None without one."""
    return digest(tokenizer.chat_template) if tokenizer.chat_template else None


def context(path: str | Path) -> int:
    """Longest sequence of a model in tokens, from its settings alone."""
    folder = checkpoints.place(path)
    settings = checkpoints.config(checkpoints.place(checkpoints.base_name(folder) or folder)).get_text_config()
    return int(getattr(settings, "max_position_embeddings", None) or 1 << 30)


def files_hash(path: str | Path) -> str | None:
    """Hash of a model's files, base of adapters included; None where they are not on this machine."""
    folder = _folder(path)
    if folder is None:
        return None
    base = checkpoints.base_name(folder)
    below = files_hash(base) if base else ""
    return None if below is None else digest([runs.fingerprint(folder), below])


def ids_hash(ids: Sequence[int]) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(array("i", ids).tobytes()).hexdigest()


def reading(tokenizer: Any, *, conditioning: Conditioning, max_length: int, max_prompt: int) -> dict[str, Any]:
    """The part of a recipe that says how texts become ids."""
    template = tokenizer.chat_template
    start = "the template's own" if template else "added" if _start(tokenizer) is not None else "none"
    prior = dict(zip(("header", "ids"), prior_prompt(tokenizer), strict=True)) if conditioning == "prior" else {}
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "template": {
            "sha256": template_hash(tokenizer),
            "generation_prompt": bool(template),
            "arguments": text.template_arguments(tokenizer),
            "system": "the template's own",
            "start_token": start,
            "strip": False,
            "end_token": [text.end_id(tokenizer), "after finished answers"],
        },
        "conditioning": {"kind": conditioning, **prior},
        "truncation": {
            "max_length": max_length,
            "max_prompt": max_prompt,
            "unit": "tokens",
            "prompt_keeps": "end",
            "response_keeps": "start",
            "truncated_rows": "kept and marked",
        },
        "reduction": "sum",
        "mask": {"turns": "the last answer", "end_token": "counted"},
    }


def scoring(policy: Policy, *, precision: Dtype) -> dict[str, Any]:
    """The part of a recipe that says which model scores, and in which arithmetic."""
    model = backbone(policy.model)
    return {
        "weights": weights_hash(policy.model),
        "numerics": {
            **arithmetic(dtype=str(model.dtype).removeprefix("torch."), precision=precision),
            "attention": "packed" if policy.packed else str(model.config._attn_implementation),
            "padding": "none" if policy.packed else "right",
            "tensor_parallel": 1,
        },
    }


def arithmetic(*, dtype: str, precision: Dtype) -> dict[str, Any]:
    """Precisions of a computation: weights, products, log-softmax, sums; and the code that made it."""
    return {"weights": dtype, "compute": precision, "log_softmax": "float32", "sum": "float64", "code": __version__}


def prior_prompt(tokenizer: Any) -> tuple[str, list[int]]:
    """What a model reads before an answer without its prompt, as text and as ids.

    Where the chat template opens an answer with a header, the start token (if the template writes one) and exactly
    that header; otherwise the start token alone. Raises ValueError for a tokenizer with neither.
    """
    opening = ""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "x"}]
        shown, asked = (text.render(tokenizer, turn, ask=ask) for ask in (False, True))
        header = asked[len(shown) :] if asked.startswith(shown) else ""
        begins = tokenizer.bos_token if tokenizer.bos_token and asked.startswith(tokenizer.bos_token) else ""
        opening = begins + header
    ids = tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"] if opening else []
    if ids:
        return opening, list(ids)
    start = _start(tokenizer)
    if start is None:
        raise ValueError("a prior needs a start token or a chat template with a header; this tokenizer has neither")
    return tokenizer.convert_ids_to_tokens(start), [start]


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in order of names, each storage once."""
    state = backbone(model).state_dict()
    fresh = all(not bool(value.any()) for name, value in state.items() if "lora_B" in name)
    seen: set[tuple[Any, ...]] = set()
    for name in sorted(state):
        value, key = state[name].detach(), (state[name].data_ptr(), state[name].shape)
        if key in seen or (fresh and "lora_" in name):
            continue
        seen.add(key)
        yield name.replace(".base_layer.", "."), value


def _bytes_hash(value: Tensor) -> str:
    flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _adapter_scales(model: Any) -> dict[str, list[Any]]:
    if not isinstance(model, PeftModel):
        return {}
    return {name: [c.r, c.lora_alpha, c.use_rslora] for name, c in model.peft_config.items()}  # type: ignore[attr-defined]


def _start(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def _folder(path: str | Path) -> Path | None:
    """The folder of a model: its own, or that of a Hub name in the local cache."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(path), "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


# readings: Texts as one model reads them: its own tokens, its own chat template, its own limits.


@dataclass(frozen=True)
class Reading:
    """N distinct texts as a scorer reads them, and the part of the recipe that says how.

    cut: whether its prompt lost its beginning; where: its name in an error; unknown: the id that stands for text the
    tokenizer does not know, None where there is none.
    """

    texts: list[Text]
    ids: list[str]
    encoded: list[Encoded]
    cut: list[bool]
    where: list[str]
    unknown: int | None
    recipe: dict[str, Any]

    @cached_property
    def hashes(self) -> list[tuple[str, str]]:
        """Of the prompt and answer ids of each text."""
        return [(ids_hash(one.prompt), ids_hash(one.response)) for one in self.encoded]

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is scored, whatever its order: the texts, and the ids they became."""
        rows = sorted(zip(self.ids, self.hashes, strict=True))
        return {"rows": len(rows), "sha256": tables.digest([row for row, _ in rows]), "ids": tables.digest(rows)}


def limits(context: int, max_length: int | None, max_prompt: int | None) -> tuple[int, int]:
    """Longest text and longest prompt in tokens; by default, as in training, the context and three quarters of it."""
    whole = context if max_length is None else max_length
    return whole, whole * 3 // 4 if max_prompt is None else max_prompt


def read(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    conditioning: Conditioning,
    max_length: int,
    max_prompt: int,
    where: Callable[[int], str] | None = None,
    encoded: Sequence[Encoded] | None = None,
) -> Reading:
    """Texts as ids, each distinct one once, answers to one prompt side by side.

    encoded: the texts with their prompts as this tokenizer and these limits give them, where that was done before.
    Raises ValueError naming `where(text)` for a text that leaves no room.
    """
    recipe = reading(tokenizer, conditioning=conditioning, max_length=max_length, max_prompt=max_prompt)
    first = _distinct(texts)
    some, names = [texts[i] for i in first.values()], [(where or _place)(i) for i in first.values()]
    known = None if encoded is None else [encoded[i] for i in first.values()]
    made = known or _encoded(tokenizer, some, names, max_length=max_length, max_prompt=max_prompt)
    if conditioning == "prior":
        made, cut = _without_prompts(tokenizer, made, max_prompt=max_prompt), [False] * len(some)
    else:
        cut = cut_prompts(tokenizer, some, made)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != text.end_id(tokenizer) else None
    return Reading(some, list(first), made, cut, names, unknown, recipe)


def cut_prompts(tokenizer: Any, texts: Sequence[Text], encoded: Sequence[Encoded]) -> list[bool]:
    """Whether each prompt lost its beginning to a limit."""
    whole = text.encode_prompts(tokenizer, [one.prompt for one in texts])
    return [len(one.prompt) < len(ids) for one, ids in zip(encoded, whole, strict=True)]


def _distinct(texts: Sequence[Text]) -> dict[str, int]:
    """First place of each distinct text by its id, answers to one prompt side by side."""
    first: dict[str, int] = {}
    asked: dict[str, int] = {}
    for i, one in enumerate(texts):
        first.setdefault(row_id(one), i)
        asked.setdefault(repr(one.prompt), i)
    return dict(sorted(first.items(), key=lambda item: asked[repr(texts[item[1]].prompt)]))


def _encoded(
    tokenizer: Any, texts: Sequence[Text], names: Sequence[str], *, max_length: int, max_prompt: int
) -> list[Encoded]:
    return text.encode_all(
        tokenizer,
        [one.prompt for one in texts],
        [one.answer for one in texts],
        finished=[one.finished for one in texts],
        max_length=max_length,
        max_prompt=max_prompt,
        where=names.__getitem__,
    )


def _without_prompts(tokenizer: Any, encoded: Sequence[Encoded], *, max_prompt: int) -> list[Encoded]:
    """The same tokens of the answers, cut where they were with their prompts, after what a prior begins with."""
    _, opening = prior_prompt(tokenizer)
    if len(opening) > max_prompt:
        raise ValueError(f"max_prompt {max_prompt} leaves no room for the {len(opening)} tokens a prior begins with")
    return [replace(one, prompt=opening) for one in encoded]


def _place(i: int) -> str:
    return f"text {i + 1}"
