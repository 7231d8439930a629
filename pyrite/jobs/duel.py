"""Duels of methods over combinations of preferences: every two of them, judged option by option on the same prompts.

A unit is one prompt under one combination, and one sample. The judge reads the raw prompt and both answers, once for
each option of the combination; the unit goes to the method that wins more options. Answers meet by ids, never by their
places, and intervals draw whole prompts, with all their combinations. What the options' golds and reward models make of
the answers is told beside it, and which methods no other one dominates.

Jang et al. 2023, arXiv:2310.11564, section 5.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrite.core import runs, specs
from pyrite.core.processes import progress, say
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.conditioning import Dimensions, Option, files, filled
from pyrite.data.files import Row
from pyrite.data.responses import Responses
from pyrite.data.text import plain
from pyrite.feedback import judges, scorers
from pyrite.feedback.pairing import check_verdicts
from pyrite.math import duels
from pyrite.math.duels import DuelRates, Missing
from pyrite.math.ranges import Natural, Several
from pyrite.training.ppo import Score, gold_scorers, model_scorers

OUTPUTS = {"verdicts.parquet": "every verdict: first, second, combination, asked_id, sample, option, p, verdict"}
GENERAL = "general"
PART = 64  # questions kept at once


@dataclass(frozen=True)
class Config:
    """Judge methods against each other under combinations of preferences."""

    answers: tuple[str, ...]
    """Candidates as METHOD=FILE; a method may have several files. Neutral answers serve every combination."""
    out: Path
    """Folder of the run, new or empty."""
    dimensions: str | None = None
    """Preference dimensions: a YAML file, or a built-in name such as soups. Required unless --general is given."""
    judge: str = "bradley_terry(gold={gold}, hard=True)"
    """The judge; {criterion}, {gold}, {sentence} and {id} are replaced by those of the option."""
    general: str | None = None
    """What is better in general, in place of the options: the gold or the criterion that the judge is given."""
    rewards: tuple[str, ...] = ()
    """Also score by reward runs: one folder for all options, or OPTION=FOLDER for each."""
    missing: Missing = "drop"
    """If an option has no verdict: drop the unit, or count the option as a tie."""
    times: Several = 2000
    """Bootstrap resamples for the intervals."""
    seed: Natural = 0
    """Random seed."""


class Unit(NamedTuple):
    """A prompt under one combination of preferences, and one sample: here two methods are compared."""

    combination: tuple[str, ...]
    asked_id: str
    sample: int

    def __str__(self) -> str:
        return f"prompt {self.asked_id} under {_name(self.combination) or 'no preference'}, sample {self.sample}"


DuelAnswers = Mapping[str, Mapping[Unit, Row]]


@dataclass(frozen=True)
class Contest:
    """All answers by method and unit, the units in order, and the criteria of a combination with their judges."""

    answers: DuelAnswers
    units: Sequence[Unit]
    judges: Mapping[str, judges.Judge]
    general: bool

    def criteria(self, combination: Sequence[str]) -> tuple[str, ...]:
        return (GENERAL,) if self.general else tuple(combination)

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(unit.combination for unit in self.units))


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads, files of the options' golds among it."""
    return {
        **{f"{name} answers {i}": file for i, (name, file) in enumerate(_named(config))},
        **(files(config.dimensions) if config.dimensions else {}),
        **{f"reward {option}": folder for option, folder in _rewards(config).items()},
    }


def run(config: Config) -> Run:
    """Read, judge, count, score."""
    run = runs.start("duel", config, inputs=inputs)
    if run.done:
        return run
    if not (config.dimensions or config.general):
        raise ValueError("duel: give --dimensions, a YAML file or soups, or --general with what makes an answer better")
    if config.rewards and not config.dimensions:
        raise ValueError("--rewards score the options of --dimensions; give both or neither")
    known = Dimensions.load(config.dimensions) if config.dimensions else None
    contest, scorers = _contest(config, known), _scorers(config, known)
    run.open()
    verdicts = [row for name in contest.judges for row in _verdicts(run, contest, name)]
    if all(row["verdict"] is None for row in verdicts):
        run.refuse(f"duel: the judge {config.judge!r} gave no verdict on any of {len(verdicts)} questions")
    if run.writes:
        rows.write(verdicts, run.folder / "verdicts.parquet")
    scores = list(_scores(contest, scorers))
    found = _counted(verdicts, contest, config)
    for row in found["averages"]:
        say(f"duel: {row['method']} wins {_told(row['half'])} on average over its opponents, ties one half")
    calls = len(verdicts)
    return run.finish(
        methods=list(contest.answers), **found, scores=scores, pareto=_pareto(scores, contest), calls=calls
    )


