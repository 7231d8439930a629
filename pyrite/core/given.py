"""Objects in place of paths and spec strings: what jobs called from Python are given.

An object has a name, "given:" with its kind and a hash of its content, which stands in config.json where a path would.
The same object gives the same name, so a run goes on after a stop if it is called again with the same objects.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PREFIX = "given:"
_objects: dict[str, Any] = {}


@contextmanager
def objects() -> Iterator[None]:
    """Within this block names given by `name` are known; a job runs in it."""
    before = dict(_objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(before)


def name(thing: Any) -> str:
    """The name of an object from here on. Raises ValueError for one that jobs cannot be given."""
    found = f"{PREFIX}{_kind(thing)}-{_digest(thing)[:12]}"
    _objects[found] = thing
    return found


def get(spec: object) -> Any | None:
    """The object of a name, None if it is a path or a spec string."""
    return _objects.get(spec) if isinstance(spec, str) else None


def digest(spec: object) -> str | None:
    """The hash of a named object's content."""
    return spec.rpartition("-")[2] if isinstance(spec, str) and spec in _objects else None


def _kind(thing: Any) -> str:
    return "rows" if isinstance(thing, list) else getattr(thing, "__name__", type(thing).__name__).lower()


def _digest(thing: Any) -> str:
    if isinstance(thing, list):
        return hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()
    if callable(getattr(thing, "digest", None)):
        return thing.digest()
    if callable(thing):
        return hashlib.sha256(_source(thing).encode()).hexdigest()
    raise ValueError(f"a job cannot be given a {type(thing).__name__}: give a model, rows, a function, or a path")


def _source(function: Any) -> str:
    """What a function does: its source and its options."""
    inner, options = getattr(function, "func", function), getattr(function, "keywords", {})
    try:
        text = inspect.getsource(inspect.unwrap(inner))
    except (OSError, TypeError):
        text = repr(inner)
    return f"{text}{sorted(options.items())}"
