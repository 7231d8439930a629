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

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite.core import runs, specs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.conditioning import Dimensions, Option, Turn, conditioned, files, filled
from pyrite.data.files import Row
from pyrite.feedback import judges, pairing
from pyrite.feedback.pairing import Judge, Rows, Ties
from pyrite.math import seeds
from pyrite.math.ranges import Fraction, Natural, Some

OUTPUTS = {
    "pairs.parquet": "training pairs: prompt, asked, preferences, kind, chosen, rejected; strength where judged",
    "held_out.parquet": "pairs of held-out prompts",
    "demos.parquet": "the chosen answers of judged training pairs",
}
PairKind = Literal["labelled", "positive_vs_neutral", "positive_vs_negative", "neutral_vs_negative"]
KINDS: tuple[PairKind, ...] = ("labelled", "positive_vs_neutral", "positive_vs_negative", "neutral_vs_negative")
JUDGED = ("labelled", "general")
REASONS = ("cut", "equal", "empty", "duplicate", "no_verdict", "tie")


@dataclass(frozen=True)
class Config:
    """Make preference pairs for each option of preference dimensions, or general ones."""

    candidates: str
    """Rows as `pyrite generate` writes them."""
    out: Path
    """Folder of the run, new or empty."""
    dimensions: str | None = None
    """Preference dimensions: a YAML file, or the built-in soups."""
    options: tuple[str, ...] = ()
    """Options to make pairs for; by default all except those added later."""
    kinds: Some[PairKind] = KINDS
    """Which pairs are made: judged ones, and those whose better answer is known from what was asked for. Two equal
    answers make no pair; they are counted."""
    judge: str = "bradley_terry(gold={gold}, hard=True)"
    """The judge that labels; {criterion}, {gold}, {sentence} and {id} are replaced by those of the option."""
    general: str | None = None
    """What is better in general, in place of dimensions: the gold or the criterion that the judge is given."""
    preference_turn: Turn = "user"
    """Where to write the option in a pair's prompt: at the end of the last user turn, or in the system turn."""
    held_out: Fraction = 0.1
    """Share of the raw prompts whose pairs are held out for measuring accuracy."""
    ties: Ties = "drop"
    """What to do with two equally good answers: leave the pair out, or keep it with strength 0.
    Losses that read strengths, such as soft_dpo, learn a probability of one half; for the others they are left out."""
    seed: Natural = 0
    """Random seed."""


@dataclass(frozen=True)
class OptionTask:
    """The pairs to make for one option, or in general: their kinds, their judge, the options that exclude this one."""

    option: Option
    options: tuple[Option, ...]
    """Those in the prompt of a pair: the option, or none."""
    kinds: Sequence[str]
    judge: Judge | None
    others: frozenset[str] = frozenset()

    @property
    def id(self) -> str | None:
        """The preference that positive answers were asked for."""
        return self.option.id if self.options else None


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads, including files of yours that the options' golds name."""
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
    couples = [_couples(rows, task, config, left_out) for task in tasks]
    run.open()
    learned = {row["asked_id"] for row in train}
    sides: tuple[list[Row], list[Row]] = ([], [])
    for task, some in zip(tasks, couples, strict=True):
        pairs = [pair for kind in some for pair in _pairs(run, kind, some[kind], task, config, left_out)]
        if not any(pair["asked_id"] in learned for pair in pairs):
            lost = pairing.counted(left_out)
            run.refuse(f"{config.candidates}: no pair to train on for {task.option.id} (left out: {lost}){hint}")
        for pair in pairs:
            sides[pair["asked_id"] not in learned].append(pair)
    return run.finish(**_written(run, *sides, tasks, left_out, hint))


# What is wanted ---------------------------------------------------------------------------------------------------


def _tasks(config: Config) -> list[OptionTask]:
    """The options with their judges. What the options alone show to be impossible is refused here."""
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


def _rows(config: Config) -> list[Row]:
    """The candidates; one without preferences is neutral. Raises ValueError for preferences of no dimension."""
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


