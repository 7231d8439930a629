"""Spec strings: "dpo(beta=0.3)", "mine.py:my_loss(tau=2)", "package.module:fn()" -> a ready function.

The module is the registry and the signature is the schema: what `members` lists is what a name may be,
keyword-only parameters are the options, and values are literals, never code.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pyrite import contracts
from pyrite.contracts import Function
from pyrite import options as ranges


Registry = ModuleType | Mapping[str, Function]

_SPEC = re.compile(r"\s*(?:(?P<where>[^()]+):)?\s*(?P<name>[^\W\d]\w*)\s*(?P<call>\(.*)?", re.DOTALL)
_EXAMPLE = 'write "name", "name(option=value)", "file.py:name(option=value)" or "package.module:name()"'


class Member(NamedTuple):
    """One entry of `pyrite list`: options map to their defaults, inspect.Parameter.empty where required; ranges in
    words."""

    name: str
    options: dict[str, Any]
    summary: str
    ranges: dict[str, str]


@dataclass(frozen=True)
class Part:
    """A function ready for data; prints as the spec that makes it again."""

    name: str
    options: Mapping[str, Any]
    function: Function
    where: str = ""

    def __call__(self, *data: Any, **late: Any) -> Any:
        return self.function(*data, **late)

    @property
    def own(self) -> bool:
        """Whether it is the user's own, from a file or a module of theirs."""
        return bool(self.where) and self.where.partition(".")[0] != "pyrite"

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.where}{':' if self.where else ''}{self.name}({options})"


def part(spec: str, registry: Registry) -> Part:
    """The function a spec string names, its options checked and fixed; one's own is held to `pyrite.contracts`.

    A bare name is looked up in `registry`, a module or a mapping of names; "path.py:name" in that file and
    "package.module:name" in that module, which are imported. A function of options alone is a factory: it
    is called, and what it returns is the part. Raises ValueError, in one line, for a spec that cannot be
    read, an unknown name or option (with the nearest), or a value that is not what the annotation says.

    >>> import pyrite.losses
    >>> part("dpo(beta=0.3)", pyrite.losses)
    dpo(beta=0.3)
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"cannot read {spec!r}: {_EXAMPLE}")
    where, name = (match["where"] or "").strip(), match["name"]
    options = _options(spec, match["call"] or "()", match.start("call"))
    module = _load(where) if where else None
    functions = _functions(module or registry)
    if name not in functions:
        place = f" in {where}" if where else ""
        raise ValueError(f"unknown name {name!r}{place}: {_no_function(name, module) or _suggest(name, functions)}")
    function = functions[name]
    _check_options(function, options)
    if not where or function.__module__.partition(".")[0] == "pyrite":
        made = _ready(function, options)
        verify = getattr(made, "verify", None)
        if verify:
            verify()  # a part that asks a model refuses a broken one now, and loads it when it is asked
        return Part(name, options, made, where)
    own = contracts.Own.of(where, name, function)
    return Part(name, options, contracts.held(own, lambda: _ready(function, options), registry), where)


def members(registry: Registry) -> list[Member]:
    """What can be named: the functions of a module's `__all__`, or its own public ones; sorted by name."""
    functions = _functions(registry)
    return [_member(name, functions[name]) for name in sorted(functions)]


def _member(name: str, function: Function) -> Member:
    hints = ranges.hints(function)
    known = {option: ranges.words(hints.get(option, Any)) for option in _defaults(function)}
    said = {option: words for option, words in known.items() if words}
    return Member(name, _defaults(function), _summary(function), said)


def signature(function: Function) -> str:
    """A function and its options as a spec has them: "dpo(beta=0.1, label_smoothing=0.0)"."""
    empty = inspect.Parameter.empty
    options = (name if value is empty else f"{name}={value!r}" for name, value in _defaults(function).items())
    return f"{function.__name__}({', '.join(options)})"


