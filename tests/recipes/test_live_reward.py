"""The recipe end to end on a small chain; its claims on simulated chains whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrite.feedback.ledger import Ledger
from pyrite.recipes import live_reward as recipe
from pyrite.recipes import study
from pyrite.recipes.live_reward import Lines, LiveRewardSettings, Task, methods
from pyrite.training.loop import Training

EVERY = tuple(methods(2, 1))
SMALL = replace(
    recipe.SETTINGS["toy"],
    tasks={
        "words": Task("word_collector(words='toy')", methods=EVERY, max_new_tokens=24),
        "distill": Task("distillation(strong={strong!r}, weak={weak!r})", methods=("gold", "live"), max_new_tokens=24),
        "math": Task("math_chain()", "arithmetic", ("gold", "live"), 40),
    },
    labels=24,
    warm=12,
    held_out=20,
    members=2,
    rounds=2,
    prompts=16,
    toy_demos=600,
    weak_demos=100,
    math_demos=300,
    math_prompts=160,
    answer_prompts=6,
    answers=2,
    sft=Training(lr=4e-3, epochs=1, batch_size=16),
    math_sft=Training(lr=4e-3, epochs=3, batch_size=16),
    reward=Training(lr=5e-4, epochs=1, batch_size=16),
    online=Training(lr=1e-3, batch_size=8),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> LiveRewardSettings:
    monkeypatch.setitem(recipe.SETTINGS, "toy", SMALL)
    return SMALL


def test_recipe_runs_once_with_equal_labels(small: LiveRewardSettings, tmp_path: Path) -> None:
    config = study.Config(out=tmp_path / "run")
    page = recipe.RECIPE.run(config)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "<html" in page.read_text() and "annotator right" in page.read_text()
    assert {(row["task"], row["method"]) for row in found["ends"]} == {
        (task, method) for task, options in small.tasks.items() for method in options.methods
    }
    for row in found["ends"]:
        paid = row["labels"]
        assert paid == small.labels or (row["method"].startswith("gold") and paid <= small.labels), row
    for row in found["books"]:
        if row["method"] != "offline":
            with Ledger(tmp_path / "run" / "seed_0" / row["task"] / row["method"] / "ledger.db") as ledger:
                assert len(list(ledger.rows())) == row["labels"]  # the x-axis is the ledger's
    starts = {row["gold"] for row in found["rounds"] if row["task"] == "words" and row["round"] == 0}
    assert len(starts) == 1  # every method begins where the others do
    assert {row["id"] for row in found["claims"]} >= {
        "live-over-gold-words",
        "live-over-gold-math",
        "fewer-labels-distill",
    }
    assert all(row["holds"] is None for row in found["claims"])  # one chain decides nothing
    before = page.stat().st_mtime_ns
    assert recipe.RECIPE.run(config).stat().st_mtime_ns == before


def curves(live: float, gold: float, *, noise: float, seed: int) -> Lines:
    """Gold that rises evenly to an end, over 400 labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.linspace(0, 400, 9, dtype=torch.float64)

    def rise(end: float) -> dict[str, torch.Tensor]:
        end += noise * torch.randn((), generator=g).item()
        return {"gold": end * labels / 400, "labels": labels, "kl": labels / 100}

    return {"live": rise(live), "gold": rise(gold)}


def row_of(rows: list[dict], name: str) -> dict:
    return next(row for row in rows if row["id"] == f"{name}-words")


def test_claims_on_chains_whose_truth_is_known() -> None:
    for live, gold, ahead, saved in ((3.0, 1.5, True, True), (1.5, 3.0, False, None), (2.0, 2.0, None, None)):
        chains = [curves(live, gold, noise=0.1, seed=seed) for seed in range(5)]
        rows = recipe.check({"words": chains})
        assert {row["id"] for row in rows} == {
            "live-over-gold-words",
            "fewer-labels-words",
        }
        found = row_of(rows, "live-over-gold")
        assert found["holds"] is ahead
        assert found["interval"][0] < live - gold < found["interval"][1]
        assert row_of(rows, "fewer-labels")["holds"] is saved
    assert row_of(rows, "live-over-gold")["by_seed"] != []


def test_labels_saved_are_those_of_the_ledger() -> None:
    one = curves(3.0, 1.5, noise=0, seed=0)
    assert recipe.labels_to(one, "live", 1.5) == pytest.approx(200)
    assert math.isnan(recipe.labels_to(one, "gold", 9.0))
    assert row_of(recipe.check({"words": [one]}), "fewer-labels")["measured"] == pytest.approx(200)
    never = row_of(recipe.check({"words": [curves(1.0, 2.0, noise=0, seed=0)]}), "fewer-labels")
    assert never["measured"] is never["holds"] is None


def test_every_method_has_the_same_labels() -> None:
    assert {method.offline + method.online for method in methods(400, 100).values()} == {400}
