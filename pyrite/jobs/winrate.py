"""Win rates against a baseline, raw and length-controlled, from a table of judged comparisons.

A row is one comparison: which prompt, which model, the judge's verdict, and how long both answers are. Prompts are
resampled whole and for all models alike, so that two models are compared on the same prompts.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data.files import DataError, Source, read
from pyrite.math import seeds, winrates
from pyrite.math.ranges import Inside, Natural, NonNegative, Real, Several
from pyrite.math.winrates import GAMED, KNOWN, Comparisons, Prior, Rates

OUTPUTS = {
    "winrates.json": "raw and length-controlled win rates of every model and their differences, with intervals",
    "winrates.csv": "one row a model, the best first",
    "difficulty.csv": "how hard each prompt is, where that is known or was estimated; --difficulty reads it",
}
UNKNOWN = (
    "how hard the prompts are is not known, as fewer than 3 models were judged. The length-controlled rates assume a "
    "usual spread of difficulties, and their intervals are widened by what that leaves open; give difficulties by "
    "--difficulty FILE, or judge 3 models or more"
)
LEFT_OUT = (
    "the difficulty of the prompts is left out, as --difficulty none says. Length-controlled rates are then too high "
    "for models that mostly lose: by 4.6 points on average on the public leaderboard"
)
WORDS = ("auto", "none")  # of --difficulty
ENOUGH = 3  # models whose verdicts tell hard prompts from weak models
# our columns, and what else they may be called; the last names are AlpacaEval's
NAMES = {
    "prompt_id": ("prompt_id", "instruction"),
    "model": ("model", "generator_2"),
    "baseline": ("baseline", "generator_1"),
    "output": ("output", "output_2"),
    "baseline_output": ("baseline_output", "output_1"),
}


@dataclass(frozen=True)
class Config:
    """Raw and length-controlled win rates from judged comparisons."""

    data: str
    """Comparisons: prompt_id, model, the verdict as `preference` (1 to 2, 2 = the model wins; 0 = a tie) or `win`
    (probability that the model wins), both lengths in characters as `length` and `baseline_length` or both texts as
    `output` and `baseline_output`; optionally `baseline` and `difficulty`."""
    out: Path
    """Folder of the run, new or empty."""
    gamed: tuple[str, ...] = ()
    """Models of the table that are the baseline, told to be brief or verbose. Their rows replace the prior."""
    difficulty: str = "auto"
    """How hard the prompts are: a file with prompt_id and difficulty; auto, the column of that name, else estimated
    where 3 models or more were judged; none, left out."""
    length_mean: Real | None = None
    """Prior mean of the length coefficient; by default -2.0 where difficulties are given, else -1.8."""
    length_precision: NonNegative = GAMED.precision
    """Prior precision of the length coefficient; 0 for no prior."""
    n_boot: Several = 1000
    """Bootstrap resamples for the intervals."""
    level: Inside = 0.95
    """Confidence level of the intervals."""
    seed: Natural = 0
    """Random seed."""


class JudgedComparison(NamedTuple):
    """One comparison; win is NaN without a verdict."""

    prompt: Any
    model: str
    baseline: str
    win: float
    length: float
    baseline_length: float
    difficulty: float | None


@dataclass(frozen=True)
class ComparisonTable:
    """Comparisons of M models on Q prompts, (M, Q) each, NaN if there is none; difficulty (Q,) if it is given."""

    models: list[str]
    baseline: str
    wins: Tensor
    length: Tensor
    baseline_length: Tensor
    difficulty: Tensor | None
    prompts: list[Any]


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    files = {"data": config.data} | ({} if config.difficulty in WORDS else {"difficulty": config.difficulty})
    return {**files}


def run(config: Config) -> Run:
    """Read, estimate, resample, write."""
    run = runs.start("winrate", config, inputs=inputs)
    if run.done:
        return run
    table = tabled(config.data)
    if config.difficulty not in WORDS:
        table = replace(table, difficulty=difficulties(config.difficulty, table.prompts))
    found, source = _comparisons(table, config)
    spreads = (winrates.SPREAD, *winrates.SPREADS) if found.spread else (0.0,)
    rates = [_rates(replace(found, spread=spread), config, given=table.difficulty is not None) for spread in spreads]
    run.open()
    models = sorted(_models(table, rates, config.level), key=lambda row: -row["lc"])
    differences = list(_differences(table.models, rates, config.level))
    warning = UNKNOWN if found.spread else LEFT_OUT if found.difficulty is None else ""
    missing = int((table.length.isfinite() & ~table.wins.isfinite()).sum())
    say(f"winrate: {len(models)} models on {table.wins.shape[1]} prompts against {table.baseline}")
    say(f"  {missing} comparisons without a verdict; difficulty of prompts {source}")
    for line in aligned(models):
        say(f"  {line}")
    if warning:
        say(f"winrate: warning: {warning}")
    if run.writes:
        about = {"baseline": table.baseline, "difficulty": source} | ({"warning": warning} if warning else {})
        runs.write_json(run.folder / "winrates.json", {**about, "models": models, "differences": differences})
        if found.difficulty is not None:
            hard = zip(table.prompts, found.difficulty.tolist(), strict=True)
            known = [{"prompt_id": prompt, "difficulty": value} for prompt, value in hard]
            runs.write_text(run.folder / "difficulty.csv", _csv(known))
        runs.write_text(run.folder / "winrates.csv", _csv(models))
    rows = {row["model"]: {name: row[name] for name in ("raw", "raw_se", "lc", "lc_se")} for row in models}
    said = {"difficulty": source} | ({"warning": warning} if warning else {})
    return run.finish(models=rows, prompts=table.wins.shape[1], no_verdict=missing, **said)


def tabled(path: str) -> ComparisonTable:
    """The comparisons of a file, checked. Raises DataError with file, row and what to do."""
    source = read(path)
    rows: dict[tuple[Any, str], JudgedComparison] = {}
    for i, raw in enumerate(source.rows):
        try:
            row = judged(raw)
            if (row.prompt, row.model) in rows:
                raise ValueError(f"a second verdict on {row.model!r} for prompt {row.prompt!r:.60}; keep one of them")
            _check_against(row, rows)
        except ValueError as error:
            raise DataError(f"{source.at(i)}: {error}") from error
        rows[row.prompt, row.model] = row
    return _grid(list(rows.values()), source)


def difficulties(path: str, prompts: Sequence[Any]) -> Tensor:
    """How hard the prompts are (Q,), from a file with their ids and `difficulty` or `instruction_difficulty`.

    Raises DataError with the row, or with a prompt that is not there.
    """
    source = read(path)
    found: dict[str, float] = {}
    for i, row in enumerate(source.rows):
        id = next((row[name] for name in ("prompt_id", "instruction", "index") if row.get(name) is not None), None)
        value = next((row[name] for name in ("difficulty", "instruction_difficulty") if name in row), None)
        if id is None or value is None:
            raise DataError(f"{source.at(i)}: difficulties need prompt_id (or instruction, or index) and difficulty")
        try:
            found[str(id)] = _number(float(value) if isinstance(value, str) else value, "difficulty")
        except ValueError as error:
            raise DataError(f"{source.at(i)}: difficulty is {value!r:.40}; it must be a finite number") from error
    missing = [prompt for prompt in prompts if str(prompt) not in found]
    if missing:
        count = f"{len(missing)} of {len(prompts)} prompts have no difficulty in it"
        raise DataError(f"{source.name}: {count}, the first is {missing[0]!r:.60}; add them, by the ids of --data")
    return torch.tensor([found[str(prompt)] for prompt in prompts], dtype=torch.float64)


def judged(raw: dict[str, Any]) -> JudgedComparison:
    """The comparison in one row. Raises ValueError, without the place, for a value that is missing, no number or out of
    range."""
    row = {ours: next((raw[name] for name in names if name in raw), None) for ours, names in NAMES.items()}
    for name in ("prompt_id", "model"):
        if not isinstance(row[name], (str, int)) or row[name] == "":
            raise ValueError(f"{name} is {row[name]!r:.40}; give every comparison a {name}")
    return JudgedComparison(
        prompt=row["prompt_id"],
        model=str(row["model"]),
        baseline=str(row["baseline"] or "baseline"),
        win=_win(raw),
        length=_length(raw, "length", row["output"]),
        baseline_length=_length(raw, "baseline_length", row["baseline_output"]),
        difficulty=None if raw.get("difficulty") is None else _number(raw["difficulty"], "difficulty"),
    )


def aligned(models: Sequence[dict[str, Any]]) -> list[str]:
    """The models as lines of a table."""
    head = ("model", "prompts", "raw", "s.e.", "length-controlled", "s.e.", "interval", "chars", "baseline")
    body = [
        (
            *(row["model"], str(row["prompts"])),
            *(f"{row[name]:.2f}" for name in ("raw", "raw_se", "lc", "lc_se")),
            f"[{row['lc_lo']:.2f}, {row['lc_hi']:.2f}]",
            *(f"{row[name]:.0f}" for name in ("length", "baseline_length")),
        )
        for row in models
    ]
    width = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    sides = "<" + ">" * (len(head) - 1)
    return [
        "  ".join(f"{c:{side}{w}}" for c, side, w in zip(line, sides, width, strict=True)) for line in (head, *body)
    ]


def _win(raw: dict[str, Any]) -> float:
    """P(model wins) of a row; NaN if the row says null."""
    given = [name for name in ("preference", "score", "win") if name in raw]
    if len(given) != 1:
        raise ValueError(
            f"{'no verdict' if not given else 'verdicts ' + ' and '.join(given)}; give one of preference (1 to 2, "
            "2 = the model wins) and win (0 to 1), null where the judge gave none"
        )
    (name,) = given
    if raw[name] is None:
        return math.nan
    value = _number(raw[name], name)
    if name == "win":
        if not 0 <= value <= 1:
            raise ValueError(f"win is {value:g}; it must be a probability, 0 to 1")
        return value
    if value != 0 and not 1 <= value <= 2:
        raise ValueError(f"{name} is {value:g}; it must be 1 (baseline wins) to 2 (model wins), or 0 for a tie")
    return winrates.from_preferences(torch.tensor(value, dtype=torch.float64)).item()


def _length(raw: dict[str, Any], name: str, text: Any) -> float:
    if raw.get(name) is not None:
        value = _number(raw[name], name)
        if value < 0:
            raise ValueError(f"{name} is {value:g}; a length is at least 0 characters")
        return value
    if not isinstance(text, str):
        answer = name.replace("length", "output")
        raise ValueError(f"neither {name} nor {answer}; give the answer's length in characters, or its text")
    return float(len(text))


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.40}; it must be a finite number")
    return float(value)


def _check_against(row: JudgedComparison, rows: dict[tuple[Any, str], JudgedComparison]) -> None:
    first = next(iter(rows.values()), row)
    if row.baseline != first.baseline:
        raise ValueError(f"compared with {row.baseline!r}, not {first.baseline!r} as before; give a file one baseline")
    if (row.difficulty is None) != (first.difficulty is None):
        raise ValueError("difficulty is in some rows only; give it in all, or in none")


def _grid(rows: list[JudgedComparison], source: Source) -> ComparisonTable:
    models, prompts = (list(dict.fromkeys(values)) for values in zip(*((r.model, r.prompt) for r in rows), strict=True))
    at = {model: m for m, model in enumerate(models)}, {prompt: q for q, prompt in enumerate(prompts)}
    where = torch.tensor([[at[0][row.model], at[1][row.prompt]] for row in rows]).T.unbind()
    values = torch.tensor([(row.win, row.length, row.baseline_length) for row in rows], dtype=torch.float64)
    empty = torch.full((len(models), len(prompts)), math.nan, dtype=torch.float64)
    wins, length, baseline_length = (empty.index_put(where, column) for column in values.T)
    for model, count in zip(models, wins.isfinite().sum(1).tolist(), strict=True):
        if count < 2:
            raise DataError(f"{source.name}: too few verdicts on {model} ({count}); give at least 2, or drop its rows")
    hard: dict[Any, float] = {}
    for row in rows:
        if row.difficulty is not None and hard.setdefault(row.prompt, row.difficulty) != row.difficulty:
            raise DataError(f"{source.name}: prompt {row.prompt!r:.60} has two difficulties; a prompt has one")
    given = torch.tensor([hard[prompt] for prompt in prompts], dtype=torch.float64) if hard else None
    return ComparisonTable(models, rows[0].baseline, wins, length, baseline_length, given, prompts)


def _comparisons(table: ComparisonTable, config: Config) -> tuple[Comparisons, str]:
    """What is to be fitted, and the source of the prompts' difficulties."""
    gap = winrates.length_gap(table.baseline_length, table.length)
    gamed = [table.models.index(name) for name in config.gamed if _known(name, table.models)]
    rows = (table.wins[gamed], gap[gamed]) if gamed else None
    others = [m for m, name in enumerate(table.models) if name != table.baseline]  # itself it always meets half-way
    if config.difficulty == "none":
        return Comparisons(table.wins, gap, None, rows), "left out"
    if table.difficulty is not None:
        where = "the table" if config.difficulty == "auto" else config.difficulty
        return Comparisons(table.wins, gap, table.difficulty, rows), f"from {where}"
    if len(others) < ENOUGH:
        unknown = Comparisons(table.wins, gap, None, rows, winrates.SPREAD)
        return unknown, f"left out, {ENOUGH} models are needed to estimate it"
    hard = winrates.difficulty(table.wins[others], gap[others], prior=_prior(config, given=False))
    return Comparisons(table.wins, gap, hard, rows), f"estimated from {len(others)} models"


