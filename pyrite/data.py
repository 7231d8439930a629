"""Rows on disk: load and import, validate, split by prompt, write, and add exact label noise.

Kinds and their columns (`prompt` is a text or a list of messages, `response` a text):
prompts {prompt_id, prompt}; demos {.., response}; pairs {.., chosen, rejected, [strength], [flipped]};
candidates {.., sample, response, finished, length, logp}, one row a response; answers {.., response}, to be judged,
which may be empty. Rows of any kind may carry what their prompt was made from: asked, the raw prompt, asked_id, and
preferences, a list of ids (`pyrite.dimensions`).
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyrite.layouts import LAYOUTS, Layout, MisplacedError, Skip, messages
from pyrite.sources import TEXTS, DataError, Placed, Row, Source, read
from pyrite.text import Answer, plain

Kind = Literal["prompts", "demos", "pairs", "candidates", "answers"]

OnContradiction = Literal["error", "swap", "drop", "keep"]
CONTRADICTION = "their strength or probability says that the rejected answer is the better one"
CONDITIONED = ("asked", "asked_id", "preferences")  # what a prompt under preferences was made from
PROBABILITY_FLOOR = 1e-4  # a judge's certainty becomes at most ln(9999) = 9.21 nats
_TEXTS = {
    "prompts": (),
    "demos": ("response",),
    "pairs": ("chosen", "rejected"),
    "candidates": ("response",),
    "answers": ("response",),
}
_NONEMPTY = {"demos": "response", "pairs": "chosen"}
_TYPES = {
    "sample": ((int,), "a whole number"),
    "length": ((int,), "a whole number"),
    "logp": ((int, float), "a number"),
    "strength": ((int, float), "a number"),
    "probability": ((int, float), "a number"),
    "finished": ((bool,), "true or false"),
    "flipped": ((bool,), "true or false"),
}
_TYPED = {
    "candidates": ("sample", "length", "logp", "finished"),
    "pairs": ("strength", "probability", "flipped"),
}


def load(
    path: str | Path,
    kind: Kind,
    *,
    columns: str | Mapping[str, str] | None = None,
    on_equal: Literal["error", "drop"] = "error",
    on_contradiction: OnContradiction = "keep",
    on_tie: Literal["keep", "drop"] = "keep",
    note: Callable[[str], object] | None = None,
) -> list[Row]:
    """Checked rows of a kind from a file, a `datasets` folder (folder[:split]) or the Hub (org/name[:split]).

    Files: JSON, JSONL, CSV, TSV (each gzipped too), Parquet. Layouts recognized: ours, TRL's standard and
    conversational ones, Anthropic HH transcripts, AlpacaFarm, Alpaca, question/response_j/response_k;
    `columns` renames others ("prompt=question,chosen=good", ours first). A missing prompt_id is derived from
    the prompt. A judge's `probability` p becomes `strength` = ln(p / (1 − p)) nats, p clipped to
    [1e-4, 1 − 1e-4]. Left out, and told to `note` in one line a reason: pairs with chosen equal to rejected
    (an error unless on_equal="drop"), conversations that part before the last answer or prefer an empty one,
    rows without a verdict, and prompts seen before (kind "prompts").

    on_contradiction: for pairs whose strength is below 0, or probability below ½, so that the rejected answer is the
    better one: keep, as they stand; swap, which exchanges the answers and their columns; drop; or an error. on_tie: for
    pairs of strength 0, of which neither answer is better.

    Every row knows its file and line: `place(row)` says them, whatever was left out, split or shuffled since.
    Raises DataError, naming the file and the row.
    """
    if kind not in LAYOUTS:
        raise DataError(f"unknown kind of data {kind!r}; it is one of {', '.join(LAYOUTS)}")
    if on_equal not in ("error", "drop"):
        raise DataError(f"on_equal is {on_equal!r}; it must be 'error' or 'drop'")
    names = _names(columns)
    source = _renamed(read(str(path), texts=[theirs for ours, theirs in names.items() if ours in TEXTS]), names)
    total = len(source.rows)
    source, layout, alone = _gathered(source, _layout(source, kind))
    rows, dropped, swaps = _converted(source, kind, layout, on_equal, on_contradiction, on_tie)
    dropped += alone
    if swaps and note is not None:
        note(f"{source.name}: in {swaps} of {total} rows chosen and rejected are exchanged: {CONTRADICTION}")
    for reason, count in dropped.items():
        if note is not None:
            note(f"{source.name}: {count} of {total} rows left out: {reason}")
    if not rows:
        raise DataError(f"{source.name}: no row is left of {total}; {'; '.join(dropped)}")
    return rows


def place(row: Row, unknown: str = "") -> str:
    """Where the user's file has a row, as errors call it: "pairs.jsonl, line 7"; `unknown` where nobody knows.

    Known of rows from `load`, and of rows made of them by `row | {...}`.
    """
    return getattr(row, "place", "") or unknown or f"the row of prompt {row.get('prompt_id')!r}"


def answer(row: Row, name: str) -> Answer:
    """The answer in a column: its text, or the whole message where that had more fields than a text."""
    fields = row.get(f"{name}_fields")
    return {"content": row[name], **fields} if fields else row[name]


def prompt_id(prompt: Any) -> str:
    """Id of a prompt, from its text alone: the same prompt has the same id in every file."""
    return hashlib.sha256(plain(prompt).encode()).hexdigest()[:16]


def origin(row: Row) -> tuple[str, str]:
    """Id and text of the raw prompt of a row: what splits go by, whatever preferences made of it.

    Of a text without a prompt, the text.
    """
    raw = all(name in row for name in CONDITIONED)
    asked = plain(row["asked" if raw else "prompt"])
    return str(row["asked_id" if raw else "prompt_id"]), asked or str(row.get("response", ""))


def apart(rows: Sequence[Row], held: Sequence[Row], *, note: Callable[[str], object], source: str) -> list[Row]:
    """The rows whose raw prompt is not among those held out; how many are left out is told to `note`.

    Prompts are compared by their texts, as files number their rows each in its own way. source: the file of `rows`,
    for messages. Raises DataError if none is left.
    """
    kept = {_words(row) for row in held}
    left = [row for row in rows if _words(row) not in kept]
    if not left:
        raise DataError(f"{source}: all {len(rows)} rows are of prompts that are held out; hold out other ones")
    if len(left) < len(rows):
        first = place(next(row for row in rows if _words(row) in kept)) or source
        note(f"{source}: {len(rows) - len(left)} of {len(rows)} rows left out: their prompt is held out ({first}, ...)")
    return left


def seen(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """How many of the rows are about a raw prompt of the others."""
    known = {_words(row) for row in others}
    return sum(_words(row) in known for row in rows)


def _words(row: Row) -> tuple[str, ...]:
    return tuple(origin(row)[1].split())


def clusters(rows: Sequence[Row]) -> list[int]:
    """Which raw prompt each row is about, numbered from 0 in order: rows of one number are not independent."""
    names = _groups(rows, None)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [number[name] for name in names]


def split(rows: Sequence[Row], *, fraction: float, seed: int, by: str | None = None) -> tuple[list[Row], list[Row]]:
    """(train, held), round(fraction · groups) groups of equal `by`, at least one, held; no prompt in both.

    by: a column; by default asked_id where a row has it, else prompt_id. Which groups depends on the seed and their
    ids only, never on the order of rows. Rows with the same prompt under two ids stay together. Raises DataError
    where there is nothing to divide.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"--held-out: the held-out fraction is {fraction}; it must be at least 0 and below 1")
    if fraction == 0:
        return list(rows), []
    groups = _groups(rows, by)
    distinct = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    if len(distinct) < 2:
        name = by or "prompt_id"
        where = f"{place(rows[0])}: " if rows else ""
        raise DataError(
            f"{where}cannot hold out rows by {name}: there are {len(distinct)} distinct ones, two are needed"
        )
    held = set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, group in zip(rows, groups, strict=True):
        sides[group in held].append(row)
    return sides


