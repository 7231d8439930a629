"""Jobs: one file, one job, each a command `pyrite JOB` and a function `pyrite.JOB(...)`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from pyrite.math import ranges

if TYPE_CHECKING:  # the command line lists jobs before it loads anything
    from pyrite.core.runs import Run


@cache
def function(job: str) -> Callable[..., Run]:
    """A job as a function of its options; models, rows, scorers and losses may be objects in place of paths and specs.

    What is given stays as it is: a trained model is in the run's folder, a new temporary one if there is no `out`.
    """
    from pyrite.core import runs

    module = importlib.import_module(f"pyrite.jobs.{job}")
    options = {one.name: (one.hint, one.default) for one in ranges.declared(module.Config)}

    def run(*args: Any, **values: Any) -> Run:
        for name in set(values) - set(options):
            near = difflib.get_close_matches(name, options, n=1)
            raise TypeError(f"{job}() has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        bound = signature.bind(*args, **values).arguments
        bound.setdefault("out", tempfile.mkdtemp(prefix=f"pyrite-{job}-"))
        return module.run(
            ranges.filled(
                module.Config,
                {name: _plain(value, options[name][0], f"{job}: {name}") for name, value in bound.items()},
            )
        )

    required = [name for name, (_, default) in options.items() if default is MISSING and name != "out"]
    kinds = inspect.Parameter
    signature = inspect.Signature(
        [kinds(name, kinds.POSITIONAL_OR_KEYWORD, annotation=options[name][0]) for name in required]
        + [
            kinds(name, kinds.KEYWORD_ONLY, annotation=hint, default=None if default is MISSING else default)
            for name, (hint, default) in options.items()
            if name not in required
        ],
        return_annotation=runs.Run,
    )
    run.__name__ = run.__qualname__ = job
    run.__doc__ = f"{module.__doc__}\n\n{inspect.getdoc(function)}\nOptions: `pyrite {job} --help-all`."
    run.__module__ = module.__name__
    run.__annotations__ = {name: hint for name, (hint, _) in options.items()} | {"return": runs.Run}
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _plain(value: Any, hint: Any, where: str) -> Any:
    """Objects by the paths and spec strings that stand for them; one for several; everything else as it is."""
    if value is not None and all(get_origin(kind) is tuple for kind in ranges.kinds(hint)):
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_plain(one, str, where) for one in several)
    if value is None or isinstance(value, str | int | float | Path):
        return value
    return _spec(value, where)


INSTEAD = {  # of objects that no job takes
    "Run": "a path in its folder, such as run.folder / 'model'",
    "Responses": "rows, a list of dictionaries such as {'prompt': ..., 'response': ...}",
    "DataFrame": "its rows, frame.to_dict('records')",
    "Dataset": "its rows, dataset.to_list()",
}


def _spec(thing: Any, where: str) -> str:
    """The path or the spec string of an object: a model, anything with `save(folder)`; rows, or prompts; a function.

    Models and rows are written to a folder named by their content, so that the same objects give the same run, which
    goes on after a stop. Raises ValueError for anything else.
    """
    from pyrite.core import runs, specs

    if isinstance(known := getattr(thing, "spec", None), str):
        return known
    kind = type(thing).__name__
    if kind in INSTEAD:
        raise ValueError(f"{where} is a {kind}: give {INSTEAD[kind]}")
    if isinstance(thing, list):
        if wrong := [one for one in thing if not (isinstance(one, (str, dict)) or _conversation(one))]:
            raise ValueError(f"{where} holds {wrong[0]!r:.40}: give prompts, or rows as dictionaries")
        rows = [one if isinstance(one, dict) else {"prompt_id": str(i), "prompt": one} for i, one in enumerate(thing)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = _folder() / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        runs.write_text(path, text)
        return str(path)
    if callable(getattr(thing, "save", None)):
        draft = Path(tempfile.mkdtemp(dir=_folder()))
        thing.save(draft)
        path = _folder() / f"{type(thing).__name__.lower()}-{runs.fingerprint(draft)}"
        shutil.rmtree(draft) if path.exists() else draft.rename(path)
        return str(path)
    if callable(thing):
        return specs.given(thing)
    raise ValueError(f"{where} is a {kind}: give a model, rows, a function or a path")


def _conversation(thing: Any) -> bool:
    """Whether it is a prompt as a list of messages."""
    return isinstance(thing, list) and bool(thing) and all(isinstance(turn, dict) for turn in thing)


def _folder() -> Path:
    """Where given objects lie, in the user's cache; it may be emptied when no job runs."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrite" / "given"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
