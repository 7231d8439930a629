"""Every option of every part, job and recipe: what is out of its range is one line, and nothing is read or written."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Interval, Len, Predicate

from pyrite import cli
from pyrite.core import specs
from pyrite.math import ranges
from pyrite.recipes import study

KINDS = [kind for kind in cli.KINDS if kind not in ("jobs", "recipes")]
RULES = (Gt, Ge, Interval, Predicate)
Command = Callable[..., tuple[int, str, str]]


def schemas() -> dict[str, Any]:
    """Command to the dataclass of its options."""
    found = {}
    for package, before in (("jobs", ""), ("recipes", "recipe ")):
        for name in cli.names(package):
            config = getattr(importlib.import_module(f"pyrite.{package}.{name}"), "Config", study.Config)
            several = {f"{before}{name} {one.__name__.lower()}": one for one in get_args(config)}
            found |= several or {f"{before}{name}": config}
    return found


def leaves(schema: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotation and default of every option, those of groups too."""
    annotated = ranges.hints(schema)
    assert annotated, f"the annotations of {schema} cannot be read"
    for field in fields(schema):
        if is_dataclass(field.default):
            yield from leaves(type(field.default))
        else:
            yield field.name, annotated[field.name], field.default


SCHEMAS = schemas()
OPTIONS = [(command, *leaf) for command, schema in SCHEMAS.items() for leaf in leaves(schema)]
MEMBERS = [
    (kind, name, function)
    for kind in KINDS
    for name, function in specs._functions(importlib.import_module(cli.KINDS[kind])).items()
]
PART_OPTIONS = [
    (kind, name, option, ranges.hints(function).get(option, Any), default)
    for kind, name, function in MEMBERS
    for option, default in specs._defaults(function).items()
]


def bare(hint: Any) -> bool:
    """Whether an annotation holds a number without a rule of its own."""
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        return bare(inner) and not any(isinstance(rule, RULES) for rule in rules)
    return hint in (int, float) or any(bare(kind) for kind in get_args(hint))


