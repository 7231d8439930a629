"""Charts: rows in, one Vega-Lite definition out, for the interactive page and for SVG and PNG files alike."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import altair as alt
import vl_convert

from pyrite.data.files import Row

Chart = alt.Chart | alt.LayerChart

INK, FAINT, GRID, EDGE = "#1f2328", "#5f6670", "#ece9e2", "#a9a69d"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
# Okabe-Ito hues, darkened until they can be read as text on white
BLUE, ORANGE, GREEN, PURPLE = "#0067a3", "#b84300", "#00735a", "#8c4585"
BRASS = "#b98a00"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, "#806000", "#444b54")
TOP = alt.YValue(0)
GAP = 15  # pixels: the least distance between two labels


@dataclass(frozen=True)
class Axis:
    """One axis: its field, title, d3 number format; whether it is logarithmic, to which base, or counts something."""

    field: str
    title: str
    format: str = ""
    log: bool = False
    base: int = 2
    whole: bool = False


def draw(
    points: Sequence[Row],
    x: Axis,
    y: Axis,
    *,
    tooltip: Mapping[str, str],
    height: int,
    domain: tuple[float, float] | None = None,
    gap: Sequence[Row] = (),
    thin: Sequence[Row] = (),
    peaks: Sequence[Row] = (),
    notes: Sequence[Row] = (),
    order: str = "",
) -> alt.LayerChart:
    """Lines with bands and a label at each end; `thin` lines behind, dots at `peaks`, `notes` along the top.

    `gap` is an area {lo, hi} to shade; `tooltip` maps fields to their titles; `domain` fixes the vertical axis. Lines
    run from left to right, or by the field `order` if they may turn back.
    """
    low, high = domain = domain or span([*points, *thin])
    ends = [line[-1] for line in split(points)]
    places = spread([end["value"] for end in ends], (high - low) * GAP / height, low, high)
    tables = {
        "bands": [p for p in points if p.get("lo") is not None and p.get("hi") is not None],
        "gap": gap,
        "thin": thin,
        "points": points,
        "peaks": peaks,
        "notes": notes,
        "labels": [{**end, "place": place} for end, place in zip(ends, places, strict=True) if end["label"]],
    }
    tables = {name: [dict(row) for row in rows] for name, rows in tables.items() if rows}
    width = 2.5 if max(map(len, split(points))) <= 60 else 1.25
    layers = [layer for name, layer in _layers(x, tooltip, width, order) if name in tables]
    color = alt.Color("color:N", scale=None)
    chart = alt.layer(*layers).encode(_across(x, points), _up(y, domain), color, detail="line:N")
    return styled(chart, tables, describe(points, x), height=height)


def _layers(x: Axis, tooltip: Mapping[str, str], width: float, order: str) -> list[tuple[str, alt.Chart]]:
    """Each layer and the table it needs; the first is drawn first."""
    dashes = alt.StrokeDash("dash:N", scale=None, legend=None)
    path = [dashes, alt.Order(f"{order}:Q")] if order else [dashes]
    layers = [
        ("gap", alt.MarkDef("area", opacity=0.1), [alt.Y("lo:Q"), alt.Y2("hi:Q")]),
        ("bands", alt.MarkDef("area", opacity=0.13), [alt.Y("lo:Q"), alt.Y2("hi:Q")]),
        ("thin", alt.MarkDef("line", strokeWidth=1, opacity=0.35), path),
        ("points", alt.MarkDef("line", strokeWidth=width, strokeJoin="round"), path),
        ("peaks", alt.MarkDef("point", size=90, filled=True, opacity=1, stroke="white", strokeWidth=1.5), []),
        ("peaks", alt.MarkDef("text", align="right", dx=18, dy=24, fontSize=12, fontWeight=600), [alt.Text("flag:N")]),
        ("notes", alt.MarkDef("text", baseline="bottom", dy=-5, fontSize=11), [alt.Text("note:N"), TOP]),
        (
            "labels",
            alt.MarkDef("text", align="left", dx=8, fontSize=12.5, fontWeight=600),
            [alt.Y("place:Q"), alt.Text("label:N")],
        ),
    ]
    drawn = [(name, table(name, mark).encode(*encodings)) for name, mark, encodings in layers]
    return [*drawn, ("points", _hover(x, tooltip))]


def _across(x: Axis, points: Iterable[Row]) -> alt.X:
    scale = alt.Scale(type="log", base=x.base, nice=False) if x.log else alt.Scale(nice=False, zero=False)
    axis = alt.Axis(
        format="d" if x.whole else x.format or alt.Undefined,
        labelFlush=False,
        tickMinStep=1 if x.whole else alt.Undefined,
        values=sorted({point[x.field] for point in points}) if x.log else alt.Undefined,
    )
    return alt.X(f"{x.field}:Q", title=x.title, scale=scale, axis=axis)


def _up(y: Axis, domain: tuple[float, float]) -> alt.Y:
    zero = alt.condition("datum.value == 0", alt.value(EDGE), alt.value(GRID))
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    return alt.Y("value:Q", title=y.title, scale=scale, axis=alt.Axis(format=y.format or alt.Undefined, gridColor=zero))


def _hover(x: Axis, tooltip: Mapping[str, str]) -> alt.Chart:
    """Dots on every line at the x nearest to the pointer, and the values of the nearest line."""
    near = alt.selection_point(
        name="near", on="pointermove", clear="pointerout", nearest=True, fields=[x.field], empty=False
    )
    # the cell under the pointer wraps the row: a plain list of fields would read the wrapper for texts
    row = "(datum.datum || datum)"
    shown = ", ".join(f"{json.dumps(title)}: {row}[{json.dumps(field)}]" for field, title in tooltip.items())
    dots = table("points", alt.MarkDef("point", filled=True, size=60))
    seen = alt.condition(near, alt.value(1), alt.value(0))
    return (
        dots.encode(opacity=seen, tooltip=alt.value(alt.expr(f"{{{shown}}}"))).add_params(near).properties(name="dots")
    )


def styled(
    chart: alt.LayerChart, tables: Mapping[str, Sequence[Row]], description: str, *, height: int
) -> alt.LayerChart:
    """The look of every chart: white card, quiet axes, as wide as the page leaves room for."""
    look = (
        chart.configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=FAINT,
            titleColor=INK,
            titleFontWeight="normal",
            labelFontSize=11.5,
            titleFontSize=12.5,
            gridColor=GRID,
            domainColor=EDGE,
            tickColor=EDGE,
            titlePadding=8,
        )
        .configure_axisX(grid=False, labelOverlap=True, tickCount=6)
        .configure_axisY(domain=False, ticks=False, tickCount=6)
    )
    return look.properties(
        width="container",
        height=height,
        description=description,
        background="#ffffff",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        padding={"left": 2, "top": 6, "bottom": 2, "right": 4},
        datasets=dict(tables),
    )


def table(name: str, mark: alt.MarkDef) -> alt.Chart:
    """One mark over one of the chart's tables, by name: each table is stored once."""
    return alt.Chart(alt.NamedData(name), mark=mark)


