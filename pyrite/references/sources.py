"""Where a reference comes from: spec strings such as "self", "prior", a path, or "0.5*self + 0.5*PATH"."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyrite.options import Amplitude, Count, fault
from pyrite.references.tables import FIRST_PART, MANIFEST, PLAN

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
