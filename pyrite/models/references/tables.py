"""Where a reference comes from: spec strings such as "self", "prior", a path, or "0.5*self + 0.5*PATH"."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pyrite.core import runs
from pyrite.data.text import Answer, Prompt
from pyrite.math.ranges import Amplitude, Count, fault

# tables: The file of a reference: Parquet parts and, last of all, a manifest; whole and unchanged, or refused.


FORMAT = "pyrite reference 1"
MANIFEST, PLAN, FIRST_PART = "manifest.json", "plan.json", "part-00000.parquet"
SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "prompt_ids_sha": pa.string(),
        "resp_ids_sha": pa.string(),
        "n_prompt_tokens": pa.int32(),
        "n_resp_tokens": pa.int32(),  # -1 where unknown, in an imported reference
        "n_unknown": pa.int32(),  # tokens of the answer that stand for text the tokenizer does not know
        "resp_utf8_bytes": pa.int64(),
        "ended_with_eos": pa.bool_(),
        "truncated": pa.bool_(),
        "prompt_truncated": pa.bool_(),
        "sum_logp": pa.float64(),
    }
)


class BadReference(ValueError):  # noqa: N818, there is a ReferenceError already
    """A reference that cannot be used; the message begins with the rule, R1 to R9, that it breaks."""


@dataclass(frozen=True)
class Text:
    """A prompt and one answer to it; `finished` says that the answer ends there, so that its end token counts.

    fields: what its message has beside the text, such as reasoning_content.
    """

    prompt: Prompt
    response: str
    finished: bool = True
    fields: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, pair: Mapping[str, Any], side: str) -> Text:
        """One side of a pair."""
        return cls(pair["prompt"], pair[side], fields=pair.get(f"{side}_fields"))

    @property
    def answer(self) -> Answer:
        """The text, or the message that it is the content of."""
        return {"content": self.response, **self.fields} if self.fields else self.response


@dataclass(frozen=True, eq=False)
class Table:
    """N texts scored by one model: a list or an array (N,) a column, log-probabilities in nats.

    token_logp: float32, the rows' tokens one after the other; None where only the sums are known or were read.
    """

    folder: Path
    manifest: dict[str, Any]
    row_id: list[str]
    prompt_ids_sha: list[str]
    resp_ids_sha: list[str]
    n_prompt_tokens: np.ndarray
    n_resp_tokens: np.ndarray
    n_unknown: np.ndarray
    resp_utf8_bytes: np.ndarray
    ended_with_eos: np.ndarray
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

    def tokens(self, row: int) -> np.ndarray:
        """Token log-probabilities of one row, (T,) float32."""
        assert self.token_logp is not None
        return self.token_logp[self._begins[row] : self._begins[row + 1]]


def row_id(text: Text) -> str:
    """sha256 of the canonical JSON of a text's messages.

    A prompt given as a str is the one user message it is rendered as, so both have one id; an answer that was cut
    before its end differs from the finished one.
    """
    prompt = [{"role": "user", "content": text.prompt}] if isinstance(text.prompt, str) else text.prompt
    answer = {"role": "assistant", "content": text.response} | ({} if text.finished else {"finished": False})
    return digest([*map(dict, prompt), {**answer, **(text.fields or {})}])


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load(path: str | Path, *, tokens: bool = True) -> Table:
    """A finished reference from its folder, a file in it, or the run that made it; without `tokens`, only its sums.

    Raises BadReference (R7) where it is not finished or was changed since, (R5) where numbers are below float32.
    """
    given = Path(path)
    inner = given / "table"
    folder = inner if (inner / MANIFEST).exists() else given.parent if given.is_file() else given
    manifest = read_manifest(folder)
    if digest(manifest["recipe"]) != manifest["fingerprint"]:
        raise BadReference(f"R7: {folder / MANIFEST}: the recipe does not match its fingerprint; compute it again")
    parts = [_read(folder / part["name"], part, tokens=tokens) for part in manifest["parts"]]
    whole = pa.concat_tables(parts)
    columns = {name: whole[name].to_numpy() for name in SCHEMA.names}
    for name in ("row_id", "prompt_ids_sha", "resp_ids_sha"):
        columns[name] = columns[name].tolist()
    has_tokens = tokens and "token_logp" in whole.column_names
    flat = pa.chunked_array([part["token_logp"].combine_chunks().flatten() for part in parts]) if has_tokens else None
    table = Table(folder, manifest, **columns, token_logp=None if flat is None else flat.to_numpy())
    if len(table.places) != len(table) or len(table) != manifest["recipe"]["data"]["rows"]:
        raise BadReference(f"R1: {folder}: {len(table)} rows, {len(table.places)} of them distinct; compute it again")
    return table


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished reference. Raises BadReference (R7) without one."""
    try:
        manifest = runs.read_json(folder / MANIFEST)
    except FileNotFoundError:
        fault = "is not finished" if (folder / PLAN).exists() else "holds no reference"
        raise BadReference(f"R7: {folder} {fault} (no {MANIFEST}); run `pyrite reference compute`") from None
    except (OSError, ValueError) as error:
        raise BadReference(f"R7: {folder / MANIFEST} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadReference(f"R7: {folder / MANIFEST} is not the manifest of a reference ({FORMAT!r}); name its folder")
    return manifest


def write_part(path: Path, part: pa.Table) -> None:
    """One part, whole or not at all. Raises BadReference (R7) where it cannot be written."""
    sink = pa.BufferOutputStream()
    pq.write_table(part, sink, write_page_checksum=True)
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


def unwritable(path: Path, error: OSError) -> BadReference:
    """What to tell when a reference cannot be written."""
    reason = error.strerror or error
    return BadReference(f"R7: cannot write {path}: {reason}; make room and run again, finished parts are kept")


def whole_part(path: Path, ids: Sequence[str]) -> bool:
    """Whether a part left by an interrupted computation is sound and holds these rows."""
    try:
        part = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return "row_id" in part.column_names and part["row_id"].to_pylist() == list(ids)


def finish(folder: Path, recipe: Mapping[str, Any], **about: Any) -> None:
    """The manifest of the parts that lie in `folder`, the last thing written; `about` changes no number."""
    parts = sorted(folder.glob("part-*.parquet"))
    listed = [{"name": path.name, "rows": pq.read_metadata(path).num_rows, "sha256": file_hash(path)} for path in parts]
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"format": FORMAT, "fingerprint": digest(recipe), "recipe": recipe, "parts": listed, **about}
    try:
        runs.write_json(folder / MANIFEST, {**manifest, "created": created})
        (folder / PLAN).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder / MANIFEST, error) from error