# What is compared -------------------------------------------------------------------------------------------------


def _contest(config: Config, known: Dimensions | None) -> Contest:
    """Answers that match, and their judges, ready. Raises ValueError, naming methods and prompt.

    Without dimensions preferences stay as the rows have them, and where no row has any there is one empty combination.
    """
    given: dict[str, dict[Unit, Row]] = {}
    for name, file in _named(config):
        _add(given.setdefault(name, {}), name, file, known)
    if len(given) < 2:
        raise ValueError(f"--answers: a duel needs two methods or more, and there is {', '.join(given) or 'none'}")
    named = {unit.combination for mine in given.values() for unit in mine} - {()}
    place = {id: i for i, id in enumerate(known.ids)} if known else {}
    every: list[tuple[str, ...]] = known.combinations() if known else [()]
    combinations = sorted(named, key=lambda ids: [(place.get(id, 0), id) for id in ids]) or every
    answers = {name: _under(mine, name, combinations) for name, mine in given.items()}
    units = sorted(next(iter(answers.values())), key=lambda unit: combinations.index(unit.combination))
    for first, second in itertools.combinations(answers, 2):
        _check_alike(answers, first, second)
    return Contest(answers, units, _judges(config, known, combinations), bool(config.general))


def _named(config: Config) -> list[tuple[str, str]]:
    """Methods and files, one a file."""
    split = [(entry, *entry.partition("=")[::2]) for entry in config.answers]
    for entry, name, file in split:
        if not (name and file):
            raise ValueError(f"--answers {entry!r}: write METHOD=FILE")
    return [(name, file) for _, name, file in split]


def _add(mine: dict[Unit, Row], name: str, file: str, known: Dimensions | None) -> None:
    """The answers of a file to those of its method; candidates without preferences are neutral."""
    for row in rows.load(file, "candidates"):
        row = {"asked": row["prompt"], "asked_id": row["prompt_id"], "preferences": [], **row}
        try:
            options = [option.id for option in known.chosen(row["preferences"])] if known else row["preferences"]
        except ValueError as error:
            raise ValueError(f"{file}: prompt {row['asked_id']}: {error}") from error
        unit = Unit(tuple(options), str(row["asked_id"]), row["sample"])
        if unit in mine:
            raise ValueError(f"{file}: {name} has two answers to {unit}; give one")
        mine[unit] = row


def _under(mine: Mapping[Unit, Row], name: str, combinations: Sequence[tuple[str, ...]]) -> dict[Unit, Row]:
    """A method's answers by combination: its own, or its neutral ones under each."""
    neutral = {unit: row for unit, row in mine.items() if not unit.combination}
    if not neutral:
        return dict(mine)
    if len(neutral) < len(mine):
        raise ValueError(f"{name} has neutral answers and others; give them as two methods")
    return {unit._replace(combination=each): row for each in combinations for unit, row in neutral.items()}


def _check_alike(answers: DuelAnswers, first: str, second: str) -> None:
    one, other = answers[first], answers[second]
    for unit in [*one, *other]:
        if unit not in one or unit not in other:
            owner, lacking = (first, second) if unit in one else (second, first)
            raise ValueError(f"{owner} has an answer to {unit}, {lacking} has none; let both answer the same prompts")
        if plain(one[unit]["asked"]) != plain(other[unit]["asked"]):
            raise ValueError(f"{first} and {second} were asked different things as {unit}; give them the same prompts")


