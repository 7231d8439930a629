"""Sections about policies optimized against reward models: gold and proxy on their way away from the reference."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from pyrite.report.charts import (
    COLORS,
    DASHED,
    FAINT,
    INK,
    NAMES,
    OBJECTIVES,
    REWARD,
    SOLID,
    Axis,
    Row,
    draw,
    span,
    styled,
    table,
)
from pyrite.report.page import Figure, Part, Table, Text, Views, number, percent

ROOT = Axis("sqrt_kl", "√KL from the reference (√nats)")
STEP = Axis("step", "steps", whole=True)
GROUPS = {
    "members": "Members of WCO",
    "weight": "Weight of UWO",
    "pairs": "Preference pairs",
    "size": "Size of the reward model",
}


def policies(
    rows: Iterable[Row],
    *,
    y: str = "gold",
    x: Axis = ROOT,
    domain: tuple[float, float] | None = None,
    height: int = 280,
) -> alt.LayerChart:
    """A column of measured policies against `x`, a line for each objective, a dot where gold peaks.

    rows: {objective, step, sqrt_kl, kl, kl_se, gold, gold_lo, gold_hi, proxy, variance}, in the order of steps; gold is
    solid, the proxy dashed. Raises ValueError where no row has the column.
    """
    points = [_point(row, y) for o in OBJECTIVES for row in rows if row["objective"] == o and row.get(y) is not None]
    if not points:
        raise ValueError(f"policies: no row has {y}")
    shown = {"line": "against", "step": "step", "KL": "KL, nats", "shown": y}
    lines = [[point for point in points if point["line"] == name] for name in dict.fromkeys(p["line"] for p in points)]
    tops = [max(line, key=lambda point: point["value"]) for line in lines] if y == "gold" else []
    up = REWARD if y in ("gold", "proxy") else Axis("value", "variance over members")
    peaks = [{**top, "flag": ""} for top in tops]
    return draw(points, x, up, tooltip=shown, height=height, domain=domain, peaks=peaks, order="step")


def _point(row: Row, y: str) -> Row:
    name = NAMES[row["objective"]]
    low, high = row.get(f"{y}_lo"), row.get(f"{y}_hi")
    band = "" if low is None or high is None else f"  [{low:.2f}, {high:.2f}]"
    return {
        **{"step": row["step"], "sqrt_kl": row["sqrt_kl"], "value": row[y], "lo": None, "hi": None},
        **{"line": name, "label": name, "color": COLORS[row["objective"]], "dash": DASHED if y == "proxy" else SOLID},
        **{"KL": f"{row['kl']:.2f} ± {row['kl_se']:.2f}", "shown": f"{row[y]:.2f}{band}"},
    }


def bars(rows: Sequence[Row]) -> alt.LayerChart:
    """Gold of best-of-n as bars, with intervals where they are known: rows {label, objective, gold, lo, hi}."""
    named = [
        {
            **{"label": f"{row['label']}, {NAMES[row['objective']]}", "value": row["gold"]},
            **{
                "lo": row.get("lo"),
                "hi": row.get("hi"),
                "color": COLORS[row["objective"]],
                "text": number(row["gold"]),
            },
        }
        for row in rows
    ]
    low, high = span(named)
    across = alt.X("value:Q", title=REWARD.title, scale=alt.Scale(domain=[min(0.0, low), max(0.0, high)], nice=False))
    up = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(grid=False, labelColor=INK, labelLimit=260))
    drawn = table("bars", alt.MarkDef("bar", height=11, opacity=0.75)).encode(alt.Color("color:N", scale=None))
    whisker = table("bars", alt.MarkDef("rule", color=FAINT, strokeWidth=1.5)).encode(alt.X("lo:Q"), alt.X2("hi:Q"))
    chart = alt.layer(drawn.encode(across), whisker).encode(up)
    told = " ".join(f"{row['label']}: {row['text']}." for row in named)
    return styled(chart, {"bars": named}, told, height=max(3, len(named)) * 19)


def policy_sections(results: Mapping[str, Any]) -> list[Part]:
    """What PPO found, from `results.json`; nothing where no policy was trained."""
    rows = results.get("policies") or []
    parts: list[Part] = []
    if rows:
        parts = [Text(_TOLD, title="What PPO makes of the same reward models"), _paths(rows), *_by_step(rows)]
        parts += [_ends(rows), *_fits(results.get("policy_fits") or [])]
    return [*parts, *_bars(results)]


_TOLD = (
    "Policies trained by PPO against the same reward models, measured on the prompts of best-of-n in the same units. "
    "They go much further from the reference than best-of-n can, so look at gold against proxy, not at one KL for "
    "both: reinforcement learning spends far more KL for the same gain. Lines follow the steps and may turn back; the "
    "dot marks the most gold. A KL below 0 is an estimate with an error, written as it is and drawn at 0."
)


def _at(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by label noise and KL strength, as the page names them."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((percent(row["noise"]), f"beta {row['beta']:g}"), []).append(row)
    return found


def _paths(rows: Sequence[Row]) -> Views:
    caption = "Gold (solid) and what each policy's own reward says (dashed), by what it was trained against."
    views: dict[tuple[str, ...], Part] = {
        key: Figure([policies(some), policies(some, y="proxy")], caption, names=("Gold", "Proxy"))
        for key, some in _at(rows).items()
    }
    return Views(("label noise", "KL penalty"), views)


def _by_step(rows: Sequence[Row]) -> list[Part]:
    views: dict[tuple[str, ...], Part] = {}
    for key, some in _at(rows).items():
        drawn = [policies(some, x=STEP)]
        if any(row.get("variance") is not None for row in some):
            drawn.append(policies(some, y="variance", x=STEP))
        names = ("Gold by step", "Members' variance by step")[: len(drawn)]
        views[key] = Figure(
            drawn, "The variance over members, of the answers a policy draws as it learns.", names=names
        )
    return [Views(("label noise", "KL penalty"), views)]


def _ends(rows: Sequence[Row]) -> Table:
    """Peak and end of every policy."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["noise"], row["beta"], row["objective"]), []).append(row)
    cells = []
    for (noise, beta, objective), line in groups.items():
        top, end = max(line, key=lambda row: row["gold"]), line[-1]
        known = (percent(noise), f"{beta:g}", NAMES[objective], number(top["gold"]), number(top["kl"]))
        band = f" [{number(end['gold_lo'])}, {number(end['gold_hi'])}]" if "gold_lo" in end else ""
        last = (number(end["gold"]) + band, number(end["proxy"]), f"{number(end['kl'])} ± {number(end['kl_se'])}")
        cells.append((*known, *last, number(end["length"])))
    columns = ("label noise", "beta", "against", "most gold", "at KL", "gold at the end", "proxy", "KL, nats", "tokens")
    caption = (
        "The most gold is looked for, so it flatters; the claims below find the peak on other chains. Intervals of "
        "gold: over chains, or with one chain two standard errors over prompts."
    )
    return Table(columns, cells, caption)


def _fits(rows: Sequence[Row]) -> list[Part]:
    if not rows:
        return []
    columns = ("label noise", "beta", "against", "a", "b", "peak at KL, nats", "gold at the peak")
    cells = [
        (
            percent(row["noise"]),
            f"{row['beta']:g}",
            NAMES[row["objective"]],
            *(row.get(key) for key in ("a", "b", "peak_kl", "peak_gold")),
        )
        for row in rows
    ]
    return [Table(columns, cells, "Least-squares fits of gold = start + d (a − b ln d), d = √KL.")]


def _bars(results: Mapping[str, Any]) -> list[Part]:
    rows = results.get("bars") or []
    groups = [group for group in GROUPS if sum(row["group"] == group for row in rows) > 1]
    if not groups:
        return []
    drawn = [bars([row for row in rows if row["group"] == group]) for group in groups]
    caption = f"Gold of best-of-{results['end_n']:,}; lines are intervals over chains."
    return [Figure(drawn, caption, names=[GROUPS[g] for g in groups], title="What else could be turned")]
