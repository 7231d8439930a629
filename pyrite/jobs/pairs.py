"""Pairs along preferences: which of two answers is better by one option, judged or known from how they were asked for.

prompts are split first, by asked_id; then, for every option and each answer under it (positive), under another option
of its dimension (negative) or under none (neutral), their other preferences being equal:
    labelled               two positives, by what the judge makes of the option's criterion or gold
    positive_vs_neutral    positive_vs_negative    neutral_vs_negative    known, no judge is asked
A pair's prompt is the raw one with that one option. With --general there is one criterion and no option: pairs of two
neutral answers under the raw prompt, for plain RLHF. The judge always reads the raw prompt.

No label is invented: a cut or empty answer, equal answers, a pair that is there already, a tie and a judge without a
verdict make no pair, and each is counted. The chosen answers of judged pairs are demonstrations for supervised
fine-tuning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite.core import runs, specs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.conditioning import Dimensions, Option, Turn, conditioned, files, filled
from pyrite.feedback import judges, pairing
from pyrite.math import seeds
from pyrite.math.ranges import Fraction, Natural, Some

OUTPUTS = {
    "pairs.parquet": "training pairs: prompt, asked, preferences, kind, chosen, rejected; strength where judged",
    "held_out.parquet": "pairs of held-out prompts",
    "demos.parquet": "the chosen answers of judged training pairs",
}
PairKind = Literal["labelled", "positive_vs_neutral", "positive_vs_negative", "neutral_vs_negative"]
Candidate = dict[str, Any]
KINDS: tuple[PairKind, ...] = ("labelled", "positive_vs_neutral", "positive_vs_negative", "neutral_vs_negative")
JUDGED = ("labelled", "general")
REASONS = ("cut", "equal", "empty", "duplicate", "no_verdict", "tie")


@dataclass(frozen=True)
class Config:
    """Make preference pairs for each option of preference dimensions, or general ones."""

    candidates: str
    """Candidates as `pyrite generate` writes them."""
    out: Path
    """Folder of the run, new or empty."""
    dimensions: str | None = None
    """Preference dimensions: a YAML file, or the shipped soups."""
    options: tuple[str, ...] = ()
    """The options to make pairs for; by default all that were not added later."""
    kinds: Some[PairKind] = KINDS
    """Which pairs are made: judged ones, and those whose better answer is known from what was asked for. Two equal
    answers make no pair; they are counted."""
    judge: str = "bradley_terry(gold={gold}, hard=True)"
    """Who labels: a judge; {criterion}, {gold}, {sentence} and {id} stand for the option's own."""
    general: str | None = None
    """In place of dimensions: what is better in general, the gold, or criterion, that the judge is given."""
    preference_turn: Turn = "user"
    """Where the option stands in a pair's prompt: at the end of the last user turn, or in the system turn."""
    held_out: Fraction = 0.1
    """Share of the raw prompts whose pairs are kept for measuring accuracy."""
    ties: Literal["drop", "keep"] = "drop"
    """Two answers that are equally good: left out, or kept with strength 0, which says that either may be chosen.
    Losses that read strengths, such as soft_dpo, learn a probability of one half; for the others they are left out."""
    seed: Natural = 0
    """Of everything that is drawn at random."""


@dataclass(frozen=True)
class OptionTask:
    """The pairs of one option, or general ones: their kinds, who judges them, and which other options exclude it."""

    option: Option
    options: tuple[Option, ...]
    """Those in the prompt of a pair: the option, or none."""
    kinds: Sequence[str]
    judge: judges.Judge | None
    others: frozenset[str] = frozenset()

    @property
    def id(self) -> str | None:
        """The preference that positive answers were asked for."""
        return self.option.id if self.options else None


@dataclass(frozen=True)
class Comparison:
    """Two answers to one raw prompt; of a kind that nobody judges, `a` is the better one."""

    kind: str
    a: Candidate
    b: Candidate

    @property
    def judged(self) -> bool:
        return self.kind in JUDGED


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads, files of the options' golds among it."""
    return {"candidates": config.candidates, **(files(config.dimensions) if config.dimensions else {})}


