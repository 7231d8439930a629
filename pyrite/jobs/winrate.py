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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrite import runs, seeds, winrates
from pyrite.options import Inside, Natural, NonNegative, Real, Several
from pyrite.progress import say
from pyrite.runs import Run
from pyrite.sources import DataError, Source, read
from pyrite.winrates import GAMED, Comparisons, Prior, Rates

OUTPUTS = {
    "winrates.json": "raw and length-controlled win rates of every model and their differences, with intervals",
    "winrates.csv": "one row a model, the best first",
}
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
    gamed: tuple[str, ...] = ()
    """Models of the table that are the baseline told to be brief or long-winded: their rows replace the prior."""
    difficulty: Literal["auto", "none"] = "auto"
    """Control for hard prompts too: by the column of that name, else estimated where 3 models or more were judged."""
    length_mean: Real = GAMED.mean
    """Prior mean of the length coefficient, by default what AlpacaEval's gamed baselines say."""
    length_precision: NonNegative = GAMED.precision
    """Its precision; 0: no prior."""
    n_boot: Several = 1000
    """Resamples for the intervals."""
    level: Inside = 0.95
    seed: Natural = 0


class Judged(NamedTuple):
    """One comparison; win is NaN without a verdict."""

    prompt: Any
    model: str
    baseline: str
    win: float
    length: float
    baseline_length: float
    difficulty: float | None


@dataclass(frozen=True)
class Table:
    """Comparisons of M models on Q prompts, (M, Q) each, NaN where there is none; difficulty (Q,) where it is given."""

    models: list[str]
    baseline: str
    wins: Tensor
    length: Tensor
    baseline_length: Tensor
    difficulty: Tensor | None


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"data": config.data}


def run(config: Config) -> Run:
    """Read, estimate, resample, write."""
    run = runs.start("winrate", config, inputs=inputs)
    if run.done:
        return run
    table = tabled(config.data)
    found, source = _comparisons(table, config)
    prior = Prior(config.length_mean, config.length_precision)
    generator = seeds.generator(config.seed, "win rates")
    rates = winrates.rates(found, prior=prior, n_boot=config.n_boot, generator=generator)
    run.open()
    models = sorted(_models(table, rates, config.level), key=lambda row: -row["lc"])
    differences = list(_differences(table.models, rates, config.level))
    missing = int((table.length.isfinite() & ~table.wins.isfinite()).sum())
    say(f"winrate: {len(models)} models on {table.wins.shape[1]} prompts against {table.baseline}")
    say(f"  {missing} comparisons without a verdict; difficulty of prompts {source}")
    for line in aligned(models):
        say(f"  {line}")
    if run.writes:
        whole = {"baseline": table.baseline, "difficulty": source, "models": models, "differences": differences}
        runs.write_json(run.folder / "winrates.json", whole)
        runs.write_text(run.folder / "winrates.csv", _csv(models))
    rows = {row["model"]: {name: row[name] for name in ("raw", "raw_se", "lc", "lc_se")} for row in models}
    return run.finish(models=rows, prompts=table.wins.shape[1], no_verdict=missing)


def tabled(path: str) -> Table:
    """The comparisons of a file, checked. Raises DataError with file, row and what to do."""
    source = read(path)
    rows: dict[tuple[Any, str], Judged] = {}
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


def judged(raw: dict[str, Any]) -> Judged:
    """One row's comparison. Raises ValueError, without the place, for what is missing, not a number or out of range."""
    row = {ours: next((raw[name] for name in names if name in raw), None) for ours, names in NAMES.items()}
    for name in ("prompt_id", "model"):
        if not isinstance(row[name], (str, int)) or row[name] == "":
            raise ValueError(f"{name} is {row[name]!r:.40}; give every comparison a {name}")
    return Judged(
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
            row["model"],
            str(row["prompts"]),
            f"{row['raw']:.2f}",
            f"{row['raw_se']:.2f}",
            f"{row['lc']:.2f}",
            f"{row['lc_se']:.2f}",
            f"[{row['lc_lo']:.2f}, {row['lc_hi']:.2f}]",
            f"{row['length']:.0f}",
            f"{row['baseline_length']:.0f}",
        )
        for row in models
    ]
    width = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    place: list[Callable[..., str]] = [str.ljust] + [str.rjust] * (len(head) - 1)
    return ["  ".join(p(cell, w) for p, cell, w in zip(place, line, width, strict=True)) for line in (head, *body)]


