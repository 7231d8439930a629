"""Every line of nonsense.yaml: one line on standard error that names what is wrong, exit status 2, nothing written."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from walks.command import pyrite
from walks.nonsense_files import lay_out

CORPUS = yaml.safe_load((Path(__file__).parent / "nonsense.yaml").read_text())
COMMANDS = {name: shlex.split(command.replace("'", "\\'")) for name, command in CORPUS["commands"].items()}


class Case(NamedTuple):
    """A command, still with the names of files, and the words its error must have; a name for reports.

    often: in the fast tests, in which a line that is for several commands is tried on one of them, in turn.
    """

    name: str
    command: list[str]
    words: list[str]
    often: bool


def cases() -> Iterator[Case]:
    """All of the corpus."""
    for group in CORPUS["cases"]:
        for (i, line), (j, command) in itertools.product(enumerate(group["lines"]), enumerate(group["for"])):
            change, _, words = line.partition(" -> ")
            typed = shlex.split(change) if '"' in change or "''" in change else change.split()
            said = [word.strip() for word in words.split(" & ")] if words else named(typed)
            yield Case(f"{command}: {change}", changed(command, typed), said, i % len(group["for"]) == j)


def named(typed: list[str]) -> list[str]:
    """What an error must name where the corpus does not say: the files as typed, else the first option."""
    files = [word for word in typed if "{" in word]
    return files or [next(word for word in typed if word.startswith("--"))]


def changed(command: str, typed: list[str]) -> list[str]:
    """A sound command with some options replaced, added or taken away."""
    if typed[0] == "only":
        return typed[1:]
    sound = COMMANDS[command]
    if typed[0] == "without":
        return _without(sound, typed[1])
    for option in (word for word in typed if word.startswith("--")):
        sound = _without(sound, option)
    return [*sound, *typed]


def _without(command: list[str], option: str) -> list[str]:
    if option not in command:
        return command
    at = command.index(option)
    end = next((i for i in range(at + 1, len(command)) if command[i].startswith("--")), len(command))
    return command[:at] + command[end:]


def tree(*roots: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below."""
    found = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            for name in (*folders, *files):
                about = os.lstat(path := os.path.join(folder, name))
                found[path] = (0 if name in folders else about.st_size, about.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def places(tiny: Path, pairs: Path, demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Files by name; commands run in a folder of their own."""
    root = tmp_path_factory.mktemp("nonsense")
    found = lay_out(root, model=tiny, pairs=pairs, demos=demos)
    (root / "here").mkdir()
    before = Path.cwd()
    os.chdir(root / "here")
    yield {**found, "root": str(root), "out": str(root / "out" / "run")}
    os.chdir(before)


def fill(words: list[str], places: dict[str, str]) -> list[str]:
    """Names of files replaced; other braces stay, as in {gold}."""
    for name, path in places.items():
        words = [word.replace("{" + name + "}", path) for word in words]
    return words


def fault(case: Case, places: dict[str, str]) -> str | None:
    """What is wrong with what a bad command does."""
    if "{unwritable}" in " ".join(case.command) and os.geteuid() == 0:
        return None  # root writes everywhere
    before = tree(Path(places["root"]))
    status, out, err = pyrite(*fill(case.command, places))
    after = tree(Path(places["root"]))
    lost = [word for word in fill(case.words, places) if word not in _last(err)]
    if status != 2:
        return f"exit status {status}: {err or out[-200:]}"
    if (
        "Traceback" in err
        or err.count("\npyrite: ") + err.startswith("pyrite: ") != 1
        or not _last(err).startswith("pyrite: ")
    ):
        return f"not one line: {err}"
    if lost:
        return f"does not name {lost}: {err}"
    if out:
        return f"standard output: {out}"
    if changes := {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}:
        return f"changed {sorted(changes)[:3]}: {err}"
    return None


def _last(said: str) -> str:
    """The error; what a command had to say before (a note on the data) may stand above it."""
    return said.rstrip("\n").rpartition("\n")[2]


OPEN = set(itertools.chain(*(CORPUS["open"] or {}).values()))
ALL = [case for case in cases() if case.name not in OPEN]
JOBS = list(dict.fromkeys(case.name.partition(":")[0] for case in ALL))


def test_the_corpus_is_large() -> None:
    assert len(ALL) >= 1200
    assert {case.name for case in cases()} >= OPEN  # what was mended, or renamed, is taken off that list
    assert sum(case.often for case in cases()) >= 600


@pytest.mark.parametrize("job", list(COMMANDS))
def test_a_refused_command_works_once_corrected(places: dict[str, str], job: str, tmp_path: Path) -> None:
    """With the same --out, which the refused one has left as it was."""
    here = {**places, "out": str(tmp_path / "run")}
    refused = [case for case in ALL if case.name.startswith(f"{job}: --") and case.often]
    for case in [case for case in refused if "{out}" in case.command][:2]:
        status, _, said = pyrite(*fill(case.command, here))
        assert status == 2, said
    status, _, said = pyrite(*fill(COMMANDS[job], here))
    assert status == 0, said


def _faults(places: dict[str, str], some: list[Case]) -> str:
    faults = {case.name: found for case in some if (found := fault(case, places))}
    return "\n".join(f"{name} -> {found.strip()}" for name, found in faults.items())


@pytest.mark.parametrize("job", JOBS)
def test_nonsense(places: dict[str, str], job: str) -> None:
    assert not _faults(places, [case for case in ALL if case.name.startswith(f"{job}:") and case.often])


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_nonsense_in_every_job(places: dict[str, str], job: str) -> None:
    assert not _faults(places, [case for case in ALL if case.name.startswith(f"{job}:") and not case.often])
