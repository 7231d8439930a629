import json

import pytest

from pyrite.data import rows as data
from pyrite.data.rows import DataError

CANDIDATE = {"prompt": "p", "sample": 0, "response": "", "finished": True, "length": 1, "logp": -0.5}


def put(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def refusal(path, kind="pairs", **options):
    with pytest.raises(DataError) as caught:
        data.load(path, kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(tmp_path, row, kind="pairs", **options):
    (found,) = data.load(put(tmp_path, [row]), kind, **options)
    del found["prompt_id"]
    return found


PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
TALK = {"prompt": turns("Q", "A", "R"), "chosen": "good", "rejected": "bad"}
FARM = {"instruction": "Q", "input": "", "output_1": "good", "output_2": "bad"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, PAIR),
        ({**TALK, "chosen": turns("", "good")[1:], "rejected": turns("", "bad")[1:]}, TALK),
        ({"chosen": turns("Q", "A", "R", "good"), "rejected": turns("Q", "A", "R", "bad")}, TALK),
        (
            {"prompt": "Q", "chosen": turns("Q", "good"), "rejected": turns("Q", "bad")},
            {**PAIR, "prompt": turns("Q")},
        ),
        (
            {"prompt": "Q", "chosen": turns("", "good")[1:], "rejected": turns("", "bad")[1:]},
            {**PAIR, "prompt": turns("Q")},
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
        ),
        (
            {"chosen": "The sky", "rejected": "The sky is"},
            {"prompt": "The", "chosen": " sky", "rejected": " sky is"},
        ),
        (
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: good",
                "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: bad",
            },
            TALK,
        ),
        ({**FARM, "preference": 1}, PAIR),
        ({**FARM, "preference": 2.0}, {**PAIR, "chosen": "bad", "rejected": "good"}),
        ({**FARM, "preference": 1, "input": "more"}, {**PAIR, "prompt": "Q\nmore"}),
        ({"instruction": "Q", "answers": ["bad", "good"], "preference": 1}, PAIR),
        ({"question": "Q", "response_j": "good", "response_k": "bad"}, PAIR),
    ],
)
def test_pair_layouts(tmp_path, row, expected):
    assert loaded(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q", "response": "good"}, "Q"),
        ({"prompt": "Q", "completion": "good"}, "Q"),
        ({"prompt": turns("Q"), "completion": turns("", "good")[1:]}, turns("Q")),
        ({"messages": turns("Q", "A", "R", "good"), "prompt": "unused"}, turns("Q", "A", "R")),
        ({"instruction": "Q", "input": "more", "output": "good"}, "Q\nmore"),
        ({"instruction": "Q", "input": None, "output": "good"}, "Q"),
    ],
)
def test_demo_layouts(tmp_path, row, prompt):
    assert loaded(tmp_path, row, "demos") == {"prompt": prompt, "response": "good"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q", "chosen": "a"}, "Q"),
        ({"messages": turns("Q", "A")}, turns("Q")),
        ({"instruction": "Q"}, "Q"),
        ({"question": "Q"}, "Q"),
        ({"chosen": turns("Q", "a"), "rejected": turns("Q", "b")}, turns("Q")),
    ],
)
def test_prompt_layouts(tmp_path, row, prompt):
    assert loaded(tmp_path, row, "prompts") == {"prompt": prompt}


def test_turns_of_one_speaker_in_a_row_are_one_turn(tmp_path):
    opening = "\n\nHuman: Q\n\nAssistant: one\n\nAssistant: two\n\nHuman: R\n\nAssistant:"
    found = loaded(tmp_path, {"chosen": f"{opening} x\n\nAssistant: y", "rejected": f"{opening} z"})
    assert found == {"prompt": turns("Q", "one\n\ntwo", "R"), "chosen": "x\n\ny", "rejected": "z"}


def test_conversations_that_part_early_and_empty_favorites_are_counted_out(tmp_path):
    rows = [
        {"chosen": turns("Q", "a", "R", "good"), "rejected": turns("Q", "b", "S", "bad")},
        {"chosen": turns("Q", "a", "R", "good"), "rejected": turns("Q", "a")},
        {"chosen": turns("Q", "good"), "rejected": turns("Q", "bad")},
        {"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant:"},
    ]
    notes = []
    found = data.load(put(tmp_path, rows), "pairs", note=notes.append)
    assert [row["chosen"] for row in found] == ["good", "good"]
    assert [note.partition(": ")[2] for note in notes] == [
        "2 of 5 rows left out: the conversations part before the last answer",
        "1 of 5 rows left out: the preferred answer of the transcript is empty",
    ]
    assert "no row is left of 1; the conversations part" in refusal(put(tmp_path, rows[:1]))


def test_no_verdict_is_no_label(tmp_path):
    rows = [{**FARM, "preference": None}, {**FARM, "preference": 1}]
    notes = []
    assert len(data.load(put(tmp_path, rows), "pairs", note=notes.append)) == 1
    assert "1 of 2 rows left out: it has no preference" in notes[0]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairs", {"chosen": "alpha one", "rejected": "beta two"}, "share no beginning"),
        ("pairs", {"chosen": turns("Q", "a", "R"), "rejected": turns("Q", "b")}, "chosen does not end with"),
        ("pairs", {"chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}, "prompt column is needed"),
        ("pairs", {**FARM, "preference": 0}, "preference must be 1 or 2, not 0"),
        ("pairs", {**FARM, "preference": True}, "preference must be 1 or 2, not True"),
        ("pairs", {"instruction": "Q", "answers": ["a"], "preference": 0}, "answers must be a list of two"),
        ("pairs", {"question": None, "response_j": "a", "response_k": "b"}, "question must be text, not None"),
        ("demos", {"prompt": "Q", "response": ""}, "response is empty"),
        ("demos", {"messages": turns("Q")}, "end with an assistant turn"),
        ("candidates", {**CANDIDATE, "logp": None}, "logp must be a number, not None"),
        ("candidates", {**CANDIDATE, "length": 1.5}, "length must be a whole number"),
        ("candidates", {**CANDIDATE, "finished": 1}, "finished must be true or false"),
    ],
)
def test_a_bad_row_of_a_layout_is_named(tmp_path, kind, row, message):
    path = put(tmp_path, [row])
    found = refusal(path, kind)
    assert found.startswith(f"{path}, line 1: ")
    assert message in found
