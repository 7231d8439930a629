"""People as judges, by file: blinded pairs out as CSV or JSONL, labels in by id, and a judge of what came in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.data.files import DataError, Row, Source, read
from pyrite.data.text import plain
from pyrite.feedback import scorers
from pyrite.feedback.judges.questions import WINS, Label, Said, Verdict, combined, pair_id, request, shown
from pyrite.math import seeds
from pyrite.math.ranges import Half, Positive, require

# scores: A judge made of any scorer, and the check on verdicts.


Judge = Callable[[list[str], list[str], list[str]], Tensor]


def bradley_terry(*, gold: str, scale: Positive = 1.0, noise: Half = 0.0, hard: bool = False) -> Judge:
    """Judge: P(a beats b) = (1 − noise) σ((gold(a) − gold(b)) / scale) + noise σ((gold(b) − gold(a)) / scale).

    gold: any scorer named as a spec string, a reward model among them; each text is scored once a call. scale: score
    points to an odds ratio of e. noise in [0, ½]: how often this judge says the opposite. hard: 1, 0, ½ at a tie, in
    place of σ. Raises ValueError for options out of range.

    >>> bradley_terry(gold="length()")(["hi"], ["one two"], ["one two"])
    tensor([0.5000])
    """
    require(bradley_terry, scale=scale, noise=noise)
    scorer = specs.part(gold, scorers)

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        texts = list(dict.fromkeys([*zip(prompts, a, strict=True), *zip(prompts, b, strict=True)]))
        if not texts:
            return torch.empty(0)
        scores = scorers.check_scores(scorer([p for p, _ in texts], [y for _, y in texts]), len(texts), name=gold)
        place = {text: i for i, text in enumerate(texts)}
        first, second = (scores[[place[text] for text in zip(prompts, side, strict=True)]] for side in (a, b))
        better = (0.5 + 0.5 * (first - second).sign()) if hard else torch.sigmoid((first - second) / scale)
        return (1 - noise) * better + noise * (1 - better)

    return judge


def check_verdicts(verdicts: Tensor | Sequence[float], n: int, *, name: str) -> Tensor:
    """The verdicts of `name` as a (N,) tensor of probabilities or NaN. Raises ValueError for anything else."""
    values = torch.as_tensor(verdicts).float()
    if values.shape != (n,):
        raise ValueError(f"{name} returned verdicts of shape {tuple(values.shape)}; {n} pairs need ({n},)")
    wrong = ((values < 0) | (values > 1)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{name} judged pair {row + 1} as {values[row].item()}; P(a beats b) lies in [0, 1]")
    return values


# humans: People as judges, by file: blinded pairs out as CSV or JSONL, labels in by id, and a judge of what came in.


COLUMNS: tuple[str, ...] = ("pair_id", "criterion", "request", "answer_A", "answer_B", "better")
LABELS: dict[str, Label] = {"A": "A", "B": "B", "TIE": "TIE", "T": "TIE", "1": "A", "2": "B", "0": "TIE"}


def blinded(rows: Sequence[Row], *, criterion: str, seed: int) -> list[Row]:
    """Rows {prompt, a, b} as a person gets them: which answer is A, and the order of the pairs, drawn by the seed.

    Nothing else of the rows is shown. Raises DataError for a pair that is there twice.
    """
    sheet: dict[str, Row] = {}
    for row in rows:
        asked, a, b = request(row), row["a"], row["b"]
        first, second = (a, b) if shown(asked, a, b, seed=seed) == "ab" else (b, a)
        name = pair_id(row["prompt"], a, b)
        if name in sheet:
            raise DataError(f"the pair {name} is there twice, its prompt beginning {asked!r:.60}; remove one")
        sheet[name] = dict(zip(COLUMNS, (name, criterion, asked, first, second, ""), strict=True))
    order = torch.randperm(len(sheet), generator=seeds.generator(seed, "order of pairs")).tolist()
    names = list(sheet)
    return [sheet[names[i]] for i in order]


def write_sheet(sheet: Sequence[Row], path: Path) -> None:
    """The pairs to be filled in, .csv (with a mark by which spreadsheets know UTF-8) or .jsonl."""
    if path.suffix == ".jsonl":
        runs.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sheet))
        return
    written = io.StringIO()
    writer = csv.DictWriter(written, [*COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(sheet)
    runs.write_text(path, "\ufeff" + written.getvalue())


def filled(path: str | Path, rows: Sequence[Row], *, seed: int) -> list[Verdict]:
    """The verdicts of a filled sheet on the rows {prompt, a, b} it was made of; none where it was left blank.

    By id alone: rows of the sheet may be in any order, and its texts are not read. Raises DataError, naming the file
    and the row, for an unknown or repeated id, or a label other than A, B, TIE.
    """
    source = _read(str(path))
    wanted = {pair_id(row["prompt"], row["a"], row["b"]): row for row in rows}
    found: dict[str, Said] = {}
    seen: set[str] = set()
    for i, given in enumerate(source.rows):
        name, said = str(given.get("pair_id") or "").strip(), str(given.get("better") or "").strip().upper()
        if name not in wanted:
            raise DataError(f"{source.at(i)}: no pair was sent out as {name!r:.40}; leave the column pair_id as it is")
        if name in seen:
            raise DataError(f"{source.at(i)}: a second label for the pair {name}; keep one of them")
        if said and said not in LABELS:
            raise DataError(f"{source.at(i)}: better is {given['better']!r:.40}; write A, B, TIE, or nothing")
        seen.add(name)
        if said:
            found[name] = Said(LABELS[said], WINS[LABELS[said]])
    verdicts = []
    for name, row in wanted.items():
        order = shown(request(row), row["a"], row["b"], seed=seed)
        verdicts.append(combined({order: found.get(name)}))
    return verdicts


def human(*, path: str) -> Judge:
    """Judge: the labels of a file of verdicts, such as people gave: rows of prompt, a, b and p = P(a beats b).

    path: verdicts as `pyrite judge import` and `pyrite judge ask` write them. Several verdicts on a pair count by
    their mean; a pair without one is NaN. Raises DataError for a file that holds no verdicts.
    """
    known: dict[tuple[str, str, str], list[float]] = {}
    for prompt, a, b, p in _verdicts(path):
        known.setdefault((prompt, a, b), []).append(p)
        known.setdefault((prompt, b, a), []).append(1 - p)

    def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        found = [known.get(texts, [math.nan]) for texts in zip(prompts, a, b, strict=True)]
        return torch.tensor([sum(values) / len(values) for values in found], dtype=torch.float64)

    return judge


def _verdicts(path: str) -> list[tuple[str, str, str, float]]:
    source = read(path)
    rows = []
    for i, row in enumerate(source.rows):
        missing = [name for name in ("prompt", "a", "b", "p") if name not in row]
        if missing:
            raise DataError(f"{source.at(i)}: verdicts need prompt, a, b and p; missing {', '.join(missing)}")
        p = row["p"]
        if p is None or p != p:
            continue
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise DataError(f"{source.at(i)}: p is {p!r:.40}; it must be a probability")
        rows.append((plain(row["prompt"]), row["a"], row["b"], float(p)))
    if not rows:
        raise DataError(f"{path}: no verdict in it")
    return rows


def _read(path: str) -> Source:
    """The rows of a sheet; CSV as spreadsheets save it, with commas, semicolons or tabs."""
    source = _read_csv(path) if path.endswith(".csv") else read(path)
    missing = [name for name in ("pair_id", "better") if name not in (source.rows[0] if source.rows else ())]
    if missing:
        raise DataError(f"{path}: no column {' and no column '.join(missing)}; give a sheet of `pyrite judge export`")
    return source


def _read_csv(path: str) -> Source:
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; save it as CSV in UTF-8") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = list(reader)
        return Source(path, rows, "row", range(2, len(rows) + 2))  # as a spreadsheet counts, below the header
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
