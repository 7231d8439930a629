"""The page of the references recipe."""

from __future__ import annotations

from pyrite.recipes.references import RECIPE, against_beta

REFS = ("self", "none", "prior", "family", "stranger", "tokenizer")


def row(ref: str, beta: float, gold: float) -> dict:
    numbers = {"gold": gold, "best_gold": gold, "kl": 3.0, "length": 20.0, "missing_eos": 0.1, "repetition": 0.0}
    return (
        {"ref": ref, "beta": beta, "chains": 2, "degenerate": int(beta < 0.01), "accuracy": 0.7}
        | numbers
        | {
            "policy_accuracy": 0.5,
            "gold_lo": gold - 0.1,
            "gold_hi": gold + 0.1,
        }
    )


CURVES = [row(ref, beta, gold) for ref in REFS for beta, gold in ((1.0, 1.0), (0.1, 2.5), (0.001, 0.5))]
START = {"gold": 1.2, "length": 18.0, "chains": 2, "degenerate": 0}
RESULTS = {
    **{"recipe": "references", "scale": "toy", "seeds": [0, 1], "seconds": 12.0, "curves": CURVES},
    "starts": [{"model": name, **START} for name in ("start", "family", "stranger", "tokenizer")],
    "indicators": [{"ref": "tokenizer", "sd": 91.3, "correlation": 0.25, "accuracy": 0.5}],
    "claims": [
        {
            "id": "x",
            "source": "arXiv:0",
            "statement": "It holds",
            "measured": 1.0,
            "interval": [0.5, 1.5],
            "holds": True,
        },
        {"id": "y", "source": "arXiv:0", "statement": "Unknown", "measured": 1.0, "interval": None, "holds": None},
    ],
    "samples": [{"prompt": "tell me", "answers": [{"policy": "start", "response": "a <b>", "gold": 1.0, "length": 3}]}],
    "config": {"gold": "length()"},
    "manifest": {"pyrite": "0"},
}


def test_the_page_says_what_came_out() -> None:
    page = RECIPE.page(RESULTS)
    assert "Most gold: own reference, β = 0.1." in page
    assert "stronger, other tokenizer" in page
    assert "a &lt;b&gt;" in page
    assert "91.3" in page
    for verdict in ("holds", "undecided"):
        assert verdict in page


def test_a_line_for_each_reference_and_a_dot_where_it_degenerates() -> None:
    chart = against_beta(RESULTS, "gold", ("self", "none")).to_dict()
    points = chart["datasets"]["points"]
    assert {p["line"] for p in points} == {"own reference", "none (posterior)", "start"}
    assert [p["beta"] for p in points if p["line"] == "own reference"] == [0.001, 0.1, 1.0]
    assert {p["beta"] for p in chart["datasets"]["peaks"]} == {0.001}
