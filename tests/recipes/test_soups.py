"""The recipe end to end on a small chain, its demonstrations, its claims on duels whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import Row, read_rows
from reading import encode_all

from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions
from pyrite.models.policy import Policy
from pyrite.recipes import soups as recipe
from pyrite.recipes import study, toy
from pyrite.recipes.soups import FOLLOWED, METHODS, PUBLISHED, RECIPE, SoupsChain, SoupsSettings
from pyrite.training.loop import Training

FAST = Training(lr=1e-3, batch_size=16)
SMALL = SoupsSettings(
    demos=200,
    test_prompts=4,
    train_prompts=16,
    general_prompts=240,
    sft=FAST,
    multitask=FAST,
    reward=FAST,
    dpo=FAST,
    ppo=FAST,
    steps=1,
    prompts_per_step=8,
)
KNOWN = Dimensions.load("toy")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> SoupsSettings:
    monkeypatch.setitem(recipe.SETTINGS, "toy", SMALL)
    return SMALL


def test_recipe_runs_once_and_is_returned_when_done(small: SoupsSettings, tmp_path: Path) -> None:
    config = study.Config(out=tmp_path / "run")
    page = RECIPE.run(config)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "<html" in page.read_text()
    assert found["duels"]["methods"] == list(METHODS)
    units = {row["wins"] + row["losses"] + row["ties"] + row["missing"] for row in found["duels"]["matrix"]}
    assert units == {8 * SMALL.test_prompts * SMALL.answers}
    added = {row["combination"] for row in found["added"]["by_combination"]}
    assert len(added) == 4 and all("lively" in combination for combination in added)
    assert {row["id"] for row in found["claims"]} == {claim.id for claim in recipe.CLAIMS}
    assert all(row["holds"] is None for row in found["claims"])  # one chain decides nothing
    assert [row["method"] for row in found["kl"]] == list(METHODS)
    assert {row["method"]: row["policies"] for row in found["costs"]} == {"psoups": 6, "pmorl": 1}
    assert not list((tmp_path / "run" / "seed_0").glob("ppo_*_again"))
    before = page.stat().st_mtime_ns
    assert RECIPE.run(config) == page and page.stat().st_mtime_ns == before


def test_test_prompts_are_never_learned_from(tmp_path: Path) -> None:
    place = SoupsChain(study.Chain(0, tmp_path), SMALL)
    recipe.start(place)
    files = (place.prompts("pair"), place.prompts("pool"))
    train, test = ({row["prompt_id"] for row in data.load(path, "prompts")} for path in files)
    asked = {row["asked_id"] for row in data.load(tmp_path / "demos.parquet", "demos")}
    assert len(test) == SMALL.test_prompts and not test & (train | asked)


def test_demonstrations_lean_to_what_their_prompts_name() -> None:
    asked = toy.prompts()[:40]
    rows = recipe.demos(4000, asked, KNOWN, follow=0.6, seed=0)
    words = {name: [len(r["response"].split()) for r in rows if name in r["preferences"]] for name in FOLLOWED}
    mean = {name: sum(lengths) / len(lengths) for name, lengths in words.items()}
    assert mean["brief"] < mean["curt"] < mean["detailed"]
    assert all(row["prompt"].startswith(row["asked"]) for row in rows)
    named = sum(len(row["preferences"]) for row in rows) / (3 * len(rows))
    assert named == pytest.approx(0.6, abs=0.02)


def test_combinations_after_an_addition_are_those_with_it(tmp_path: Path) -> None:
    place = SoupsChain(study.Chain(0, tmp_path), SoupsSettings())
    assert len(place.combinations) == 8 and len(place.added) == 4
    assert all("lively" in combination for combination in place.added)


def test_kl_is_read_off_the_judged_answers(tmp_path: Path) -> None:
    """The start's own answers are at 0; others at the mean of what their policy and the start make of them."""
    place = SoupsChain(study.Chain(0, tmp_path), SMALL)
    recipe.start(place)
    start = Policy.load(place.model("sft"))
    asked = data.load(place.prompts("pool"), "prompts")
    said = ["the fox was old .", "hello my friend !", "it took the tail with a bone .", "the king slept ."]
    encoded = encode_all(start.tokenizer, [row["prompt"] for row in asked], said, finished=[True, True, True, False])
    logps = read_rows(start, [Row(one.prompt, [one.response]) for one in encoded]).sum.tolist()
    for name, shift in (("own", 0.0), ("other", 1.5)):
        rows = [
            {**row, "sample": 0, "response": text, "finished": i < 3, "length": 5, "logp": logp + shift}
            for i, (row, text, logp) in enumerate(zip(asked, said, logps, strict=True))
        ]
        data.write(rows, tmp_path / f"{name}.parquet")
    files = {name: [tmp_path / f"{name}.parquet"] for name in ("own", "other")}
    own, other = recipe.divergence(tmp_path / "sft" / "model", files)
    assert (own["kl"], own["kl_se"]) == pytest.approx((0.0, 0.0), abs=1e-4)
    assert (other["kl"], other["kl_se"]) == pytest.approx((1.5, 0.0), abs=1e-4)


