import gzip
import json

import pytest

from pyrite.data import rows as data
from pyrite.data.rows import DataError

PAIRS = [
    {"prompt_id": "a", "prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."},
    {"prompt_id": "b", "prompt": "Say bye.", "chosen": "Bye!", "rejected": ""},
]


def put(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path, kind="pairs", **options):
    with pytest.raises(DataError) as caught:
        data.load(path, kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_arrays_and_mislabelled_lines_are_read(tmp_path):
    (tmp_path / "array.json").write_text("\ufeff " + json.dumps(PAIRS, indent=1), encoding="utf-8")
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(PAIRS).encode()))
    for path in (tmp_path / "array.json", tmp_path / "array.json.gz", put(tmp_path, PAIRS, "lines.json")):
        assert data.load(path, "pairs") == PAIRS


def test_line_separators_inside_a_text_do_not_break_a_row(tmp_path):
    row = {**PAIRS[0], "chosen": "one\u2028two\u0085three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8", newline="")
    assert data.load(tmp_path / "rows.jsonl", "pairs") == [row]


def test_a_datasets_folder_is_read_with_its_splits(tmp_path):
    import datasets

    part = datasets.Dataset.from_list(PAIRS)
    part.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert data.load(tmp_path / "one", "pairs") == PAIRS
    assert data.load(tmp_path / "two", "pairs") == PAIRS
    assert data.load(f"{tmp_path / 'two'}:test", "pairs") == PAIRS[1:]
    assert "no split 'dev' but train, test" in refusal(f"{tmp_path / 'two'}:dev")
    assert "without splits" in refusal(f"{tmp_path / 'one'}:train")
    assert "save_to_disk" in refusal(tmp_path)


def test_a_hub_name_is_asked_for_only_where_no_file_is(monkeypatch):
    import datasets

    asked = []

    def fake(name, split=None):
        asked.append((name, split))
        if name == "org/absent":
            raise ConnectionError("not reachable\nand more")
        part = datasets.Dataset.from_list(PAIRS)
        return part if split else datasets.DatasetDict({"train": part})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert data.load("org/name:test", "pairs") == data.load("org/name", "pairs") == PAIRS
    assert asked == [("org/name", "test"), ("org/name", None)]
    assert refusal("org/absent") == ("no file org/absent, and no data set of that name from the Hub: not reachable")
    for path in ("data/rows.jsonl", "rows", "a/b/c"):
        assert f"no file {path}; give a file, a datasets folder or a Hub name" in refusal(path)
    assert len(asked) == 3


def test_rows_in_arrays_and_parquet_are_counted_from_one(tmp_path):
    rows = [PAIRS[0], {**PAIRS[1], "chosen": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data.write(rows, tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        assert refusal(tmp_path / name) == f"{tmp_path / name}, row 2: chosen is empty"


def test_files_that_hold_no_rows_are_refused(tmp_path):
    for name, content in [("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", "[]")]:
        (tmp_path / name).write_text(content)
        assert refusal(tmp_path / name) == f"{tmp_path / name} is empty: it holds no rows"


def test_what_is_not_json_is_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PAIRS[0])
    path.write_text(f"{good}\n\n{good[:-1]}\n")
    assert refusal(path).startswith(f"{path}, line 3 is not JSON: ")
    path.write_text(f"{good}\n[1, 2]\n")
    assert refusal(path) == f"{path}, line 2 is not a JSON object but [1, 2]"
    path.write_text('[{"a": 1}, 7]')
    assert refusal(path) == f"{path}, row 2 is not a JSON object but 7"
    path.write_bytes(b'{"prompt": "\xff"}')
    assert refusal(path).startswith(f"cannot read {path}: ")


def test_broken_and_unknown_files_are_refused(tmp_path):
    for name, content in [("a.jsonl.gz", b"plain"), ("b.jsonl.gz", gzip.compress(b"{}" * 99)[:20])]:
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(f"cannot read {tmp_path / name}: ")
    (tmp_path / "c.parquet").write_bytes(b"plain")
    assert "c.parquet is not Parquet" in refusal(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("a,b")
    assert "must end in .json, .jsonl" in refusal(tmp_path / "d.txt")
    (tmp_path / "d.csv").write_text("a,b")
    assert "d.csv is empty" in refusal(tmp_path / "d.csv")
