"""The file of a reference: log-probabilities of texts under one model, and a recipe of all that decides them.

A folder of Parquet parts and, written last, a manifest with their checksums and the fingerprint of the recipe. It is
whole and unchanged, or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import Tensor

from pyrite import __version__
from pyrite.core import checkpoints, runs
from pyrite.data import text
from pyrite.data.responses import Answer, Prompt, Responses
from pyrite.models.loading import Dtype, backbone
from pyrite.models.policy import Policy

FORMAT = "pyrite reference 1"
MANIFEST, PARTS = "manifest.json", "part-*.parquet"
SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "prompt_ids_sha": pa.string(),
        "resp_ids_sha": pa.string(),
        "n_prompt_tokens": pa.int32(),
        "n_resp_tokens": pa.int32(),  # -1 if unknown, in an imported reference
        "n_unknown": pa.int32(),  # tokens of the answer that stand for text the tokenizer does not know
        "truncated": pa.bool_(),
        "prompt_truncated": pa.bool_(),
        "sum_logp": pa.float64(),
    }
)
# of a model's config: where it came from and what generation reads, which no log-probability depends on
_IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id", "pyrite")


class BadReference(ValueError):  # noqa: N818, there is a ReferenceError already
    """A reference that cannot be used; the message begins with the rule, R1 to R9, that it breaks."""


@dataclass(frozen=True, eq=False)
class ReferenceTable:
    """N texts scored by one model: a list or an array (N,) for each column, log-probabilities in nats.

    token_logp: float32, the rows' tokens one after the other; None if only the sums are known or were read.
    """

    folder: Path
    manifest: dict[str, Any]
    row_id: list[str]
    prompt_ids_sha: list[str]
    resp_ids_sha: list[str]
    n_prompt_tokens: np.ndarray
    n_resp_tokens: np.ndarray
    n_unknown: np.ndarray
    truncated: np.ndarray
    prompt_truncated: np.ndarray
    sum_logp: np.ndarray
    token_logp: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that can change a number: scorer, tokenizer, template, conditioning, truncation, precision."""
        return self.manifest["recipe"]

    @property
    def imported(self) -> bool:
        """Whether the sums came from elsewhere, so that what was read is not known."""
        return "imported" in self.recipe

    @cached_property
    def places(self) -> dict[str, int]:
        """Row of each row_id."""
        return {name: row for row, name in enumerate(self.row_id)}

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.n_resp_tokens.astype(np.int64))])

    def rows(self, said: Responses) -> list[int]:
        """Where some of its texts stand."""
        return [self.places[name] for name in row_ids(said)]

    def tokens(self, row: int) -> np.ndarray:
        """Token log-probabilities of one row, (T,) float32."""
        assert self.token_logp is not None
        return self.token_logp[self._begins[row] : self._begins[row + 1]]


