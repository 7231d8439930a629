"""Files as their publishers have them, each from the file to the job that learns from it, through the command line."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judges.server import Server
from reading import encode_all

from pyrite.core.runs import read_json
from pyrite.data import rows as data
from pyrite.data.files import DataError, read
from pyrite.data.rows import load
from pyrite.data.text import load_tokenizer

Command = Callable[..., None]
Rows = list[dict[str, Any]]
P = ("tell me about the cat", "tell me about the dog", "sing on the mat", "tell me about a tree")
GOOD = ("the cat sat on the mat .", "the dog ran .", "a bird sang", "the tree , big and red")
BAD = ("dog dog", "cat", "the the", "mat")
QUICK = ("--epochs", 1, "--batch-size", 2, "--lr", 1e-3, "--held-out", 0.25)


def turn(prompt: str) -> Rows:
    return [{"role": "user", "content": prompt}]


def said(answer: str) -> Rows:
    return [{"role": "assistant", "content": answer}]


def human(prompt: str) -> Rows:
    return [{"from": "human", "value": prompt}]


def gpt(answer: str) -> Rows:
    return [{"from": "gpt", "value": answer}]


def four(make: Callable[[str, str, str, int], Any]) -> Rows:
    """One row, or several, for each of four pairs."""
    made = [make(*texts, i) for i, texts in enumerate(zip(P, GOOD, BAD, strict=True))]
    return [row for one in made for row in (one if isinstance(one, list) else [one])]


PAIRS: dict[str, Rows] = {
    "ours": four(lambda p, g, b, _: {"prompt": p, "chosen": g, "rejected": b}),
    "unpaired": four(
        lambda p, g, b, _: [
            {"prompt": p, "completion": b, "label": False},
            {"prompt": p, "completion": g, "label": True},
        ]
    ),
    "unpaired messages": four(
        lambda p, g, b, _: [
            {"prompt": turn(p), "completion": said(g), "label": 1},
            {"prompt": turn(p), "completion": said(b), "label": 0},
        ]
    ),
    "ShareGPT": four(
        lambda p, g, b, _: {"conversations": human(p), "chosen": gpt(g)[0], "rejected": gpt(b)[0], "system": ""}
    ),
    "SHP": four(
        lambda p, g, b, i: {
            "post_id": f"x{i}",
            "history": p,
            "human_ref_A": b if i % 2 else g,
            "human_ref_B": g if i % 2 else b,
            "labels": 1 - i % 2,
            "score_ratio": 2.0,
        }
    ),
    "HelpSteer2": four(
        lambda p, g, b, i: {
            "split": "train",
            "prompt": p,
            "response_1": b if i % 2 else g,
            "response_2": g if i % 2 else b,
            "preference_strength": 2 if i % 2 else -1,
        }
    ),
    "HelpSteer3": four(
        lambda p, g, b, i: {
            "context": turn(p),
            "response1": b if i % 2 else g,
            "response2": g if i % 2 else b,
            "overall_preference": 3 if i % 2 else -2,
        }
    ),
    "AlpacaEval": four(
        lambda p, g, b, i: {
            "instruction": p,
            "output_1": b if i % 2 else g,
            "output_2": g if i % 2 else b,
            "generator_1": "base",
            "generator_2": "mine",
            "preference": 1.9 if i % 2 else 1.000004,
        }
    ),
    "HelpSteer": four(
        lambda p, g, b, _: [
            {"prompt": p, "response": b, "helpfulness": 1, "correctness": 2},
            {"prompt": p, "response": g, "helpfulness": 4, "correctness": 3},
        ]
    ),
}
DEMOS: dict[str, Rows] = {
    "ours": four(lambda p, g, _b, _: {"prompt": p, "response": g}),
    "ShareGPT": four(lambda p, g, _b, _: {"id": "x", "conversations": human(p) + gpt(g)}),
    "ShareGPT with more turns": four(
        lambda p, g, b, _: {"conversations": human("please") + gpt(b) + human(p) + gpt(g)}
    ),
    "unpaired": PAIRS["unpaired"],
}


def written(rows: Rows, path: Path) -> Path:
    """Rows in a file of the kind that its name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            flat = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]
            writer.writerows(flat)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        data.write(rows, path)
    return path