def _options(spec: str, call: str, start: int) -> dict[str, Any]:
    """The keyword options of "(name=value, ...)", which begins at `start` of the spec."""
    try:
        node = ast.parse(f"f{call}", mode="eval").body
    except SyntaxError as error:
        at = start + max((error.offset or 2) - 2, 0)  # offset counts from 1, and from the f put in front
        raise ValueError(f"cannot read {spec!r} at {spec[at:] or 'its end'!r}: {_EXAMPLE}") from None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"cannot read {spec!r} beyond one pair of parentheses: {_EXAMPLE}")
    if node.args:
        raise ValueError(f"{spec!r}: {ast.unparse(node.args[0])!r} has no name; {_EXAMPLE}")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in options:
            raise ValueError(f"{spec!r}: give every option once, by its name, not {ast.unparse(keyword)!r}")
        options[keyword.arg] = _literal(spec, keyword.arg, keyword.value)
    return options


def _literal(spec: str, name: str, value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        raise ValueError(
            f"{spec!r}: {name}={ast.unparse(value)} is no plain value; "
            "give a number, True, False, None, a list, or text in quotes"
        ) from None


def _load(where: str) -> ModuleType:
    """The module at a path ending in .py, or of a dotted name."""
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"no file {where}: give its path from the current folder, {Path.cwd()}")
    try:
        with contracts.undisturbed({}, where):
            return _load_file(path) if path.suffix == ".py" else importlib.import_module(where)
    except ModuleNotFoundError as error:
        hint = "" if error.name != where else f'; for a file of yours write "{where}.py:name()"'
        raise ValueError(f"cannot import {where}: no module named {error.name!r}{_line(error, path)}{hint}") from None
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot import {where}: {said}{_line(error, path)}") from error


def _line(error: BaseException, path: Path) -> str:
    """The line of a file at which its import stopped; a SyntaxError names its own."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [n for frame, n in frames if Path(frame.f_code.co_filename).absolute() == path.absolute()]
    return f" ({path.name}, line {lines[-1]})" if lines and not isinstance(error, SyntaxError) else ""


def _load_file(path: Path) -> ModuleType:
    name = f"pyrite_part_{re.sub(r'[^0-9a-zA-Z]', '_', str(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and type hints of the file look it up by name
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _no_function(name: str, module: ModuleType | None) -> str:
    """What a name of one's own file stands for, if not for a function of that file."""
    value = vars(module).get(name) if module and not name.startswith("_") else None
    if inspect.isclass(value) and value.__module__ == getattr(module, "__name__", ""):
        return f"{name} is a class; write a function that makes one: def make(*, option=1): return {name}(option)"
    if callable(value) and not inspect.isclass(value) and not hasattr(module, "__all__"):
        return f"{name} is not a function of this file; write one that calls it"
    return ""


def _functions(registry: Registry) -> dict[str, Function]:
    if not isinstance(registry, ModuleType):
        return dict(registry)
    exported = getattr(registry, "__all__", None)
    found = {name: vars(registry)[name] for name in exported or vars(registry) if name in vars(registry)}
    return {
        name: value
        for name, value in found.items()
        if inspect.isfunction(value)
        and (exported or (not name.startswith("_") and value.__module__ == registry.__name__))
    }


def _defaults(function: Function) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _summary(function: Function) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _ready(function: Function, options: dict[str, Any]) -> Function:
    """The function with its options fixed or, of a factory, what it makes of them."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is not p.KEYWORD_ONLY for p in parameters):
        return partial(function, **options)
    for p in parameters:
        if p.default is p.empty and p.name not in options:
            raise ValueError(f"{function.__name__} needs the option {p.name!r}; it is {signature(function)}")
    return function(**options)


def _check_options(function: Function, options: dict[str, Any]) -> None:
    known = _defaults(function)
    hints = ranges.hints(function)
    for name, value in options.items():
        if name in inspect.signature(function).parameters and name not in known:
            raise ValueError(
                f"{function.__name__} takes {name} by position; put a star before its options: "
                f"def {function.__name__}(..., *, {name}=...)"
            )
        if name not in known:
            raise ValueError(
                f"{function.__name__} has no option {name!r}: {_suggest(name, known)}; it is {signature(function)}"
            )
        wrong = None if value == known[name] else ranges.fault(value, hints.get(name, Any))
        if wrong:
            refused = ranges.refusal(f"{function.__name__}: option {name}={value!r}", wrong)
            raise ValueError(f"{refused}; it is {signature(function)}")


def _suggest(name: str, known: Iterable[str]) -> str:
    """ "did you mean dpo? known: dpo, ipo"."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{guess}known: {', '.join(names) or 'none'}"
