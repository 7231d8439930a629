"""Options of preferences: the shipped ones, and files of one's own with errors that name the entry."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import yaml

from pyrite.core import specs
from pyrite.data import conditioning as module
from pyrite.data.conditioning import Dimensions, Option, filled
from pyrite.feedback import judges

SOUPS = Dimensions.load("soups")
MINE = [
    {"id": "warm", "dimension": "tone", "sentence": "Be warm.", "criterion": "Which is warmer?", "gold": "length()"},
    {"id": "cold", "dimension": "tone", "sentence": "Be cold.", "criterion": "Which is colder?"},
    {"id": "brief", "dimension": "size", "sentence": "Be  brief.\n", "criterion": "Which is shorter?"},
]


def put(folder: Path, entries: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
    return path


def test_examples() -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_eight_of_the_paper() -> None:
    assert SOUPS.ids == ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B", "P3C", "P3D")
    assert SOUPS.names == ("expertise", "informativeness", "style")
    assert [option.id for option in SOUPS.opposites("P3A")] == ["P3B", "P3C", "P3D"]
    assert [option.id for option in SOUPS.opposites("P2B")] == ["P2A"]
    assert all(option.sentence.endswith(".") and option.criterion.endswith(".") for option in SOUPS.options)


def test_combinations_in_order() -> None:
    """Eight of the first six options, AAA, AAB, ..., BBB; sixteen with those added later; any product."""
    wanted = "AAA AAB ABA ABB BAA BAB BBA BBB".split()
    assert ["".join(id[-1] for id in one) for one in SOUPS.combinations()] == wanted
    sixteen = ["".join(id[-1] for id in one) for one in SOUPS.combinations(SOUPS.ids)]
    assert len(sixteen) == 16 and sixteen[:5] == ["AAA", "AAB", "AAC", "AAD", "ABA"]
    assert SOUPS.combinations(["P2B", "P1A", "P1B"]) == [("P1A", "P2B"), ("P1B", "P2B")]
    assert SOUPS.combinations([]) == []
    with pytest.raises(ValueError, match="unknown preference 'P4A'"):
        SOUPS.combinations(["P4A"])


def test_options_are_chosen_in_the_order_of_dimensions() -> None:
    assert [option.id for option in SOUPS.chosen(["P3B", "P1A", "P2A"])] == ["P1A", "P2A", "P3B"]
    assert SOUPS.chosen([]) == ()
    with pytest.raises(ValueError, match="P3A and P3C are both of style"):
        SOUPS.chosen(["P3A", "P1A", "P3C"])
    with pytest.raises(ValueError, match=r"unknown preference 'P1a': did you mean P1"):
        SOUPS.chosen(["P1a"])


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    found = Dimensions.load(put(tmp_path, MINE))
    assert found.ids == ("warm", "cold", "brief") and found.names == ("tone", "size")
    assert found.option("brief").sentence == "Be brief."
    assert found.option("warm").gold == "length()" and found.option("cold").gold is None
    assert found.combinations() == [("warm", "brief"), ("cold", "brief")]


BAD = [
    ([], r"give a list of options, each with id, dimension, sentence, criterion"),
    ({"P": MINE[0]}, "give a list of options"),
    ("- [unclosed", "cannot be read as YAML"),
    ([MINE[0], "warm"], r"option 2: give id.*not 'warm'"),
    ([MINE[0], {**MINE[1], "critereon": "?"}], r"option 2 \(cold\): unknown 'critereon'; did you mean 'criterion'"),
    ([{k: v for k, v in MINE[0].items() if k != "criterion"}], r"option 1 \(warm\): missing criterion"),
    ([{**MINE[0], "sentence": " "}], r"option 1 \(warm\): sentence must be text, not ' '"),
    ([{**MINE[0], "gold": 3}], r"option 1 \(warm\): gold must be text, not 3"),
    ([{**MINE[0], "later": "yes please"}], r"option 1 \(warm\).*later is true or false"),
    ([MINE[0], {**MINE[1], "id": "warm"}], r"option 2 \(warm\): this id is taken"),
    ([{**MINE[0], "id": "a+b"}], r"option 1 \(a\+b\): an id is letters"),
    ([{**MINE[0], "id": "neutral"}], r"option 1 \(neutral\).*not 'neutral'"),
    ([{**MINE[0], "id": 1}], r"option 1 \(1\): id must be text"),
    ([MINE[0], {**MINE[1], "sentence": "be WARM"}], r"option 2 \(cold\): 'be WARM' is what warm says"),
]


@pytest.mark.parametrize(("entries", "words"), BAD, ids=[words for _, words in BAD])
def test_errors_name_file_and_entry(tmp_path: Path, entries: object, words: str) -> None:
    path = put(tmp_path, entries)
    with pytest.raises(ValueError, match=words) as caught:
        Dimensions.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_no_such_dimensions() -> None:
    with pytest.raises(ValueError, match=r"no preference dimensions 'sops'.*soups"):
        Dimensions.load("sops")


def test_a_template_takes_what_an_option_has() -> None:
    option = Option("X", "d", "It's short.", 'Which is "it"?', gold="length(unit='chars')")
    assert filled("bradley_terry(gold={gold}, hard=True)", option) == (
        "bradley_terry(gold=\"length(unit='chars')\", hard=True)"
    )
    assert filled("f(a={id}, b={criterion}, c={sentence})", option) == (
        "f(a='X', b='Which is \"it\"?', c=\"It's short.\")"
    )
    assert filled("f(a={id}, b='{else}')", option) == "f(a='X', b='{else}')"
    with pytest.raises(ValueError, match="preference P1A has no gold"):
        filled("bradley_terry(gold={gold})", SOUPS.option("P1A"))
    with pytest.raises(ValueError, match=r"the same of every preference: write criterion=\{criterion\}"):
        filled("length()", option)


def test_what_an_option_says_is_not_filled_again() -> None:
    option = Option("X", "d", "s", "Which says {gold}?", gold="length()")
    assert filled("f(a={criterion})", option) == "f(a='Which says {gold}?')"
    assert filled("f(a={criterion}, b={gold})", option) == "f(a='Which says {gold}?', b='length()')"


def test_every_shipped_criterion_suits_a_language_judge() -> None:
    for option in SOUPS.options:
        judge = specs.part(filled("llm(model='m', criterion={criterion}, criterion_id={id})", option), judges)
        assert judge.options["criterion"] == option.criterion and judge.options["criterion_id"] == option.id