def matrix(**rates: float) -> dict:
    """Duels from "first_over_second" rates."""
    rows = []
    for name, half in rates.items():
        first, second = name.split("_over_")
        rows += [{"first": first, "second": second, "half": half}, {"first": second, "second": first, "half": 1 - half}]
    return {"matrix": rows}


def test_claims_on_duels_whose_truth_is_known() -> None:
    chains = [{"duels": matrix(psoups_over_pp=half, pmorl_over_pp=1 - half)} for half in (0.6, 0.62, 0.64)]
    found = {row["id"]: row for row in study.check(recipe.CLAIMS, chains)}
    assert found["psoups-over-pp"]["holds"] is True and found["psoups-over-pp"]["measured"] == pytest.approx(0.12)
    assert found["pmorl-over-pp"]["holds"] is False
    assert "psoups-best" not in found and "psoups-over-pmorl-added" not in found  # not run
    assert study.check(recipe.CLAIMS, chains[:1])[0]["holds"] is None


def test_the_best_method_has_the_highest_mean_over_the_published_ones() -> None:
    names = list(PUBLISHED)
    rates = {f"{a}_over_{b}": 0.6 for i, a in enumerate(names) for b in names[:i]}  # later ones win
    duels = matrix(**rates)
    assert recipe.best("psoups", duels) == pytest.approx(0.04)
    assert recipe.best("vb", duels) == pytest.approx(-0.2)


def test_costs_count_policies_and_answers() -> None:
    soups, morl = recipe.costs(SoupsSettings())
    assert (soups["policies"], soups["combinations"], soups["combinations_more"]) == (6, 8, 12)
    assert soups["answers"] == morl["answers"] == 6 * SoupsSettings().steps * SoupsSettings().prompts_per_step
    assert morl["answers_more"] == 7 * soups["answers_more"]


def test_several_chains_are_averaged_with_intervals() -> None:
    rows = [{"first": "a", "second": "b", "wins": w, "half": w / 10, "half_lo": 0.0, "half_hi": 1.0} for w in (4, 6, 8)]
    none = dict.fromkeys(("by_combination", "by_criterion", "averages", "scores", "pareto"), ())
    merged = recipe.together([{"methods": ["a", "b"], "calls": 5, "matrix": [row], **none} for row in rows])
    (row,) = merged["matrix"]
    assert merged["calls"] == 15 and merged["over"] == "chains" and "half_lo_lo" not in row
    assert row["wins"] == 6 and row["half"] == pytest.approx(0.6)
    assert row["half_lo"] == pytest.approx(0.6 - 4.303 * 0.2 / 3**0.5, abs=1e-3)
