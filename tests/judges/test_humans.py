"""People's labels: blinded sheets, filled in by spreadsheets of all kinds, taken in by id."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from pyrite.core import specs
from pyrite.data import rows as data
from pyrite.data.files import DataError, Row
from pyrite.feedback import judges
from pyrite.feedback.judges import human, verdict_row
from pyrite.jobs.judge import blinded, filled, write_sheet

ROWS: list[Row] = [
    {"prompt_id": str(i), "prompt": f'say "{i}",\nplease; now', "a": f"=a{i}; ü\n", "b": f"b{i},\tx", "model": "secret"}
    for i in range(40)
]


def better(row: Row) -> str:
    """A person who prefers the answers called a, except for two."""
    number = int(row["request"].split('"')[1])
    if number < 2:
        return ("tie ", "")[number]
    return "A" if row["answer_A"].startswith("=a") else "b"


def fill(path: Path, target: Path, delimiter: str = ",") -> None:
    """What a spreadsheet saves."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "note"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows([{**row, "better": better(row), "note": "hm"} for row in reversed(rows)])


def test_a_sheet_is_blind_and_seeded() -> None:
    sheet = blinded(ROWS, criterion="brevity", seed=0)
    assert set(sheet[0]) == {"pair_id", "criterion", "request", "answer_A", "answer_B", "better"}
    first = [row["answer_A"].startswith("=a") for row in sheet]
    assert 8 <= sum(first) <= 32
    assert [row["request"] for row in sheet] != [row["prompt"] for row in ROWS]
    assert blinded(ROWS, criterion="brevity", seed=0) == sheet != blinded(ROWS, criterion="brevity", seed=1)
    assert blinded([{**ROWS[0], "asked": "raw"}], criterion="c", seed=0)[0]["request"] == "raw"
    with pytest.raises(DataError, match="there twice"):
        blinded([ROWS[0], {**ROWS[0], "a": ROWS[0]["b"], "b": ROWS[0]["a"]}], criterion="c", seed=0)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_there_and_back(tmp_path: Path, delimiter: str) -> None:
    write_sheet(blinded(ROWS, criterion="brevity", seed=7), tmp_path / "sheet.csv")
    fill(tmp_path / "sheet.csv", tmp_path / "filled.csv", delimiter)
    verdicts = filled(tmp_path / "filled.csv", ROWS, seed=7)
    assert [verdict.preference for verdict in verdicts] == [0, None, *[1] * 38]
    assert {verdict.order for verdict in verdicts} == {"ab", "ba"}
    assert all((one.p_ab if one.order == "ab" else one.p_ba) == 1.0 for one in verdicts[2:])


def test_jsonl_there_and_back(tmp_path: Path) -> None:
    sheet = blinded(ROWS, criterion="brevity", seed=7)
    write_sheet(sheet, tmp_path / "sheet.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "sheet.jsonl").read_text().splitlines()]
    assert rows == sheet
    (tmp_path / "filled.jsonl").write_text(
        "".join(json.dumps({**row, "better": better(row)}) + "\n" for row in rows[:9])
    )
    verdicts = filled(tmp_path / "filled.jsonl", ROWS, seed=7)
    assert sum(verdict.preference is not None for verdict in verdicts) <= 9  # rows that did not come back


def test_wrong_sheets_are_refused_by_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "filled.csv"
    known = blinded(ROWS[:2], criterion="c", seed=0)[0]["pair_id"]
    for lines, words in (
        ("pair_id,better\nx,A\n", r"filled\.csv, row 2: no pair was sent out as 'x'"),
        (f"pair_id,better\n{known},A\n{known},B\n", r"row 3: a second label for the pair"),
        (f"pair_id,better\n{known},both\n", r"row 2: better is 'both'; write A, B, TIE, or nothing"),
        (f"pair_id,best\n{known},A\n", "no column better"),
        ("", "it holds no rows"),
    ):
        path.write_text(lines)
        with pytest.raises(DataError, match=words):
            filled(path, ROWS[:2], seed=0)
    path.write_bytes("pair_id,better\n\xe4,A".encode("latin-1"))
    with pytest.raises(DataError, match="save it in UTF-8"):
        filled(path, ROWS[:2], seed=0)
    with pytest.raises(DataError, match="no file"):
        filled(tmp_path / "nothing.csv", ROWS[:2], seed=0)


def test_people_as_a_judge(tmp_path: Path) -> None:
    write_sheet(blinded(ROWS, criterion="brevity", seed=7), tmp_path / "sheet.csv")
    fill(tmp_path / "sheet.csv", tmp_path / "filled.csv")
    verdicts = filled(tmp_path / "filled.csv", ROWS, seed=7)
    table = [verdict_row(row, one, criterion="c", model="h") for row, one in zip(ROWS, verdicts, strict=True)]
    data.write(table, tmp_path / "verdicts.parquet")
    judge = specs.part(f"human(path={str(tmp_path / 'verdicts.parquet')!r})", judges)
    texts = [[row[name] for row in ROWS[:4]] for name in ("prompt", "a", "b")]
    assert torch.equal(judge(*texts).nan_to_num(-1), torch.tensor([0.5, -1, 1, 1]).double())
    assert torch.equal(judge(texts[0], texts[2], texts[1]).nan_to_num(-1), torch.tensor([0.5, -1, 0, 0]).double())
    assert judge(["never"], ["x"], ["y"]).isnan().all()
    second = [{**row, "p": 0.0} for row in table]
    data.write([*table, *second], tmp_path / "two.jsonl")
    assert human(path=str(tmp_path / "two.jsonl"))(*texts).tolist() == [0.25, 0.0, 0.5, 0.5]


def test_files_without_verdicts_are_refused(tmp_path: Path) -> None:
    for row, words in (
        ({"prompt": "p", "a": "x", "b": "y"}, "line 1: verdicts need .* missing p"),
        ({"prompt": "p", "a": "x", "b": "y", "p": 2}, "line 1: p is 2"),
        ({"prompt": "p", "a": "x", "b": "y", "p": None}, "no verdict in it"),
    ):
        (tmp_path / "v.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=words):
            human(path=str(tmp_path / "v.jsonl"))
