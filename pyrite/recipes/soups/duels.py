"""Sections about duels of methods over combinations of preferences: win matrices, scores by option, Pareto fronts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from pyrite.report.charts import BLUE, FAINT, GREEN, INK, ORANGE, Row, span, styled, table
from pyrite.report.page import Figure, Part, Table, Text, Views, number, percent

LOW, MIDDLE, HIGH = ORANGE, "#f4f2ee", BLUE  # told apart by every kind of color vision
ROW, GAP = 52, 12  # pixels: the height of a cell, and how far labels must be from each other


def matrix_chart(rows: Sequence[Row], *, rate: str = "half") -> alt.LayerChart:
    """Win rates of the method of a row against the one of a column, the number and its interval in each cell.

    rows: {first, second, half, half_lo, half_hi, wins, losses, ties} as the job duel has them, in any order; blue above
    50 %, orange below. rate: the tie rule, half or without. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("matrix_chart: there is no duel to draw")
    methods = list(dict.fromkeys(row["first"] for row in rows))
    cells = [_cell(row, rate) for row in rows if row[rate] is not None]
    wrapped = "split(datum.label, '_')"  # long names in several lines
    names = alt.Axis(labelAngle=0, labelOverlap=False, labelExpr=wrapped)
    across = alt.X("second:N", title="against", sort=methods, axis=names)
    up = alt.Y("first:N", title=None, sort=methods, axis=alt.Axis(labelColor=INK, labelLimit=220, grid=False))
    # fixed ends, so that matrices can be compared
    scale = alt.Scale(domain=[0, 0.5, 1], range=[LOW, MIDDLE, HIGH], interpolate="rgb", clamp=True)
    shown = [alt.Tooltip(f"{name}:N", title=title) for name, title in _TOOLTIP.items()]
    block = table("cells", alt.MarkDef("rect", stroke="#ffffff", strokeWidth=2)).encode(
        alt.Color("value:Q", scale=scale, legend=None), tooltip=shown
    )
    color = alt.Color("ink:N", scale=None)
    told = table("cells", alt.MarkDef("text", fontSize=14, fontWeight=600, dy=-6)).encode(alt.Text("shown:N"), color)
    band = table("cells", alt.MarkDef("text", fontSize=10, dy=11)).encode(alt.Text("band:N"), color)
    chart = alt.layer(block, told, band).encode(across, up).resolve_scale(color="independent")
    words = " ".join(f"{cell['first']} against {cell['second']}: {cell['shown']}." for cell in cells)
    return styled(chart, {"cells": cells}, words, height=ROW * len(methods))


def pareto_chart(rows: Sequence[Row], x: str, y: str, *, height: int = 300) -> alt.LayerChart:
    """Methods by their mean score in two objectives; filled where no method is at least as good in all objectives.

    rows: {method, front, and a mean for each objective}. Raises ValueError where no row has both objectives.
    """
    some = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not some:
        raise ValueError(f"pareto_chart: no row has both {x} and {y}")
    left, right = span([{"value": row[x]} for row in some])
    low, high = span([{"value": row[y]} for row in some])
    places = _apart(some, (x, y), (right - left, high - low), height)
    points = [_point(row, x, y, place) for row, place in zip(some, places, strict=True)]
    right += 0.25 * (right - left)  # room for the labels
    across = alt.X("x:Q", title=x, scale=alt.Scale(domain=[left, right], nice=False, zero=False))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(domain=[low, high], nice=False, zero=False))
    names = {"method": "method", "across": x, "up": y, "standing": "over all objectives"}
    shown = [alt.Tooltip(f"{name}:N", title=title) for name, title in names.items()]
    mark = alt.MarkDef("point", filled=True, size=110, opacity=1, strokeWidth=2)
    dots = table("points", mark).encode(
        up, alt.Fill("fill:N", scale=None), alt.Stroke("color:N", scale=None), tooltip=shown
    )
    words = table("points", alt.MarkDef("text", align="left", dx=10, fontSize=12, fontWeight=600))
    labels = words.encode(alt.Y("place:Q"), alt.Text("method:N"), alt.Color("color:N", scale=None))
    told = " ".join(f"{p['method']}: {x} {p['across']}, {y} {p['up']}, {p['standing']}." for p in points)
    return styled(alt.layer(dots, labels).encode(across), {"points": points}, told, height=height)


def duel_sections(results: Mapping[str, Any]) -> list[Part]:
    """What the job duel found, from its results; nothing without duels. over: what intervals are over, "prompts"."""
    if not results.get("matrix"):
        return []
    over = results.get("over", "prompts")
    drawn = Figure(matrix_chart(results["matrix"]), _MATRIX.format(over=over))
    parts: list[Part] = [Text(_TOLD.format(calls=number(results["calls"])), title="Who wins"), drawn]
    parts += [_rates(results), *_apiece(results, "by_combination", "combination", _COMBINATION)]
    parts += [*_apiece(results, "by_criterion", "option", _OPTION), *_fronts(results), *_scores(results)]
    return parts