def run(config: Config) -> Run:
    """Split, couple, judge, store."""
    run = runs.start("pairs", config, inputs=inputs)
    if run.done:
        return run
    tasks = _tasks(config)
    rows = _rows(config)
    train, _ = data.split(rows, fraction=config.held_out, seed=seeds.derive(config.seed, "held out"))
    left_out: Counter[str] = Counter()
    hint = data.cut_hint(rows)
    couples = [_sound(_couples(rows, task, config), left_out) for task in tasks]
    run.open()
    learned = {row["asked_id"] for row in train}
    sides: tuple[list[Candidate], list[Candidate]] = ([], [])
    for task, some in zip(tasks, couples, strict=True):
        pairs = _pairs(some, _verdicts(run, some, task), task, config, left_out)
        if not any(pair["asked_id"] in learned for pair in pairs):
            counted = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
            run.refuse(f"{config.candidates}: no pair to train on for {task.option.id} (left out: {counted}){hint}")
        for pair in pairs:
            sides[pair["asked_id"] not in learned].append(pair)
    return run.finish(**_written(run, *sides, tasks, left_out, hint))


# What is wanted ---------------------------------------------------------------------------------------------------


def _tasks(config: Config) -> list[OptionTask]:
    """Options with their judges, ready; whatever the options alone show to be impossible is refused."""
    if bool(config.dimensions) == bool(config.general):
        raise ValueError("pairs needs --dimensions, a YAML file or soups, or --general; and not both")
    if config.general:
        if config.options:
            raise ValueError("--options are of --dimensions; --general has none")
        option = Option("general", "", "", config.general, config.general)
        return [OptionTask(option, (), ("general",), specs.part(filled(config.judge, option), judges))]
    known = Dimensions.load(str(config.dimensions))
    wanted = [known.option(id) for id in dict.fromkeys(config.options)] or [o for o in known.options if not o.later]
    judged = "labelled" in config.kinds
    return [
        OptionTask(
            option,
            (option,),
            [kind for kind in KINDS if kind in config.kinds],
            specs.part(filled(config.judge, option), judges) if judged else None,
            frozenset(other.id for other in known.opposites(option.id)),
        )
        for option in wanted
    ]


def _rows(config: Config) -> list[Candidate]:
    """The candidates; one without preferences is neutral. Raises ValueError for preferences that are not among the
    dimensions'."""
    plain = data.load(config.candidates, "candidates")
    rows = [{"asked": row["prompt"], "asked_id": row["prompt_id"], "preferences": [], **row} for row in plain]
    if config.dimensions:
        known = Dimensions.load(config.dimensions)
        try:
            for ids in {tuple(row["preferences"]) for row in rows}:
                known.chosen(ids)
        except ValueError as error:
            raise ValueError(f"{config.candidates}: {error}") from error
    return rows


# Couples ----------------------------------------------------------------------------------------------------------


def _couples(rows: Sequence[Candidate], task: OptionTask, config: Config) -> list[Comparison]:
    """Answers set against each other, kind by kind. Raises ValueError for a kind of which there is none."""
    groups: dict[Any, dict[str | None, list[Candidate]]] = {}
    for row in rows:
        own = next((id for id in row["preferences"] if id == task.id or id in task.others), None)
        rest = tuple(id for id in row["preferences"] if id != own)
        if task.id or not rest:
            groups.setdefault((row["asked_id"], rest), {}).setdefault(own, []).append(row)
    found: list[Comparison] = []
    for kind in task.kinds:
        new = [Comparison(kind, a, b) for group in groups.values() for a, b in _set_against(kind, group, task)]
        if not new:
            raise ValueError(
                f"{config.candidates}: no two answers for {kind} of {task.option.id}; generate answers under its "
                "preferences (positive, neutral and negative ones as the kind says), or leave it out of --kinds"
            )
        found += new
    return found


def _set_against(
    kind: str, group: dict[str | None, list[Candidate]], task: OptionTask
) -> Iterator[tuple[Candidate, Candidate]]:
    """Couples among the answers of one raw prompt, by what they were asked for in the option's dimension."""
    positive, neutral = group.get(task.id, []), group.get(None, [])
    if kind in JUDGED:
        yield from zip(positive[::2], positive[1::2], strict=False)
    elif kind == "positive_vs_neutral":
        yield from zip(positive, neutral, strict=False)
    else:
        better = positive if kind == "positive_vs_negative" else neutral
        for id in sorted(task.others):
            yield from zip(better, group.get(id, []), strict=False)


