"""The page of the live reward recipe."""

from __future__ import annotations

from typing import Any

import pytest

from pyrite.recipes.live_reward import RECIPE, figures, over

METHODS = ("offline", "gold", "gold_matched", "static", "live", "live_random")


def curve(task: str, method: str, number: int) -> dict[str, Any]:
    gain = {"live": 0.5, "gold": 0.3}.get(method, 0.1)
    row = {
        "gold": 1.0 + gain * number,
        "gold_lo": 0.9,
        "gold_hi": 1.2 + gain * number,
        "kl": 1.5 * number,
        "length": 20.0,
    }
    row |= {"labels": 50.0 * number, "win_rate": 0.6, "proxy": 0.1, "chains": 1}
    row |= {} if method.startswith(("gold", "offline")) else {"live_accuracy": 0.8 - number / 10, "proxy_accuracy": 0.7}
    return {"task": task, "method": method, "round": number, **row}


CURVES = [curve(task, method, number) for task in ("words", "math") for method in METHODS for number in range(3)]
LEVEL = {"task": "words", "chains": 2}
RESULTS: dict[str, Any] = {
    **{"recipe": "live_reward", "scale": "toy", "seeds": [0, 1], "seconds": 300.0},
    "curves": CURVES,
    "ends": [row for row in CURVES if row["round"] == 2],
    "levels": [
        {**LEVEL, "method": "gold", "share": 0.5, "reached": 2, "labels": 120.0, "labels_lo": 80.0, "labels_hi": 160.0},
        {**LEVEL, "method": "gold", "share": 1.0, "reached": 1, "labels": 321.0},
        {**LEVEL, "method": "live", "share": 0.5, "reached": 2, "labels": 110.0},
        {**LEVEL, "method": "live", "share": 1.0, "reached": 0},
    ],
    "books": [
        {"seed": seed, "task": "words", "method": "live", "before": 100, "labels": 300, "pairs": 1480}
        | {"ties": 77, "gold_pairs": 223, "silver_pairs": 1257}
        for seed in (0, 1)
    ],
    "rewards": [
        {"seed": seed, "task": "words", "kind": "static", "pairs": 250, "accuracy": 0.7 + seed / 10} for seed in (0, 1)
    ],
    "claims": [
        {"id": "live-over-gold-words", "source": "arXiv:0", "statement": "words: more gold"}
        | {"measured": 1.0, "interval": [0.5, 1.5], "holds": True}
    ],
    "samples": [
        {"task": "words", "pairs": [{"prompt": "tell", "chosen": "a <b>", "rejected": "c", "source": "silver"}]}
    ],
    "config": {"labels": 400, "warm": 100, "rounds": 8, "prompts": 192},
    "manifest": {"pyrite": "0"},
}


def test_the_page_says_what_came_out() -> None:
    page = RECIPE.page(RESULTS)
    assert "400 labels: a live reward ends above labels alone in 2 of 2 tasks" in page
    assert "labels 1,536 more for nothing" in page
    assert "static 75\N{NO-BREAK SPACE}%" in page
    assert "120 [80, 160]" in page
    assert "321 (1 of 2 chains)" in page
    assert "never" in page
    assert "a &lt;b&gt;" in page
    assert "1,257" in page
    assert page.count("1,257") == 1  # the books of one seed


def test_charts_have_a_line_for_each_method() -> None:
    found = figures(RESULTS)
    assert set(found) == {f"{task}_{kind}" for task in ("words", "math") for kind in KINDS}
    lines = {row["line"] for row in over(CURVES[:18], "labels", "gold").to_dict()["datasets"]["points"]}
    assert {"live reward", "labels alone", "static reward"} <= lines


KINDS = ("gold_over_labels", "gold_over_kl", "accuracy")


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no row has both"):
        over([{"method": "live", "round": 0}], "labels", "gold")
