"""What an option may be: its range stands once, in the annotation beside it, and is checked here.

`beta: Positive = 0.1` in the signature of a part or in a job's Config says that beta is a number above 0.
`fault` compares one value with its annotation, `check` a whole Config with its groups. Numbers are always finite,
and text is never empty, unless that is the default.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Len, Lt, Predicate

__all__ = [
    "Amplitude",
    "AnyText",
    "ConfigOption",
    "Count",
    "Fraction",
    "Half",
    "Inside",
    "Minority",
    "Natural",
    "NonNegative",
    "Positive",
    "Real",
    "Several",
    "Share",
    "Some",
    "check",
    "declared",
    "fault",
    "filled",
    "hints",
    "kinds",
    "part",
    "refusal",
    "require",
    "shown",
    "words",
]

Real = Annotated[float, Predicate(math.isfinite)]
"""Any finite number."""

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]

Share = Annotated[float, Interval(ge=0, le=1)]
"""A part of a whole, or a probability."""

Fraction = Annotated[float, Interval(ge=0, lt=1)]
"""A share that leaves something: 0, but never all."""

Amplitude = Annotated[float, Interval(gt=0, le=1)]
"""A share that is something: all, but never 0."""

Inside = Annotated[float, Interval(gt=0, lt=1)]
"""A share that is neither nothing nor all."""

Half = Annotated[float, Interval(ge=0, le=0.5)]
"""The probability that a label is wrong; at a half it says nothing."""

Minority = Annotated[float, Interval(ge=0, lt=0.5)]
"""The probability that a label is wrong, where it must say something."""

Count = Annotated[int, Ge(1)]
Several = Annotated[int, Ge(2)]
Natural = Annotated[int, Ge(0)]

Item = TypeVar("Item")
Some = Annotated[tuple[Item, ...], Len(1)]
"""Several values, at least one."""

AnyText = Annotated[str, Len(0)]
"""Text that may be empty; other text may not."""

_NAMES = {type(None): "None", Path: "a path"}
_SIMPLE = (bool, int, float, str, Path, types.NoneType)


def fault(value: Any, hint: Any) -> str | None:
    """What is wrong with a value of an option so annotated, None if nothing is.

    >>> fault(-1, Positive), fault(1, Positive)
    ('give a number above 0', None)
    """
    wrong = _fault(value, hint)
    return wrong[1] if wrong else None


def check(config: Any) -> None:
    """Refuse a Config if an option, also one in a group, is not what its annotation says.

    Raises ValueError that names the option as it is typed: "--batch-size 0: give at least 1".
    """
    usual = {one.key: one.default for one in declared(type(config))}
    for one in declared(config):
        if one.default == usual.get(one.key) == "":
            continue
        if wrong := fault(one.default, one.hint):
            raise ValueError(refusal(f"{one.typed} {shown(one.default)}", wrong))


def require(function: Callable[..., Any], **values: Any) -> None:
    """Refuse values that a function's own annotations rule out. For calls without a spec string."""
    annotated = hints(function)
    for name, value in values.items():
        if wrong := fault(value, annotated.get(name, Any)):
            raise ValueError(refusal(f"{function.__name__}: option {name}={value!r}", wrong))


def refusal(option: str, wrong: str) -> str:
    """An option and what is wrong with it, as one phrase."""
    return f"{option}{'' if wrong.startswith('is ') else ':'} {wrong}"


def hints(owner: Any) -> dict[str, Any]:
    """The annotations of a function's or a dataclass's options, with their ranges; {} if they cannot be read."""
    try:
        return get_type_hints(owner, include_extras=True)
    except Exception:  # names imported for type checkers only, or whatever a user's own file annotates with
        return {}


def kinds(hint: Any) -> list[Any]:
    """The plain types that an annotation admits, without their ranges; None first.

    >>> kinds(Share | str | None)
    [<class 'NoneType'>, <class 'float'>, <class 'str'>]
    """
    if get_origin(hint) is Annotated:
        return kinds(get_args(hint)[0])
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    found = [kind for part in get_args(hint) for kind in kinds(part)]
    return sorted(found, key=lambda kind: kind is not types.NoneType)


def words(hint: Any) -> str:
    """The range an annotation declares, "" if it declares none: "above 0", "0 to 1"."""
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        return " and ".join(filter(None, [words(inner), *(_rule(rule)[0] for rule in rules)]))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    kinds = [kind for kind in get_args(hint) if kind not in (types.NoneType, ...)]
    return " or ".join(dict.fromkeys(filter(None, map(words, kinds))))


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value)) or "(nothing)"
    return repr(value) if isinstance(value, str) and (not value or value.isspace()) else str(value)


class ConfigOption(NamedTuple):
    """One option of a Config class. Read from a Config instead of its class, `default` is the value it has."""

    owner: type
    """The class that declares it."""
    group: str
    name: str
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def typed(self) -> str:
        """The option as it is typed."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def key(self) -> str:
        """Its name in a run's config.json: "seed", "training.lr"."""
        return f"{self.group}.{self.name}" if self.group else self.name

    @property
    def several(self) -> bool:
        """Whether it takes more than one value."""
        return any(get_origin(kind) is tuple for kind in kinds(self.hint))

    @property
    def text(self) -> str:
        """The text below it in its class."""
        return _texts(self.owner).get(self.name, "")


