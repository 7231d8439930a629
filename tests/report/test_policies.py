"""Sections about optimized policies: paths that may turn back, bars, and a page with and without them."""

from typing import Any

import pytest
import vl_convert

from pyrite.recipes.overoptimization.policies import STEP, bars, policies, policy_sections
from pyrite.report.charts import specification, vega_lite

GOLD = {"single": [0.0, 1.0, 0.5, -1.0], "uwo": [0.0, 1.0, 1.2, 1.1]}
KL = [-0.01, 2.0, 9.0, 4.0]  # an estimate below 0 at the start, and a path that turns back


def rows(beta: float = 0.0) -> list[dict[str, Any]]:
    found = []
    for objective, line in GOLD.items():
        for step, (gold, kl) in enumerate(zip(line, KL, strict=True)):
            known = {
                "noise": 0.25,
                "beta": beta,
                "objective": objective,
                "step": step,
                "gold": gold,
                "proxy": 2.0 * step,
            }
            known |= {"kl": kl, "kl_se": 0.02, "sqrt_kl": max(kl, 0.0) ** 0.5, "length": 20.0}
            known |= {"gold_lo": gold - 0.1, "gold_hi": gold + 0.1}
            found.append(known | ({"variance": 1.0 + step} if objective == "uwo" and step else {}))
    return found


def results() -> dict[str, Any]:
    fit = {"noise": 0.25, "beta": 0.0, "objective": "single", "a": 0.35, "b": 0.15, "peak_kl": 14.4, "peak_gold": 0.57}
    one = {"group": "members", "label": "3 members", "objective": "wco", "gold": 0.5, "lo": 0.4, "hi": 0.6}
    two = {"group": "members", "label": "5 members", "objective": "wco", "gold": 0.7}
    return {"policies": [*rows(), *rows(0.05)], "policy_fits": [fit], "bars": [one, two], "end_n": 256}


def test_lines_follow_the_steps_not_the_kl() -> None:
    spec = specification(policies(rows()))
    (line,) = [layer for layer in spec["layer"] if layer["mark"].get("strokeJoin") == "round"]
    assert line["encoding"]["order"]["field"] == "step"
    assert [p["step"] for p in spec["datasets"]["points"] if p["line"] == "UWO"] == [0, 1, 2, 3]
    assert {(p["line"], p["value"]) for p in spec["datasets"]["peaks"]} == {("single", 1.0), ("UWO", 1.2)}


def test_a_negative_kl_is_told_with_its_error() -> None:
    first = specification(policies(rows()))["datasets"]["points"][0]
    assert first["KL"] == "-0.01 ± 0.02" and first["sqrt_kl"] == 0.0


def test_variance_only_where_it_is_known() -> None:
    drawn = specification(policies(rows(), y="variance", x=STEP))["datasets"]["points"]
    assert {p["line"] for p in drawn} == {"UWO"} and len(drawn) == 3
    with pytest.raises(ValueError, match="no row has variance"):
        policies([row for row in rows() if row["objective"] == "single"], y="variance")


def test_bars_are_drawn_with_the_intervals_there_are() -> None:
    spec = specification(bars(results()["bars"]))
    assert [row["label"] for row in spec["datasets"]["bars"]] == ["3 members, WCO", "5 members, WCO"]
    assert "<svg" in vl_convert.vegalite_to_svg(spec | {"width": 300}, vl_version=vega_lite(), allowed_base_urls=[])


def test_sections_are_there_where_policies_are() -> None:
    parts = policy_sections(results())
    assert [part.kind for part in parts] == ["text", "tabs", "tabs", "table", "table", "figure"]
    rows = parts[3].content["rows"]
    assert len(rows) == 4 and rows[0][3:5] == ["1.00", "2.00"]
    assert policy_sections({}) == []
    assert policy_sections({"policies": [], "bars": results()["bars"][:1]}) == []  # one bar compares nothing
