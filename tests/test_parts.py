import doctest
from collections.abc import Callable
from typing import Literal

import pytest
import torch

import pyrite.core.specs
import pyrite.math.ensembles
import pyrite.math.losses
from pyrite.core.specs import Registry, members, part, signature
from pyrite.math.losses import dpo

MINE = '''
from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True)
class Record:
    value: float

def my_loss(pair, *, tau: float = 1.0, note: str = "x"):
    """Mine."""
    return Record(pair * tau)

def _hidden(pair): ...
'''


def scorer(*, words: list[str], unit: Literal["words", "chars"] = "words") -> Callable[[str], int]:
    return lambda text: len(words) + len(text)


def options(data, *, count: int = 1, flag: bool = False, cap: float | None = None, any_=0) -> tuple:
    return data, count, flag, cap, any_


HERE = {"scorer": scorer, "options": options}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(spec: str, registry: Registry = pyrite.math.losses) -> str:
    with pytest.raises(ValueError) as caught:
        part(spec, registry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_examples():
    result = doctest.testmod(pyrite.core.specs)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("spec", ["uwo", "uwo()", " uwo( ) ", "uwo(weight=0.5)", "uwo(weight = 5e-1,)"])
def test_names_with_and_without_options(spec):
    scores = torch.tensor([[1.0], [2.0], [3.0], [4.0], [10.0]])
    assert part(spec, pyrite.math.ensembles)(scores).item() == -1.0


def test_prints_as_the_spec_that_makes_it():
    made = part("dpo( beta = 3e-1, label_smoothing=.1 )", pyrite.math.losses)
    assert repr(made) == str(made) == "dpo(beta=0.3, label_smoothing=0.1)"
    assert part(repr(made), pyrite.math.losses).options == made.options
    assert made.name == "dpo"


def test_a_function_of_ones_own(mine):
    made = part("mine.py:my_loss(tau=2, note='a:b(c)')", HERE)
    assert made(3).value == 6
    assert repr(made) == "mine.py:my_loss(tau=2, note='a:b(c)')"
    assert part(f"{mine}/mine.py:my_loss", HERE)(3).value == 3


def test_a_function_of_a_module():
    made = part("pyrite.math.losses:dpo(beta=1)", pyrite.math.ensembles)
    assert repr(made) == "pyrite.math.losses:dpo(beta=1)"
    assert made.function.func is dpo  # type: ignore


def test_a_factory_is_called_with_its_options():
    assert part("scorer(words=['a', 'b'])", HERE)("xyz") == 5
    assert refusal("scorer", HERE) == "scorer needs the option 'words'; it is scorer(words, unit='words')"


def test_late_options_win():
    assert part("options(count=2)", HERE)("x", count=3) == ("x", 3, False, None, 0)


@pytest.mark.parametrize(
    "spec, value",
    [
        ("options(count=-2)", ("x", -2, False, None, 0)),
        ("options(flag=True)", ("x", 1, True, None, 0)),
        ("options(cap=None)", ("x", 1, False, None, 0)),
        ("options(cap=3)", ("x", 1, False, 3, 0)),
        ("options(any_=[1, {'a': (2.0, None)}])", ("x", 1, False, None, [1, {"a": (2.0, None)}])),
    ],
)
def test_literal_values(spec, value):
    assert part(spec, HERE)("x") == value


@pytest.mark.parametrize(
    "spec, pieces",
    [
        ("dop", ["unknown name 'dop'", "did you mean dpo", "known: alphapo, aot, "]),
        ("zzz()", ["unknown name 'zzz'", "known: alphapo, aot, "]),
        ("margin", ["unknown name 'margin'"]),
        ("ipo(ta=1)", ["no option 'ta'", "did you mean tau", "ipo(tau=0.1, length_norm=False)"]),
        ("dpo(0.3)", ["'0.3' has no name"]),
        ("dpo(*[1])", ["has no name"]),
        ("dpo(**{'beta': 1})", ["give every option once, by its name"]),
        ("dpo(beta=1, beta=2)", ["give every option once", "beta=2"]),
        ("dpo(beta=)", ["cannot read 'dpo(beta=)' at ", "name(option=value)"]),
        ("dpo(beta=1", ["cannot read", "at '(beta=1'"]),
        ("dpo(beta=1) x", ["cannot read", "at 'x'"]),
        ("dpo(beta=1)(label_smoothing=0)", ["beyond one pair of parentheses"]),
        ("dpo(beta=1) + dpo(beta=2)", ["beyond one pair of parentheses"]),
        ("dpo beta=1", ["cannot read 'dpo beta=1'"]),
        ("", ["cannot read ''"]),
        ("dpo(beta=ln2)", ["beta=ln2 is no plain value", "text in quotes"]),
        ("dpo(beta=__import__('os').getpid())", ["is no plain value"]),
        ("dpo(beta='0.1')", ["beta='0.1' is str, give float", "dpo(beta=0.1, label_smoothing=0.0)"]),
        ("dpo(beta=True)", ["is bool, give float"]),
        ("nosuch.py:dpo()", ["no file nosuch.py"]),
        ("nosuch:dpo()", ["no module named 'nosuch'", '"nosuch.py:name()"']),
        ("pyrite.math.losses:margin()", ["unknown name 'margin' in pyrite.math.losses", "known: alphapo, aot, "]),
    ],
)
def test_refusals_teach(spec, pieces):
    message = refusal(spec)
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(
    "spec, piece",
    [
        ("options(count=1.5)", "count=1.5 is float, give int"),
        ("options(flag=1)", "flag=1 is int, give bool"),
        ("options(cap='x')", "give float or None"),
        ("scorer(words=['a'], unit='lines')", "give 'words' or 'chars'"),
    ],
)
def test_values_are_checked_against_the_annotations(spec, piece):
    assert piece in refusal(spec, HERE)


def test_refusals_of_ones_own_file(mine):
    assert "unknown name 'my_los' in mine.py: did you mean my_loss" in refusal("mine.py:my_los")
    assert "unknown name '_hidden'" in refusal("mine.py:_hidden")
    (mine / "broken.py").write_text("def f(:\n")
    assert "cannot import broken.py: SyntaxError" in refusal("broken.py:f")
    (mine / "needy.py").write_text("import not_there\n")
    assert "cannot import needy.py: no module named 'not_there'" in refusal("needy.py:f")
    (mine / "lost.py").write_text("open('nowhere.txt')\n")
    assert "cannot import lost.py: FileNotFoundError" in refusal("lost.py:f")


def test_members_are_what_a_module_exports(mine):
    listed = {member.name: member for member in members(pyrite.math.losses)}
    assert list(listed) == sorted(pyrite.math.losses.__all__)
    assert listed["dpo"].options == {"beta": 0.1, "label_smoothing": 0.0}
    assert listed["ipo"].summary.startswith("Identity preference optimization")
    assert [member.name for member in members(HERE)] == ["options", "scorer"]


def test_every_member_is_named_by_its_signature():
    for registry in (pyrite.math.losses, pyrite.math.ensembles):
        for member in members(registry):
            assert part(signature(getattr(registry, member.name)), registry).options == member.options