def _judges(config: Config, known: Dimensions | None, combinations: Iterable[Sequence[str]]) -> dict[str, judges.Judge]:
    if config.general or not known:
        option = Option(GENERAL, "", "", config.general or "", config.general)
        spec = filled(config.judge, option) if "{" in config.judge else config.judge  # it may say itself what is better
        return {GENERAL: specs.part(spec, judges)}
    options = [known.option(id) for id in dict.fromkeys(itertools.chain(*combinations))]
    return {option.id: specs.part(filled(config.judge, option), judges) for option in options}


# Verdicts ---------------------------------------------------------------------------------------------------------


def _verdicts(run: Run, contest: Contest, name: str) -> Iterator[Row]:
    """The verdicts of one criterion's judge on every two methods and every unit, saved in parts."""
    cases = [
        (first, second, unit)
        for first, second in itertools.combinations(contest.answers, 2)
        for unit in contest.units
        if name in contest.criteria(unit.combination)
    ]
    with progress(f"judge {name}", len(cases), unit="pairs") as advance:

        def ask(begin: int, end: int) -> dict[str, list]:
            some = cases[begin:end]
            both = [(contest.answers[first][unit], contest.answers[second][unit]) for first, second, unit in some]
            prompts = [plain(a["asked"]) for a, _ in both]
            given = contest.judges[name](prompts, [a["response"] for a, _ in both], [b["response"] for _, b in both])
            advance(end - begin)
            return {"p": check_verdicts(given, len(some), name=f"the judge of {name}").tolist()}

        told = runs.in_parts(run.folder / "parts" / name, len(cases), ask, size=PART)["p"].to_pylist()
    for (first, second, unit), p in zip(cases, told, strict=True):
        place = {"combination": _name(unit.combination), "asked_id": unit.asked_id, "sample": unit.sample}
        given = {"p": None, "verdict": None} if math.isnan(p) else {"p": p, "verdict": (p > 0.5) - (p < 0.5)}
        yield {"first": first, "second": second, **place, "option": name, **given}


