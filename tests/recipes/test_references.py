"""The recipe end to end on a small chain, and its claims on simulated golds whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrite.recipes import references as recipe
from pyrite.recipes import study
from pyrite.recipes.references import RECIPE, BetaCurves, ReferencesSettings
from pyrite.training.loop import Training

SMALL = ReferencesSettings(
    toy_demos=400,
    better_demos=100,
    sft=Training(lr=4e-3, epochs=1, batch_size=32),
    stronger=Training(lr=2e-3, epochs=1, batch_size=32),
    vocabulary=300,
    pair_prompts=20,
    pair_answers=4,
    dpo=Training(lr=5e-4, epochs=1, batch_size=16),
    betas=(0.1, 0.01),
    other_betas=(0.1,),
    answer_prompts=6,
    max_new_tokens=24,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ReferencesSettings:
    monkeypatch.setitem(recipe.SETTINGS, "toy", SMALL)
    return SMALL


def test_recipe_runs_once_and_is_returned_when_done(
    small: ReferencesSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study.Config(out=tmp_path / "run")
    page = RECIPE.run(config)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "<html" in page.read_text()
    refs = ["self", "none", "prior", "family", "stranger", "tokenizer"]
    assert [(row["ref"], row["beta"]) for row in found["curves"]] == [
        (ref, beta) for ref in refs for beta in (small.betas if ref == "self" else small.other_betas)
    ]
    assert [row["id"] for row in found["claims"]] == [claim.id for claim in recipe.CLAIMS]
    assert all(row["holds"] in (True, False, None) for row in found["claims"])
    assert [row["ref"] for row in found["indicators"]] == ["self", "prior", "family", "stranger", "tokenizer"]
    assert found["indicators"][0]["correlation"] == pytest.approx(1.0)
    assert all(row["sd"] > 0 for row in found["indicators"])
    said = capsys.readouterr().err
    assert said.count("reference: computed") == 5  # self, prior and three models; the second beta computes nothing
    assert said.count("no forward pass") == 1
    before = page.stat().st_mtime_ns
    assert RECIPE.run(config) == page
    assert page.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another config"):
        RECIPE.run(replace(config, seeds=2))


BETAS = [1.0, 0.1, 0.01, 0.001]
TRUTH = {  # mean gold by beta
    "self": [1.0, 2.0, 3.0, 0.0],
    "none": [1.0, 1.5, 2.0, 1.0],
    "prior": [1.0, 1.5, 2.5, 1.0],
    "family": [2.0, 4.0, 3.0, 1.0],
    "stranger": [1.0, 2.0, 2.5, 1.0],
    "tokenizer": [2.0, 3.5, 2.0, 1.0],
}


def simulated(seed: int, *, noise: float = 1.0, truth: dict[str, list[float]] = TRUTH) -> BetaCurves:
    g = torch.Generator().manual_seed(seed)

    def drawn(means: list[float]) -> torch.Tensor:
        return torch.tensor(means).double()[:, None] + noise * torch.randn(len(means), 200, generator=g).double()

    values = {("length", ref): drawn([30.0 if ref == "none" else 20.0] * 4) for ref in truth}
    values |= {("gold", ref): drawn(means) for ref, means in truth.items()}
    accuracy = dict.fromkeys(truth, (0.45, 0.5, 0.6, 0.62))
    return BetaCurves(dict.fromkeys(truth, BETAS), values, accuracy, study.halves(values))


def verdicts(chains: list[BetaCurves]) -> dict[str, bool | None]:
    return {row["id"]: row["holds"] for row in recipe.check(chains)}


@pytest.mark.parametrize("seeds", [1, 4])
def test_what_is_true_is_found(seeds: int) -> None:
    found = verdicts([simulated(seed) for seed in range(seeds)])
    if seeds == 1:
        assert found.pop("policy-accuracy") is None  # one number gives no interval
    assert all(found.values()), found


def test_what_is_reversed_is_contradicted() -> None:
    flipped = {**TRUTH, "none": TRUTH["self"], "self": TRUTH["none"], "family": TRUTH["none"]}
    found = verdicts([simulated(seed, truth=flipped) for seed in range(4)])
    assert found["reference-helps"] is False
    assert found["compatible"] is False


def test_without_a_difference_claims_seldom_hold() -> None:
    """Nothing depends on beta or the reference: looking for the best beta must not create a gain."""
    flat = {ref: [1.0] * 4 for ref in TRUTH}
    rows = [row for seed in range(40) for row in recipe.check([simulated(seed, truth=flat)])]
    compared = [row for row in rows if row["id"] not in ("posterior-is-long", "policy-accuracy", "stronger-wants-more")]
    wrong = sum(row["holds"] is not None for row in compared)
    assert wrong / len(compared) < 0.12  # intervals of 95 %


def test_best_beta_is_measured_on_the_other_half() -> None:
    chain = simulated(0)
    gold = chain.values["gold", "family"]
    even, odd = gold[:, 0::2].mean(1), gold[:, 1::2].mean(1)
    want = (odd[even.argmax()] + even[odd.argmax()]) / 2
    assert chain.best("family").item() == pytest.approx(want.item())
    assert chain.best_beta("family").item() == pytest.approx(-1.0)
