"""What the line charts share: one look, bands, labels that do not overlap, dots under the pointer.

A point is a dict {value, lo, hi, line, label, color, dash} and the field of the horizontal axis.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

Row = Mapping[str, Any]
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
    run from left to right, or by the field `order` where they may turn back.
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
    chart = alt.layer(*layers).encode(_across(x), _up(y, domain), color, detail="line:N")
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


def _across(x: Axis) -> alt.X:
    scale = alt.Scale(type="log", base=x.base, nice=False) if x.log else alt.Scale(nice=False, zero=False)
    axis = alt.Axis(
        format="d" if x.whole else x.format or alt.Undefined,
        labelFlush=False,
        tickMinStep=1 if x.whole else alt.Undefined,
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