def _prior(config: Config, *, given: bool) -> Prior:
    """The prior of the length coefficient. Its mean depends on whether the difficulties of the prompts are given."""
    usual = (KNOWN if given else GAMED).mean
    return Prior(usual if config.length_mean is None else config.length_mean, config.length_precision)


def _rates(found: Comparisons, config: Config, *, given: bool) -> Rates:
    generator = seeds.generator(config.seed, "win rates")  # the same resamples every time
    return winrates.rates(found, prior=_prior(config, given=given), n_boot=config.n_boot, generator=generator)


def _known(name: str, models: list[str]) -> bool:
    if name not in models:
        near = difflib.get_close_matches(name, models, n=1)
        raise ValueError(f"--gamed {name}: the table has no such model{f'; did you mean {near[0]!r}?' if near else ''}")
    return True


def _models(table: ComparisonTable, several: Sequence[Rates], level: float) -> Iterator[dict[str, Any]]:
    """A row for each model, by the first rates. Each interval covers those of all rates."""
    rates = several[0]
    for m, model in enumerate(table.models):
        wins = table.wins[m]
        seen = wins[wins.isfinite()]
        yield {
            "model": model,
            "prompts": len(seen),
            "won": int((seen > 0.5).sum()),
            "lost": int((seen < 0.5).sum()),
            "tied": int((seen == 0.5).sum()),
            **_with_interval("raw", rates.raw[m], rates.raw_boot[:, m], level),
            "raw_se": rates.raw_error[m].item(),
            **_widened("lc", [(one.lc[m], one.lc_boot[:, m]) for one in several], level),
            "lc_se": rates.lc_error[m].item(),
            **dict(zip(("phi", "psi", "theta"), rates.coefficients[m].tolist(), strict=True)),
            "length": table.length[m].nanmean().item(),
            "baseline_length": table.baseline_length[m].nanmean().item(),
        }