def write(rows: Sequence[Row], path: str | Path) -> None:
    """Rows to .parquet, .jsonl or .jsonl.gz, whole or not at all. Raises DataError where it cannot."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if not target.name.endswith((".parquet", ".jsonl", ".jsonl.gz")):
        raise DataError(f"cannot write {target}: the name must end in .parquet, .jsonl or .jsonl.gz")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".parquet":
            _write_parquet(rows, temporary)
        else:
            text = "".join(f"{_json(row, sort=False)}\n" for row in rows).encode()
            temporary.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {target}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of the rows in their order; the order of columns and the file format do not matter."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_json(row, sort=True).encode() + b"\n")
    return digest.hexdigest()


def cut_hint(candidates: Sequence[Row]) -> str:
    """What to do about answers that were cut before their end, as the end of a message; empty if none was."""
    cut = [row["length"] for row in candidates if not row["finished"]]
    if not cut:
        return ""
    counted = f"{len(cut)} of {len(candidates)} answers were cut, the longest at {max(cut)} tokens"
    return f"; {counted}: for more finished ones, generate again with a larger --max-new-tokens"


def flip_labels(rows: Sequence[Row], *, p: float, seed: int) -> tuple[list[Row], np.ndarray]:
    """Exact label noise: chosen and rejected swapped in exactly round(p · N) pairs, and the mask (N,).

    Give it training pairs only. One seed gives one mask, to be shared by all members of an ensemble. A
    strength stays: it is part of the (now false) claim. Raises DataError unless 0 ≤ p ≤ 1.
    """
    if not 0 <= p <= 1:
        raise DataError(f"the share of flipped labels is {p}; it must be between 0 and 1")
    mask = np.zeros(len(rows), dtype=bool)
    stream = np.random.default_rng(np.random.SeedSequence([seed, *b"label noise"]))
    mask[stream.permutation(len(rows))[: round(p * len(rows))]] = True
    return apply_flips(rows, mask), mask


def apply_flips(rows: Sequence[Row], mask: np.ndarray) -> list[Row]:
    """Pairs swapped where `mask` (N,) is true, `flipped` kept in step; done twice, the identity."""
    if len(mask) != len(rows):
        raise DataError(f"the flip mask has {len(mask)} entries for {len(rows)} pairs")
    result = []
    for row, flip in zip(rows, mask, strict=True):
        row = exchanged(row) if flip else row
        result.append(row | {"flipped": bool(row.get("flipped", False)) ^ bool(flip)})
    return result


def _names(columns: str | Mapping[str, str] | None) -> Mapping[str, str]:
    """Theirs by ours: "prompt=question,chosen=good" or the mapping itself."""
    if not isinstance(columns, str) or not columns:
        return columns or {}
    pairs = [entry.partition("=") for entry in columns.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise DataError(f"--columns {columns}: write ours=theirs, as in prompt=question,chosen=good")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _renamed(source: Source, columns: Mapping[str, str]) -> Source:
    if not columns:
        return source
    for theirs in columns.values():
        if theirs not in source.rows[0]:
            raise DataError(f"{source.name} has no column {theirs!r}{_nearest(theirs, source.rows[0])}")
    taken = set(columns.values())
    rows = [
        {k: v for k, v in row.items() if k not in taken}
        | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        for row in source.rows
    ]
    return Source(source.name, rows, source.unit, source.numbers)


def _layout(source: Source, kind: str) -> Layout:
    present = source.rows[0]
    for layout in LAYOUTS[kind]:
        if all(name in present for name in layout.needs):
            return layout
    needs = LAYOUTS[kind][0].needs
    missing = [name for name in needs if name not in present]
    raise DataError(
        f"{source.at(0)}: {kind} need {', '.join(needs)}; missing {', '.join(missing)}"
        f"{_nearest(missing[0], present)}; rename with columns {missing[0]}=NAME"
    )


def _gathered(source: Source, layout: Layout) -> tuple[Source, Layout, Counter[str]]:
    """The rows, made pairs where the layout has one answer a row, and how many of them make none, by reason."""
    if layout.gather is None:
        return source, layout, Counter()
    try:
        pairs, alone = layout.gather(source.rows)
    except MisplacedError as error:
        raise DataError(f"{source.at(error.row)}: {error}") from error
    except ValueError as error:
        raise DataError(f"{source.name}: {error}") from error
    numbers = [source.numbers[i] if source.numbers else i + 1 for i, _ in pairs]
    made = Source(source.name, [row for _, row in pairs], source.unit, numbers)
    return (
        made,
        replace(layout, needs=("prompt", "chosen", "rejected"), reads=layout.needs, gather=None),
        Counter(alone),
    )


def _nearest(name: str, present: Row) -> str:
    near = difflib.get_close_matches(name, [str(column) for column in present], n=1)
    return f" (present: {', '.join(map(str, present))}{f'; nearest: {near[0]}' if near else ''})"


def _converted(
    source: Source, kind: Kind, layout: Layout, on_equal: str, on_contradiction: OnContradiction, on_tie: str
) -> tuple[list[Row], Counter[str], int]:
    """The rows, how many were left out by reason, and of how many pairs the answers were exchanged."""
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    prompts: dict[Any, str] = {}
    against: list[int] = []
    said = ""
    for i, raw in enumerate(source.rows):
        try:
            row = _checked(raw, kind, layout)
            _check_pair(row, kind, on_equal)
            _check_id(row, kind, prompts)
            if kind == "pairs" and _better(row) == 0 and on_tie == "drop":
                raise Skip("neither answer is better (strength 0)")
            if kind == "pairs" and _better(row) < 0:
                name = "probability" if "probability" in row else "strength"
                said = said or f"{name} is {row[name]:.4g}"
                against.append(i)
                row = _resolved(row, on_contradiction)
        except Skip as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            raise DataError(f"{source.at(i)}: {error}") from error
        else:
            rows.append(Placed.at(row, source.at(i)))
    if against and on_contradiction == "error":
        raise DataError(
            f"{source.at(against[0])}: {said}, so the rejected answer is the better one, as in {len(against)} of "
            f"{len(source.rows)} rows; --on-contradiction swap exchanges their answers, drop leaves them out, "
            "keep takes them as they stand"
        )
    return rows, dropped, len(against) * (on_contradiction == "swap")


def _better(row: Row) -> float:
    """Which answer the numbers of a pair prefer: above 0 chosen, below 0 rejected, 0 neither; 1 without numbers."""
    if "strength" not in row:
        return 1.0
    odds = row.get("probability", 0.5) - 0.5
    if row["strength"] * odds < 0:
        raise ValueError(
            f"strength is {row['strength']:.4g} but probability is {row['probability']:.4g}: they disagree"
        )
    return row["strength"]


def _resolved(row: Row, on_contradiction: OnContradiction) -> Row:
    """A pair of which the rejected answer is the better one, as it is to be taken."""
    if on_contradiction == "drop":
        raise Skip(CONTRADICTION)
    if on_contradiction != "swap":
        return row
    signs = {"strength": -row["strength"]} if "strength" in row else {}
    signs |= {"probability": 1 - row["probability"]} if "probability" in row else {}
    return exchanged(row) | signs


def exchanged(row: Row) -> Row:
    """A pair with its answers exchanged, and with them all columns that come in twos: chosen_logp and rejected_logp."""
    return row | {name: row[_twin(name)] for name in row if _twin(name) in row}


def twins(one: str, other: str) -> bool:
    """Whether `exchanged` sees that two columns belong to the two answers of a pair.

    >>> twins("chosen_logp", "rejected_logp"), twins("lw", "ll")
    (True, False)
    """
    return one != other and _twin(one) == other


def _twin(name: str) -> str:
    """Of a column about one answer, the name of the other's."""
    return re.sub("chosen|rejected", lambda found: "rejected" if found[0] == "chosen" else "chosen", name)


