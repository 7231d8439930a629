"""What recipes share: a run for its settings, seeds in a row, results with their origin, claims, verdicts in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from pyrite.core.runs import Run, RunError, read_json
from pyrite.jobs import bandit
from pyrite.math.seeds import derive
from pyrite.recipes import study
from pyrite.recipes.study import Chain, Claim, Config, Row
from pyrite.report.page import text


@dataclass(frozen=True)
class Settings:
    rounds: int = 4


CLAIMS = [Claim("large", "a paper", "The seed is above 0", float)]


def collect(chains: list[Chain], settings: Settings) -> Row:
    seeds = [chain.seed for chain in chains]
    return {"curves": [], "claims": study.check(CLAIMS, seeds), "folders": [chain.folder.name for chain in chains]}


def chain(one: Chain, settings: Settings) -> None:
    one.runs["stage"] = Run(one.folder, {}, {}, results={"seconds": 0.25 * one.seed})


RECIPE = study.Recipe(
    "mine", {"toy": Settings()}, chain, collect, lambda found: ("A title", "A lead.", [text("Prose.")]), lambda _: {}
)


def test_a_recipe_runs_its_chains_and_says_where_its_results_come_from(tmp_path: Path, capsys) -> None:
    config = Config(out=tmp_path / "run", seeds=2, first_seed=3)
    page = RECIPE.run(config)
    found = read_json(tmp_path / "run" / "results.json")
    assert found["folders"] == ["seed_3", "seed_4"] and found["seeds"] == [3, 4]
    assert (found["recipe"], found["scale"], found["seconds"]) == ("mine", "toy", 1.8)
    assert found["stages"] == [{"stage": "stage", "seconds": 0.75}]  # of the first chain
    assert found["config"] == {"rounds": 4}
    assert found["manifest"] == read_json(tmp_path / "run" / "manifest.json")
    assert page.read_text() == RECIPE.page(found)
    for told in ("seeds 3, 4", "The seed is above 0", "✓ holds" if found["claims"][0]["holds"] else "? undecided"):
        assert told in page.read_text()
    assert "--seeds 2 --first-seed 3" in page.read_text()  # how to repeat it
    err = capsys.readouterr().err
    assert "mine: chain with seed 4" in err and "+3.500" in err
    before = page.stat().st_mtime_ns
    assert RECIPE.run(config) == page and page.stat().st_mtime_ns == before


def test_a_stage_is_run_in_the_folder_of_its_chain_with_a_seed_of_its_own(tmp_path: Path) -> None:
    one = Chain(3, tmp_path)
    race = bandit.Config(Path("races", "short"), instances=1, seeds=1, steps=2)
    one.run("race", race)
    one.run("again", replace(race, out=Path("again")), "short")
    assert one.runs["race"].folder == tmp_path / "races" / "short" and one.results("race")["seconds"] >= 0
    assert [one.runs[name].config["seed"] for name in ("race", "again")] == [derive(3, "short")] * 2
    one.run("unseeded", replace(race, out=Path("unseeded"), seed=5), draws=False)
    assert one.runs["unseeded"].config["seed"] == 5


def test_claims_are_a_table() -> None:
    table = """
first | table 1 | It is
    above 0
second | not in, which has no such figure | It is 0.5
"""
    first, second = study.claims("arXiv:0", table, {"first": float, "second": (float, study.contains(0.5))})
    assert (first.source, first.statement) == ("arXiv:0, table 1", "It is above 0")
    assert second.source == "not in arXiv:0, which has no such figure"
    assert first.rule(0.1, 0.2) is True and second.rule(0.1, 0.2) is False
    with pytest.raises(KeyError, match="first"):
        study.claims("arXiv:0", table, {})


def test_a_run_belongs_to_its_settings(tmp_path: Path) -> None:
    RECIPE.run(Config(out=tmp_path / "run"))
    with pytest.raises(RunError, match="rounds"):
        replace(RECIPE, scales={"toy": Settings(rounds=5)}).run(Config(out=tmp_path / "run"))


def test_a_scale_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe mine: --scale large: there is toy"):
        RECIPE.run(Config(out=tmp_path / "run", scale="large"))
    assert not (tmp_path / "run").exists()


def test_without_a_difference_claims_seldom_hold() -> None:
    """Chains whose true mean is 0 give a verdict in about one study of twenty."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 5, generator=g).tolist()
    verdicts = [study.check(CLAIMS, chains)[0]["holds"] for chains in noise]
    assert 4 <= len([v for v in verdicts if v is not None]) <= 36


def test_a_claim_about_something_that_was_not_run_is_left_out_and_one_chain_decides_nothing() -> None:
    claims = [*CLAIMS, Claim("other", "a paper", "Of another method", lambda chain: {}["method"])]
    (row,) = study.check(claims, [2.0])
    assert (row["id"], row["measured"], row["interval"], row["holds"]) == ("large", 2.0, None, None)


def test_means_over_chains_have_an_interval_and_one_chain_its_own_error() -> None:
    rows = [{"seed": seed, "method": "live", "gold": 1.0 + seed, "gold_se": 0.5} for seed in range(3)]
    (mean,) = study.over_chains(rows, ("method",), ("gold", "kl"))
    assert mean["gold"] == 2.0 and mean["gold_lo"] == pytest.approx(-0.484, abs=1e-3) and mean["chains"] == 3
    (one,) = study.over_chains(rows[:1], ("method",), ("gold",))
    assert (one["gold_lo"], one["gold_hi"]) == pytest.approx((1 - 0.98, 1 + 0.98)) and "kl" not in one


def test_verdicts_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"holds": True, "measured": 1.0, "interval": [0.5, 1.5], "statement": "one"},
        {"holds": False, "measured": -1.0, "interval": [-1.5, -0.5], "statement": "two"},
        {"holds": None, "measured": None, "interval": None, "statement": "three"},
    ]
    study.tell(rows)
    lines = capsys.readouterr().err.splitlines()
    assert "holds" in lines[0] and "+1.000 [+0.500, +1.500]  one" in lines[0]
    assert "does not hold" in lines[1]
    assert "undecided" in lines[2] and "–  three" in lines[2]


def test_curves_over_kl_are_compared_where_the_shorter_one_ends() -> None:
    long = {"gold": torch.tensor([0.0, 4.0, 8.0]), "kl": torch.tensor([0.0, 1.0, 2.0])}
    short = {"gold": torch.tensor([0.0, 3.0]), "kl": torch.tensor([0.0, 1.5])}
    assert study.at_equal_kl(short, long, "gold") == pytest.approx(3 - 6)
    mixed = {"proxy": torch.tensor([0, 1, 3.0]), "kl": torch.tensor([0, 2, 6.0])}
    offline = {"proxy": torch.tensor([0, 1, 1.2]), "kl": torch.tensor([0, 1, 3.0])}
    assert study.at_equal_kl(mixed, offline, "proxy") == pytest.approx(1.5 - 1.2)  # at 3 nats, a quarter of the way