def margins(logp: np.ndarray) -> dict[str, Any]:
    """Of the margins m = log π_ref(chosen) − log π_ref(rejected) of B pairs: mean, sd, quantiles, ranking accuracy.

    logp (2B,): chosen and rejected alternately, nats. Accuracy: the share of pairs with m > 0, ties ½.
    """
    m = np.asarray(logp[::2], dtype=np.float64) - np.asarray(logp[1::2], dtype=np.float64)
    quantiles = {f"q{100 * share:02.0f}": float(np.quantile(m, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
    sd = float(m.std(ddof=1)) if len(m) > 1 else 0.0
    return {"mean": float(m.mean()), "sd": sd, **quantiles, "accuracy": float(((m > 0) + 0.5 * (m == 0)).mean())}


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, listed: Mapping[str, Any], *, tokens: bool) -> pa.Table:
    """One part, as its manifest has it."""
    if not path.exists():
        raise BadReference(f"R7: {path} is missing; copy the whole folder, or compute it again")
    if file_hash(path) != listed["sha256"]:
        raise BadReference(f"R7: {path} was changed after it was written (its checksum differs); compute it again")
    found = pq.read_schema(path)
    missing = [name for name in SCHEMA.names if name not in found.names]
    if missing:
        raise BadReference(f"R7: {path} has no column {missing[0]}; compute it again")
    kinds = [found.field("sum_logp").type]
    kinds += [found.field("token_logp").type.value_type] if "token_logp" in found.names else []
    if any(kind not in (pa.float32(), pa.float64()) for kind in kinds):
        raise BadReference(f"R5: {path} stores log-probabilities as {kinds[0]}; float32 at least is needed")
    wanted = [*SCHEMA.names, "token_logp"] if tokens and "token_logp" in found.names else SCHEMA.names
    return pq.read_table(path, columns=wanted)


# sources: Where a reference comes from: spec strings such as "self", "prior", a path, or "0.5*self + 0.5*PATH".


Kind = Literal["self", "none", "column", "prior", "ema", "model", "table"]

_ALONE = ("none", "ema")
_DEFAULTS = {"ema": {"rate": 0.01, "every": 1}}
_DTYPES = ("float32", "bfloat16")
_EXAMPLE = 'write self, none, column, prior, ema(rate=0.01), a path, or a sum such as "0.5*self + 0.5*PATH"'


@dataclass(frozen=True)
class Source:
    """One reference and its weight in a sum; `path` of a model, or of a finished reference for kind "table"."""

    kind: Kind
    path: str | None = None
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}({self.path})" if self.kind == "prior" and self.path else self.path or self.kind


def parse(spec: str) -> list[Source]:
    """The sources of a spec, a weighted sum of log-probabilities: log π_ref = Σ_k weight_k · log π_k.

    self               the policy before training
    none               no reference
    column             columns chosen_logprob and rejected_logprob of the data; column(chosen=NAME, rejected=NAME)
    prior, prior(PATH) the policy before training, or another model, that does not see the prompt
    ema                a moving average of the policy, every so many steps; ema(rate=0.01, every=1)
    PATH               a model (folder or Hub name), or a finished reference (its folder, or a file in it)

    A path takes options too: dtype=bfloat16 loads a model so; own_template=True accepts a finished reference whose
    model has the policy's tokenizer but another chat template. Raises ValueError naming the piece that is wrong.

    >>> [(source.kind, source.weight) for source in parse("0.25*self + 0.75*prior")]
    [('self', 0.25), ('prior', 0.75)]
    """
    whole = Path(spec.strip())
    pieces = [spec.strip()] if whole.exists() else re.split(r"\s+\+\s+|\+(?=\s*[\d.]+\s*\*)", spec.strip())
    sources = [_piece(piece.strip(), spec) for piece in pieces]
    lonely = next((source for source in sources if source.kind in _ALONE), None)
    if lonely and (len(sources) > 1 or lonely.weight != 1):
        raise ValueError(f"ref {spec!r}: {lonely.kind!r} cannot be part of a sum; give it alone, or leave it out")
    return sources


def _piece(piece: str, spec: str) -> Source:
    """One term of a sum."""
    match = re.fullmatch(r"(?:(?P<weight>[-+]?[\d.]+(?:e[-+]?\d+)?)\s*\*\s*)?(?P<body>.*)", piece, re.DOTALL)
    assert match
    body, name, call = match["body"].strip(), match["body"].strip(), None
    if not Path(body).exists() and body.endswith(")"):
        name, _, call = body[:-1].partition("(")
    if not name:
        raise ValueError(f"ref {spec!r}: {piece!r} names nothing; {_EXAMPLE}")
    known = _KINDS.get(name)
    path, options = _arguments(call, _PATH if known is None else known, piece, spec, takes_path=name == "prior")
    if known is None:
        kind, path = _kind_of(name, piece, spec)
    else:
        kind = name
    if name == "prior" and path is not None and _kind_of(path, piece, spec)[0] == "table":
        raise ValueError(f"ref {spec!r}: {piece!r} is a finished reference and knows its conditioning; name it alone")
    options = _DEFAULTS.get(name, {}) | options
    return Source(kind, path, _weight(match["weight"], piece, spec), options)  # type: ignore[arg-type]


def _weight(given: str | None, piece: str, spec: str) -> float:
    try:
        weight = 1.0 if given is None else float(given)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"ref {spec!r}: the weight in {piece!r} must be a positive number")
    return weight