def _differences(models: list[str], several: Sequence[Rates], level: float) -> Iterator[dict[str, Any]]:
    """The difference of every two models; both are resampled together."""
    rates = several[0]
    for a, b in itertools.combinations(range(len(models)), 2):
        raw = _with_interval("raw", rates.raw[a] - rates.raw[b], rates.raw_boot[:, a] - rates.raw_boot[:, b], level)
        parted = [(one.lc[a] - one.lc[b], one.lc_boot[:, a] - one.lc_boot[:, b]) for one in several]
        lc = _widened("lc", parted, level)
        yield {"a": models[a], "b": models[b], **raw, **lc}


def _with_interval(name: str, value: Tensor, boot: Tensor, level: float) -> dict[str, float]:
    mean, lo, hi = winrates.interval(value, boot, level=level)
    return {name: mean.item(), f"{name}_lo": lo.item(), f"{name}_hi": hi.item()}


def _widened(name: str, several: Sequence[tuple[Tensor, Tensor]], level: float) -> dict[str, float]:
    """The first value, with an interval that covers those of all."""
    found = [_with_interval(name, value, boot, level) for value, boot in several]
    low, high = min(one[f"{name}_lo"] for one in found), max(one[f"{name}_hi"] for one in found)
    return found[0] | {f"{name}_lo": low, f"{name}_hi": high}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
