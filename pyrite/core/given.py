"""Objects in place of paths and spec strings: what jobs called from Python are given.

Models and rows are written to a folder named by their content, so that the same objects give the same run, which goes
on after a stop. A function keeps its place in memory under a name with the hash of its source.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrite.core.runs import fingerprint

PREFIX = "given:"
_functions: dict[str, Callable[..., Any]] = {}


def spec(thing: Any) -> str:
    """The path or the name that stands for an object in a job's options.

    thing: a model, anything with `save(folder)`; rows, a list of dictionaries or of prompts; or a function, such
    as a loss or a scorer. Raises ValueError for anything else.
    """
    if isinstance(known := getattr(thing, "spec", None), str):
        return known
    if isinstance(thing, list) and all(isinstance(row, str) for row in thing):
        thing = [{"prompt_id": str(i), "prompt": prompt} for i, prompt in enumerate(thing)]
    if isinstance(thing, list):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in thing)
        path = _folder() / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        path.write_text(text)
        return str(path)
    if callable(getattr(thing, "save", None)):
        draft = Path(tempfile.mkdtemp(dir=_folder()))
        thing.save(draft)
        path = _folder() / f"{type(thing).__name__.lower()}-{fingerprint(draft)}"
        shutil.rmtree(draft) if path.exists() else draft.rename(path)
        return str(path)
    if callable(thing):
        name = getattr(getattr(thing, "func", thing), "__name__", type(thing).__name__)
        key = f"{PREFIX}{name}-{hashlib.sha256(_source(thing).encode()).hexdigest()[:16]}"
        _functions[key] = thing
        return key
    raise ValueError(f"a job cannot be given a {type(thing).__name__}: give a model, rows, a function or a path")


def function(name: str) -> Callable[..., Any]:
    """The function of a name. Raises ValueError for one that was given to another process."""
    if name not in _functions:
        raise ValueError(f"{name} was a function in the memory of another process: give it again")
    return _functions[name]


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / "pyrite-given"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _source(thing: Any) -> str:
    """What a function does: its source, its options and what it holds."""
    inner, options = getattr(thing, "func", thing), getattr(thing, "keywords", {})
    try:
        text = inspect.getsource(inspect.unwrap(inner))
    except (OSError, TypeError):
        text = repr(inner)
    holds = [repr(cell.cell_contents) for cell in getattr(inner, "__closure__", None) or ()]
    defaults = getattr(inner, "__defaults__", None), getattr(inner, "__kwdefaults__", None)
    return f"{text}{sorted(options.items())}{holds}{defaults}"
