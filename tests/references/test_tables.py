"""The file of a reference: identity of rows, checksums, and nothing half-written that is ever accepted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyrite.models import references as t
from pyrite.models.references import BadReference, load, margins, row_id

PART = "part-00000.parquet"

RECIPE = {"data": {"rows": 3}, "tokens": True}


def columns(values: tuple[float, ...] = (-1.0, -2.5, -3.0)) -> pa.Table:
    rows = [
        {
            "row_id": str(i),
            "prompt_ids_sha": "p",
            "resp_ids_sha": "r",
            "n_prompt_tokens": 2,
            "n_resp_tokens": i,
            "n_unknown": 0,
            "truncated": False,
            "prompt_truncated": False,
            "sum_logp": value,
        }
        for i, value in enumerate(values)
    ]
    tokens = pa.array([[-0.5] * i for i in range(len(values))], pa.list_(pa.float32()))
    return pa.Table.from_pylist(rows, schema=t.SCHEMA).append_column("token_logp", tokens)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reference in two parts."""
    whole = columns()
    t.write_part(tmp_path / PART, whole.slice(0, 2), "")
    t.write_part(tmp_path / "part-00001.parquet", whole.slice(2), "")
    t.finish(tmp_path, RECIPE, scorer={"name": "me"})
    return tmp_path


def test_round_trip(folder: Path) -> None:
    for path in (folder, folder / PART):
        table = load(path)
        assert table.row_id == ["0", "1", "2"]
        assert table.sum_logp.dtype == np.float64
        assert table.sum_logp.tolist() == [-1.0, -2.5, -3.0]
        assert [table.tokens(i).tolist() for i in range(3)] == [[], [-0.5], [-0.5, -0.5]]
        assert table.tokens(2).dtype == np.float32
    assert load(folder, tokens=False).token_logp is None
    assert table.manifest["scorer"] == {"name": "me"}


def test_the_id_of_a_row_is_that_of_its_messages() -> None:
    as_messages = [{"role": "user", "content": "hi"}], "yes"
    assert row_id("hi", "yes") == row_id("hi", {"content": "yes"}) == row_id(*as_messages)
    canonical = '[{"content":"hi","role":"user"},{"content":"yes","role":"assistant"}]'
    assert row_id(*as_messages) == hashlib.sha256(canonical.encode()).hexdigest()
    others = [
        ("hi", "no"),
        ("ho", "yes"),
        ("hi", {"content": "yes", "reasoning_content": "so"}),
        ([{"role": "system", "content": "hi"}], "yes"),
        ([{"role": "user", "content": "hi"}, {"role": "user", "content": "yes"}], ""),
    ]
    assert len({row_id(*one) for one in [as_messages, *others]}) == 6


def test_every_file_is_checked(folder: Path) -> None:
    part = folder / "part-00001.parquet"
    good = part.read_bytes()
    part.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(BadReference, match=r"^R7: .*part-00001.parquet was changed"):
        load(folder)
    part.unlink()
    with pytest.raises(BadReference, match=r"^R7: .*part-00001.parquet is missing"):
        load(folder)
    part.write_bytes(good)
    manifest = json.loads((folder / t.MANIFEST).read_text())
    manifest["recipe"]["data"]["note"] = "another"
    (folder / t.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadReference, match=r"^R7: .* does not match its fingerprint"):
        load(folder)
    (folder / t.MANIFEST).write_text("{")
    with pytest.raises(BadReference, match=r"^R7: .* cannot be read"):
        load(folder)
    (folder / t.MANIFEST).write_text('{"pyrite": "0.1"}')
    with pytest.raises(BadReference, match=r"^R7: .* is not the manifest of a reference"):
        load(folder)
    (folder / t.MANIFEST).unlink()
    with pytest.raises(BadReference, match=r"^R7: .* is not finished"):
        load(folder)
    for path in folder.glob(t.PARTS):
        path.unlink()
    with pytest.raises(BadReference, match=r"^R7: .* holds no reference"):
        load(folder)


@pytest.mark.parametrize("bad", ["half sums", "half tokens", "no column", "twice", "too few"])
def test_bad_tables_are_refused(bad: str, tmp_path: Path) -> None:
    whole = columns()
    changed = {
        "half sums": lambda: whole.set_column(8, "sum_logp", whole["sum_logp"].cast(pa.float16())),
        "half tokens": lambda: whole.set_column(9, "token_logp", whole["token_logp"].cast(pa.list_(pa.float16()))),
        "no column": lambda: whole.drop_columns(["truncated"]),
        "twice": lambda: pa.concat_tables([whole.slice(0, 2), whole.slice(0, 1)]),
        "too few": lambda: whole.slice(0, 2),
    }[bad]()
    pq.write_table(changed, tmp_path / PART)
    t.finish(tmp_path, RECIPE)
    rule = {"half sums": "R5", "half tokens": "R5", "no column": "R7"}.get(bad, "R1")
    with pytest.raises(BadReference, match=f"^{rule}: "):
        load(tmp_path)


def test_a_part_left_behind_must_be_sound(tmp_path: Path) -> None:
    path = tmp_path / PART
    assert not t.whole_part(path, ["0"])
    t.write_part(path, columns(), "")
    assert t.whole_part(path, ["0", "1", "2"])
    assert not t.whole_part(path, ["0", "2", "1"])
    good = path.read_bytes()
    for damaged in (good[:-20], good[:60] + bytes(8) + good[68:]):
        path.write_bytes(damaged)
        assert not t.whole_part(path, ["0", "1", "2"])


def test_margins_worked() -> None:
    seen = margins(np.array([-1.0, -2.0, -5.0, -3.0, -4.0, -4.0, -1.0, -4.0]))
    assert seen["mean"] == pytest.approx(0.5)  # margins 1, -2, 0, 3
    assert seen["sd"] == pytest.approx(np.std([1, -2, 0, 3], ddof=1))
    assert seen["q50"] == pytest.approx(0.5)
    assert seen["accuracy"] == pytest.approx((2 + 0.5) / 4)
    assert margins(np.array([-1.0, -3.0]))["sd"] == 0


def test_a_reference_that_an_earlier_version_imported_is_refused(tmp_path: Path) -> None:
    t.write_part(tmp_path / PART, columns(), "")
    t.finish(tmp_path, {"imported": {"file": "given.jsonl"}, **RECIPE}, scorer={"name": "theirs"})
    with pytest.raises(BadReference, match=r"^R7: .* imported by an earlier version; .* --ref column"):
        load(tmp_path)
