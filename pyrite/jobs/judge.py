"""Judging: pairs of answers put to a language model or to people, and how far two judges agree.

`pyrite judge ask|export|import|agreement`. Every answer of a model is in the ledger, with its text, tokens and cost, as
soon as it is there, so an interrupted run goes on where it stopped, and a second run costs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite.core import runs
from pyrite.core.processes import progress, say, world
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data.files import Row, read
from pyrite.data.text import plain
from pyrite.feedback import pairing
from pyrite.feedback.judges import agreement as agreeing
from pyrite.feedback.judges import people
from pyrite.feedback.judges.llm import JudgeOptions, LanguageJudge, by_characters, by_tokenizer
from pyrite.feedback.judges.questions import Shown, request, verdict_row
from pyrite.feedback.ledger import Books, Ledger, Question
from pyrite.math import seeds
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
    """The judge, by the name its server knows."""
    criterion: str
    """What makes an answer better, in a sentence."""
    out: Path
    """Folder of the run, new or empty."""
    pairs: str | None = None
    """Pairs to judge, a = chosen and b = rejected; rename others: --columns chosen=a,rejected=b."""
    candidates: str | None = None
    """Instead: candidates, whose answers 0 and 1, 2 and 3, ... to a prompt are paired."""
    columns: str | None = None
    """Names of the columns where they differ, as ours=theirs: "prompt=question,response=answer"."""
    criterion_id: str | None = None
    """Name of the criterion in ledger and table; the sentence by default."""
    ledger: Path | None = None
    """SQLite file of the answers, which runs may share; ledger.db in the run's folder by default."""
    estimate: bool = False
    """Say what it would cost, by the prompts as they would be sent, and ask nobody."""
    tokenizer: str | None = None
    """Tokenizer that counts for --estimate, a folder or a Hub name; without one, characters / 4."""
    answers: tuple[str, ...] = ()
    """Instead: answers of models that are compared with --baseline, a file each, as FILE or NAME=FILE."""
    baseline: str | None = None
    """The answers that those of --answers are compared with, as FILE or NAME=FILE."""
    judge: JudgeOptions = JudgeOptions()


@dataclass(frozen=True)
class Export:
    """Write pairs to a file for a person to label, blinded: in an order, and with sides, drawn by the seed."""

    criterion: str
    """What makes an answer better, in a sentence; it stands beside each pair."""
    out: Path
    """Folder of the run, new or empty."""
    pairs: str | None = None
    """Pairs, a = chosen and b = rejected; rename others: --columns chosen=a,rejected=b."""
    candidates: str | None = None
    """Instead: candidates, whose answers 0 and 1, 2 and 3, ... to a prompt are paired."""
    columns: str | None = None
    """Names of the columns where they differ, as ours=theirs: "prompt=question,response=answer"."""
    criterion_id: str | None = None
    """Name of the criterion in the table of verdicts; the sentence by default."""
    format: Literal["csv", "jsonl"] = "csv"
    """Of the file for the person who labels."""
    seed: Natural = 0
    """Of everything that is drawn at random."""


@dataclass(frozen=True)
class Import:
    """Take in the labels of a filled file, by the ids of its pairs: A, B, TIE, or nothing for no verdict."""

    file: str
    """The filled file: columns pair_id and better."""
    exported: Path
    """Folder of the export that the file comes from."""
    out: Path
    """Folder of the run, new or empty."""
    annotator: str = "human"
    """Who labelled."""