def _sound(couples: Iterable[Comparison], left_out: Counter[str]) -> list[Comparison]:
    """Those of one option that can carry a preference; the others are counted by reason."""
    seen, kept = set(), []
    for couple in couples:
        key = (couple.a["asked_id"], frozenset((couple.a["response"], couple.b["response"])))
        if reason := pairing.why_not(couple.a, couple.b):
            left_out[reason] += 1
        elif key in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(key)
            kept.append(couple)
    return kept


# Pairs ------------------------------------------------------------------------------------------------------------


def _verdicts(run: Run, couples: Sequence[Comparison], task: OptionTask) -> list[float]:
    """P(a beats b) of each couple, NaN without a verdict: from the judge, in parts that survive an interruption, or 1
    where it is known."""
    asked = [couple for couple in couples if couple.judged]
    judge, name = task.judge, f"the judge of {task.option.id}"
    if judge is None or not asked:
        return [1.0] * len(couples)
    prompts, sides = [text.plain(couple.a["asked"]) for couple in asked], [(couple.a, couple.b) for couple in asked]
    folder, title = run.folder / "parts" / task.option.id, f"judge {task.option.id}"
    verdicts = iter(pairing.judged(folder, judge, prompts, sides, name=name, title=title))
    return [next(verdicts) if couple.judged else 1.0 for couple in couples]


def _pairs(
    couples: Sequence[Comparison], verdicts: Sequence[float], task: OptionTask, config: Config, left_out: Counter[str]
) -> list[Candidate]:
    """The rows of pairs; no verdict makes no pair, nor does a tie unless it is kept, with strength 0."""
    pairs = []
    for couple, p in zip(couples, verdicts, strict=True):
        if p != p:  # NaN differs from itself
            left_out["no_verdict"] += 1
        elif p == 0.5 and config.ties == "drop":
            left_out["tie"] += 1
        else:
            better, worse = (couple.a, couple.b) if p >= 0.5 else (couple.b, couple.a)
            raw = {"prompt_id": couple.a["asked_id"], "prompt": couple.a["asked"]}
            answers = {"chosen": better["response"], "rejected": worse["response"]}
            strength = {"strength": pairing.log_odds([p]).abs().item()} if couple.judged else {}
            made = conditioned(raw, task.options, turn=config.preference_turn)
            pairs.append({**made, "kind": couple.kind, **answers, **strength})
    return pairs


def _written(
    run: Run,
    train: list[Candidate],
    held: list[Candidate],
    tasks: Sequence[OptionTask],
    left_out: Counter[str],
    hint: str,
) -> dict[str, Any]:
    """Store everything; what there is of each option, and what is not."""
    demos = _demos(train)
    if run.writes:
        for name, rows in (("pairs", train), ("held_out", held), ("demos", demos)):
            if rows:
                data.write(rows, run.folder / f"{name}.parquet")
    counted = ", ".join(f"{left_out[reason]} {reason}" for reason in REASONS if left_out[reason]) or "none"
    say(f"pairs: {len(train)} pairs, {len(held)} held out, {len(demos)} demonstrations; left out: {counted}{hint}")
    by_option = {task.option.id: _counts(train, held, task) for task in tasks}
    counts = {"pairs": len(train), "held_out": len(held), "demos": len(demos), "options": by_option}
    return counts | {f"left_out_{reason}": left_out[reason] for reason in REASONS}


def _counts(train: Sequence[Candidate], held: Sequence[Candidate], task: OptionTask) -> dict[str, int]:
    mine = [option.id for option in task.options]
    kinds = Counter(pair["kind"] for pair in train if pair["preferences"] == mine)
    return {**{kind: kinds[kind] for kind in task.kinds}, "held_out": sum(p["preferences"] == mine for p in held)}


def _demos(pairs: Sequence[Candidate]) -> list[Candidate]:
    """The chosen answers of judged pairs, each once; of a tie, neither was chosen."""
    names = ("prompt_id", "prompt", *data.CONDITIONED)
    judged = [pair for pair in pairs if pair["kind"] in JUDGED and pair["strength"]]
    rows = {(pair["prompt_id"], pair["chosen"]): pair for pair in judged}
    return [{name: pair[name] for name in names} | {"response": pair["chosen"]} for pair in rows.values()]
