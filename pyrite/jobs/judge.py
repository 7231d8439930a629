"""Judging: pairs of answers put to a language model or to people, and how far two judges agree.

`pyrite judge ask|export|import|agreement`. Every answer of a model is in the ledger, with its text, tokens and cost, as
soon as it is there, so an interrupted run goes on from there, and a second run costs nothing.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.core.processes import progress, say, world
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data.files import DataError, Row, Source, read
from pyrite.data.rows import prompt_id
from pyrite.data.text import plain
from pyrite.feedback import pairing
from pyrite.feedback.judges import (
    WINS,
    JudgeOptions,
    Label,
    LanguageJudge,
    Said,
    Verdict,
    combined,
    pair_id,
    request,
    shown,
    verdict_row,
)
from pyrite.feedback.ledger import Books, Ledger
from pyrite.math import seeds, statistics, winrates
from pyrite.math.ranges import Count, Inside, Natural, check

ANSWER = ("response", "sample", "finished", "length", "logp")  # what a candidate has of its own
OUTPUTS = {
    "verdicts.parquet": "ask, import: the pairs with preference (1 a, 2 b, 0 tie, null), p, order, p_ab, p_ba, raw",
    "comparisons.parquet": "ask --answers: the verdicts as `pyrite winrate` reads them",
    "ledger.db": "ask: every answer with its text, tokens and cost, unless --ledger names another file",
    "pairs.csv": "export: blinded pairs to be labelled, or pairs.jsonl",
    "pairs.parquet": "export: what the pairs were made of; import reads it",
    "agreement.json": "agreement: agreement, kappa, position bias, tie and no-verdict rates, with intervals",
}


@dataclass(frozen=True)
class Ask:
    """Have a language model say which answer of each pair is better by a criterion."""

    model: str
    """The judge's model name on the server."""
    criterion: str
    """What makes an answer better, in a sentence."""
    out: Path
    """Folder of the run, new or empty."""
    pairs: str | None = None
    """Pairs to judge, a = chosen and b = rejected; rename others: --columns chosen=a,rejected=b."""
    candidates: str | None = None
    """Candidates to judge, in place of --pairs: answers 0 and 1, 2 and 3, ... to a prompt make pairs."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    criterion_id: str | None = None
    """Name of the criterion in ledger and table; the sentence by default."""
    ledger: Path | None = None
    """SQLite file that keeps the answers; runs may share it. By default ledger.db in the run's folder."""
    estimate: bool = False
    """Estimate the cost from the prompts that would be sent. Nothing is asked. A token is taken to be four
    characters."""
    answers: tuple[str, ...] = ()
    """Answers of models to compare with --baseline, in place of --pairs: one file per model, as FILE or NAME=FILE."""
    baseline: str | None = None
    """Answers to compare --answers with, as FILE or NAME=FILE."""
    judge: JudgeOptions = JudgeOptions()