_TOOLTIP = {"first": "method", "second": "against", "shown": "win rate", "band": "interval", "counts": "units"}
_TOLD = (
    "A unit is one prompt under one combination of preferences, the same for both methods. The judge says for each "
    "option which answer is better; the unit goes to the method that wins more options. **Ties one half** counts a tie "
    "for half a win to each, **without ties** leaves it out; a unit with a missing verdict is dropped and counted, "
    "unless it was asked to be a tie. {calls} questions were put to the judge."
)
_MATRIX = "Win rate of the method on the left against the one below, ties one half; 95 % intervals over {over}."
_COMBINATION = "Win rates under one combination, ties one half."
_OPTION = "Win rates by the verdicts on one option alone, ties one half."
_FRONT = (
    "Mean scores over the combinations that ask for an option. Filled: no other method is at least as good in all "
    "objectives, not only in these two, and better in one."
)


def _cell(row: Row, rate: str) -> Row:
    value, low, high = row[rate], row.get(f"{rate}_lo"), row.get(f"{rate}_hi")
    counted = f"{row['wins']} won, {row['losses']} lost, {row['ties']} tied" if "wins" in row else ""
    return {
        **{"first": row["first"], "second": row["second"], "value": value, "shown": f"{100 * value:.0f} %"},
        "band": "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f}",
        "ink": "#ffffff" if abs(value - 0.5) > 0.38 else INK,
        "counts": counted,
    }


def _point(row: Row, x: str, y: str, place: float) -> Row:
    color = GREEN if row["front"] else FAINT
    return {
        **{"method": row["method"], "x": row[x], "y": row[y], "across": number(row[x]), "up": number(row[y])},
        **{"color": color, "fill": color if row["front"] else "#ffffff", "place": place},
        "standing": "on the front" if row["front"] else "dominated",
    }


def _apart(rows: Sequence[Row], at: tuple[str, str], size: tuple[float, float], height: int) -> list[float]:
    """Heights of the labels: those of points near each other, left to right, are moved off each other."""
    x, y = at
    step = size[1] * GAP / height
    places: dict[int, float] = {}
    for i in sorted(range(len(rows)), key=lambda i: rows[i][y]):
        near = [place for j, place in places.items() if abs(rows[i][x] - rows[j][x]) < 0.2 * size[0]]
        places[i] = max([rows[i][y], *(place + step for place in near)])
    return [places[i] for i in range(len(rows))]


def _rates(results: Mapping[str, Any]) -> Table:
    """Every two methods once, by both tie rules."""
    over = results.get("over", "prompts")
    columns = ("method", "against", "won", "lost", "tied", "missing", "ties one half", "interval", "without ties")
    cells = [
        (
            *(row[name] for name in ("first", "second", "wins", "losses", "ties", "missing")),
            percent(row["half"]),
            _band(row, "half"),
            f"{percent(row['without'])} {_band(row, 'without')}".strip(),
        )
        for row in _once(results["matrix"])
    ]
    return Table(columns, cells, f"Every two methods, by both tie rules, with 95 % intervals over {over}.")


def _once(rows: Iterable[Row]) -> list[Row]:
    """Each pair in the direction that comes first."""
    seen: dict[frozenset[str], Row] = {}
    for row in rows:
        seen.setdefault(frozenset((row["first"], row["second"])), row)
    return list(seen.values())


def _band(row: Row, rate: str) -> str:
    low, high = row.get(f"{rate}_lo"), row.get(f"{rate}_hi")
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def _apiece(results: Mapping[str, Any], table: str, by: str, caption: str) -> list[Part]:
    """A matrix for each combination or option."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in results.get(table) or []:
        groups.setdefault((row[by],), []).append(row)
    views: dict[tuple[str, ...], Part] = {key: Figure(matrix_chart(rows), caption) for key, rows in groups.items()}
    return [Views((by,), views)] if len(views) > 1 else []


def _fronts(results: Mapping[str, Any]) -> list[Part]:
    """Every two options that some combination has together."""
    rows = results.get("pareto") or []
    together = {row["combination"]: row["combination"].split("+") for row in results.get("scores") or []}
    options = [name for name in (rows[0] if rows else {}) if name not in ("method", "front")]
    views: dict[tuple[str, ...], Part] = {
        (f"{x} and {y}",): Figure(pareto_chart(rows, x, y), _FRONT)
        for x, y in itertools.combinations(options, 2)
        if any({x, y} <= set(ids) for ids in together.values())
    }
    return [Views(("objectives",), views, title="What each option costs another")] if views else []


def _scores(results: Mapping[str, Any]) -> list[Part]:
    """Mean scores of methods by option, one table a combination."""
    rows = results.get("scores") or []
    if not rows:
        return []
    over = results.get("over", "prompts")
    views: dict[tuple[str, ...], Part] = {}
    for by, combination in dict.fromkeys((row["by"], row["combination"]) for row in rows):
        some = [row for row in rows if (row["by"], row["combination"]) == (by, combination)]
        columns = list(dict.fromkeys(row["option"] for row in some))
        found = {(row["method"], row["option"]): f"{number(row['mean'])} ± {number(row['se'])}" for row in some}
        cells = [(name, *(found.get((name, o)) for o in columns)) for name in dict.fromkeys(r["method"] for r in some)]
        views[by, combination] = Table(("method", *columns), cells, f"Mean and standard error over {over}.")
    return [Views(("scored by", "combination"), views, title="Scores by option")]
