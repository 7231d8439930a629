"""The page of the soups recipe from results made up here."""

import itertools
from typing import Any

from pyrite.recipes import study
from pyrite.recipes.soups import CLAIMS, RECIPE, figures

METHODS = ["vb", "pp", "psoups"]
STRENGTH = {"vb": 0.0, "pp": 1.0, "psoups": 2.0}


def duels(*, by: str = "gold") -> dict[str, Any]:
    """Everybody wins against weaker ones by a tenth for each unit of strength."""
    rows = []
    for first, second in itertools.permutations(METHODS, 2):
        half = 0.5 + 0.1 * (STRENGTH[first] - STRENGTH[second])
        known = {"wins": 5, "losses": 4, "ties": 1, "missing": 0, "half": half, "half_lo": half - 0.05}
        known |= {"half_hi": half + 0.05, "without": half, "without_lo": None, "without_hi": None}
        rows.append({"first": first, "second": second, **known})
    options = ("technical", "brief", "detailed", "kind", "plain", "curt")
    return {
        "methods": METHODS,
        "matrix": rows,
        "averages": [{"method": m, "half": 0.4 + 0.1 * STRENGTH[m]} for m in METHODS],
        "by_combination": [{**row, "combination": "technical+brief+kind"} for row in rows],
        "by_criterion": [{**row, "option": "brief"} for row in rows],
        "scores": [
            {"method": m, "combination": "technical+brief+kind", "option": o, "mean": STRENGTH[m], "se": 0.1, "by": by}
            for m in METHODS
            for o in options
        ],
        "pareto": [{"method": m, "front": m == "psoups", **dict.fromkeys(options, STRENGTH[m])} for m in METHODS],
        "calls": 240,
        "over": "prompts",
    }


def results() -> dict[str, Any]:
    costs = {"policies": 6, "combinations": 8, "answers": 9216}
    costs |= {"policies_more": 1, "combinations_more": 12, "answers_more": 1536}
    accuracy = {"accuracy": 0.7, "accuracy_lo": 0.6, "accuracy_hi": 0.8}
    policy = {
        "policy": "ppo brief",
        "kl_k1": -0.01,
        "kl_k1_lo": -0.05,
        "kl_k1_hi": 0.03,
        "length": 20.0,
        "missing_eos": 0.0,
        "score": 1.0,
    }
    kl = {"pp": (-0.02, -0.12, 0.08), "vb": (2.0, 1.0, 3.0)}
    return {
        **{"recipe": "soups", "scale": "toy", "seeds": [0], "seconds": 12.0},
        **{"duels": duels(), "added": duels(), "general": duels()},
        "kl": [{"method": m, "kl": mean, "kl_lo": lo, "kl_hi": hi} for m, (mean, lo, hi) in kl.items()],
        "costs": [{"method": "psoups", **costs}, {"method": "pmorl", **costs, "policies": 1}],
        "claims": study.check(CLAIMS, [{"duels": duels(), "added": duels(), "general": duels()}]),
        "reward_models": [{"seed": 0, "kind": "reward model", **accuracy}],
        "policies": [policy],
        "samples": [{"method": "pp", "combination": "plain", "prompt": "a fox <b>", "response": "the fox ."}],
        "stages": [{"stage": "ppo brief", "seconds": 1.0}, {"stage": "ppo kind", "seconds": 2.0}],
    }


def test_the_page_says_who_wins_and_what_it_costs() -> None:
    page = RECIPE.page(results())
    assert "psoups wins most" in page
    assert "9,216" in page and "1,536" in page
    assert "−0.01 [−0.05, 0.03]" in page  # a KL below 0 is shown with its interval
    assert "−0.02 [−0.12, 0.08]" in page and "2.00 [1.00, 3.00]" in page
    assert "a fox &lt;b&gt;" in page and "a fox <b>" not in page


def test_charts_by_name() -> None:
    assert set(figures(results())) >= {"win_rates", "pareto_technical_brief"}