def split(points: Iterable[Row]) -> list[list[Row]]:
    """The points of each line, lines in the order of their first points."""
    lines: dict[str, list[Row]] = {}
    for point in points:
        lines.setdefault(point["line"], []).append(point)
    return list(lines.values())


def span(points: Iterable[Row]) -> tuple[float, float]:
    """The least and greatest value with its band, and a margin of 5 %."""
    ends = [p[key] for p in points for key in ("lo", "value", "hi") if p.get(key) is not None]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def describe(points: Sequence[Row], x: Axis) -> str:
    """One sentence a line, for readers who cannot see the chart."""
    sentences = []
    for line in split(points):
        first, last, top = line[0], line[-1], max(line, key=lambda p: p["value"])
        sentences.append(
            f"{first['line']}: {first['value']:.2f} at {x.field} {first[x.field]:.4g},"
            f" highest {top['value']:.2f} at {top[x.field]:.4g},"
            f" {last['value']:.2f} at {last[x.field]:.4g}."
        )
    return " ".join(sentences)


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Positions close to those wanted, in their order, `step` apart or more, half a step inside the range.

    >>> spread([0.0, 0.5, 5.0], 1.0, -9.0, 9.0)
    [-0.25, 0.75, 5.0]
    """

    def bottom(group: Sequence[int]) -> float:
        middle = sum(wanted[i] for i in group) / len(group)
        return max(low, min(middle - len(group) * step / 2, high - len(group) * step))

    groups: list[list[int]] = []
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        groups.append([i])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + len(groups[-2]) * step:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = list(wanted)
    for group in groups:
        for rank, i in enumerate(group):
            placed[i] = bottom(group) + (rank + 0.5) * step
    return placed


# Gold and proxy by objective -----------------------------------------------------------------------------------------

OBJECTIVES = ("single", "mean", "wco", "uwo")
NAMES = {"single": "single", "mean": "mean", "wco": "WCO", "uwo": "UWO", "member": "member"}
COLORS = {"single": ORANGE, "mean": BLUE, "wco": GREEN, "uwo": PURPLE, "member": ORANGE}
AXES = {
    "sqrt_kl": Axis("sqrt_kl", "√KL from the reference (√nats)"),
    "n": Axis("n", "n, answers to choose from", format=",d", log=True),
}
REWARD = Axis("value", "reward, SD of the initial policy")
SOLID, DASHED = [1, 0], [5, 4]


def overoptimization(
    curves: Iterable[Row],
    *,
    noise: float | None = None,
    x: str = "sqrt_kl",
    objectives: Sequence[str] = OBJECTIVES,
    quantities: Sequence[str] = ("gold", "proxy"),
    members: bool = False,
    domain: tuple[float, float] | None = None,
    height: int = 300,
) -> alt.LayerChart:
    """Gold (solid) and proxy (dashed) against `x`, sqrt_kl (√nats) or n (log scale); a color each objective.

    curves: rows {noise, objective, member, n, kl, sqrt_kl, gold, gold_lo, gold_hi, proxy, ...}.
    A band is drawn if both of its ends are known, a dot if gold peaks before the last n. `members` adds
    each single model, thin; `domain` fixes the vertical axis (reward units), so that charts can share it.
    """
    if x not in AXES:
        raise ValueError(f"overoptimization: x is {x!r}; choose sqrt_kl or n")
    rows = sorted((r for r in curves if noise is None or r["noise"] == noise), key=lambda r: r["n"])
    points = reward_points(rows, objectives, quantities)
    if not points:
        raise ValueError(f"overoptimization: no curve of {', '.join(objectives)} at noise {noise}")
    tops = [top for line in split(points) if line[0]["quantity"] == "gold" and (top := peak(line))]
    flags = [{**top, "flag": f"peak, n = {top['n']:,}" if len(objectives) == 1 else ""} for top in tops]
    return draw(
        points,
        AXES[x],
        REWARD,
        tooltip={
            "line": "curve",
            "n": "n",
            "KL": "KL, nats",
            "shown": "reward",
            "effective": "effective samples",
        },
        height=height,
        domain=domain,
        gap=_gap(rows, objectives) if set(quantities) >= {"gold", "proxy"} else (),
        thin=reward_points(rows, ("member",), quantities) if members else (),
        peaks=flags,
        notes=_counts(split(points)[0]) if x == "sqrt_kl" else (),
    )


def reward_points(rows: Iterable[Row], objectives: Sequence[str], quantities: Sequence[str]) -> list[Row]:
    """The points of the lines to draw, objective by objective."""
    chosen = [(row, q) for o in objectives for q in quantities for row in rows if row["objective"] == o]
    both = len(quantities) > 1
    return [_point(row, q, objectives, both=both) for row, q in chosen if row.get(q) is not None]


def _point(row: Row, quantity: str, objectives: Sequence[str], *, both: bool) -> Row:
    name = NAMES[row["objective"]] + (f" {row['member']}" if row.get("member") is not None else "")
    low, high = row.get(f"{quantity}_lo"), row.get(f"{quantity}_hi")
    effective = row.get("effective_samples")
    return {
        "n": row["n"],
        "sqrt_kl": row["sqrt_kl"],
        "value": row[quantity],
        "lo": low,
        "hi": high,
        "quantity": quantity,
        "line": f"{name} {quantity}",
        "color": COLORS[row["objective"]],
        "dash": SOLID if quantity == "gold" else DASHED,
        "label": quantity if len(objectives) == 1 else f"{name} {quantity}" if both else name,
        "KL": f"{row['kl']:.2f}",
        "shown": f"{row[quantity]:.2f}" + ("" if low is None or high is None else f"  [{low:.2f}, {high:.2f}]"),
        "effective": "–" if effective is None else f"{effective:,.0f}",
    }


def peak(line: Sequence[Row]) -> Row | None:
    """The highest point of a curve, or None while the curve is still highest at its end."""
    top = max(line, key=lambda point: point["value"])
    return None if top is line[-1] or top is line[0] else top


def _gap(rows: Iterable[Row], objectives: Sequence[str]) -> list[Row]:
    """From gold up to proxy, for the one objective of a chart: reward that is believed and not there."""
    return [
        {
            "n": row["n"],
            "sqrt_kl": row["sqrt_kl"],
            "lo": row["gold"],
            "hi": max(row["gold"], row["proxy"]),
            "color": BRASS,
            "line": "gap",
        }
        for row in rows
        if [row["objective"]] == list(objectives) and row["gold"] is not None and row["proxy"] is not None
    ]


def _counts(line: Sequence[Row]) -> list[Row]:
    """Values of n to write along a √KL axis: the first, the last, and those with room around them."""
    first, last = line[0]["sqrt_kl"], line[-1]["sqrt_kl"]
    kept = [line[0]]
    for point in line[1:-1]:
        if min(point["sqrt_kl"] - kept[-1]["sqrt_kl"], last - point["sqrt_kl"]) >= (last - first) / 8:
            kept.append(point)
    kept += line[1:][-1:]
    return [{**point, "note": f"{'' if i else 'n = '}{point['n']:,}", "color": FAINT} for i, point in enumerate(kept)]


# Any rows -------------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row], title: str = "") -> alt.LayerChart:
    """Bars in the order given: rows {label, value, text, color}, with {lo, hi} if an interval is known.

    The text is written behind a bar. `title` is of the horizontal axis, which is left out without one.
    """
    ends = [{**row, "lo": row.get("lo"), "hi": row.get("hi")} for row in rows]
    ends = [{**row, "end": max(row["value"], row["hi"] or 0.0, 0.0)} for row in ends]
    low, high = span([*ends, {"value": 0.0}])
    low, high = min(low, 0.0) if any(row["value"] < 0 for row in ends) else 0.0, high + 0.12 * (high - low)
    scale = alt.Scale(domain=[low, high], nice=False)
    across = alt.X("value:Q", title=title or None, scale=scale, axis=alt.Axis() if title else None)
    up = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(grid=False, labelColor=INK, labelLimit=260))
    bar = table("bars", alt.MarkDef("bar", cornerRadiusEnd=2, height=14, opacity=0.8))
    whisker = table("bars", alt.MarkDef("rule", color=FAINT, strokeWidth=1.5))
    words = table("bars", alt.MarkDef("text", align="left", dx=6, fontSize=12, color=FAINT))
    chart = alt.layer(
        bar.encode(across, alt.Color("color:N", scale=None)),
        whisker.encode(alt.X("lo:Q"), alt.X2("hi:Q")),
        words.encode(alt.X("end:Q"), alt.Text("text:N")),
    ).encode(up)
    told = " ".join(f"{row['label']}: {row['text']}." for row in ends)
    return styled(chart, {"bars": ends}, told, height=max(2, len(ends)) * 22)


def lines(
    rows: Sequence[Row],
    x: str,
    y: str | Sequence[str],
    *,
    titles: tuple[str, str] = ("", ""),
    height: int = 200,
) -> alt.LayerChart:
    """Columns `y` of any rows against column `x`; rows that lack a finite value are left out of that line.

    If the rows have a column's standard error, NAME_se, a band of one error either way is drawn. `titles` names
    the horizontal and the vertical axis.
    """
    columns = [y] if isinstance(y, str) else list(y)
    points = []
    for i, column in enumerate(columns):
        for row in rows:
            if not (finite(row.get(x)) and finite(row.get(column))):
                continue
            value, error = row[column], row.get(f"{column}_se")
            known = finite(error)
            points.append(
                {
                    x: row[x],
                    "value": value,
                    "lo": value - error if known else None,
                    "hi": value + error if known else None,
                    "shown": f"{value:.5g} ± {error:.2g}" if known else f"{value:.5g}",
                    "line": column,
                    "label": column if len(columns) > 1 else "",
                    "color": SERIES[i % len(SERIES)],
                    "dash": SOLID,
                }
            )
    if not points:
        raise ValueError(f"lines: no row has finite {x} and {' or '.join(columns)}")
    across, up = Axis(x, titles[0] or x), Axis("value", titles[1])
    return draw(points, across, up, tooltip={"line": "metric", x: x, "shown": "value"}, height=height)


def curves(
    rows: Iterable[Row],
    x: Axis,
    y: Axis,
    *,
    by: str,
    names: Mapping[str, str] = MappingProxyType({}),
    colors: Mapping[str, str] = MappingProxyType({}),
    tooltip: Mapping[str, str] = MappingProxyType({}),
    dot: Callable[[Row], bool] = lambda row: False,
    band: Callable[[Row], bool] = lambda row: True,
    dash: Sequence[int] = SOLID,
    level: tuple[str, float] | None = None,
    order: str = "",
    domain: tuple[float, float] | None = None,
    height: int = 260,
) -> alt.LayerChart:
    """Column `y` of rows against column `x`, a line for each value of column `by`; rows without both are left out.

    names, colors: of the values of `by`, whose lines come in the order of their first rows. tooltip: titles of other
    columns. dot: which rows get a dot. band: for which rows the interval, y_lo to y_hi, is drawn. level: a dashed line
    and its name. order, domain: as in `draw`. Raises ValueError if no row has both columns.
    """
    rows = [row for row in rows if finite(row.get(x.field)) and finite(row.get(y.field))]
    if not rows:
        raise ValueError(f"curves: no row has both {x.field} and {y.field}")
    form = y.format or ".3g"
    lines = list(dict.fromkeys(row[by] for row in rows))
    points = []
    for row in sorted(rows, key=lambda row: lines.index(row[by])):
        low, high = row.get(f"{y.field}_lo"), row.get(f"{y.field}_hi")
        interval = "" if low is None or high is None else f"  [{format(low, form)}, {format(high, form)}]"
        name, other = names.get(row[by], row[by]), SERIES[lines.index(row[by]) % len(SERIES)]
        points.append(
            {
                **{key: row.get(key) for key in tooltip},
                x.field: row[x.field],
                "across": f"{row[x.field]:.3g}",
                "value": row[y.field],
                "shown": f"{format(row[y.field], form)}{interval}",
                "lo": low if band(row) else None,
                "hi": high if band(row) else None,
                "line": name,
                "label": name,
                "color": colors.get(row[by], other),
                "dash": dash,
                "dot": dot(row),
            }
        )
    dots = [{**point, "flag": ""} for point in points if point["dot"]]
    if level is not None:
        name, value = level
        told = {"line": name, "label": name, "color": FAINT, "dash": DASHED, "shown": format(value, form)}
        ends = (min(row[x.field] for row in rows), max(row[x.field] for row in rows))
        points += [{x.field: end, "across": f"{end:.3g}", "value": value, **told} for end in ends]
    hover = {"line": by, **tooltip, "across": x.title, "shown": y.title}
    up = Axis("value", y.title, format=y.format)
    return draw(points, x, up, tooltip=hover, height=height, peaks=dots, order=order, domain=domain)


def finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def reach(curves: Iterable[Row], quantities: Sequence[str] = ("gold", "proxy")) -> tuple[float, float]:
    """The vertical range that holds all these curves with their bands, for charts that share it."""
    rows = list(curves)
    return span(reward_points(rows, list(NAMES), quantities))


def specification(chart: Chart) -> dict[str, Any]:
    """The chart as plain JSON values, without the address of its schema."""
    spec = json.loads(chart.to_json())
    spec.pop("$schema", None)
    return spec


def vega_lite() -> str:
    """The Vega-Lite version that altair writes, as vl-convert names it: "6.4"."""
    return ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def save(chart: Chart, folder: Path | str, name: str, *, width: int = 560) -> list[Path]:
    """Write `name.svg` and `name.png` (two pixels a point) into `folder`, offline; returns the two paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = specification(chart) | {"width": width}
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    svg.write_text(vl_convert.vegalite_to_svg(spec, vl_version=vega_lite(), allowed_base_urls=[]), encoding="utf-8")
    png.write_bytes(vl_convert.vegalite_to_png(spec, vl_version=vega_lite(), scale=2, allowed_base_urls=[]))
    return [svg, png]