@dataclass(frozen=True)
class Export:
    """Write pairs to a file for a person to label. The file is blinded: the order of the pairs, and which answer is A,
    are drawn by the seed."""

    criterion: str
    """What makes an answer better, in one sentence. The judge reads it with every pair."""
    out: Path
    """Folder of the run, new or empty."""
    pairs: str | None = None
    """Pairs to judge: a = chosen, b = rejected. Rename other columns with --columns chosen=a,rejected=b."""
    candidates: str | None = None
    """Candidates to judge, in place of --pairs: answers 0 and 1, 2 and 3, ... to a prompt make pairs."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    criterion_id: str | None = None
    """Name of the criterion in the table of verdicts; the sentence by default."""
    format: Literal["csv", "jsonl"] = "csv"
    """Format of the file to fill in."""
    seed: Natural = 0
    """Random seed."""


@dataclass(frozen=True)
class Import:
    """Read the labels of a filled file, by the ids of its pairs: A, B, TIE, or nothing for no verdict."""

    file: str
    """The filled-in file: columns pair_id and better."""
    exported: Path
    """Folder of the export that the file belongs to."""
    out: Path
    """Folder of the run, new or empty."""
    annotator: str = "human"
    """Name of the person or group that labeled."""


@dataclass(frozen=True)
class Agreement:
    """How far two files of verdicts agree, and how each of the judges is biased."""

    first: str
    """verdicts.parquet of the first judge."""
    out: Path
    """Folder of the run, new or empty."""
    second: str | None = None
    """verdicts.parquet of a second judge, or of people. Without it, only position bias is reported."""
    n_boot: Count = 1000
    """Bootstrap resamples of prompts for the intervals."""
    level: Inside = 0.95
    """Confidence level of the intervals."""
    seed: Natural = 0
    """Random seed."""


Config = Ask | Export | Import | Agreement


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    if isinstance(config, Import):
        return {"file": config.file, "exported": config.exported}
    if isinstance(config, Agreement):
        files = {"first": config.first, "second": config.second}
    else:
        shown = config.judge.demonstrations if isinstance(config, Ask) else None
        files = {"pairs": config.pairs, "candidates": config.candidates, "demonstrations": shown}
    if isinstance(config, Ask):
        given = {f"answers {i}": one for i, one in enumerate(config.answers)} | {"baseline": config.baseline}
        files |= {name: _split(one)[1] for name, one in given.items() if one}
    return {name: path for name, path in files.items() if path}


def run(config: Config) -> Run:
    """Do what the kind of config says."""
    check(config)
    if isinstance(config, Ask):
        return ask(config)
    if isinstance(config, Export):
        return export(config)
    return import_(config) if isinstance(config, Import) else agreement(config)


def ask(config: Ask) -> Run:
    """Ask what the ledger cannot answer, then write the verdicts.

    The folder gets its config only then. Until the run is done, the ledger is all that a new attempt needs, so the new
    attempt may have another pace, price or limit.
    """
    if config.estimate:
        judge, _, texts = _asked(config)
        found = judge.estimate(judge.questions(*texts))
        say("judge: {questions} questions in {requests} requests, {answered} answered in the ledger".format(**found))
        say("  about {tokens_in} tokens to read, at most {tokens_out} to write; cost {cost:.6g}".format(**found))
        return Run(config.out, runs.plain_config(config), {}, found)
    run = runs.start("judge", config, inputs=inputs)
    if run.done:
        return run
    if world().num_processes > 1:
        raise ValueError("judge: one process asks, several requests at once; run it without a launcher")
    judge, rows, texts = _asked(config)
    run.own()  # the ledger may lie in its folder
    keys = list({question.key for pair in judge.questions(*texts) for question in pair.values()})
    before = _books(judge.ledger, keys)
    with progress("judge", len(keys), unit="questions") as advance:
        verdicts = judge.verdicts(*texts, advance=advance)
    if all(verdict.preference is None for verdict in verdicts):
        raise ValueError(_nothing(judge, keys, len(rows)))
    run.open()
    table = [
        verdict_row(row, verdict, criterion=judge.criterion, model=config.model)
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    data.write(table, run.folder / "verdicts.parquet")
    if config.answers:
        data.write(_comparisons(table), run.folder / "comparisons.parquet")
        say(f"judge: win rates: pyrite winrate --data {run.folder / 'comparisons.parquet'} --out ...")
    found, spent = _counted(table), _books(judge.ledger, keys)
    say(f"judge: {', '.join(f'{count} {name}' for name, count in found.items())}; {spent.cost:.6g} paid in all")
    if spent.failed:
        say(
            f"judge: {spent.failed} questions had no answer; another --out with --ledger {judge.ledger} asks them again"
        )
    return run.finish(**found, calls=spent.calls - before.calls, answers=asdict(spent), ledger=judge.ledger)


def export(config: Export) -> Run:
    """Write the sheet for a person, and the pairs it was made of."""
    run = runs.start("judge", config, inputs=inputs)
    if run.done:
        return run
    rows = _pairs(config)
    sheet = blinded(rows, criterion=config.criterion, seed=config.seed)
    run.open()
    path = run.folder / f"pairs.{config.format}"
    if run.writes:
        data.write(rows, run.folder / "pairs.parquet")
        write_sheet(sheet, path)
    say(
        f"judge: {len(sheet)} pairs in {path}; fill in `better` with A, B or TIE, and leave blank what cannot be judged"
    )
    return run.finish(pairs=len(sheet))


def import_(config: Import) -> Run:
    """Check every label, then write the verdicts."""
    run = runs.start("judge", config, inputs=inputs)
    if run.done:
        return run
    if not (config.exported / "done.json").exists():
        raise ValueError(f"{config.exported}: no export there; give the --out folder of `pyrite judge export`")
    made = runs.read_json(config.exported / "config.json")
    rows = read(str(config.exported / "pairs.parquet")).rows
    verdicts = filled(config.file, rows, seed=made["seed"])
    run.open()
    table = [
        verdict_row(row, verdict, criterion=made["criterion_id"] or made["criterion"], model=config.annotator)
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    if run.writes:
        data.write(table, run.folder / "verdicts.parquet")
    return run.finish(**_counted(table))


def agreement(config: Agreement) -> Run:
    """Join the verdicts by pair and criterion, count, resample, write."""
    run = runs.start("judge", config, inputs=inputs)
    if run.done:
        return run
    judges = {name: opinions(str(path)) for name, path in inputs(config).items()}
    generator = seeds.generator(config.seed, "agreement")
    options: dict[str, Any] = {"n_boot": config.n_boot, "level": config.level, "generator": generator}
    found = {name: leaning(judged, **options) for name, judged in judges.items()}
    if "second" in judges:
        found["both"] = agreed(judges["first"], judges["second"], **options)
    run.open()
    for name, values in found.items():
        say(f"judge: {name}: {', '.join(f'{key} {_shown(value)}' for key, value in values.items())}")
    if run.writes:
        runs.write_json(run.folder / "agreement.json", found)
    return run.finish(**found)


# Pairs ----------------------------------------------------------------------------------------------------------------


def _asked(config: Ask) -> tuple[LanguageJudge, list[Row], tuple[list[str], list[str], list[str]]]:
    """The judge, the rows, and the texts that the judge is asked about."""
    rows = _pairs(config)
    ledger = str(config.ledger or config.out / "ledger.db")
    judge = LanguageJudge(config.model, config.criterion, config.criterion_id, config.judge, ledger)
    return judge, rows, ([request(row) for row in rows], [row["a"] for row in rows], [row["b"] for row in rows])


def _pairs(config: Ask | Export) -> list[Row]:
    """Rows {prompt_id, prompt, a, b, ...} with the other columns of the file."""
    compared = isinstance(config, Ask) and bool(config.answers or config.baseline)
    if bool(config.pairs) + bool(config.candidates) + compared != 1:
        raise ValueError(
            "judge: give either --pairs or --candidates"
            + (", or --answers with --baseline" if isinstance(config, Ask) else "")
        )
    if isinstance(config, Ask) and compared:
        return _compared(config)
    if config.pairs:
        rows = data.load(config.pairs, "pairs", columns=config.columns, note=say)
        sides = [{"a": row.pop("chosen"), "b": row.pop("rejected")} for row in rows]
        return [{**row, **side} for row, side in zip(rows, sides, strict=True)]
    rows = data.load(str(config.candidates), "candidates", columns=config.columns)
    left_out: Counter[str] = Counter()
    couples = pairing.sound(pairing.consecutive(rows), left_out)
    lost = f"{left_out.total()} with an answer cut, empty or twice the same left out{data.cut_hint(rows)}"
    if not couples:
        raise ValueError(f"{config.candidates}: no pair of different, finished answers to one prompt; {lost}")
    say(f"judge: {len(couples)} pairs; {lost}")
    return [_couple(a, b) for a, b in couples]


def _compared(config: Ask) -> list[Row]:
    """For every model and every prompt that both have answered: the baseline's answer (a) and the model's (b)."""
    if not (config.answers and config.baseline):
        raise ValueError("judge: --answers and --baseline belong together; give both")
    theirs, base = _answers(config.baseline, config.columns)
    rows: list[Row] = []
    seen = {theirs}
    for given in config.answers:
        name, mine = _answers(given, config.columns)
        if name in seen:
            raise ValueError(f"judge: two files of answers are called {name!r}; name them, as in --answers NAME=FILE")
        seen.add(name)
        common = [prompt for prompt in mine if prompt in base]
        if not common:
            raise ValueError(f"judge: {name} and {theirs} have answered no prompt in common, compared by their texts")
        alone = (
            f"{len(mine) - len(common)} prompts only {name} has answered and {len(base) - len(common)} only {theirs}"
        )
        say(f"judge: {name} against {theirs}: {len(common)} pairs; left out: {alone}")
        for prompt in common:
            a, b = base[prompt], mine[prompt]
            asked = {key: value for key, value in a.items() if key in ("prompt_id", "prompt", *data.CONDITIONED)}
            rows.append({**asked, "a": a["response"], "b": b["response"], "generator_1": theirs, "generator_2": name})
    return rows


def _answers(given: str, columns: str | None) -> tuple[str, dict[str, Row]]:
    """The name of a model, and its first answer to each prompt."""
    name, file = _split(given)
    rows = data.load(file, "answers", columns=columns, note=say)
    named = {str(row["generator"]) for row in rows if row.get("generator")}
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(plain(row["prompt"]), row)
    cut = sum(row.get("finished") is False for row in found.values())
    if len(found) < len(rows) or cut:
        more = len(rows) - len(found)
        say(
            f"judge: {file}: {more} further answers to a prompt left out; {cut} answers were cut, and are judged as cut"
        )
    return name or (named.pop() if len(named) == 1 else Path(file).stem), found


def _split(given: str) -> tuple[str, str]:
    """Name and file of NAME=FILE; no name if there is only a file."""
    name, sign, file = given.partition("=")
    return (name, file) if sign and name and file and not Path(given).exists() else ("", given)


def _comparisons(table: list[Row]) -> list[Row]:
    """The verdicts as `pyrite winrate` reads them."""
    return [
        {
            "prompt_id": row["prompt_id"],
            "model": row["generator_2"],
            "baseline": row["generator_1"],
            "win": None if row["p"] is None else 1 - row["p"],
            "output": row["b"],
            "baseline_output": row["a"],
        }
        for row in table
    ]


def _couple(a: Row, b: Row) -> Row:
    others = {name: value for name, value in a.items() if name not in ANSWER}
    return {**others, "a": a["response"], "b": b["response"], "sample_a": a["sample"], "sample_b": b["sample"]}


def _nothing(judge: LanguageJudge, keys: list[str], pairs: int) -> str:
    """The error if no pair got a verdict."""
    with Ledger(judge.ledger) as ledger:
        books = ledger.books(keys)
        last = next((row.error for row in reversed(ledger.find(keys).values()) if row.error), "nothing was asked")
    return (
        f"judge: none of {pairs} pairs got a verdict: {books.failed} questions had no answer, {books.no_verdict} an "
        f"answer without one; the last one because: {last}; check the address, the model, --reply and --max-tokens. "
        f"The answers are in {judge.ledger}"
    )


def _books(path: str, keys: list[str]) -> Books:
    with Ledger(path) as ledger:
        return ledger.books(keys)


def _counted(table: list[Row]) -> dict[str, int]:
    seen = Counter(row["preference"] for row in table)
    return {"pairs": len(table), "first": seen[1], "second": seen[2], "ties": seen[0], "no_verdict": seen[None]}


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return (
        "not known"
        if value["value"] is None
        else f"{value['value']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}] of {value['n']}"
    )


# Sheets for people ----------------------------------------------------------------------------------------------------


COLUMNS: tuple[str, ...] = ("pair_id", "criterion", "request", "answer_A", "answer_B", "better")
LABELS: dict[str, Label] = {"A": "A", "B": "B", "TIE": "TIE", "T": "TIE", "1": "A", "2": "B", "0": "TIE"}


def blinded(rows: Sequence[Row], *, criterion: str, seed: int) -> list[Row]:
    """The sheet of rows {prompt, a, b}. Which answer is A, and the order of the pairs, are drawn by the seed.

    The sheet shows nothing else of the rows. Raises DataError if a pair is there twice.
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
    """Write the sheet to be filled in, as .csv (with a mark by which spreadsheets recognize UTF-8) or .jsonl."""
    if path.suffix == ".jsonl":
        runs.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sheet))
        return
    written = io.StringIO()
    writer = csv.DictWriter(written, [*COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(sheet)
    runs.write_text(path, "\ufeff" + written.getvalue())


def filled(path: str | Path, rows: Sequence[Row], *, seed: int) -> list[Verdict]:
    """The verdicts of a filled sheet on the rows {prompt, a, b} that it was made of; a blank row has none.

    Rows are found by their ids, so they may be in any order, and their texts are not read. Raises DataError, naming the
    file and the row, for an unknown or repeated id, or a label other than A, B, TIE.
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


def _read(path: str) -> Source:
    """The rows of a sheet. Rows of CSV are counted as a spreadsheet counts them."""
    source = read(path)
    missing = [name for name in ("pair_id", "better") if name not in source.rows[0]]
    if missing:
        raise DataError(f"{path}: no column {' and no column '.join(missing)}; give a sheet of `pyrite judge export`")
    return replace(source, unit="row", numbers=range(2, len(source.rows) + 2)) if path.endswith(".csv") else source


# Agreement ------------------------------------------------------------------------------------------------------------


# Axes: Q prompts, B resamples. Pairs of one prompt are not independent, so prompts are resampled whole.

NEEDED = ("prompt", "a", "b", "preference")


Statistic = dict[str, Any]  # value, lo and hi over prompts (None if unknown), and n, the verdicts it rests on


class Opinion(NamedTuple):
    """A verdict: the prompt; the pair and the criterion; the preference, 1 for the answer whose text sorts first, 2 for
    the other one, 0 for a tie; and P(a beats b) in each order in which the answers were shown."""

    prompt: str
    pair: tuple[str, str]
    preference: int | None
    p_ab: float | None
    p_ba: float | None


def opinions(path: str) -> list[Opinion]:
    """The verdicts of a file as `pyrite judge` writes it. Raises DataError, naming file and row."""
    source = read(path)
    found = [_opinion(row, source, i) for i, row in enumerate(source.rows)]
    seen: dict[tuple[str, str], int] = {}
    for i, one in enumerate(found):
        if seen.setdefault(one.pair, i) != i:
            first = source.at(seen[one.pair])
            raise DataError(f"{source.at(i)}: the pair has a verdict already, in {first}; give one judge's file")
    return found


def agreed(
    first: Sequence[Opinion], second: Sequence[Opinion], *, n_boot: int, level: float, generator: torch.Generator
) -> dict[str, Any]:
    """How far two judges agree on the pairs that both have judged. Pairs are joined by their texts and criterion.

    agreement: share of equal verdicts among A, B and tie. kappa: (agreement − chance) / (1 − chance), chance = Σ_c
    p₁(c) p₂(c) of their own shares (Cohen 1960); None if chance is 1. decided: agreement on pairs on which neither sees
    a tie. Raises ValueError if no pair has both verdicts.
    """
    theirs = {one.pair: one for one in second}
    both = [(one, theirs[one.pair]) for one in first if one.pair in theirs]
    judged = [(mine, other) for mine, other in both if mine.preference is not None and other.preference is not None]
    if not judged:
        common = f"{len(both)} of {len(first)} and {len(second)} pairs are the same texts by the same criterion"
        raise ValueError(f"no pair has a verdict of both judges: {common}")
    table = torch.zeros(len(judged), 3, 3, dtype=torch.float64)
    for i, (mine, other) in enumerate(judged):
        table[i, mine.preference or 0, other.preference or 0] = 1
    boot = _resampled([mine.prompt for mine, _ in judged], n_boot, level, generator)
    return {
        "pairs": len(judged),
        "only_first": len(first) - len(both),
        "only_second": len(second) - len(both),
        "without_a_verdict": len(both) - len(judged),
        "agreement": boot(table, _equal, len(judged)),
        "kappa": boot(table, kappa, len(judged)),
        "decided": boot(table[:, 1:, 1:], _equal, int(table[:, 1:, 1:].sum())),
        "confusion": table.sum(0).int().tolist(),
    }


def kappa(table: Tensor) -> Tensor:
    """Cohen's kappa of confusion tables, (..., C, C) counts -> (...).

    >>> round(kappa(torch.tensor([[20.0, 5.0], [10.0, 15.0]])).item(), 6)
    0.4
    """
    share = table / table.sum((-2, -1), keepdim=True)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    return (_equal(table) - chance) / (1 - chance)


def _equal(table: Tensor) -> Tensor:
    """Share of equal verdicts."""
    return table.diagonal(dim1=-2, dim2=-1).sum(-1) / table.sum((-2, -1))


def leaning(judged: Sequence[Opinion], *, n_boot: int, level: float, generator: torch.Generator) -> dict[str, Any]:
    """How one judge is biased.

    first_shown: share of verdicts for the answer shown first, without ties; ½ without position bias. consistency: share
    of pairs, asked in both orders, with the same verdict in both. ties and no_verdict: shares of pairs.
    """
    boot = _resampled([one.prompt for one in judged], n_boot, level, generator)
    rows = torch.tensor([_counts(one) for one in judged], dtype=torch.float64)

    def share(part: int, whole: int) -> Statistic:
        return boot(rows, lambda t: t[..., part] / t[..., whole], int(rows[:, whole].sum()))

    return {
        "pairs": len(judged),
        "first_shown": share(0, 1),
        "consistency": share(2, 3),
        "ties": share(4, 5),
        "no_verdict": share(6, 7),
    }


def _resampled(
    prompts: Sequence[str], n_boot: int, level: float, generator: torch.Generator
) -> Callable[[Tensor, Callable[[Tensor], Tensor], int], Statistic]:
    """A function (rows (N, ...), statistic, n): a statistic of the sum over pairs, with its interval over prompts."""
    names = {name: i for i, name in enumerate(dict.fromkeys(prompts))}
    of = torch.tensor([names[prompt] for prompt in prompts], dtype=torch.long)
    counts = torch.cat([*statistics.resamples(len(names), n_boot=n_boot, generator=generator)])

    def found(rows: Tensor, statistic: Callable[[Tensor], Tensor], n: int) -> Statistic:
        flat = rows.flatten(1)
        sums = torch.zeros(counts.shape[1], flat.shape[1], dtype=flat.dtype).index_add_(0, of, flat)
        boot = statistic((counts @ sums).unflatten(1, rows.shape[1:]))
        values = (one.item() for one in winrates.interval(statistic(rows.sum(0)), boot, level=level))
        return dict(zip(("value", "lo", "hi"), (None if x != x else x for x in values), strict=True)) | {"n": n}

    return found


def _counts(one: Opinion) -> tuple[float, ...]:
    """(first shown won, decided), (same in both orders, asked in both), (tie, verdict), (none, pair)."""
    wins = [one.p_ab] if one.p_ab is not None else []
    wins += [1 - one.p_ba] if one.p_ba is not None else []
    decided = [p for p in wins if p != 0.5]
    both = one.p_ab is not None and one.p_ba is not None
    same = both and _side(one.p_ab) == _side(one.p_ba)
    verdict = one.preference is not None
    leaning = (sum(p > 0.5 for p in decided), len(decided), float(same), float(both))
    return (*leaning, float(one.preference == 0), float(verdict), float(not verdict), 1.0)


def _side(p: float | None) -> int:
    return 0 if p is None or p == 0.5 else 1 if p > 0.5 else -1


def _opinion(row: Row, source: Source, i: int) -> Opinion:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        raise DataError(f"{source.at(i)}: verdicts need {', '.join(NEEDED)}; missing {', '.join(missing)}")
    preference = row["preference"]
    if preference not in (0, 1, 2, None):
        raise DataError(f"{source.at(i)}: preference is {preference!r:.40}; it must be 1, 2, 0 for a tie, or null")
    if row["a"] > row["b"] and preference:
        preference = 3 - preference
    named = pair_id(row["prompt"], row["a"], row["b"])
    place = (named, str(row.get("criterion") or ""))
    return Opinion(
        str(row.get("prompt_id") or prompt_id(row["prompt"])), place, preference, row.get("p_ab"), row.get("p_ba")
    )