@dataclass(frozen=True)
class Agreement:
    """How far two files of verdicts agree, and how each of the judges leans."""

    first: str
    """verdicts.parquet of a judge."""
    out: Path
    """Folder of the run, new or empty."""
    second: str | None = None
    """verdicts.parquet of another judge, or of people; without one, how the first judge leans."""
    n_boot: Count = 1000
    """Resamples of prompts for the intervals."""
    level: Inside = 0.95
    """Of the intervals: 0.95 covers the truth in 95 of 100 repetitions."""
    seed: Natural = 0
    """Of everything that is drawn at random."""


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
    """Ask what the ledger does not hold, then write the verdicts.

    The folder gets its config only then: until it is done, the ledger is all there is to resume, and the pace, the
    price or the limit may be others in the next attempt.
    """
    if config.estimate:
        judge, _, texts = _asked(config)
        results = _estimated(judge, judge.questions(*texts), config.tokenizer)
        return Run(config.out, runs.plain_config(config), {}, results)
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
    """Write the pairs as a person gets them, and what they were made of."""
    run = runs.start("judge", config, inputs=inputs)
    if run.done:
        return run
    rows = _pairs(config)
    sheet = people.blinded(rows, criterion=config.criterion, seed=config.seed)
    run.open()
    path = run.folder / f"pairs.{config.format}"
    if run.writes:
        data.write(rows, run.folder / "pairs.parquet")
        people.write_sheet(sheet, path)
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
    verdicts = people.filled(config.file, rows, seed=made["seed"])
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
    judges = {name: agreeing.opinions(str(path)) for name, path in inputs(config).items()}
    generator = seeds.generator(config.seed, "agreement")
    options: dict[str, Any] = {"n_boot": config.n_boot, "level": config.level, "generator": generator}
    found = {name: agreeing.leaning(judged, **options) for name, judged in judges.items()}
    if "second" in judges:
        found["both"] = agreeing.agreement(judges["first"], judges["second"], **options)
    run.open()
    for name, values in found.items():
        say(f"judge: {name}: {', '.join(f'{key} {_shown(value)}' for key, value in values.items())}")
    whole = {name: {key: _plain(value) for key, value in values.items()} for name, values in found.items()}
    if run.writes:
        runs.write_json(run.folder / "agreement.json", whole)
    return run.finish(**whole)


def _asked(config: Ask) -> tuple[LanguageJudge, list[Row], tuple[list[str], list[str], list[str]]]:
    """The judge, the rows, and the texts it is asked about."""
    rows = _pairs(config)
    ledger = str(config.ledger or config.out / "ledger.db")
    judge = LanguageJudge(config.model, config.criterion, config.criterion_id, config.judge, ledger)
    return judge, rows, ([request(row) for row in rows], [row["a"] for row in rows], [row["b"] for row in rows])


def _pairs(config: Ask | Export) -> list[Row]:
    """Rows {prompt_id, prompt, a, b, ...}, and what else the file has."""
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
    by_prompt: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(row["prompt_id"], []).append(i)
    couples = [(rows[i], rows[j]) for i, j in pairing.paired(list(by_prompt.values()), "consecutive")]
    sound = [couple for couple in couples if _sound(*couple)]
    hint = data.cut_hint(rows)
    lost = f"{len(couples) - len(sound)} with an answer cut, empty or twice the same left out{hint}"
    if not sound:
        raise ValueError(f"{config.candidates}: no pair of different, finished answers to one prompt; {lost}")
    say(f"judge: {len(sound)} pairs; {lost}")
    return [_couple(a, b) for a, b in sound]


def _compared(config: Ask) -> list[Row]:
    """The baseline's answer (a) and a model's (b) to every prompt that both have answered, model by model."""
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
    """Name and file of NAME=FILE; no name where there is only a file."""
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


def _sound(a: Row, b: Row) -> bool:
    return bool(a["finished"] and b["finished"] and a["response"] and b["response"] and a["response"] != b["response"])


def _couple(a: Row, b: Row) -> Row:
    others = {name: value for name, value in a.items() if name not in ANSWER}
    return {**others, "a": a["response"], "b": b["response"], "sample_a": a["sample"], "sample_b": b["sample"]}


def _nothing(judge: LanguageJudge, keys: list[str], pairs: int) -> str:
    """What went wrong where no pair got a verdict."""
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


def _estimated(judge: LanguageJudge, asked: list[dict[Shown, Question]], tokenizer: str | None) -> dict[str, Any]:
    found = judge.estimate(asked, by_tokenizer(tokenizer) if tokenizer else by_characters)
    counted = f"counted by {tokenizer}" if tokenizer else "taken as characters / 4; --tokenizer counts them"
    say(f"judge: {found.questions} questions in {found.requests} requests, {found.answered} answered in the ledger")
    say(f"  {found.tokens_in} tokens to read, {counted}; at most {found.tokens_out} to write; cost {found.cost:.6g}")
    return found._asdict()


def _counted(table: list[Row]) -> dict[str, int]:
    seen = Counter(row["preference"] for row in table)
    return {"pairs": len(table), "first": seen[1], "second": seen[2], "ties": seen[0], "no_verdict": seen[None]}


def _shown(value: Any) -> str:
    if not isinstance(value, agreeing.Measured):
        return str(value)
    return f"{value.value:.3f} [{value.lo:.3f}, {value.hi:.3f}] of {value.n}"


def _plain(value: Any) -> Any:
    if not isinstance(value, agreeing.Measured):
        return value
    return {name: None if number != number else number for name, number in value._asdict().items()}
