"""From what was typed, or stands in a file, to the Config of a job.

Typed options are a mapping of names to the texts that follow them, `Given`, until `make` turns the texts into values.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from pyrite.cli.help import did_you_mean, is_old, unknown
from pyrite.math.ranges import ConfigOption, check, declared, filled, kinds

Given = dict[str, list[str]]


def parse(schema: type, arguments: Sequence[str], *, prog: str) -> Any:
    """A Config from options as they are typed."""
    return make(schema, read(schema, arguments), prog=prog)


def read(schema: type, arguments: Sequence[str], *, job: str | None = None) -> Given:
    """The options typed, over those of `--config FILE`. Raises ValueError for one that the Config does not have."""
    known = {one.name: one for one in declared(schema)}
    given: Given = {}
    values: list[str] | None = None
    for argument in arguments:
        if re.match(r"--[A-Za-z]", argument):
            option, equals, value = argument.partition("=")
            name = option.removeprefix("--").replace("-", "_")
            off = name.startswith("no_") and name.removeprefix("no_") in known
            if name not in known and not off and name != "config":
                raise ValueError(unknown(name, known, option.replace("_", "-")))
            values = given[name.removeprefix("no_") if off else name] = ["False"] if off else []
            values += [value] if equals else []
        elif values is None:
            raise ValueError(f"{argument}: no such option; write every option as --name value")
        else:
            values.append(argument)
    if "config" not in given:
        return given
    if len(path := given.pop("config")) != 1:
        raise ValueError("--config needs a YAML file, or the config.json of a run")
    return _from_file(known, Path(path[0]).expanduser(), job) | given


def make(schema: type, given: Given, *, prog: str) -> Any:
    """A Config from typed options, over its defaults. Raises ValueError for one that is missing or out of its range."""
    known = list(declared(schema))
    for one in known:
        if one.required and one.name not in given:
            told = one.text.split(". ")[0].rstrip(".:")
            why = f" ({told})" if told else ""
            raise ValueError(f"{one.typed} is missing{why}; `{prog} --help` shows an example")
    config = filled(schema, {one.name: _values(one, given[one.name]) for one in known if one.name in given})
    check(config)
    return config


def _values(one: ConfigOption, texts: list[str]) -> Any:
    """What was typed for an option, as its annotation has it."""
    plain = kinds(one.hint)
    if Path in plain and (not texts or "" in texts):
        raise ValueError(f"{one.typed} is empty: give a path")  # an empty path would be the current folder
    for kind in plain:
        if get_origin(kind) is tuple:
            inner = get_args(kind)
            if inner[-1] is not ... and len(texts) != len(inner):
                raise ValueError(f"{one.typed}: {len(inner)} values are needed")
            return tuple(_value(one, inner[0] if inner[-1] is ... else inner[i], text) for i, text in enumerate(texts))
    if plain == [bool]:
        if texts not in ([], ["True"], ["False"]):
            raise ValueError(
                f"{one.typed} {' '.join(texts)}: is a switch and takes no value; --no-{one.typed[2:]} is off"
            )
        return texts != ["False"]
    if not texts:
        raise ValueError(f"{one.typed}: a value is missing")
    if texts[1:]:
        raise ValueError(f"{one.typed} {' '.join(texts)}: takes one value")
    return _value(one, one.hint, texts[0])


def _value(one: ConfigOption, hint: Any, text: str) -> Any:
    wrong = ""
    for kind in kinds(hint):
        if kind is types.NoneType:
            if text == "None":
                return None
        elif get_origin(kind) is Literal:
            choices = {str(choice): choice for choice in get_args(kind)}
            if text in choices:
                return choices[text]
            wrong = f": invalid choice {text!r}; choose {', '.join(choices)}"
        elif kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                wrong = f" {text}: is no {'whole number' if kind is int else 'number'}"
        else:
            return kind(at_home(text))
    raise ValueError(f"{one.typed}{wrong}")


def at_home(text: str) -> str:
    """The user's home in place of every ~ that begins a path, also inside a spec string."""
    return re.sub(r"""(?<![^\s('"=*])~(?=/|$)""", str(Path.home()), text)


def _from_file(known: Mapping[str, ConfigOption], path: Path, job: str | None) -> Given:
    """The options of a YAML file, or of the config.json of a run of this job."""
    try:
        found = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: give one option a line, as in batch_size: 8")
    if "job" in found and "job" not in known and isinstance(made := found.pop("job"), str):
        if made != job:
            raise ValueError(f"{path}: is the config of `pyrite {made}`, not of `pyrite {job}`; use it with that")
        found.pop("settings", None)  # of a recipe: its scale stands for them
    given: Given = {}
    groups = {one.group for one in known.values()}
    for key, value in _flat(found, groups, path):
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: {unknown(name, known, repr(key))}")
        given[name] = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return given


def _flat(found: Mapping[Any, Any], groups: set[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Nested groups ("training: {lr: ...}") read as if written flat."""
    for key, value in found.items():
        if not isinstance(value, dict):
            yield str(key), value
        elif key in groups or any(is_old(str(inner)) for inner in value):
            yield from _flat(value, groups, path)  # also a group of an earlier version
        else:
            raise ValueError(f"{path}: unknown group {key!r}{did_you_mean(str(key), groups)}")
