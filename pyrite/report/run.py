"""The page of one job's run folder."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrite.report.charts import Row, lines
from pyrite.report.markup import number
from pyrite.report.page import page
from pyrite.report.sections import Figure, Keys, Numbers, Part, Text
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
        _results(done),
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


def _results(done: Mapping[str, Any] | None) -> Part:
    """The first few plain numbers of done.json."""
    found = [(k, number(v)) for k, v in (done or {}).items() if _numeric(v) and k != "seconds"]
    return Numbers([("Results", found[:6])]) if found else Text("No results yet." if done is None else "")


def _rest(done: Mapping[str, Any] | None) -> list[Part]:
    return [Keys(done, "All results")] if done else []


def _curves(rows: Sequence[Row]) -> list[Part]:
    """One small chart a metric, with a line for each part of the run that logged it at least twice."""
    found = [{"step": i, **row} for i, row in enumerate(rows)]
    names = dict.fromkeys(key for row in found for key, value in row.items() if _numeric(value) and key != "step")
    logged = {name: _by_part(found, name) for name in names}
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
    """The values of one metric by the part of the run that logged them, as rows {step, part: value}."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if _numeric(row.get(name)):
            label = str(row.get("part", name))
            parts.setdefault(label, []).append({"step": row["step"], label: row[name]})
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