def kinds(hint: Any) -> set[Any]:
    """The plain types an annotation admits."""
    if get_origin(hint) is Annotated:
        return kinds(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return {Literal}
    found = [kinds(kind) for kind in get_args(hint) if kind is not ...]
    return set().union(*found) if found else {hint}


def may_be_empty(hint: Any) -> bool:
    rules = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return any(isinstance(rule, Len) and rule.min_length == 0 for rule in rules)


def nonsense(hint: Any) -> list[Any]:
    """Values that no option of this annotation may take: drawn by its types, then by the bounds it declares."""
    admits, rules = kinds(hint), json.loads(json.dumps(ranges.words(hint)))
    found: list[Any] = []
    if float in admits:
        found += [math.nan, math.inf, -math.inf]
    if {int, float} & admits:
        if "any finite" not in rules:
            found += [-1, -1e9 if float in admits else -(10**9)]
        if "above 0" in rules or "at least 1" in rules or "at least 2" in rules:
            found += [0]
        if "to 1" in rules or "to 0.5" in rules or "below" in rules or "at most 1" in rules:
            found += [1.5, 100]
        if int in admits and float not in admits:
            found += [1.5, True]
        if str not in admits and Path not in admits:
            found += ["many"]
    if str in admits and not may_be_empty(hint):
        found += ["", 7] if not {int, float} & admits else [""]
    if Literal in admits and str not in admits and not {int, float} & admits:
        found += ["nonsense"]
    if bool in admits:
        found += ["maybe", 2]
    if type(None) not in admits:
        found += [None]
    return found


@pytest.fixture
def pyrite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Exit status, standard output and standard error of a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pyrite", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return run


def required(schema: Any, *, but: str = "") -> list[str]:
    """Something for every option that must be given, none of which is there."""
    given = []
    for name, hint, default in leaves(schema):
        if default is MISSING and name != but:
            given += [f"--{name.replace('_', '-')}", *(["nothing", "other"] if several(hint) else ["nothing"])]
    return given


def several(hint: Any) -> bool:
    return get_origin(get_args(hint)[0] if get_origin(hint) is Annotated else hint) is tuple


def typed(hint: Any) -> Iterator[Any]:
    """The nonsense that can be typed: all is text on a command line, and a switch takes no value."""
    if bool not in kinds(hint):
        for value in nonsense(hint):
            text = isinstance(value, int) and kinds(hint) & {str, Path}
            if value is not None and not isinstance(value, bool) and not text:
                yield value


@pytest.mark.parametrize(("command", "name", "hint"), [(c, n, h) for c, n, h, _ in OPTIONS])
def test_every_number_of_a_job_declares_its_range(command: str, name: str, hint: Any) -> None:
    assert not bare(hint), f"{command} --{name}: annotate it with a range of pyrite/math/ranges.py"


@pytest.mark.parametrize(("kind", "name", "option", "hint"), [(k, n, o, h) for k, n, o, h, _ in PART_OPTIONS])
def test_every_number_of_a_part_declares_its_range(kind: str, name: str, option: str, hint: Any) -> None:
    assert hint is not Any and not bare(hint), (
        f"{kind}.{name}({option}): annotate it with a range of pyrite/math/ranges.py"
    )


@pytest.mark.parametrize(("command", "name", "hint", "default"), OPTIONS)
def test_defaults_are_in_range(command: str, name: str, hint: Any, default: Any) -> None:
    if default not in (MISSING, ""):
        assert ranges.fault(default, hint) is None


@pytest.mark.parametrize("command", SCHEMAS)
def test_nonsense_on_the_command_line(pyrite: Command, tmp_path: Path, command: str) -> None:
    """Out of range, of another type, empty: one line that names the option as typed, before anything is read."""
    for number, (name, hint, _) in enumerate(leaves(SCHEMAS[command])):
        option, values = f"--{name.replace('_', '-')}", list(typed(hint))
        if not values:
            continue  # a switch, or text that may be anything
        value = values[number % len(values)]
        status, out, err = pyrite(*command.split(), *required(SCHEMAS[command], but=name), option, value)
        assert (status, out) == (2, ""), (option, value, err)
        assert err.count("\n") == 1 and err.startswith("pyrite: ") and option in err, (option, value, err)
        assert not list(tmp_path.iterdir()), (option, value)


@pytest.mark.parametrize("command", [c for c in SCHEMAS if not c.startswith("recipe")])
def test_nonsense_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """The same for a Config made in Python, with types that no command line gives."""
    monkeypatch.chdir(tmp_path)
    schema = SCHEMAS[command]
    run = importlib.import_module(f"pyrite.jobs.{command.split()[0]}").run
    annotated = ranges.hints(schema)
    needed = {name: "nothing" for name, _, default in leaves(schema) if default is MISSING}
    needed |= {name: ("nothing", "other") for name in needed if several(annotated[name])}
    good = schema(**needed)
    for name, hint, _ in leaves(schema):
        for value in nonsense(hint):
            with pytest.raises(ValueError) as error:
                run(_with(good, name, value))
            assert f"--{name.replace('_', '-')} " in str(error.value), (name, value, str(error.value))
            assert "\n" not in str(error.value)
            assert not list(tmp_path.iterdir())


def _with(config: Any, name: str, value: Any) -> Any:
    """A config in which one option, perhaps of a group, is another."""
    for field in fields(config):
        inner = getattr(config, field.name)
        if field.name == name:
            return replace(config, **{name: value})
        if is_dataclass(inner) and not isinstance(inner, type) and any(name == n for n, *_ in leaves(type(inner))):
            return replace(config, **{field.name: _with(inner, name, value)})
    raise AssertionError(name)


@pytest.mark.parametrize(("kind", "name", "option", "hint", "default"), PART_OPTIONS)
def test_nonsense_in_a_part(kind: str, name: str, option: str, hint: Any, default: Any) -> None:
    registry = importlib.import_module(cli.KINDS[kind])
    for value in nonsense(hint):
        if value == default:
            continue
        text = {math.inf: "1e999", -math.inf: "-1e999"}.get(value, repr(value)) if value == value else "1e999"
        with pytest.raises(ValueError, match=rf"\b{option}=") as error:
            specs.part(f"{name}({option}={text})", registry)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", ["dpo(beta=-1)", "dpo(beta=0)", "dpo(label_smoothing=2)", "ipo(tau=-1)", "dpo(beta=1e999)"]
)
def test_a_loss_that_learns_the_rejected_answer_does_not_start(
    pyrite: Command, tiny: Path, pairs: Path, tmp_path: Path, spec: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, out, err = pyrite("dpo", "--model", tiny, "--data", pairs, "--out", "run", "--loss", spec)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert spec.split("(")[1].split("=")[0] in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("spec", ["ema(rate=0)", "ema(rate=2)", "ema(rate=nan)", "ema(every=0)", "-1*self", "0*self"])
def test_a_reference_out_of_range(pyrite: Command, tiny: Path, pairs: Path, spec: str) -> None:
    status, out, err = pyrite("dpo", "--model", tiny, "--data", pairs, "--out", "run", f"--ref={spec}")
    assert (status, out, err.count("\n")) == (2, "", 1), err


def test_list_shows_ranges(pyrite: Command, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["pyrite", "list", "losses"])
    cli.main()
    said = capsys.readouterr().out
    assert "beta: above 0; label_smoothing: 0 to 0.5" in said