def _win(raw: dict[str, Any]) -> float:
    """P(model wins) of a row; NaN where it says null."""
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


def _check_against(row: Judged, rows: dict[tuple[Any, str], Judged]) -> None:
    first = next(iter(rows.values()), row)
    if row.baseline != first.baseline:
        raise ValueError(f"compared with {row.baseline!r}, not {first.baseline!r} as before; give a file one baseline")
    if (row.difficulty is None) != (first.difficulty is None):
        raise ValueError("difficulty is in some rows only; give it in all, or in none")


def _grid(rows: list[Judged], source: Source) -> Table:
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
    return Table(models, rows[0].baseline, wins, length, baseline_length, given)


def _comparisons(table: Table, config: Config) -> tuple[Comparisons, str]:
    """What is to be fitted, and where the difficulty of prompts comes from."""
    gap = winrates.length_gap(table.baseline_length, table.length)
    gamed = [table.models.index(name) for name in config.gamed if _known(name, table.models)]
    rows = (table.wins[gamed], gap[gamed]) if gamed else None
    others = [m for m, name in enumerate(table.models) if name != table.baseline]  # itself it always meets half-way
    if config.difficulty == "none":
        return Comparisons(table.wins, gap, None, rows), "left out"
    if table.difficulty is not None:
        return Comparisons(table.wins, gap, table.difficulty, rows), "from the table"
    if len(others) < ENOUGH:
        return Comparisons(table.wins, gap, None, rows), f"left out, {ENOUGH} models are needed to estimate it"
    prior = Prior(config.length_mean, config.length_precision)
    hard = winrates.difficulty(table.wins[others], gap[others], prior=prior)
    return Comparisons(table.wins, gap, hard, rows), f"estimated from {len(others)} models"


def _known(name: str, models: list[str]) -> bool:
    if name not in models:
        near = difflib.get_close_matches(name, models, n=1)
        raise ValueError(f"--gamed {name}: the table has no such model{f'; did you mean {near[0]!r}?' if near else ''}")
    return True


def _models(table: Table, rates: Rates, level: float) -> Iterator[dict[str, Any]]:
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
            **_with_interval("lc", rates.lc[m], rates.lc_boot[:, m], level),
            "lc_se": rates.lc_error[m].item(),
            **dict(zip(("phi", "psi", "theta"), rates.coefficients[m].tolist(), strict=True)),
            "length": table.length[m].nanmean().item(),
            "baseline_length": table.baseline_length[m].nanmean().item(),
        }


def _differences(models: list[str], rates: Rates, level: float) -> Iterator[dict[str, Any]]:
    """Every pair of models, resampled together."""
    for a, b in itertools.combinations(range(len(models)), 2):
        raw, lc = (
            _with_interval(name, value[a] - value[b], boot[:, a] - boot[:, b], level)
            for name, value, boot in (("raw", rates.raw, rates.raw_boot), ("lc", rates.lc, rates.lc_boot))
        )
        yield {"a": models[a], "b": models[b], **raw, **lc}


def _with_interval(name: str, value: Tensor, boot: Tensor, level: float) -> dict[str, float]:
    mean, lo, hi = winrates.interval(value, boot, level=level)
    return {name: mean.item(), f"{name}_lo": lo.item(), f"{name}_hi": hi.item()}


def _csv(models: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(models[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(models)
    return text.getvalue()
