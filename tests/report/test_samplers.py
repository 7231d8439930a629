"""The page of the samplers recipe."""

from __future__ import annotations

from typing import Any

import pytest

from pyrite.recipes.samplers import RECIPE, figures, over

METHODS = ("offline", "on_policy", "hybrid", "mixed")


def curve(method: str, number: int) -> dict[str, Any]:
    values = {"gold": 1.0 + number / 4, "proxy": 0.5 * number, "kl": 1.5 * number, "length": 20.0, "agreement": 0.7}
    return {"method": method, "round": number, "win_rate": 0.6, "gold_lo": 0.9, "gold_hi": 1.1, **values}


def end(method: str) -> dict[str, Any]:
    values = dict.fromkeys(ENDS, 1.0) | {"proxy": 1.0 + (method == "mixed")}
    bands = {f"{name}_{end}": value + by for name, value in values.items() for end, by in (("lo", -0.1), ("hi", 0.1))}
    return {"method": method, **values, **bands}


def race(samplers: tuple[str, ...], **found: Any) -> dict[str, Any]:
    summary = {"order": 2.0, "step_order": 2.0, "rate": 4.4, "contraction": 0.0, "steps_to_1e-06": 5, "error": 1e-9}
    summary |= {"diverged": 0.0, "bound": None, "floor": None, "steps_to_0.01": 2, "drift": 0.0, **found}
    summary |= {name: {"mean": 0.1} for name in ("value_gap", "reward", "kl")}
    curves = [{"sampler": name, "step": t, "error": 0.1**t, "value_gap": 0.1**t} for name in samplers for t in range(3)]
    return {"config": {"samples": 512}, "samplers": dict.fromkeys(samplers, summary), "curves": curves}


ENDS = ("gold", "proxy", "kl", "length", "missing_eos", "win_gold", "win_proxy")
CLAIM = {"source": "arXiv:0", "measured": 1.0, "interval": [0.5, 1.5]}
RESULTS: dict[str, Any] = {
    **{"recipe": "samplers", "scale": "toy", "seeds": [0], "seconds": 12.0},
    "races": {
        "orders": race(("uniform", "mix_r")),
        "bounds": race(("uniform",), bound={"constant": 0.588, "order": 1, "holds": 1.0, "closest": 0.1}),
        "floor 512": race(("uniform",), floor={"measured": {"mean": 0.0912}, "predicted": 0.0917}),
    },
    "budget": {"answers": 2688, "couples": 1344, "labels": dict.fromkeys(METHODS, 1343), "rounds": 3},
    "curves": [curve(method, number) for method in METHODS for number in range(4)],
    "ends": [end(method) for method in ("start", *METHODS)],
    "scorer": [{"seed": 0, "pairs": 700, "accuracy": 0.71, "accuracy_lo": 0.6, "accuracy_hi": 0.8}],
    "claims": [
        {"id": "mixed-over-offline-proxy", "statement": "Mixed first", "holds": True, **CLAIM},
        {"id": "mixed-over-offline-gold", "statement": "Mixed first", "holds": None, **CLAIM},
    ],
    "samples": [{"prompt": "tell", "answers": [{"policy": "mixed", "response": "a <b>", "gold": 1.0, "proxy": 2.0}]}],
    "config": {"gold": "length()"},
    "manifest": {"pyrite": "0"},
}


def test_the_page_says_what_came_out() -> None:
    page = RECIPE.page(RESULTS)
    assert "1 of 2 comparisons hold" in page
    assert "2,688 answers, 1,344 pairs for every method" in page
    assert "labels the pairs puts mixed first" in page
    assert "ranks 71\N{NO-BREAK SPACE}% of held-out pairs right" in page
    assert "0.0912" in page
    assert "a &lt;b&gt;" in page


def test_a_line_for_each_method_and_a_dot_for_each_round() -> None:
    chart = over(RESULTS, "kl", "gold").to_dict()
    points = chart["datasets"]["points"]
    assert {p["line"] for p in points} == {"offline", "on-policy", "hybrid", "mixed"}
    assert [p["kl"] for p in points if p["line"] == "mixed"] == [0.0, 1.5, 3.0, 4.5]
    assert len(chart["datasets"]["peaks"]) == len(points)
    assert "peaks" not in over(RESULTS, "round", "gold").to_dict()["datasets"]


def test_charts_worth_a_file() -> None:
    assert list(figures(RESULTS)) == ["orders", "proxy_over_kl", "gold_over_kl"]


def test_a_number_nobody_has() -> None:
    curves = [{**row, "gold": None} for row in RESULTS["curves"]]
    with pytest.raises(ValueError, match="no row has both kl and gold"):
        over(RESULTS | {"curves": curves}, "kl", "gold")
