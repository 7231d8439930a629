"""Sections about duels: win matrices, fronts, and that they render."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import vl_convert

from pyrite.recipes.soups import duel_sections, matrix_chart, pareto_chart
from pyrite.report.charts import specification, vega_lite
from pyrite.report.page import page

METHODS = ["vb", "pp", "pmorl", "psoups"]
OPTIONS = {"technical+brief": ("technical", "brief"), "plain+brief": ("plain", "brief")}


def duels(**place: str) -> list[dict[str, Any]]:
    """Each method wins against those before it."""
    found = []
    for first, second in itertools.permutations(METHODS, 2):
        half = 0.5 + 0.15 * (METHODS.index(first) - METHODS.index(second))
        known = {"half": half, "half_lo": max(half - 0.06, 0.0), "half_hi": min(half + 0.06, 1.0)}
        known |= {"without": half, "without_lo": half - 0.07, "without_hi": half + 0.07}
        counts = {"wins": 30, "losses": 15, "ties": 5, "missing": 2}
        found.append({"first": first, "second": second, **place, **counts, **known})
    return found


def results() -> dict[str, Any]:
    rows = [("vb", 0.1, 0.2, 0.3), ("pp", 0.5, 0.9, 0.1), ("pmorl", 0.9, 0.6, 0.4), ("psoups", 0.88, 0.62, 0.5)]
    front: list[dict[str, Any]] = [
        dict(zip(("method", "technical", "plain", "brief"), row, strict=True)) for row in rows
    ]
    scores = [
        {"method": row["method"], "combination": name, "option": option, "mean": row[option], "se": 0.01, "by": "gold"}
        for name, options in OPTIONS.items()
        for row in front
        for option in options
    ]
    return {
        "methods": METHODS,
        "matrix": duels(),
        "averages": [{"method": name, "half": 0.5} for name in METHODS],
        "by_combination": [row for name in OPTIONS for row in duels(combination=name)],
        "by_criterion": [row for name in ("technical", "plain", "brief") for row in duels(option=name)],
        "scores": scores,
        "pareto": [{**row, "front": row["method"] != "vb"} for row in front],
        "calls": 4800,
        "over": "prompts",
    }


def svg(chart: Any) -> str:
    spec = specification(chart)
    return vl_convert.vegalite_to_svg(spec | {"width": 420}, vl_version=vega_lite(), allowed_base_urls=[])


def test_the_number_stands_in_each_cell_and_none_on_the_diagonal() -> None:
    spec = specification(matrix_chart(duels()))
    cells = spec["datasets"]["cells"]
    assert len(cells) == 12 and not any(cell["first"] == cell["second"] for cell in cells)
    shown = {(cell["first"], cell["second"]): (cell["shown"], cell["band"]) for cell in cells}
    assert shown["psoups", "vb"] == ("95 %", "89 to 100") and shown["vb", "psoups"][0] == "5 %"
    drawn = svg(matrix_chart(duels()))
    assert ">95 %<" in drawn and ">35 %<" in drawn and ">psoups<" in drawn


def test_matrices_share_their_colors_and_their_order() -> None:
    """50 % is the middle of every matrix, and methods stand as they were given."""
    spec = specification(matrix_chart(duels()))
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [0, 0.5, 1]
    assert spec["encoding"]["x"]["sort"] == spec["encoding"]["y"]["sort"] == METHODS


def test_cells_without_a_rate_are_left_out() -> None:
    rows = duels()
    rows[0] |= {"half": None, "half_lo": None, "half_hi": None}
    assert len(specification(matrix_chart(rows))["datasets"]["cells"]) == 11
    with pytest.raises(ValueError, match="no duel to draw"):
        matrix_chart([])


def test_the_front_is_filled() -> None:
    chart = pareto_chart(results()["pareto"], "technical", "brief")
    points = {point["method"]: point for point in specification(chart)["datasets"]["points"]}
    assert points["vb"]["fill"] == "#ffffff" and points["vb"]["standing"] == "dominated"
    assert points["pmorl"]["fill"] == points["pmorl"]["color"] != points["vb"]["color"]
    assert ">psoups<" in svg(chart)
    with pytest.raises(ValueError, match="no row has both technical and kind"):
        pareto_chart(results()["pareto"], "technical", "kind")


def test_labels_of_neighbors_are_moved_apart() -> None:
    rows = [{"method": str(i), "front": True, "a": x, "b": 0.5} for i, x in enumerate((0.0, 0.01, 0.02, 1.0))]
    points = specification(pareto_chart(rows, "a", "b"))["datasets"]["points"]
    places = [point["place"] for point in points]
    assert places[0] < places[1] < places[2] and places[3] == 0.5
    assert {point["y"] for point in points} == {0.5}


def test_sections() -> None:
    parts = duel_sections(results())
    assert [part.kind for part in parts] == ["text", "figure", "table", "tabs", "tabs", "tabs", "tabs"]
    assert len(parts[2].content["rows"]) == 6  # every pair once
    assert parts[2].content["rows"][0][:3] == ["vb", "pp", "30"]
    fronts = parts[5].content
    assert [options for _, options in fronts["choices"]] == [["technical and brief", "plain and brief"]]
    assert all(view.kind == "figure" for _, view in fronts["panels"])
    assert "4,800 questions" in page("Duels", parts)