def _check_pair(row: Row, kind: Kind, on_equal: str) -> None:
    if kind == "pairs" and answer(row, "chosen") == answer(row, "rejected"):
        if on_equal == "error":
            raise ValueError("chosen equals rejected; remove such pairs, or leave them out with on_equal=drop")
        raise Skip("chosen equals rejected")


def _check_id(row: Row, kind: Kind, prompts: dict[Any, str]) -> None:
    """One id, one prompt: splits, counts and random streams go by it."""
    text, seen = plain(row["prompt"]), row["prompt_id"] in prompts
    if prompts.setdefault(row["prompt_id"], text) != text:
        raise ValueError(f"prompt_id {row['prompt_id']!r} already belongs to another prompt")
    if seen and kind == "prompts":
        raise Skip("the prompt is there already")


def _checked(raw: Row, kind: Kind, layout: Layout) -> Row:
    """Our columns, then the file's others; raises ValueError without the place, which the caller knows."""
    missing = [name for name in layout.needs if name not in raw]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    ours = layout.convert(raw)
    bare = kind == "demos" and ours["prompt"] == "" and "text" in layout.needs  # a text without a prompt
    prompt = ours["prompt"] = "" if bare else _checked_prompt(ours["prompt"])
    for name in _TEXTS[kind]:
        if not isinstance(ours[name], str):
            raise ValueError(f"{name} must be text, not {ours[name]!r:.60}")
    if kind in _NONEMPTY and not ours[_NONEMPTY[kind]].strip() and not ours.get(f"{_NONEMPTY[kind]}_fields"):
        raise ValueError(f"{_NONEMPTY[kind]} is empty")
    named = _named(raw, "prompt_id", prompt or ours["response"])
    if kind == "prompts":
        return {"prompt_id": named, "prompt": prompt, **_asked(raw)}
    used = {"prompt_id", *ours, *layout.needs, *layout.reads}
    others = {name: value for name, value in raw.items() if name not in used and value is not None}
    row = {"prompt_id": named, **ours, **others, **_asked(raw)}
    _check_numbers(row, kind)
    if kind == "pairs" and "probability" in row and "strength" not in row:
        row["strength"] = _log_odds(row["probability"])
    return row


