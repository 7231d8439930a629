"""Raw rows from files, `datasets` folders and the Hub, each row knowing its place for error messages."""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

Row = dict[str, Any]
# columns of CSV files that hold texts or names, whatever they look like
TEXTS = frozenset(
    "prompt prompt_id asked asked_id response chosen rejected completion instruction input output output_1 output_2 "
    "question response_j response_k text post history human_ref_A human_ref_B response1 response2 response_1 response_2"
    " model baseline baseline_output generator generator_1 generator_2 pair_id criterion better a b reason".split()
)


class Placed(dict[str, Any]):
    """A row that knows its `place` in the user's file, as in "pairs.jsonl, line 7".

    Otherwise it is a dict. `row | {...}` keeps the place; `{**row}` loses it.
    """

    place: str = ""

    @classmethod
    def at(cls, row: Mapping[str, Any], place: str) -> Placed:
        made = cls(row)
        made.place = place
        return made

    def __or__(self, other: Any) -> Any:
        return Placed.at({**self, **other}, self.place)


class DataError(ValueError):
    """Bad data: one line that says what is wrong, in which file and row, and what to do."""


@dataclass(frozen=True)
class Source:
    """The rows of a file as they stand there. `unit` and `numbers` say how they are counted."""

    name: str
    rows: list[Row]
    unit: str = "row"
    numbers: Sequence[int] | None = None

    def at(self, i: int) -> str:
        """The place of row i, counted from 0: "pairs.jsonl, line 7"."""
        return f"{self.name}, {self.unit} {self.numbers[i] if self.numbers else i + 1}"


def read(path: str, *, texts: Iterable[str] = ()) -> Source:
    """The rows of a file, a `datasets` folder ("folder[:split]") or a Hub name.

    Files: JSON, JSONL, CSV, TSV (each gzipped too), Parquet. CSV has only texts. A column in which every cell is a
    number, true or false, or messages written as JSON is converted; a column with the name of a text, or in `texts`,
    stays text. Raises DataError if there are no rows, or if a line is not a JSON object.
    """
    name, _, part = path.rpartition(":")
    if Path(path).is_file():
        source = _read_file(path, TEXTS | set(texts))
    elif Path(path).is_dir():
        source = _read_folder(path, "")
    elif Path(name).is_dir() and name:
        source = _read_folder(name, part)
    else:
        source = _read_hub(path)
    if not source.rows:
        raise DataError(f"{source.name} is empty: it holds no rows")
    return source


def _read_file(path: str, texts: Collection[str]) -> Source:
    try:
        if re.search(r"\.(csv|tsv)(\.gz)?$", path):
            return _read_csv(path, texts)
        return _read_parquet(path) if path.endswith(".parquet") else _read_json(path)
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: {error}; save it in UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _read_json(path: str) -> Source:
    if not re.search(r"\.(json|jsonl|ndjson)(\.gz)?$", path):
        raise DataError(
            f"cannot read {path}: the name must end in .json, .jsonl, .csv, .tsv (or these + .gz) or .parquet"
        )
    text = _text(path)
    if text.lstrip().startswith("["):
        source = Source(path, _parsed(text, path))
    else:  # split at newlines alone: splitlines() would also break at separators that JSON texts may hold
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [_parsed(line, f"{path}, line {number}") for number, line in lines]
        source = Source(path, rows, "line", [number for number, _ in lines])
    for i, row in enumerate(source.rows):
        if not isinstance(row, dict):
            raise DataError(f"{source.at(i)} is not a JSON object but {row!r:.40}")
    return source


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)  # NaN and Infinity pass here and are refused by column later
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _text(path: str, newline: str | None = None) -> str:
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
        return cast(str, file.read())


def _read_csv(path: str, texts: Collection[str]) -> Source:
    """The rows below the header, with the lines on which they begin: a quoted cell may span several lines."""
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", _text(path, ""))
    head = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if re.search(r"\.tsv(\.gz)?$", path) else max(",;\t", key=head.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for cells in reader:
            rows += [(begin, cells)] if cells else []
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {begin}: not CSV: {error}; a cell with quotes or line breaks needs quotes"
        ) from None
    if not rows:
        return Source(path, [])
    (_, header), *body = rows
    header = [name.strip() or ("index" if not i else "") for i, name in enumerate(header)]  # pandas leaves it unnamed
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise DataError(f"{path}, line 1: two columns are called {doubled!r}; give each its own name")
    for line, cells in body:
        if len(cells) != len(header):
            raise DataError(
                f"{path}, line {line} has {len(cells)} cells and the header {len(header)}: "
                f"a text that holds {delimiter!r} or a line break needs quotes"
            )
    columns = [_column([cells[i] for _, cells in body], name in texts) for i, name in enumerate(header)]
    table = [dict(zip(header, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return Source(path, table, "line", [line for line, _ in body])


def _column(cells: list[str], text: bool) -> list[Any]:
    """The values of a CSV column. A column of texts stays as it is, also if it looks like numbers."""
    if text:
        return [_structure(cell, _turns) for cell in cells]
    given = {cell.strip() for cell in cells} - {""}
    for read in (_truth, int, float, _structured):
        with contextlib.suppress(ValueError):
            known = {cell: read(cell) for cell in given}
            return [known.get(cell.strip()) for cell in cells]
    return list(cells)


def _truth(cell: str) -> bool:
    if cell.lower() not in ("true", "false"):
        raise ValueError
    return cell.lower() == "true"


def _structured(cell: str) -> Any:
    found = _structure(cell, lambda value: isinstance(value, list | dict))
    if found is cell:
        raise ValueError
    return found


def _structure(cell: str, wanted: Callable[[Any], bool]) -> Any:
    """The value in a cell, written as JSON or as Python prints it (pandas does), if it is what is wanted; else the
    text."""
    for read in (json.loads, ast.literal_eval) if cell.lstrip()[:1] in ("[", "{") else ():
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if wanted(found := read(cell)):
                return found
    return cell


def _turns(value: Any) -> bool:
    """Whether a value is a message or messages."""
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)


def _read_parquet(path: str) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        return Source(path, pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from error


def _read_folder(path: str, part: str) -> Source:
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        reason = "a folder must be one that datasets' save_to_disk wrote; name a file in it instead"
        raise DataError(f"cannot read {path}: {reason}") from error
    return _part(found, path, part)


def _read_hub(path: str) -> Source:
    name, _, part = path.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or re.search(r"\.(jsonl?|ndjson|parquet|[ct]sv|gz)$", name):
        raise DataError(f"no file {path}; give a file, a datasets folder or a Hub name (org/name[:split])")
    import datasets

    try:
        found = datasets.load_dataset(name, split=part or None)
    except Exception as error:  # the Hub client raises many unrelated kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"no file {path}, and no data set of that name from the Hub: {reason}") from error
    return _part(found, path, "")


def _part(found: Any, name: str, part: str) -> Source:
    if not isinstance(found, dict):
        if part:
            raise DataError(f"{name} is one data set without splits; leave out :{part}")
        return Source(name, found.to_list())
    wanted = part or ("train" if "train" in found or len(found) != 1 else str(next(iter(found))))
    if wanted not in found:
        raise DataError(f"{name} has no split {wanted!r} but {', '.join(map(str, found))}; write {name}:SPLIT")
    return Source(f"{name}:{wanted}", found[wanted].to_list())