def _counted(verdicts: Sequence[Row], contest: Contest, config: Config) -> dict[str, list[Row]]:
    """The win matrix, its averages, and win rates by combination and by criterion."""
    prompts = {id: i for i, id in enumerate(sorted({unit.asked_id for unit in contest.units}))}
    asked = {
        c: torch.tensor([prompts[u.asked_id] for u in contest.units if u.combination == c])
        for c in contest.combinations
    }
    said: dict[tuple[str, ...], list[float]] = {}
    for row in verdicts:
        key = (row["first"], row["second"], row["combination"], row["option"])
        said.setdefault(key, []).append(math.nan if row["verdict"] is None else row["verdict"])
    table = {key: torch.tensor(values, dtype=torch.float64) for key, values in said.items()}

    def rates(some: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DuelRates:
        outcome, prompt = (torch.cat(column) for column in zip(*some, strict=True))
        return duels.rates(outcome, prompt, times=config.times, seed=config.seed)

    found: dict[str, list[Row]] = {"matrix": [], "averages": [], "by_combination": [], "by_criterion": []}
    for pair in itertools.combinations(contest.answers, 2):
        won = {}
        for c in contest.combinations:
            along = torch.stack([table[*pair, _name(c), option] for option in contest.criteria(c)])
            won[c] = (duels.outcomes(along, missing=config.missing), asked[c])
            found["by_combination"] += _both(pair, rates([won[c]]), combination=_name(c))
        found["matrix"] += _both(pair, rates(list(won.values())))
        for option in contest.judges:
            where = [c for c in contest.combinations if option in contest.criteria(c)]
            alone = [(table[*pair, _name(c), option], asked[c]) for c in where]
            found["by_criterion"] += _both(pair, rates(alone), option=option)
    return found | {"averages": _averages(found["matrix"], list(contest.answers))}


def _both(pair: tuple[str, str], rates: DuelRates, **place: str) -> list[Row]:
    """A row for each direction."""
    rows = []
    for (first, second), seen in ((pair, rates), (pair[::-1], duels.mirrored(rates))):
        values = {name: _known(value) for name, value in seen._asdict().items() if name != "sem"}
        rows.append({"first": first, "second": second, **place, **values})
    return rows


def _averages(matrix: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    table = torch.full((len(methods), len(methods)), math.nan, dtype=torch.float64)
    for row in matrix:
        if row["half"] is not None:
            table[methods.index(row["first"]), methods.index(row["second"])] = row["half"]
    means = duels.average(table).tolist()
    return [{"method": name, "half": _known(mean)} for name, mean in zip(methods, means, strict=True)]


# Scores -----------------------------------------------------------------------------------------------------------


def _scorers(config: Config, known: Dimensions | None) -> dict[str, dict[str, Score]]:
    """Scorers of options by kind, loaded."""
    if not known:
        return {}
    found = {"gold": gold_scorers(known)} if any(option.gold for option in known.options) else {}
    if not config.rewards:
        return found
    named = _rewards(config)
    return found | {"reward": model_scorers(named.get("", named), known)}


def _rewards(config: Config) -> dict[str, str]:
    """Folders of reward runs by option, "" for all options."""
    found: dict[str, str] = {}
    for given in config.rewards:
        match = re.match(r"([\w.-]+)=", given)
        found[match[1] if match else ""] = given[match.end() :] if match else given
    if len(found) < len(config.rewards) or ("" in found and len(found) > 1):
        raise ValueError("--rewards: give one folder for all options, or OPTION=FOLDER once for each")
    return found


def _scores(contest: Contest, scorers: Mapping[str, Mapping[str, Score]]) -> Iterator[Row]:
    """The mean score of each method by each option of each combination, with its standard error over prompts."""
    for by, of_options in scorers.items():
        for option in dict.fromkeys(itertools.chain(*contest.combinations)):
            if option not in of_options:
                continue
            score = _scored(contest, option, of_options[option])
            for name, mine in contest.answers.items():
                for c in (c for c in contest.combinations if option in c):
                    asked: dict[str, list[float]] = {}
                    for unit in (unit for unit in contest.units if unit.combination == c):
                        asked.setdefault(unit.asked_id, []).append(score(mine[unit]))
                    means = torch.tensor([sum(some) / len(some) for some in asked.values()], dtype=torch.float64)
                    se = means.std().item() / len(means) ** 0.5 if len(means) > 1 else None
                    place = {"method": name, "combination": _name(c), "option": option}
                    yield {**place, "mean": means.mean().item(), "se": se, "by": by}


def _scored(contest: Contest, option: str, scorer: Score) -> Callable[[Row], float]:
    """The score of every answer under an option; each text is scored once."""
    texts: dict[tuple[Any, ...], Row] = {}

    def key(row: Row) -> tuple[Any, ...]:
        return str(row["asked_id"]), row["response"], row["finished"]

    for unit in (unit for unit in contest.units if option in unit.combination):
        for row in (mine[unit] for mine in contest.answers.values()):
            texts.setdefault(key(row), row)
    every = list(texts.values())
    said = Responses.said(every, [row["response"] for row in every], finished=[row["finished"] for row in every])
    scores = scorers.check_scores(scorer(said), len(every), name=f"the score of {option}").tolist()
    found = dict(zip(texts, scores, strict=True))
    return lambda row: found[key(row)]


def _pareto(scores: Sequence[Row], contest: Contest) -> list[Row]:
    """Each method's mean by option, by gold if the option has one, and whether the method is on the Pareto front."""
    means: dict[str, dict[str, float]] = {name: {} for name in contest.answers}
    for by in ("gold", "reward"):
        for option in dict.fromkeys(row["option"] for row in scores if row["by"] == by):
            for name, mine in means.items():
                some = [r["mean"] for r in scores if (r["by"], r["method"], r["option"]) == (by, name, option)]
                mine.setdefault(option, sum(some) / len(some))
    if not scores:
        return []
    front = duels.pareto(torch.tensor([list(mine.values()) for mine in means.values()], dtype=torch.float64)).tolist()
    return [{"method": name, **mine, "front": ahead} for (name, mine), ahead in zip(means.items(), front, strict=True)]


def _name(combination: Sequence[str]) -> str:
    return "+".join(combination)


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _told(share: float | None) -> str:
    return "nothing that could be judged" if share is None else f"{100 * share:.1f} %"
