"""The page of one job's run folder: gold and proxy on their way from the reference, then all that was measured."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrite.core.runs import read_metrics
from pyrite.report.charts import NAMES, OBJECTIVES, Chart, Row, finite, lines, overoptimization, reach
from pyrite.report.page import Part, banded, details, figure, number, numbers, page, table, tabs, text

MOST = 600  # points in a line: more cannot be seen, and a browser would feel them


BANDS = (
    "Gold is solid, proxy dashed, both in standard deviations of all answers. Bands are 95 % intervals over prompts; "
    "KL = ln n − (n − 1)/n."
)


def run_page(folder: Path | str) -> str:
    """The page of a run folder: gold and proxy against the KL from the reference (of best_of_n against n too), every
    numeric metric against the step, results, configuration, versions.

    Reads config.json, and manifest.json, metrics.jsonl, curves.json and done.json if they exist. Raises ValueError if
    config.json is missing or a file does not parse.
    """
    folder = Path(folder)
    config = _read(folder / "config.json")
    if config is None:
        raise ValueError(f"{folder}: no config.json there; give the folder of a run")
    manifest, done = _read(folder / "manifest.json") or {}, _read(folder / "done.json")
    rows = read_metrics(folder)
    parts: list[Part] = [
        *_results(done),
        *_best_of_n(_read(folder / "curves.json") or []),
        *_way(rows),
        *_curves(rows),
        *([details(done, "All results")] if done else []),
        details(config, "Full configuration", title="The run"),
    ]
    if manifest:
        parts.append(details(manifest, "Versions, hardware and inputs"))
    state = "done" if done is not None else "not finished"
    lead = f"{state}, {number(done['seconds'])} seconds" if done and "seconds" in done else state
    job = config.get("job", "run")
    return page(f"{job}: {folder.resolve().name}", parts, lead=lead, eyebrow=f"pyrite · {job}")


def _results(done: Mapping[str, Any] | None) -> list[Part]:
    """The first few plain numbers of done.json, and what its measurements have with a standard error."""
    plain = [(k, number(v)) for k, v in (done or {}).items() if finite(v) and k != "seconds"]
    first = numbers([("Results", plain[:6])]) if plain else text("No results yet." if done is None else "")
    return [first, *_measured(done or {})]


def _measured(done: Mapping[str, Any]) -> list[Part]:
    """A column for each measurement; a value beside its standard error, negative ones as they are."""
    inner = {name: row for name, row in done.items() if isinstance(row, Mapping)}
    rows = {name: row for name, row in inner.items() if any(f"{key}_se" in row for key in row)}
    means = {name: row for name, row in inner.items() if {"mean", "se"} <= row.keys()}
    if means:
        rows["mean"] = {key: row["mean"] for key, row in means.items()} | {f"{k}_se": v["se"] for k, v in means.items()}
    names = dict.fromkeys(name for row in rows.values() for name in row if f"{name}_se" in row)
    cells = [[name, *(_with_error(row, name) for row in rows.values())] for name in names]
    return [table(["", *rows], cells, caption="Measured, ± one standard error.")] if cells else []


def _with_error(row: Mapping[str, Any], name: str) -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    known = finite(value) and finite(error)
    return f"{value:.3g} ± {error:.2g}".replace("-", "−") if known else number(None)


def _best_of_n(curves: Sequence[Row]) -> list[Part]:
    """Gold and proxy of the best of n answers against √KL and n, with their bands, an objective at a time."""
    found = {str(row["objective"]): [] for row in curves}
    for row in curves:
        # members are drawn as single models, and an objective of the user's own in the color of one
        name = str(row["objective"]).partition("(")[0]
        found[str(row["objective"])].append({**row, "objective": name if name in OBJECTIVES else "single"})
    if not found:
        return []
    shared = reach([row for rows in found.values() for row in rows])
    views: dict[tuple[str, ...], Part] = {}
    for name, rows in found.items():
        across: list[Chart] = [
            overoptimization(rows, x=x, objectives=[rows[0]["objective"]], domain=shared) for x in ("sqrt_kl", "n")
        ]
        views[(_called(name),)] = figure(across, BANDS, names=("Against the KL", "Against n"))
    told = (
        "Of n answers to a prompt, the one is taken that the proxy likes best. Where the proxy goes on rising and gold "
        "does not, the proxy promises reward that is not there; the gap between the two is shaded."
    )
    cells = [
        [_called(name), end["n"], end["kl"], banded(end, "gold"), banded(end, "proxy")]
        for name, end in ((name, rows[-1]) for name, rows in found.items())
    ]
    caption = "At the largest n, with 95 % intervals over prompts."
    return [
        text(told, title="Gold and proxy of the best of n"),
        tabs(("chosen by",), views),
        table(["", "n", "KL, nats", "gold", "proxy"], cells, caption),
    ]


def _called(objective: str) -> str:
    return "average single model" if objective == "single" else NAMES.get(objective, objective)


def _way(rows: Sequence[Row]) -> list[Part]:
    """Gold and proxy of a policy's answers against √KL from the reference, if the run has measured them."""
    points = []
    for row in rows:
        kl = row.get("kl_exact", row.get("kl_k1"))
        if finite(kl) and (finite(row.get("gold")) or finite(row.get("proxy"))):
            points.append({**row, "sqrt_kl": math.sqrt(max(kl, 0.0))})
    measured = [name for name in ("gold", "proxy") if sum(finite(row.get(name)) for row in points) > 1]
    if not measured:
        return []
    chart = lines(points, "sqrt_kl", measured, titles=("√KL from the reference (√nats)", "reward"), height=280)
    caption = (
        "Each point is a measurement on held-out prompts; bands are one standard error either way. A KL that is "
        "estimated below 0 is drawn at 0."
    )
    return [figure(chart, caption, title="Gold and proxy on the way from the reference")]


def _curves(rows: Sequence[Row]) -> list[Part]:
    """One small chart a metric, with a line for each part of the run that logged it at least twice, and its error."""
    found = [{"step": i, **row} for i, row in enumerate(rows)]
    names = dict.fromkeys(key for row in found for key, value in row.items() if finite(value) and key != "step")
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
    return [figure(charts, caption, names=list(logged), title="Metrics")]


def _by_part(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """The values of one metric by the part of the run that logged them, as rows {step, part: value, part_se: error}."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if finite(row.get(name)):
            label = str(row.get("part", name))
            point = {"step": row["step"], label: row[name], f"{label}_se": row.get(f"{name}_se")}
            parts.setdefault(label, []).append(point)
    return {label: found for label, found in parts.items() if len(found) > 1}


def _read(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error.msg}, line {error.lineno}); the run must be repeated") from error