@functools.cache
def _texts(schema: type) -> dict[str, str]:
    """The text below each option of a Config class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        line.target.id: inspect.cleandoc(after.value.value)
        for line, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


def declared(schema: Any, group: str = "") -> Iterator[ConfigOption]:
    """Every option of a Config class, or of a Config, groups included."""
    owner = schema if isinstance(schema, type) else type(schema)
    annotated = hints(owner)
    for one in fields(schema):
        default = _default_in(schema, one)
        if is_dataclass(default):
            yield from declared(default, one.name)
        else:
            yield ConfigOption(owner, group, one.name, annotated.get(one.name, Any), default)


def filled(schema: Any, values: Mapping[str, Any]) -> Any:
    """A Config with these values over its defaults. Options of groups are given by their names alone."""
    own: dict[str, Any] = {}
    for one in fields(schema):
        default = _default_in(schema, one)
        if is_dataclass(default):
            own[one.name] = filled(default, values)
        elif one.name in values:
            own[one.name] = values[one.name]
    return schema(**own) if isinstance(schema, type) else replace(schema, **own)


def _default_in(schema: Any, field: Field[Any]) -> Any:
    """The default of a field of a class, or its value in an instance."""
    if not isinstance(schema, type):
        return getattr(schema, field.name)
    if field.default is MISSING and field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


Fault = tuple[bool, str]  # whether the type is right and only the value is not; what is wrong, in words


def _fault(value: Any, hint: Any) -> Fault | None:
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        if inner is str and isinstance(value, str) and any(isinstance(rule, Len) for rule in rules):
            inner = Any  # how long a text is, its own rule says
        if wrong := _fault(value, inner):
            return wrong
        broken = [said for said, holds in map(_rule, rules) if not holds(value)]
        number = "a number " if broken and broken[0].startswith(("above", "below")) else ""
        return (True, f"give {number}{broken[0]}") if broken else None
    if get_origin(hint) in (Union, types.UnionType):
        return _of_several(value, get_args(hint))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        right = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if right else (False, f"give {' or '.join(map(repr, choices))}")
    if hint in _SIMPLE:
        return _of_type(value, hint)
    if get_origin(hint) in (list, tuple, Sequence):
        return _of_many(value, get_args(hint))
    if isinstance(hint, type) and hint not in (Any, object) and not isinstance(value, hint):
        return False, f"is {type(value).__name__}, give {hint.__name__}"
    return _anything(value)


def _of_type(value: Any, kind: type) -> Fault | None:
    """Text and paths stand for each other. A whole number is a number, True is not."""
    if kind in (str, Path):
        right = isinstance(value, (str, Path))
    elif kind is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        right = type(value) is kind
    if not right:
        return False, f"is {type(value).__name__}, give {_NAMES.get(kind, kind.__name__)}"
    if isinstance(value, str) and not value.strip():
        return True, "must not be empty"
    return _anything(value)


def _of_several(value: Any, kinds: tuple[Any, ...]) -> Fault | None:
    faults = [_fault(value, kind) for kind in kinds]
    if any(found is None for found in faults):
        return None
    near = [found for found in faults if found and found[0]]
    if near:
        return near[0]
    wanted = " or ".join(_name(kind) for kind in kinds)
    return False, f"is {type(value).__name__}, give {wanted}"


def _of_many(value: Any, kinds: tuple[Any, ...]) -> Fault | None:
    if not isinstance(value, (list, tuple)):
        return False, f"is {type(value).__name__}, give a list"
    several = kinds[:-1] * len(value) if kinds[-1:] == (...,) else kinds * len(value) if len(kinds) == 1 else kinds
    if len(several) != len(value):
        return True, f"give {len(several)} values"
    return next((found for item, kind in zip(value, several, strict=True) if (found := _fault(item, kind))), None)


def _anything(value: Any) -> Fault | None:
    """What is checked without an annotation: numbers are finite, also inside of lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return True, "give a finite number"
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for item in inner if (found := _anything(item))), None)


def _rule(rule: Any) -> tuple[str, Callable[[Any], bool]]:
    """A rule of annotated_types in words, and a function that tests it."""
    match rule:
        case Interval(ge=low, le=high) if low is not None and high is not None:
            return f"{low} to {high}", lambda value: low <= value <= high
        case Interval():
            parts = [_rule(part) for part in rule]
            return " and ".join(said for said, _ in parts), lambda value: all(holds(value) for _, holds in parts)
        case Gt(gt=low):
            return f"above {low}", lambda value: value > low
        case Ge(ge=low):
            return f"at least {low}", lambda value: value >= low
        case Lt(lt=high):
            return f"below {high}", lambda value: value < high
        case Le(le=high):
            return f"at most {high}", lambda value: value <= high
        case Len(min_length=few, max_length=many):
            upper = "" if many is None else f" and at most {many}"
            said = f"at least {'one' if few == 1 else few}{upper}"
            return said, lambda value: few <= len(value) and (many is None or len(value) <= many)
        case Predicate(func=holds):
            said = (holds.__doc__ or holds.__name__).splitlines()[0].rstrip(".")  # its docstring says what must hold
            return "any finite number" if holds is math.isfinite else said, holds
    return "", lambda value: True


def _name(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _name(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return _NAMES.get(hint, hint.__name__ if isinstance(hint, type) else str(hint))


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a part be called with options alone: that gives the part with these options.

    A loss, an ensemble or another part is a function of data, with keyword-only options. Raises ValueError for an
    option that is unknown or out of its range.

    >>> from pyrite.math.losses import simpo
    >>> simpo(beta=2.5).keywords
    {'beta': 2.5}
    """
    data = {name for name, one in inspect.signature(function).parameters.items() if one.kind is not one.KEYWORD_ONLY}

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        if args or data & options.keys():
            return function(*args, **options)
        require(function, **options)
        return functools.partial(called, **options)

    return called
