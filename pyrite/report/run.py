"""The page of one job's run folder."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrite.report.charts import Row, lines
from pyrite.report.markup import number
from pyrite.report.page import page
from pyrite.report.sections import Figure, Keys, Numbers, Part, Table, Text
from pyrite.runs import read_metrics

MOST = 600  # points in a line: more cannot be seen, and a browser would feel them


def run_page(folder: Path | str) -> str:
    """The page of a run folder: every numeric metric against the step, results, configuration, versions.

    Reads config.json, and manifest.json, metrics.jsonl and done.json where they are there. Raises ValueError
    where config.json is missing or a file does not parse.
    """
    folder = Path(folder)
    config = _read(folder / "config.json")
    if config is None:
        raise ValueError(f"{folder}: no config.json there; give the folder of a run")
    manifest, done = _read(folder / "manifest.json") or {}, _read(folder / "done.json")
    rows = read_metrics(folder)
    parts: list[Part] = [
        *_results(done),
        *_curves(rows),
        *_rest(done),
        Keys(config, "Full configuration", title="The run"),
    ]
    if manifest:
        parts.append(Keys(manifest, "Versions, hardware and inputs"))
    state = "done" if done is not None else "not finished"
    lead = f"{state}, {number(done['seconds'])} seconds" if done and "seconds" in done else state
    job = config.get("job", "run")
    return page(f"{job}: {folder.resolve().name}", parts, lead=lead, eyebrow=f"pyrite · {job}")


def _results(done: Mapping[str, Any] | None) -> list[Part]:
    """The first few plain numbers of done.json, and what its measurements have with a standard error."""
    plain = [(k, number(v)) for k, v in (done or {}).items() if _numeric(v) and k != "seconds"]
    numbers: Part = Text("No results yet." if done is None else "")
    return [Numbers([("Results", plain[:6])]) if plain else numbers, *_measured(done or {})]


def _measured(done: Mapping[str, Any]) -> list[Part]:
    """A column for each measurement; a value beside its standard error, negative ones as they are."""
    inner = {name: row for name, row in done.items() if isinstance(row, Mapping)}
    rows = {name: row for name, row in inner.items() if any(f"{key}_se" in row for key in row)}
    means = {name: row for name, row in inner.items() if {"mean", "se"} <= row.keys()}
    if means:
        rows["mean"] = {key: row["mean"] for key, row in means.items()} | {f"{k}_se": v["se"] for k, v in means.items()}
    names = dict.fromkeys(name for row in rows.values() for name in row if f"{name}_se" in row)
    table = [[name, *(_with_error(row, name) for row in rows.values())] for name in names]
    return [Table(["", *rows], table, caption="Measured, ± one standard error.")] if table else []


def _with_error(row: Mapping[str, Any], name: str) -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    known = _numeric(value) and _numeric(error)
    return f"{value:.3g} ± {error:.2g}".replace("-", "−") if known else number(None)


def _rest(done: Mapping[str, Any] | None) -> list[Part]:
    return [Keys(done, "All results")] if done else []


def _curves(rows: Sequence[Row]) -> list[Part]:
    """One small chart a metric, with a line for each part of the run that logged it at least twice, and its error."""
    found = [{"step": i, **row} for i, row in enumerate(rows)]
    names = dict.fromkeys(key for row in found for key, value in row.items() if _numeric(value) and key != "step")
    errors = {f"{name}_se" for name in names}  # drawn as bands
    logged = {name: _by_part(found, name) for name in names if name not in errors}
    logged = {name: parts for name, parts in logged.items() if parts}
    if not logged:
        return []
    every = max(1, math.ceil(max(len(rows) for parts in logged.values() for rows in parts.values()) / MOST))
    charts = [
        lines([row for rows in parts.values() for row in rows[::every]], "step", list(parts), height=150)
        for parts in logged.values()
    ]
    caption = "Every numeric metric, as logged" + (f"; one value in {every} is drawn." if every > 1 else ".")
    return [Figure(charts, caption, names=list(logged), title="Metrics")]


def _by_part(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """The values of one metric by the part of the run that logged them, as rows {step, part: value, part_se: error}."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if _numeric(row.get(name)):
            label = str(row.get("part", name))
            point = {"step": row["step"], label: row[name], f"{label}_se": row.get(f"{name}_se")}
            parts.setdefault(label, []).append(point)
    return {label: found for label, found in parts.items() if len(found) > 1}


def _numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error.msg}, line {error.lineno}); the run must be repeated") from error
