"""Take in log-probabilities that someone else computed: one sum an answer, as RefDPO published them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pyrite import data
from pyrite.references import tables
from pyrite.references.rules import POSITIVE
from pyrite.references.tables import BadReference, Table, Text, row_id
from pyrite.sources import DataError

SIDES = ("chosen", "rejected")
NAMES = ("chosen_logprob", "rejected_logprob")


@dataclass(frozen=True)
class Sums:
    """What a file says of 2B answers, chosen and rejected alternately: texts, sums in nats, and how they were read."""

    texts: list[Text]
    values: list[float]
    about: dict[str, Any]


def import_table(
    file: str | Path,
    *,
    folder: Path,
    scorer: str,
    names: tuple[str, str] = NAMES,
    columns: str | None = None,
    note: Callable[[str], object] | None = None,
) -> Table:
    """Pairs with the summed log-probabilities of both answers, nats, as a reference in `folder`.

    file: prompt, chosen, rejected and the two sums, as JSONL, CSV, Parquet or a data set that `data.load` reads;
    `columns` renames its columns, `names` are those of the sums. The manifest says that it was imported: nothing is
    known of tokenizer, template or truncation, so only losses of sums can use it.
    Raises BadReference (R1), naming the first row, for a sum that is missing, not finite or positive.
    """
    return store(read(file, names=names, columns=columns, note=note), folder=folder, scorer=scorer)


def read(
    file: str | Path,
    *,
    names: tuple[str, str] = NAMES,
    columns: str | None = None,
    note: Callable[[str], object] | None = None,
) -> Sums:
    """The first half of `import_table`: read and check, write nothing."""
    seen: dict[str, float] = {}
    texts, values = [], []
    for text, value, where in _values(str(file), names, columns, note):
        if seen.setdefault(row_id(text), value) != value:
            raise BadReference(f"R1: {where} is {value}, another row has {seen[row_id(text)]} for the same answer")
        texts.append(text)
        values.append(value)
    sha256 = tables.file_hash(Path(file)) if Path(file).is_file() else None
    return Sums(texts, values, {"file": Path(file).name, "sha256": sha256, "names": list(names)})


def store(sums: Sums, *, folder: Path, scorer: str) -> Table:
    """The second half of `import_table`. Raises BadReference (R7) where the folder is taken or cannot be written."""
    if (folder / tables.MANIFEST).exists():
        raise BadReference(f"R7: {folder} holds a reference already; delete it or choose another folder")
    by_id = {row_id(text): (text, value) for text, value in zip(sums.texts, sums.values, strict=True)}
    recipe = {
        "imported": sums.about,
        "reduction": "sum",
        "data": {"rows": len(by_id), "sha256": tables.digest(sorted(by_id))},
        "tokens": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise tables.unwritable(folder, error) from error
    tables.write_part(folder / tables.FIRST_PART, _part(by_id))
    about = {"name": scorer, "revision": None, "files": None}
    tables.finish(folder, recipe, scorer=about, margins=tables.margins(np.array(sums.values)))
    return tables.load(folder)


def _values(
    file: str, names: tuple[str, str], columns: str | None, note: Callable[[str], object] | None
) -> Iterator[tuple[Text, float, str]]:
    """Chosen and rejected alternately, their sums, and where they stand."""
    for number, row in enumerate(_rows(file, columns, note), 1):
        for side, name in zip(SIDES, names, strict=True):
            where = f"{file}: {name} of pair {number} (prompt {row['prompt_id']})"
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadReference(f"R1: {where} is {value!r:.40}; a number is needed, the log-probability in nats")
            if not (math.isfinite(value) and value <= POSITIVE):
                raise BadReference(f"R1: {where} is {value}; a log-probability is finite and at most 0")
            yield Text(row["prompt"], row[side]), float(value), where


def _rows(file: str, columns: str | None, note: Callable[[str], object] | None) -> list[dict[str, Any]]:
    try:
        if file.endswith(".csv"):
            return list(_from_csv(file, columns))
        return data.load(file, "pairs", columns=columns, on_equal="drop", note=note)
    except (DataError, OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadReference(f"R1: {' '.join(str(error).split())}") from error


def _from_csv(file: str, columns: str | None) -> Iterator[dict[str, Any]]:
    """Rows of texts and numbers; what is no number stays text, and is refused with its place."""
    theirs = {
        ours.strip(): name.strip() for ours, _, name in (one.partition("=") for one in (columns or "").split(","))
    }
    with Path(file).open(newline="", encoding="utf-8-sig") as stream:
        for row in csv.DictReader(stream):
            named = {ours: row.pop(name) for ours, name in theirs.items() if name in row} | row
            missing = [name for name in ("prompt", *SIDES) if not named.get(name)]
            if missing:
                raise DataError(
                    f"{file} has a row without {missing[0]}; CSV needs prompt, chosen, rejected and the sums"
                )
            yield {name: _number(text) for name, text in named.items()} | {
                "prompt_id": data.prompt_id(named["prompt"]),
                **{name: named[name] for name in ("prompt", *SIDES)},
            }


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _part(by_id: dict[str, tuple[Text, float]]) -> pa.Table:
    """What is known of imported rows; how they were read is not."""
    unknown = {"n_prompt_tokens": -1, "n_resp_tokens": -1, "n_unknown": 0, "ended_with_eos": True}
    unknown |= {"prompt_ids_sha": "", "resp_ids_sha": "", "truncated": False, "prompt_truncated": False}
    rows = [
        {
            **unknown,
            "row_id": name,
            "resp_utf8_bytes": len(text.response.encode("utf-8", "surrogatepass")),
            "sum_logp": value,
        }
        for name, (text, value) in by_id.items()
    ]
    return pa.Table.from_pylist(rows, schema=tables.SCHEMA)
