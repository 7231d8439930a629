"""The recipe end to end on a small chain, and its claims on simulated races and chains whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pyrite.core.runs import Run
from pyrite.recipes import samplers as recipe
from pyrite.recipes import study
from pyrite.recipes.samplers import CAPPED, RACES, RECIPE, SamplersSettings
from pyrite.training.loop import Training

SMALL = SamplersSettings(
    races={name: {**race, "instances": 2, "steps": min(race.get("steps", 60), 30)} for name, race in RACES.items()},
    repetitions=2,
    toy_demos=400,
    sft=Training(lr=4e-3, epochs=1, batch_size=32),
    scorer=Training(lr=5e-4, epochs=1, batch_size=32),
    scorer_answers=2,
    methods={"offline": "reference()", "on_policy": "on_policy()", "hybrid": "hybrid()", "mixed": "mixed(kappa=0.5)"},
    rounds=2,
    prompts_per_round=12,
    online=Training(lr=1e-3, epochs=1, batch_size=8),
    round_answers=1,
    answer_prompts=6,
    answers=2,
    max_new_tokens=24,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> SamplersSettings:
    monkeypatch.setitem(recipe.SETTINGS, "toy", SMALL)
    return SMALL


def test_recipe_runs_once_and_is_returned_when_done(small: SamplersSettings, tmp_path: Path) -> None:
    config = study.Config(out=tmp_path / "run")
    page = RECIPE.run(config)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "<html" in page.read_text()
    ends = {row["method"]: row for row in found["ends"]}
    assert list(ends) == ["start", *small.methods]
    assert [(row["method"], row["round"]) for row in found["curves"]] == [
        (m, r) for m in small.methods for r in range(3)
    ]
    assert [row["id"] for row in found["claims"]] == [claim.id for claim in recipe.CLAIMS]
    assert found["budget"]["answers"] == 2 * 2 * 12
    assert found["budget"]["couples"] == 2 * 12
    assert ends["start"]["win_gold"] == 0.5
    assert abs(ends["start"]["kl"]) < 1e-4
    firsts = [_texts(tmp_path / "run" / "seed_0" / method, 1) for method in small.methods]
    assert all(first == firsts[0] for first in firsts)  # where policy and reference are one, so are the samplers
    lasts = [_texts(tmp_path / "run" / "seed_0" / method, 2) for method in small.methods]
    assert all(last != lasts[0] for last in lasts[1:])
    before = page.stat().st_mtime_ns
    assert RECIPE.run(config) == page
    assert page.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another config"):
        RECIPE.run(replace(config, seeds=2))


def _texts(folder: Path, number: int) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "rounds" / f"{number:05d}.parquet").to_pylist()
    return [{key: row[key] for key in ("prompt_id", "chosen", "rejected")} for row in rows]


def test_methods_that_were_given_more_are_refused(tmp_path: Path) -> None:
    def rounds(method: str, answers: int) -> Run:
        folder = tmp_path / method
        folder.mkdir()
        row = {"pairs": answers // 2, "ties": 0, "no_verdict": 0, "labels": answers // 2, "answers": answers}
        (folder / "metrics.jsonl").write_text(f"{json.dumps({'answers': 0})}\n{json.dumps(row)}\n")
        return Run(folder, {}, {})

    two = replace(SMALL, methods={"offline": "reference()", "mixed": "mixed()"})
    chain = study.Chain(3, tmp_path, {"rounds: offline": rounds("offline", 8), "rounds: mixed": rounds("mixed", 16)})
    with pytest.raises(ValueError, match="seed 3: methods differ in answers"):
        recipe.budget(chain, two)
    assert recipe.budget(chain, replace(two, methods={"offline": "reference()"}))["labels"] == {"offline": 4}


def races(*, order: float = 2.0, floors: tuple[float, float] = (0.4, 0.1), bound: float = 1.0) -> dict[str, Any]:
    """Five repetitions of what the theory says, or of something else."""

    def about(**figures: float) -> dict[str, Any]:
        return {"by_repetition": {k: [v * d for d in (0.99, 1.0, 1.01, 1.0, 1.0)] for k, v in figures.items()}}

    quick = about(**{"order": order, "steps_to_1e-06": 5, "mean_error": 0.1})
    slow = about(**{"order": 1.0, "steps_to_1e-06": 20, "mean_error": 0.2})
    kept = {**quick, "bound": {"holds": bound}}
    quadratic = {"uniform": slow, "mix_r": quick, "mix_p": quick, CAPPED: quick}
    best = quadratic | {"mix_r(share=1.0)": slow, "mix_p(share=1.0)": slow}
    found = {"orders": quadratic, "best": best, "fixed": quadratic, "sooner": quadratic}
    found["bounds"] = dict.fromkeys(("uniform", "mix_r", "mix_p"), kept)
    for samples, floor in zip((512, 8192), floors, strict=True):
        found[f"floor {samples}"] = {CAPPED: about(mean_error=floor)}
    config = {"instances": 20, "seeds": 5}
    return {name: {"samplers": samplers, "config": config} for name, samplers in found.items()}


REWARD = {"offline": 1.0, "on_policy": 1.5, "hybrid": 1.7, "mixed": 2.0}


def chain(seed: int, *, reward: dict[str, float] = REWARD, noise: float = 1.0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def drawn(mean: float) -> torch.Tensor:
        return mean + noise * torch.randn(200, generator=g, dtype=torch.float64)

    end = {m: {"proxy": drawn(r), "gold": drawn(r), "kl": drawn(2 * r)} for m, r in reward.items()}
    line = torch.arange(4, dtype=torch.float64)
    rounds = {m: {"kl": line, "proxy": r * line + drawn(0.0).mean(), "gold": line} for m, r in reward.items()}
    return {"end": end, "rounds": rounds}


def verdicts(exact: dict[str, Any], chains: list[dict[str, Any]]) -> dict[str, bool | None]:
    return {row["id"]: row["holds"] for row in recipe.check(exact, chains)}


@pytest.mark.parametrize("seeds", [1, 4])
def test_what_is_true_is_found(seeds: int) -> None:
    found = verdicts(races(), [chain(seed) for seed in range(seeds)])
    if seeds == 1:  # one number gives no interval
        assert found.pop("equal-kl-offline") is None
        assert found.pop("equal-kl-on-policy") is None
    assert all(found.values()), found


def test_what_is_otherwise_is_contradicted() -> None:
    swapped = REWARD | {"mixed": 1.0, "offline": 2.0}
    found = verdicts(races(order=1.5, floors=(0.4, 0.2), bound=0.99), [chain(s, reward=swapped) for s in range(4)])
    wrong = {"order-mix-r", "order-mix-p", "bound-uniform", "fixed-rate", "floor", "farther", "equal-kl-offline"}
    wrong |= {f"mixed-over-{other}-{by}" for other in ("offline", "on-policy") for by in ("proxy", "gold")}
    assert {name for name, holds in found.items() if holds is False} >= wrong
    assert found["order-uniform"] is True


def test_without_a_difference_claims_seldom_hold() -> None:
    flat = dict.fromkeys(REWARD, 1.0)
    rows = [row for seed in range(40) for row in recipe.check(races(), [chain(seed, reward=flat)])]
    compared = [row for row in rows if "-over-" in row["id"] or row["id"] == "farther"]
    assert len(compared) == 40 * 9
    assert sum(row["holds"] is not None for row in compared) / len(compared) < 0.12  # intervals of 95 %


def test_a_sampler_that_never_arrives_gives_no_number() -> None:
    exact = races()
    exact["best"]["samplers"]["uniform"]["by_repetition"]["steps_to_1e-06"] = [None] * 5
    row = {row["id"]: row for row in recipe.check(exact, [chain(0)])}["fewer-updates-mix-r"]
    assert (row["measured"], row["interval"], row["holds"]) == (None, None, None)