def _asked(raw: Row) -> Row:
    """What a prompt was made from; nothing unless both the raw prompt and its preferences are there."""
    if raw.get("asked") is None or raw.get("preferences") is None:
        return {}
    asked, ids = _checked_prompt(raw["asked"], "asked"), raw["preferences"]
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"preferences must be a list of texts, not {ids!r:.60}")
    return {"asked": asked, "asked_id": _named(raw, "asked_id", asked), "preferences": ids}


def _named(raw: Row, name: str, prompt: Any) -> str | int:
    """The id in a column, else one derived from the prompt."""
    given = raw.get(name)
    if given is None:
        return prompt_id(prompt)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ValueError(f"{name} must be text or a whole number, not {given!r:.60}")
    return given


def _checked_prompt(prompt: Any, name: str = "prompt") -> Any:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{name} is empty")
        return prompt
    turns = messages(prompt, name) if isinstance(prompt, list) else None
    if turns is None:
        raise ValueError(f"{name} must be text or a list of messages, not {prompt!r:.60}")
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{name} ends with an assistant turn; it must end with what is to be answered")
    return turns


def _check_numbers(row: Row, kind: str) -> None:
    for name in _TYPED.get(kind, ()):
        types, words = _TYPES[name]
        value = row.get(name)
        wrong_bool = isinstance(value, bool) and bool not in types
        if name in row and (wrong_bool or not isinstance(value, types)):
            raise ValueError(f"{name} must be {words}, not {value!r:.60}")
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; numbers must be finite")


def _log_odds(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"probability is {p}; it must be between 0 and 1")
    p = min(max(p, PROBABILITY_FLOOR), 1 - PROBABILITY_FLOOR)
    return math.log(p / (1 - p))


def _groups(rows: Sequence[Row], by: str | None) -> list[str]:
    """Group of each row: rows joined by equal `by` or raw prompt, named by the smallest `by` in it."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    owner: dict[str, str] = {}
    keys = []
    for i, row in enumerate(rows):
        if (by or "prompt_id") not in row:
            raise DataError(f"row {i + 1} has no column {by or 'prompt_id'!r} to split by")
        keys.append(key := str(row[by]) if by else origin(row)[0])
        other = owner.setdefault(origin(row)[1], key) if "prompt" in row else key
        low, high = sorted((root(key), root(other)))
        parent[high] = low
    return [root(key) for key in keys]


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, path)


def _json(row: Row, *, sort: bool) -> str:
    return json.dumps(row, sort_keys=sort, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