def text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv.gz", "json", "parquet"])
@pytest.mark.parametrize("layout", PAIRS)
def test_the_better_answer_is_chosen(layout: str, kind: str, tmp_path: Path) -> None:
    """Of every layout, in every format that can hold it, the same four pairs."""
    path = written(PAIRS[layout], tmp_path / f"pairs.{kind}")
    rows = load(path, "pairs")
    assert [(text(row["prompt"]), row["chosen"], row["rejected"]) for row in rows] == list(
        zip(P, GOOD, BAD, strict=True)
    )


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_are_learned(layout: str, pyrite: Command, tiny: Path, tmp_path: Path) -> None:
    written(PAIRS[layout], tmp_path / "pairs.csv")
    pyrite("dpo", "--model", tiny, "--data", "pairs.csv", "--out", "dpo", *QUICK)
    assert read_json(Path("dpo/done.json"))["pairs"] == 3
    pyrite("reward", "--model", tiny, "--data", "pairs.csv", "--out", "reward", *QUICK[:-1], 0.5)
    assert read_json(Path("reward/done.json"))


@pytest.mark.parametrize("layout", DEMOS)
def test_demonstrations_are_learned(layout: str, pyrite: Command, tiny: Path, tmp_path: Path) -> None:
    written(DEMOS[layout], tmp_path / "demos.csv")
    rows = load(tmp_path / "demos.csv", "demos")
    assert [(text(row["prompt"]), row["response"]) for row in rows] == list(zip(P, GOOD, strict=True))
    pyrite("sft", "--model", tiny, "--data", "demos.csv", "--out", "sft", *QUICK)
    assert read_json(Path("sft/done.json"))["seconds"] >= 0