def row_id(prompt: Prompt, answer: Answer) -> str:
    """sha256 of the canonical JSON of the messages; a prompt given as a str is the one user message it stands for."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    return digest([*turns, {"role": "assistant", **({"content": answer} if isinstance(answer, str) else answer)}])


def row_ids(said: Responses) -> list[str]:
    """The id of each of N responses."""
    return [row_id(prompt, answer) for prompt, answer in zip(said.prompts, said.texts, strict=True)]


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    written = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()


def margins(logp: np.ndarray) -> dict[str, Any]:
    """Of the margins m = log π_ref(chosen) − log π_ref(rejected) of B pairs: mean, sd, quantiles, ranking accuracy.

    logp (2B,): chosen and rejected alternately, nats. Accuracy: the share of pairs with m > 0, ties ½.
    """
    m = np.asarray(logp[::2], dtype=np.float64) - np.asarray(logp[1::2], dtype=np.float64)
    quantiles = {f"q{100 * share:02.0f}": float(np.quantile(m, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
    sd = float(m.std(ddof=1)) if len(m) > 1 else 0.0
    return {"mean": float(m.mean()), "sd": sd, **quantiles, "accuracy": float(((m > 0) + 0.5 * (m == 0)).mean())}


# Reading -------------------------------------------------------------------------------------------------------------


def folder_of(path: str | Path) -> Path | None:
    """The folder of a finished reference: itself, of a file in it, or of the run that made it; None without one."""
    given = Path(path)
    for folder in (given.parent if given.is_file() else given, given / "table"):
        if (folder / MANIFEST).exists() and any(folder.glob(PARTS)):
            return folder
    return None


def load(path: str | Path, *, tokens: bool = True) -> ReferenceTable:
    """A finished reference from its folder, a file in it, or the run that made it; without `tokens`, only its sums.

    Raises BadReference (R7) if it is not finished or was changed since, (R5) if numbers are below float32.
    """
    folder = folder_of(path) or Path(path)
    manifest = read_manifest(folder)
    if digest(manifest["recipe"]) != manifest["fingerprint"]:
        raise BadReference(f"R7: {folder / MANIFEST}: the recipe does not match its fingerprint; compute it again")
    parts = [_read_part(folder / part["name"], part["sha256"], tokens=tokens) for part in manifest["parts"]]
    whole = pa.concat_tables(parts)
    columns = {name: whole[name].to_numpy() for name in SCHEMA.names}
    for name in ("row_id", "prompt_ids_sha", "resp_ids_sha"):
        columns[name] = columns[name].tolist()
    has_tokens = tokens and "token_logp" in whole.column_names
    flat = pa.chunked_array([part["token_logp"].combine_chunks().flatten() for part in parts]) if has_tokens else None
    table = ReferenceTable(folder, manifest, **columns, token_logp=None if flat is None else flat.to_numpy())
    if len(table.places) != len(table) or len(table) != manifest["recipe"]["data"]["rows"]:
        raise BadReference(f"R1: {folder}: {len(table)} rows, {len(table.places)} of them distinct; compute it again")
    return table


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished reference. Raises BadReference (R7) without one."""
    try:
        manifest = runs.read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        fault = "is not finished" if any(folder.glob(PARTS)) else "holds no reference"
        raise BadReference(f"R7: {folder} {fault} (no {MANIFEST}); run `pyrite reference compute`") from None
    except (OSError, ValueError) as error:
        raise BadReference(f"R7: {folder / MANIFEST} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadReference(f"R7: {folder / MANIFEST} is not the manifest of a reference ({FORMAT!r}); name its folder")
    return manifest


def _read_part(path: Path, sha256: str, *, tokens: bool) -> pa.Table:
    if not path.exists():
        raise BadReference(f"R7: {path} is missing; copy the whole folder, or compute it again")
    if file_hash(path) != sha256:
        raise BadReference(f"R7: {path} was changed after it was written (its checksum differs); compute it again")
    found = pq.read_schema(path)
    if missing := [name for name in SCHEMA.names if name not in found.names]:
        raise BadReference(f"R7: {path} has no column {missing[0]}; compute it again")
    kinds = [found.field("sum_logp").type]
    kinds += [found.field("token_logp").type.value_type] if "token_logp" in found.names else []
    if any(kind not in (pa.float32(), pa.float64()) for kind in kinds):
        raise BadReference(f"R5: {path} stores log-probabilities as {kinds[0]}; float32 at least is needed")
    wanted = [*SCHEMA.names, "token_logp"] if tokens and "token_logp" in found.names else SCHEMA.names
    return pq.read_table(path, columns=wanted)


# Writing -------------------------------------------------------------------------------------------------------------


def begin(folder: Path, fingerprint: str) -> bool:
    """Make the folder; whether it holds this very reference, finished.

    Raises BadReference (R7) if it cannot be made or holds another reference, finished or begun.
    """
    if (folder / MANIFEST).exists():
        if load(folder, tokens=False).manifest["fingerprint"] != fingerprint:
            raise BadReference(f"R7: {folder} holds another reference already; delete it or choose another folder")
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    for path in folder.glob(PARTS):
        with contextlib.suppress(OSError, pa.ArrowException):  # a damaged part is computed again
            if (pq.read_schema(path).metadata or {}).get(b"fingerprint", b"").decode() != fingerprint:
                raise BadReference(
                    f"R7: {folder} holds an unfinished reference of something else; delete it or choose another"
                )
    return False


def write_part(path: Path, part: pa.Table, fingerprint: str) -> None:
    """One part, whole or not at all. Raises BadReference (R7) if it cannot be written."""
    sink = pa.BufferOutputStream()
    pq.write_table(part.replace_schema_metadata({"fingerprint": fingerprint}), sink, write_page_checksum=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(sink.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def whole_part(path: Path, ids: Sequence[str]) -> bool:
    """Whether a part left by an interrupted computation is sound and holds these rows."""
    try:
        part = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return "row_id" in part.column_names and part["row_id"].to_pylist() == list(ids)


def finish(folder: Path, recipe: Mapping[str, Any], **about: Any) -> None:
    """The manifest of the parts that lie in `folder`, the last thing written; `about` changes no number."""
    parts = sorted(folder.glob(PARTS))
    listed = [{"name": path.name, "rows": pq.read_metadata(path).num_rows, "sha256": file_hash(path)} for path in parts]
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"format": FORMAT, "fingerprint": digest(recipe), "recipe": recipe, "parts": listed, **about}
    try:
        runs.write_json(folder / MANIFEST, {**manifest, "created": created})
    except OSError as error:
        raise unwritable(folder / MANIFEST, error) from error


def unwritable(path: Path, error: OSError) -> BadReference:
    """The error to raise if a reference cannot be written."""
    reason = error.strerror or error
    return BadReference(f"R7: cannot write {path}: {reason}; make room and run again, finished parts are kept")


# The recipe: everything that decides the numbers ---------------------------------------------------------------------


def recipe_of_model(policy: Policy, *, precision: Dtype) -> dict[str, Any]:
    """Which model scores, and in which arithmetic."""
    model = backbone(policy.model)
    attention = "packed" if policy.packed else str(model.config._attn_implementation)
    numerics = arithmetic(dtype=str(model.dtype).removeprefix("torch."), precision=precision)
    return {"weights": weights_hash(policy.model), "numerics": {**numerics, "attention": attention}}


def arithmetic(*, dtype: str, precision: Dtype) -> dict[str, Any]:
    """Precisions of weights and products, and the version of the code."""
    return {"weights": dtype, "compute": precision, "code": __version__}


def recipe_of_reading(tokenizer: Any, *, conditioning: str, max_length: int, max_prompt: int) -> dict[str, Any]:
    """How texts become ids."""
    prior = dict(zip(("header", "ids"), prior_prompt(tokenizer), strict=True)) if conditioning == "prior" else {}
    template = {
        "sha256": template_hash(tokenizer),
        "arguments": text.template_arguments(tokenizer),
        "start_token": _start(tokenizer),
        "end_token": text.end_id(tokenizer),
    }
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template,
        "conditioning": {"kind": conditioning, **prior},
        "truncation": {"max_length": max_length, "max_prompt": max_prompt},
    }


def weights_hash(model: Any) -> str:
    """sha256 of names, dtypes, shapes and bytes of all weights, adapters and architecture settings included.

    Adapters that add nothing yet (B = 0) are left out: a policy with fresh adapters is still its base model.
    """
    inside = backbone(model)
    state = inside.state_dict()
    fresh = all(not bool(value.any()) for name, value in state.items() if "lora_B" in name)
    kept: dict[tuple[Any, ...], tuple[str, Tensor]] = {}  # each storage once, by the first of its names
    for name in sorted(state):
        if not (fresh and "lora_" in name):
            value = state[name].detach()
            kept.setdefault((value.data_ptr(), value.shape), (name.replace(".base_layer.", "."), value))
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock to the others
        hashes = list(pool.map(_bytes_hash, [value for _, value in kept.values()]))
    named = [[name, str(v.dtype), list(v.shape), seen] for (name, v), seen in zip(kept.values(), hashes, strict=True)]
    config = {key: value for key, value in inside.config.to_dict().items() if key not in _IDLE}
    scales = {}
    if isinstance(model, PeftModel) and not fresh:
        adapters: Any = model.peft_config
        scales = {name: [one.r, one.lora_alpha, one.use_rslora] for name, one in adapters.items()}
    return digest([named, json.loads(json.dumps(config, default=str), parse_constant=str), scales])


def _bytes_hash(value: Tensor) -> str:
    flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


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


def prior_prompt(tokenizer: Any) -> tuple[str, list[int]]:
    """What a model reads before an answer without its prompt, as text and as ids.

    If the chat template opens an answer with a header, the start token (if the template writes one) and exactly that
    header; otherwise the start token alone. Raises ValueError for a tokenizer with neither.
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


def _start(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def files_hash(path: str | Path) -> str:
    """Hash of a model's files, those of the base below adapters included."""
    folder = checkpoints.place(path)
    base = checkpoints.base_name(folder)
    return digest([runs.fingerprint(folder), files_hash(base) if base else ""])


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ids_hash(ids: Sequence[int]) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(array("i", ids).tobytes()).hexdigest()