def _arguments(
    call: str | None, known: Mapping[str, Callable], piece: str, spec: str, *, takes_path: bool
) -> tuple[str | None, dict[str, Any]]:
    """The path and the options between parentheses."""
    path, options = None, {}
    for part in (part.strip() for part in (call or "").split(",")):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not part:
            continue
        if not equals and takes_path and path is None:
            path = part
        elif not equals or name not in known:
            choices = ", ".join(known) or "none at all"
            raise ValueError(f"ref {spec!r}: {part!r} is no option of {piece!r}; it takes {choices}")
        else:
            try:
                options[name] = known[name](value)
            except ValueError as error:
                raise ValueError(f"ref {spec!r}: {part!r} in {piece!r}: {error}") from None
    return path, options


def _kind_of(name: str, piece: str, spec: str) -> tuple[Kind, str]:
    """Whether a path is a finished reference or a model, and where exactly."""
    path = Path(name)
    for folder in (path.parent if path.is_file() else path, path / "table"):
        if (folder / MANIFEST).exists() and (folder / FIRST_PART).exists():
            return "table", str(folder)
        if (folder / PLAN).exists():
            raise ValueError(f"ref {spec!r}: {folder} is not finished; run the command that began it again")
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return "model", name
    near = difflib.get_close_matches(name, _KINDS, n=1, cutoff=0.75)
    if not path.exists() and not near and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return "model", name  # a Hub name
    inner = path / "model"
    hint = f"did you mean {near[0]!r}?" if near else f"did you mean {inner}?" if inner.exists() else _EXAMPLE
    raise ValueError(f"ref {spec!r}: {piece!r} is neither a model nor a finished reference; {hint}")


def _rate(text: str) -> float:
    return _in_range(float(text), Amplitude)


def _steps(text: str) -> int:
    return _in_range(int(text) if text.isdecimal() else text, Count)


def _in_range(value: Any, hint: Any) -> Any:
    if wrong := fault(value, hint):
        raise ValueError(wrong)
    return value


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError(f"choose {' or '.join(_DTYPES)}")
    return text


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("write True or False")
    return text == "True"


_PATH: dict[str, Callable] = {"dtype": _dtype, "own_template": _flag}
_KINDS: dict[str, dict[str, Callable]] = {
    "self": {},
    "none": {},
    "column": {"chosen": str, "rejected": str},
    "prior": {"dtype": _dtype},
    "ema": {"rate": _rate, "every": _steps},
}