@pytest.mark.parametrize("template", ["", "{% for m in messages %}<unk> {{ m['content'] }} <eos>{% endfor %}"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_plain_texts_are_learned(kind: str, template: str, pyrite: Command, tiny: Path, tmp_path: Path) -> None:
    """Each whole, from the start token to the end token, and never as a turn of a chat."""
    shutil.copytree(tiny, "model")
    tokenizer, _ = load_tokenizer("model")
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained("model")
    rows = load(written([{"text": good} for good in GOOD], tmp_path / f"texts.{kind}"), "demos")
    assert [(row["prompt"], row["response"]) for row in rows] == [("", good) for good in GOOD]
    assert len({row["prompt_id"] for row in rows}) == 4
    tokenizer, _ = load_tokenizer("model")
    (one,) = encode_all(tokenizer, [""], [GOOD[1]])
    assert one.prompt == [tokenizer.bos_token_id]
    assert one.response == [*tokenizer(GOOD[1], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pyrite("sft", "--model", "model", "--data", f"texts.{kind}", "--out", "sft", *QUICK)
    done = read_json(Path("sft/done.json"))
    assert done["seconds"] >= 0
    pyrite("sft", "--model", "model", "--data", f"texts.{kind}", "--out", "two", *QUICK[:-1], 0.5)


def test_a_text_begins_after_the_end_token_where_there_is_no_start_token(tiny: Path) -> None:
    tokenizer, _ = load_tokenizer(tiny)
    tokenizer.bos_token = None
    (one,) = encode_all(tokenizer, [""], [GOOD[1]])
    assert one.prompt == one.response[-1:] == [tokenizer.eos_token_id]


def test_a_transcript_is_a_conversation(tmp_path: Path) -> None:
    rows = [{"text": f"\n\nHuman: {p}\n\nAssistant: {g}"} for p, g in zip(P, GOOD, strict=True)]
    found = load(written(rows, tmp_path / "texts.jsonl"), "demos")
    assert [(text(row["prompt"]), row["response"]) for row in found] == list(zip(P, GOOD, strict=True))


@pytest.mark.parametrize("layout", ["ShareGPT", "SHP", "HelpSteer3", "HelpSteer2", "unpaired"])
def test_prompts_of_a_layout(layout: str, tmp_path: Path) -> None:
    rows = load(written(PAIRS[layout], tmp_path / "rows.jsonl"), "prompts")
    assert [text(row["prompt"]) for row in rows] == list(P)


def test_what_makes_no_pair_is_counted(pyrite: Command, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {"prompt": "please", "completion": "the bird", "label": True}
    written([alone, *PAIRS["unpaired"], alone], Path("pairs.jsonl"))
    pyrite("dpo", "--model", tiny, "--data", "pairs.jsonl", "--out", "dpo", *QUICK)
    assert "2 of 10 rows left out: no answer with the other label" in " ".join("".join(capsys.readouterr()).split())
    written([{**row, "label": True} for row in PAIRS["unpaired"]], Path("good.jsonl"))
    with pytest.raises(SystemExit) as ended:
        pyrite("reward", "--model", tiny, "--data", "good.jsonl", "--out", "reward", *QUICK)
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "no prompt has both an answer with label true and one with label false" in error
    assert "pyrite sft" in error
    assert not Path("reward").exists()


@pytest.mark.parametrize(
    ("layout", "change", "reason"),
    [
        ("HelpSteer2", {"preference_strength": 0}, "neither answer is better"),
        ("HelpSteer3", {"overall_preference": None}, "it has no preference"),
        ("AlpacaEval", {"preference": 1.5}, "neither answer is better"),
        (
            "ShareGPT",
            {"chosen": {"from": "gpt", "value": GOOD[0]}, "rejected": {"from": "gpt", "value": GOOD[0]}},
            "equal",
        ),
    ],
)
def test_ties_are_no_pairs(layout: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = [{**PAIRS[layout][0], **change}, *PAIRS[layout][1:]]
    notes: list[str] = []
    found = load(written(rows, tmp_path / "rows.jsonl"), "pairs", note=notes.append)
    assert len(found) == 3
    assert len(notes) == 1 and reason in notes[0] and "1 of 4 rows" in notes[0]


def test_equal_helpfulness_is_no_pair(tmp_path: Path) -> None:
    rows = [{**row, "helpfulness": 3} if i < 2 else row for i, row in enumerate(PAIRS["HelpSteer"])]
    notes: list[str] = []
    assert len(load(written(rows, tmp_path / "rows.jsonl"), "pairs", note=notes.append)) == 3
    assert "2 of 8 rows left out: two answers to a prompt are equally helpful" in notes[0]


BROKEN = [
    ("unpaired", 3, {"label": "good"}, "label must be true or false"),
    ("unpaired", 5, {"completion": None}, "must be text"),
    ("SHP", 2, {"labels": 2}, "labels must be true or false"),
    ("SHP", 1, {"human_ref_A": None}, "human_ref_A must be text"),
    ("HelpSteer2", 3, {"preference_strength": 7}, "preference_strength must be a number from -3 to 3"),
    ("HelpSteer3", 0, {"overall_preference": "first"}, "overall_preference must be a number"),
    ("HelpSteer", 6, {"helpfulness": None}, "helpfulness must be a number"),
    ("ShareGPT", 2, {"conversations": [{"from": "tool", "value": "x"}]}, "a turn from 'tool'"),
    ("ShareGPT", 2, {"conversations": []}, "empty"),
    ("ShareGPT", 2, {"conversations": [{"from": "human"}]}, "each with from and value"),
]


@pytest.mark.parametrize(("layout", "at", "change", "words"), BROKEN)
def test_a_broken_row_is_named(
    layout: str,
    at: int,
    change: dict[str, Any],
    words: str,
    pyrite: Command,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{**row, **change} if i == at else row for i, row in enumerate(PAIRS[layout])]
    written(rows, Path("rows.jsonl"))
    with pytest.raises(SystemExit) as ended:
        pyrite("dpo", "--model", tiny, "--data", "rows.jsonl", "--out", "out", *QUICK)
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert words in error
    pair = at - at % 2 if "completion" in change else at  # a pair is named by its first row
    assert f"rows.jsonl, line {pair + 1}:" in error
    assert not Path("out").exists()


def test_lines_of_csv_count_newlines_in_quotes(pyrite: Command, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = 'prompt,chosen,rejected,probability\n"tell me\nabout\n\na cat",the cat,a dog,0.9\n\nthe dog,"",cat,0.8\n'
    Path("pairs.csv").write_text("\ufeff" + rows)
    assert read("pairs.csv").rows[0] == {
        "prompt": "tell me\nabout\n\na cat",
        "chosen": "the cat",
        "rejected": "a dog",
        "probability": 0.9,
    }
    with pytest.raises(SystemExit):
        pyrite("dpo", "--model", tiny, "--data", "pairs.csv", "--out", "out", *QUICK)
    assert "pairs.csv, line 7: chosen is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,chosen,rejected\na,b\n", "line 2 has 2 cells and the header 3"),
        ("prompt,chosen,rejected\na,b,c\nd,e,f,g\n", "line 3 has 4 cells and the header 3"),
        ('prompt,chosen,rejected\na,"b\nc,d\n', "line 2: not CSV"),
        ("prompt,prompt,rejected\na,b,c\n", "two columns are called 'prompt'"),
        ("prompt,chosen,rejected\n", "is empty"),
        ("", "is empty"),
        ("prompt,chosen,rejected,probability\na,b,c,high\n", "probability must be a number, not 'high'"),
    ],
)
def test_broken_csv_is_named(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(DataError) as refused:
        load(path, "pairs")
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_as_programs_write_it(delimiter: str, newline: str, tmp_path: Path) -> None:
    """Texts that look like numbers stay texts; numbers, truths and messages are read."""
    lines = [
        ["prompt", "chosen", "rejected", "strength", "flipped", "gold"],
        ["1", "2", "003", "1.5", "True", ""],
        ["nan", "true", "[1]", "2", "false", "7"],
        [json.dumps(turn("why?")), "a", "b", "0.5", "FALSE", ""],
        [repr(turn("how?")), "a", "b", "0.5", "FALSE", ""],
    ]
    path = tmp_path / ("pairs.tsv" if delimiter == "\t" else "pairs.csv")
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=newline).writerows(lines)
    rows = load(path, "pairs")
    assert [row["prompt"] for row in rows] == ["1", "nan", turn("why?"), turn("how?")]
    assert [(row["chosen"], row["rejected"]) for row in rows[:2]] == [("2", "003"), ("true", "[1]")]
    assert [row["strength"] for row in rows] == [1.5, 2.0, 0.5, 0.5]
    assert [row["flipped"] for row in rows] == [True, False, False, False]
    assert [row.get("gold") for row in rows] == [None, 7, None, None]


def test_two_files_of_answers_to_win_rates(pyrite: Command, tmp_path: Path) -> None:
    """AlpacaEval's outputs of two models, a judge, and the table of win rates, by existing jobs alone."""
    for name, answers in (("mine", GOOD), ("base", BAD)):
        rows = [{"instruction": p, "output": a, "generator": name} for p, a in zip(P, answers, strict=True)]
        more = [{**rows[0], "instruction": f"more of {name}"}]
        Path(f"{name}.json").write_text(json.dumps(rows + more))
    candidates = [
        {"prompt": p, "response": a, "sample": k, "finished": k == 0, "length": 3, "logp": -1.0}
        for p, a in zip(P, BAD, strict=True)
        for k in range(2)
    ]
    data.write(candidates, "third.parquet")
    with Server() as server:
        at = ("--base-url", server.url, "--model", "toy", "--criterion", "Which answer is longer?", "--backoff", 0.01)
        files = ("--answers", "mine.json", "third=third.parquet", "--baseline", "base.json")
        pyrite("judge", "ask", *files, *at, "--out", "judged")
        assert len(server.bodies) == 8  # equal answers are a tie that nobody is asked about
    pyrite("winrate", "--data", "judged/comparisons.parquet", "--n-boot", 20, "--out", "rates")
    found = read_json(Path("rates/winrates.json"))
    assert found["baseline"] == "base"
    rates = {row["model"]: row for row in found["models"]}
    assert (rates["mine"]["raw"], rates["mine"]["prompts"]) == (100, 4)
    assert (rates["third"]["raw"], rates["third"]["tied"]) == (50, 4)
    assert rates["mine"]["length"] == sum(map(len, GOOD)) / 4
    verdicts = read("judged/verdicts.parquet").rows
    assert [(row["generator_1"], row["generator_2"], row["preference"]) for row in verdicts[:4]] == [
        ("base", "mine", 2)
    ] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--answers", "mine.json"), "--answers and --baseline belong together"),
        (("--baseline", "mine.json"), "--answers and --baseline belong together"),
        (("--answers", "mine.json", "--baseline", "mine.json"), "two files of answers are called 'mine'"),
        (("--answers", "mine.json", "--baseline", "other.json"), "no prompt in common"),
        (("--answers", "mine.json", "--baseline", "other.json", "--pairs", "mine.json"), "give either"),
    ],
)
def test_answers_that_cannot_be_compared(
    options: tuple[str, ...], words: str, pyrite: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.json").write_text(json.dumps([{"instruction": "a", "output": "b", "generator": "mine"}]))
    Path("other.json").write_text(json.dumps([{"instruction": "c", "output": "d", "generator": "other"}]))
    with pytest.raises(SystemExit) as ended:
        at = ("--model", "m", "--criterion", "c", "--base-url", "http://127.0.0.1:9/v1")
        pyrite("judge", "ask", *options, *at, "--out", "out")
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_general_duel_needs_no_dimensions(pyrite: Command, tmp_path: Path) -> None:
    for name, answers in (("mine", GOOD), ("base", BAD)):
        rows = [
            {"prompt": p, "response": a, "sample": 0, "finished": True, "length": 3, "logp": -1.0}
            for p, a in zip(P, answers, strict=True)
        ]
        data.write(rows, f"{name}.jsonl")
    pyrite("duel", "--answers", "mine=mine.jsonl", "base=base.jsonl", "--general", "length()", "--out", "duel")
    done = read_json(Path("duel/done.json"))
    assert [(row["method"], row["half"]) for row in done["averages"]] == [("mine", 1.0), ("base", 0.0)]
    assert [row["option"] for row in done["by_criterion"]] == ["general"] * 2
    pyrite(
        "duel", "--answers", "mine=mine.jsonl", "base=base.jsonl", "--general", "whatever", "--judge",
        "bradley_terry(gold='length()', hard=True)", "--out", "own",
    )  # fmt: skip
    assert read_json(Path("own/done.json"))["matrix"] == done["matrix"]


def test_the_judged_pairs_are_built_from_their_source(pyrite: Command, tiny: Path) -> None:
    """Two annotation files as alpaca_eval has them, to the files that benchmarks and tests on real data read."""
    spec = importlib.util.spec_from_file_location("judged", Path(__file__).parents[2] / "benchmarks" / "judged.py")
    assert spec and spec.loader
    judged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judged)
    preferences = {"one": (1.1, 2.0, 1.5, 1.000004), "two": (1.0, 1.25, 0.0, 2.0)}
    for model, values in preferences.items():
        rows = [
            {"instruction": p, "output_1": g, "output_2": b, "generator_1": "gpt4", "generator_2": model}
            | {"dataset": "koala", "annotator": judged.JUDGE, "preference": value}
            for p, g, b, value in zip(P, GOOD, BAD, values, strict=True)
        ]
        folder = Path("source/results") / model / judged.JUDGE
        folder.mkdir(parents=True)
        (folder / "annotations.json").write_text(json.dumps(rows))
    board = Path("source") / judged.BOARD
    board.parent.mkdir(parents=True)
    columns = [*judged.RATES, *judged.COUNTS]
    board.write_text(
        "\n".join([",".join(["", *columns]), *(f"{model}{',12' * len(columns)}" for model in preferences)])
    )
    judged.build(Path("source"), Path("built"), tuple(preferences), ("two",))
    rows = load("built/judged_pairs.jsonl.gz", "pairs")
    seen = [
        (row["prompt_id"], row["model"], row["chosen"] == GOOD[row["prompt_id"]], row["probability"]) for row in rows
    ]
    assert seen == [
        (0, "one", True, 0.9),
        (0, "two", True, 1.0),
        (1, "one", False, 1.0),
        (1, "two", True, 0.75),
        (2, "one", True, 0.5),
        (2, "two", True, 0.5),
        (3, "one", True, 0.999996),
        (3, "two", False, 1.0),
    ]
    assert [row["source"] for row in rows] == ["koala"] * 8
    table = read_json(Path("built/winrates.json"))["models"]["two"]
    assert table["rows"] == [
        [i, len(b), len(g), p] for i, (g, b, p) in enumerate(zip(GOOD, BAD, (1, 1.25, 1.5, 2), strict=True))
    ]
    assert table["published"]["win_rate"] == 12.0
    pyrite("reward", "--model", tiny, "--data", "built/judged_pairs.jsonl.gz", "--out", "reward", *QUICK[:-1], 0.5)


def test_answers_that_are_numbers_stay_text_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "sums.csv"
    path.write_text("q,good,bad,strength\n2 and 2,4,007,0.5\n3 and 4,7,8,2\n")
    rows = load(path, "pairs", columns="prompt=q,chosen=good,rejected=bad")
    assert [(row["chosen"], row["rejected"], row["strength"]) for row in rows] == [("4", "007", 0.5), ("7", "8", 2.0)]