def _couples(rows: Sequence[Row], task: OptionTask, config: Config, left_out: Counter[str]) -> dict[str, list[Rows]]:
    """Answers set against each other, kind by kind; of a kind that nobody judges, the first is the better one.

    Those that cannot carry a preference, or are there already, are counted by reason. Raises ValueError for a kind of
    which there is none.
    """
    groups: dict[Any, dict[str | None, list[Row]]] = {}
    for row in rows:
        own = next((id for id in row["preferences"] if id == task.id or id in task.others), None)
        rest = tuple(id for id in row["preferences"] if id != own)
        if task.id or not rest:
            groups.setdefault((row["asked_id"], rest), {}).setdefault(own, []).append(row)
    found: dict[str, list[Rows]] = {}
    seen = set()
    for kind in task.kinds:
        every = [couple for group in groups.values() for couple in _set_against(kind, group, task)]
        if not every:
            raise ValueError(
                f"{config.candidates}: no two answers for {kind} of {task.option.id}; generate answers under its "
                "preferences (positive, neutral and negative ones as the kind says), or leave it out of --kinds"
            )
        found[kind] = []
        for a, b in pairing.sound(every, left_out):
            key = (a["asked_id"], frozenset((a["response"], b["response"])))
            if key in seen:
                left_out["duplicate"] += 1
            else:
                seen.add(key)
                found[kind].append((a, b))
    return found


def _set_against(kind: str, group: dict[str | None, list[Row]], task: OptionTask) -> Iterator[Rows]:
    """The couples of one kind among the answers to one raw prompt."""
    positive, neutral = group.get(task.id, []), group.get(None, [])
    if kind in JUDGED:
        yield from zip(positive[::2], positive[1::2], strict=False)
    elif kind == "positive_vs_neutral":
        yield from zip(positive, neutral, strict=False)
    else:
        better = positive if kind == "positive_vs_negative" else neutral
        for id in sorted(task.others):
            yield from zip(better, group.get(id, []), strict=False)


# Pairs ------------------------------------------------------------------------------------------------------------


def _pairs(
    run: Run, kind: str, couples: Sequence[Rows], task: OptionTask, config: Config, left_out: Counter[str]
) -> Iterator[Row]:
    """The rows of pairs of one kind: judged, or known from what was asked for."""
    strengths = [math.inf] * len(couples)
    if kind in JUDGED and task.judge and couples:
        prompts, folder = [text.plain(a["asked"]) for a, _ in couples], run.folder / "parts" / task.option.id
        about = {"name": f"the judge of {task.option.id}", "title": f"judge {task.option.id}"}
        strengths = pairing.log_odds(pairing.judged(folder, task.judge, prompts, couples, **about))
    for chosen, rejected, strength in pairing.preferred(couples, strengths, left_out, ties=config.ties):
        raw = {"prompt_id": chosen["asked_id"], "prompt": chosen["asked"]}
        made = conditioned(raw, task.options, turn=config.preference_turn)
        answers = {"kind": kind, "chosen": chosen["response"], "rejected": rejected["response"]}
        yield {**made, **answers} | ({"strength": strength} if kind in JUDGED else {})


def _written(
    run: Run,
    train: list[Row],
    held: list[Row],
    tasks: Sequence[OptionTask],
    left_out: Counter[str],
    hint: str,
) -> dict[str, Any]:
    """Write everything, and count what there is of each option and what was left out."""
    demos = _demos(train)
    if run.writes:
        for name, rows in (("pairs", train), ("held_out", held), ("demos", demos)):
            if rows:
                data.write(rows, run.folder / f"{name}.parquet")
    lost = pairing.counted(left_out)
    say(f"pairs: {len(train)} pairs, {len(held)} held out, {len(demos)} demonstrations; left out: {lost}{hint}")
    by_option = {task.option.id: _counts(train, held, task) for task in tasks}
    counts = {"pairs": len(train), "held_out": len(held), "demos": len(demos), "options": by_option}
    return counts | {f"left_out_{reason}": left_out[reason] for reason in REASONS}


def _counts(train: Sequence[Row], held: Sequence[Row], task: OptionTask) -> dict[str, int]:
    mine = [option.id for option in task.options]
    kinds = Counter(pair["kind"] for pair in train if pair["preferences"] == mine)
    return {**{kind: kinds[kind] for kind in task.kinds}, "held_out": sum(p["preferences"] == mine for p in held)}


def _demos(pairs: Sequence[Row]) -> list[Row]:
    """The chosen answers of judged pairs, each once. A tie has none."""
    names = ("prompt_id", "prompt", *data.CONDITIONED)
    judged = [pair for pair in pairs if pair["kind"] in JUDGED and pair["strength"]]
    rows = {(pair["prompt_id"], pair["chosen"]): pair for pair in judged}
    return [{name: pair[name] for name in names} | {"response": pair["chosen"]} for pair in rows.values()]
