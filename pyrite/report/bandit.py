"""The page and the figures of the job bandit: results in, HTML and charts out."""

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

from pyrite.report.charts import SERIES, SOLID, Axis, Chart, Row, draw, save
from pyrite.report.page import Figure, Keys, Part, Table, Text, number, page

Results = Mapping[str, Any]
LEAST = 1e-16  # what is smaller is rounding: drawn here

ERROR = "log10 of the error, max |δ| in nats"
GAP = "log10 of the value lost, nats"
READING = (
    "δ is the difference in reward of two responses less the difference the policy implies, β times the gap of "
    "log π/π_ref; at the optimum it is 0 for every pair. On this scale **linear convergence is a straight line** and "
    "**quadratic convergence bends down**, twice as many digits with every update, until rounding (about 1e-15) or "
    "the noise of sampled pairs stops it. An order of 1 is linear, 2 quadratic."
)


def bandit_page(results: Results) -> str:
    """The whole page from `results.json`. Raises ValueError where it holds no curve."""
    charts, config = bandit_charts(results), results["config"]
    gradients = "exact gradients" if config["samples"] is None else f"{config['samples']:,} pairs drawn a step"
    world = f"{config['actions']} responses, β = {config['beta']:g}, {gradients}, rate: {config['rate']}"
    count = f"{config['instances'] * config['seeds']:,} instances ({config['seeds']} repetitions)"
    caption = "Medians over instances; the bands hold the middle 90 %."
    parts: list[Part] = [
        Figure(list(charts.values()), caption, names=["Error", "Value lost"], title="Convergence"),
        Text(READING),
        Table(
            *_table(results["samplers"]), caption="Medians over instances; means of what is in nats.", title="Orders"
        ),
        *_bounds(results["samplers"]),
        *_floors(results["samplers"]),
        Keys(config, "Full configuration", title="The run"),
    ]
    return page("Samplers in an exact world", parts, lead=f"{world}; {count}.", eyebrow="pyrite · bandit")


def bandit_charts(results: Results) -> dict[str, Chart]:
    """The error and the value lost against updates, by sampler; names for files -> charts."""
    rows = results["curves"]
    if not rows:
        raise ValueError("results: no curves; the page of bandit starts from them")
    return {"error": _chart(rows, "error", ERROR), "value_gap": _chart(rows, "value_gap", GAP)}


def save_bandit(results: Results, folder: Path | str) -> list[Path]:
    """Write every chart as SVG and PNG into `folder`; returns the paths."""
    return [path for name, chart in bandit_charts(results).items() for path in save(chart, folder, name)]


def _chart(rows: list[Row], key: str, title: str) -> Chart:
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    points = [
        {
            "step": row["step"],
            **{"value": _digits(row[key]), "lo": _digits(row.get(f"{key}_lo")), "hi": _digits(row.get(f"{key}_hi"))},
            **{"line": name, "label": name, "color": SERIES[index % len(SERIES)], "dash": SOLID},
            "shown": f"{row[key]:.3g}",
        }
        for index, name in enumerate(names)
        for row in rows
        if row["sampler"] == name and row[key] is not None
    ]
    if not points:
        raise ValueError(f"results: no finite {key} of any sampler")
    tooltip = {"line": "sampler", "step": "update", "shown": key.replace("_", " ")}
    return draw(points, Axis("step", "updates"), Axis("value", title), tooltip=tooltip, height=300)


def _digits(value: float | None) -> float | None:
    return None if value is None else log10(max(value, LEAST))


def _table(samplers: Results) -> tuple[list[str], list[list[object]]]:
    names = {
        "order": "order",
        "step_order": "order of one step",
        "rate": "rate",
        "contraction": "error left by a step",
        "steps_to_0.01": "updates to 0.01",
        "steps_to_1e-06": "to 1e-6",
        "error": "last error",
        "drift": "drift from the optimum",
        "diverged": "diverged",
    }
    means = {"value_gap": "value lost", "reward": "reward", "kl": "KL, nats"}
    rows = [
        [name, *(found[key] for key in names), *(found[key]["mean"] for key in means)]
        for name, found in samplers.items()
    ]
    return ["sampler", *names.values(), *means.values()], rows


def _bounds(samplers: Results) -> list[Part]:
    rows = [[name, str(b["constant"]), b["order"], b["holds"], b["closest"]] for name, b in _of(samplers, "bound")]
    columns = ["sampler", "constant", "order", "instances where it holds", "most of it used at the first update"]
    caption = "max |δ| ≤ c^t (order 1) or c^(2^t − 1) (order 2) for rewards in [0, 1]."
    return [Table(columns, rows, caption=caption, title="The theorems' bounds")] if rows else []


def _floors(samplers: Results) -> list[Part]:
    found = [(name, floor["measured"]["mean"], floor["predicted"]) for name, floor in _of(samplers, "floor")]
    rows = [[name, number(measured, 4), number(predicted, 4)] for name, measured, predicted in found]
    caption = "Mean |δ| over the second half of the run, and what sampling noise alone leaves near the optimum."
    return [Table(["sampler", "measured", "predicted"], rows, caption=caption, title="Noise floor")] if rows else []


def _of(samplers: Results, key: str) -> list[tuple[str, Row]]:
    return [(name, found[key]) for name, found in samplers.items() if found[key]]
