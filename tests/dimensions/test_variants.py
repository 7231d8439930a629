"""Prompts under preferences: one text for all that read it, ids, neutral ones, what is refused."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from pyrite.data import conditioning as module
from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions, Variants, conditioned, render

SOUPS = Dimensions.load("soups")
AB = SOUPS.chosen(["P2A", "P1B"])
SAID = f"{SOUPS.option('P1B').sentence} {SOUPS.option('P2A').sentence}"
TALK = [
    {"role": "system", "content": "You are kind. "},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?  "},
]
ROWS = [{"prompt_id": 7, "prompt": "tell me"}, {"prompt_id": "b", "prompt": "a cat then"}]


def test_examples() -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("prompt", ["Why?", "Why? ", "Why?\n"])
def test_sentences_follow_a_text_after_one_space(prompt: str) -> None:
    assert render(prompt, AB) == f"Why? {SAID}"
    assert render(prompt, []) == prompt
    assert render("", AB) == SAID


def test_sentences_follow_the_last_user_turn() -> None:
    assert render(TALK, AB) == [*TALK[:3], {"role": "user", "content": f"Why? {SAID}"}]
    assert render(TALK, []) == TALK
    tooled = [*TALK, {"role": "tool", "content": "42"}]
    assert render(tooled, AB) == [*TALK[:3], {"role": "user", "content": f"Why? {SAID}"}, tooled[-1]]
    with pytest.raises(ValueError, match="without a user turn"):
        render(TALK[:1], AB)


def test_or_stand_in_the_system_turn() -> None:
    asked = {"role": "user", "content": "Why?"}
    assert render("Why?", AB, turn="system") == [{"role": "system", "content": SAID}, asked]
    assert render("Why?", [], turn="system") == [asked]
    assert render(TALK, AB, turn="system") == [{"role": "system", "content": f"You are kind. {SAID}"}, *TALK[1:]]
    assert render(TALK[1:], AB, turn="system")[0] == {"role": "system", "content": SAID}


def test_a_conditioned_row() -> None:
    row = conditioned(ROWS[0], AB)
    assert row == {
        "prompt_id": data.prompt_id(f"tell me {SAID}"),
        "prompt": f"tell me {SAID}",
        "asked": "tell me",
        "asked_id": 7,
        "preferences": ["P1B", "P2A"],
    }
    neutral = conditioned(ROWS[0], [])
    assert (neutral["prompt_id"], neutral["prompt"], neutral["preferences"]) == ("7", "tell me", [])


def test_every_prompt_under_every_variant() -> None:
    some = Variants("soups", ("P1A", "neutral", "P3B+P1A", "P1A"))
    rows = some.of(ROWS)
    assert [(row["asked_id"], row["preferences"]) for row in rows] == [
        (id, preferences) for id in (7, "b") for preferences in (["P1A"], [], ["P1A", "P3B"])
    ]
    assert rows[2]["prompt"] == render("tell me", SOUPS.chosen(["P1A", "P3B"]))
    assert len(Variants("soups", ("neutral", "all")).of(ROWS)) == 2 * 9
    everything = Variants("soups", (f"all:{','.join(SOUPS.ids)}",)).of(ROWS[:1])
    assert len(everything) == 16 and everything[2]["preferences"] == ["P1A", "P2A", "P3C"]


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    """List columns, empty ones among them, through Parquet and JSONL; in the system turn, messages throughout."""
    for turn in ("user", "system"):
        for raw in ROWS:
            rows = Variants("soups", ("neutral", "P1A+P2B"), preference_turn=turn).of([raw])
            for name in ("rows.parquet", "rows.jsonl"):
                data.write(rows, tmp_path / name)
                assert data.load(tmp_path / name, "prompts") == rows


def test_without_dimensions_nothing_changes() -> None:
    assert Variants().of(ROWS) == ROWS
    assert Variants().inputs() == {}
    assert str(Variants("soups").inputs()["dimensions"]).endswith("soups.yaml")


BAD = [
    (Variants(preferences=("P1A",)), "needs --dimensions"),
    (Variants(None, ("all",)), "needs --dimensions"),
    (Variants("soups"), "say under which --preferences"),
    (Variants("soups", ("P1A+P1B",)), "P1A and P1B are both of expertise"),
    (Variants("soups", ("P1A+P9",)), "unknown preference 'P9'"),
    (Variants("soups", ("nutral",)), "unknown preference 'nutral'"),
    (Variants("none.yaml", ("P1A",)), r"no preference dimensions 'none\.yaml'"),
]


@pytest.mark.parametrize(("variants", "words"), BAD, ids=[words for _, words in BAD])
def test_impossible_variants_are_refused(variants: Variants, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        variants.of(ROWS)


def test_prompts_that_become_one_or_carry_preferences_are_refused() -> None:
    twin = {"prompt_id": "c", "prompt": f"tell me {SOUPS.option('P1A').sentence}"}
    rows = Variants("soups", ("P1A",)).of([ROWS[0]])
    with pytest.raises(ValueError, match="carries preferences already"):
        Variants("soups", ("P1A",)).of(rows)
    same = {**twin, "prompt_id": data.prompt_id(str(twin["prompt"]))}
    with pytest.raises(ValueError, match=r"prompts 7 and .* become the same prompt"):
        Variants("soups", ("P1A", "neutral")).of([ROWS[0], same])
