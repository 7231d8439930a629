"""Foreign log-probabilities: what is taken in, and what is refused with its place."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from pyrite.core.runs import read_json
from pyrite.data import rows as data
from pyrite.jobs import reference
from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, ReferenceTable, load, verify

from .conftest import Text, encode, id_of

NAMES = ("prompt", "chosen", "rejected", "chosen_logprob", "rejected_logprob")


@pytest.fixture
def given(rows: list[dict]) -> list[dict]:
    """Rows as RefDPO published them."""
    texts = [{name: row[name] for name in NAMES[:3]} for row in rows]
    return [{**row, "chosen_logprob": -10.0 - i / 8, "rejected_logprob": -20 - i / 7} for i, row in enumerate(texts)]


def write(rows: list[dict], path: Path) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        data.write(rows, path)
    return path


def imported(file: Path, out: Path, scorer: str = "theirs", **options: str) -> ReferenceTable:
    return load(reference.run(reference.Import(str(file), scorer, out, **options)).folder)


@pytest.mark.parametrize("name", ["given.jsonl", "given.jsonl.gz", "given.parquet", "given.csv"])
def test_sums_are_taken_in_exactly(name: str, given: list[dict], tmp_path: Path) -> None:
    table = imported(write(given, tmp_path / name), tmp_path / "table")
    for row in given:
        for side in ("chosen", "rejected"):
            at = table.places[id_of(Text(row["prompt"], row[side]))]
            assert table.sum_logp[at] == row[f"{side}_logprob"]
    assert table.imported
    assert table.recipe["imported"]["names"] == ["chosen_logprob", "rejected_logprob"]
    assert table.manifest["scorer"]["name"] == "theirs"
    results = read_json(tmp_path / "table" / "done.json")
    assert results["margins"]["accuracy"] == 1.0
    (tmp_path / "table" / "done.json").unlink()  # interrupted at the very end
    assert len(imported(tmp_path / name, tmp_path / "table")) == 160


def test_conversations_and_other_names(given: list[dict], tmp_path: Path) -> None:
    """The published rows hold whole conversations."""
    ask = [{"role": "user", "content": given[0]["prompt"]}]
    answers = {side: [*ask, {"role": "assistant", "content": given[0][side]}] for side in ("chosen", "rejected")}
    path = write([{**answers, "w": -1.0, "l": -2}], tmp_path / "given.jsonl")
    table = imported(path, tmp_path / "table", chosen="w", rejected="l")
    assert id_of(Text(given[0]["prompt"], given[0]["chosen"])) in table.places
    renamed = [{"question": row["prompt"], **{n: row[n] for n in NAMES[1:]}} for row in given]
    for name in ("q.jsonl", "q.csv"):
        path = write(renamed, tmp_path / name)
        assert len(imported(path, tmp_path / f"of {name}", columns="prompt=question")) == 160


def test_it_serves_losses_of_sums_only(given: list[dict], texts: list[Text], policy: Policy, tmp_path: Path) -> None:
    table = imported(write(given, tmp_path / "given.jsonl"), tmp_path / "table")
    encoded = encode(policy.tokenizer, texts)
    assert verify(table, encoded, tokenizer=policy.tokenizer) == [None] * len(texts)
    with pytest.raises(BadReference, match=r"^R3"):
        verify(table, encoded, tokenizer=policy.tokenizer, tokens=True)
    short = encode(policy.tokenizer, texts, max_length=12, max_prompt=9)
    reasons = verify(table, short, tokenizer=policy.tokenizer)
    assert any(reasons)
    assert {reason.split(":")[0] for reason in reasons if reason} == {"R3"}


@pytest.mark.parametrize("name", ["given.jsonl", "given.csv"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected_logprob": 0.5}, "'rejected_logprob' of the answer .*, line [34]\\) holds 0.5, .* at most 0"),
        ({"chosen_logprob": "high"}, "'chosen_logprob' of the answer .*, line [1-4]\\) holds .* a number is needed"),
        ({"chosen_logprob": None}, "'chosen_logprob' of the answer .*, line [34]\\) holds .* a number is needed"),
        ({"chosen_logprob": -math.inf}, "-?inf"),
    ],
)
def test_bad_numbers_are_refused(name: str, change: dict, words: str, given: list[dict], tmp_path: Path) -> None:
    given[2] |= change
    path = tmp_path / name
    if "inf" in words and path.suffix == ".jsonl":
        data.write(given[:2], path)
        row = str(given[2]).replace("'", '"').replace("-inf", "-Infinity")
        path.write_text(path.read_text() + row + "\n")
    else:
        write(given, path)
    with pytest.raises(ValueError, match=words):
        imported(path, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_bad_files_are_refused(given: list[dict], tmp_path: Path) -> None:
    folder = tmp_path / "table"
    twice = write([*given, {**given[0], "chosen_logprob": -99.0}], tmp_path / "twice.jsonl")
    with pytest.raises(BadReference, match=r"^R1: .* has -99.0, another row -10.0 for the same answer"):
        imported(twice, folder)
    with pytest.raises(BadReference, match=r"^R1: column 'chosen_logprob' of the answer .*, line 1\) holds None"):
        imported(write([{n: r[n] for n in NAMES[:3]} for r in given], tmp_path / "no.jsonl"), folder)
    with pytest.raises(ValueError, match="pairs need prompt, chosen, rejected"):
        imported(write([{"prompt": "x"}], tmp_path / "bare.csv"), folder)
    for missing in ("none.csv", "none.jsonl"):
        with pytest.raises(ValueError, match="none"):
            imported(tmp_path / missing, folder)
    assert not folder.exists()
