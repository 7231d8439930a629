"""The job bandit: orders as the theory has them, tables that agree, refusals before any work."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pyrite.core.runs import Run, read_json
from pyrite.jobs import bandit


@pytest.fixture
def config(tmp_path: Path) -> bandit.Config:
    return bandit.Config(tmp_path / "run", actions=8, instances=20, seeds=2, steps=40)


def instances_of(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.folder / "instances.parquet").to_pylist()


def test_linear_and_quadratic(config: bandit.Config) -> None:
    run = bandit.run(config)
    results = read_json(run.folder / "results.json")
    assert run.results is not None and run.results["samplers"] == results["samplers"]
    for name, order in (("uniform", 1.0), ("mix_r", 2.0), ("mix_p", 2.0)):
        found = results["samplers"][name]
        assert found["order"] == pytest.approx(order, abs=0.06)
        assert found["step_order"] == pytest.approx(order, abs=0.01)
        low, high = found["order_range"]
        assert low <= found["order"] <= high
        assert found["drift"] < 1e-12 and found["floor"] is None and found["bound"] is None
    samplers = results["samplers"]
    assert samplers["mix_p"]["steps_to_1e-06"] < samplers["uniform"]["steps_to_1e-06"]
    assert samplers["mix_p"]["contraction"] < 1e-12 < samplers["uniform"]["contraction"] < 1
    assert results["recipe"] == "bandit" and results["config"] == run.config


def test_tables_agree(config: bandit.Config) -> None:
    run = bandit.run(config)
    results = read_json(run.folder / "results.json")
    curves, instances = results["curves"], instances_of(run)
    assert len(curves) == 3 * 41
    assert len(instances) == 3 * 40 and {row["seed"] for row in instances} == {0, 1}
    assert all(row["error_lo"] <= row["error"] <= row["error_hi"] for row in curves)
    for name, found in results["samplers"].items():
        last = [row for row in curves if row["sampler"] == name][-1]
        assert last["error"] == found["error"]
        mine = [row["last_kl"] for row in instances if row["sampler"] == name]
        assert found["kl"]["mean"] == pytest.approx(sum(mine) / len(mine)) == pytest.approx(last["kl"])
        assert sum(found["by_repetition"]["mean_error"]) / 2 == pytest.approx(found["mean_error"]["mean"])
        assert found["kl"]["lo"] < found["kl"]["mean"] < found["kl"]["hi"]
    first = [row for row in results["curves"] if row["step"] == 0]
    assert all(row["error"] == first[0]["error"] and row["kl"] == pytest.approx(0, abs=1e-12) for row in first)


def test_a_repetition_keeps_its_rewards(config: bandit.Config, tmp_path: Path) -> None:
    both = instances_of(bandit.run(config))
    one = instances_of(bandit.run(replace(config, seeds=1, out=tmp_path / "one")))
    other = instances_of(bandit.run(replace(config, seed=1, out=tmp_path / "other")))
    assert [row["last_reward"] for row in one if row["sampler"] == "mix_p"] == pytest.approx(
        [row["last_reward"] for row in both if row["sampler"] == "mix_p" and row["seed"] == 0]
    )
    assert one[0]["last_reward"] != other[0]["last_reward"]
    assert read_json(tmp_path / "one" / "results.json")["samplers"]["mix_p"]["kl"]["lo"] is None


def test_a_cacheful_at_a_time_is_the_same(config: bandit.Config, tmp_path: Path, monkeypatch) -> None:
    whole = bandit.run(config).results
    monkeypatch.setattr(bandit, "PAIRS", 7 * 64)
    parts = bandit.run(replace(config, out=tmp_path / "parts")).results
    assert whole is not None and parts is not None
    for name, found in whole["samplers"].items():
        assert parts["samplers"][name]["error"] == pytest.approx(found["error"], rel=1e-3, abs=1e-14)
        assert parts["samplers"][name]["reward"]["mean"] == pytest.approx(found["reward"]["mean"], rel=1e-12)


def test_bounds_where_they_are_promised(config: bandit.Config) -> None:
    samplers = ("uniform", "mix_r()", "mix_p", "on_policy")
    run = bandit.run(replace(config, rewards="unit", samplers=samplers))
    found = read_json(run.folder / "results.json")["samplers"]
    for name in samplers[:3]:
        assert found[name]["bound"]["holds"] == 1.0 and 0 < found[name]["bound"]["closest"] < 1
    assert found["on_policy"]["bound"] is None


def test_drawn_pairs_stop_at_their_floor(config: bandit.Config, tmp_path: Path) -> None:
    drawn = replace(config, samples=4096, samplers=("uniform", "mix_p(cap='range')"), seeds=4)
    found = read_json(bandit.run(drawn).folder / "results.json")["samplers"]
    for sampler in found.values():
        assert sampler["order"] is None and sampler["step_order"] is not None
        assert sampler["floor"]["measured"]["mean"] == pytest.approx(sampler["floor"]["predicted"], rel=0.15)
    again = bandit.run(replace(drawn, out=tmp_path / "again"))
    assert read_json(again.folder / "results.json")["samplers"] == found


def test_flipped_labels_move_the_optimum_and_say_so(config: bandit.Config) -> None:
    found = read_json(bandit.run(replace(config, noise=0.2)).folder / "results.json")["samplers"]["mix_p"]
    assert found["drift"] > 0.01 and found["value_gap"]["mean"] > 1e-4
    assert found["order"] is None and found["contraction"] is None and found["diverged"] is None


def test_another_loss_and_a_run_that_diverges(config: bandit.Config, tmp_path: Path) -> None:
    other = bandit.run(replace(config, loss="ipo(tau=0.5)", rate="0.5", out=tmp_path / "ipo")).results
    assert other is not None and other["samplers"]["uniform"]["order"] is None
    wild = bandit.run(replace(config, rate="1e9", out=tmp_path / "wild"))
    found = read_json(wild.folder / "results.json")["samplers"]["mix_p"]
    assert found["diverged"] == 1.0
    assert math.nan not in json.loads((wild.folder / "results.json").read_text(), parse_constant=pytest.fail)["curves"]


def test_done_is_not_done_again(config: bandit.Config) -> None:
    run = bandit.run(config)
    before = (run.folder / "results.json").stat().st_mtime_ns
    assert bandit.run(config).results == run.results
    assert (run.folder / "results.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="steps: 40 there, 41 now"):
        bandit.run(replace(config, steps=41))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"samplers": ()}, "give at least one"),
        ({"samplers": ("uniform", "uniform")}, "one is named twice"),
        ({"samplers": ("mix_q",)}, "unknown name .mix_q.: did you mean"),
        ({"samplers": ("pyrite.math.ensembles:mean()",)}, "not a pyrite.math.samplers.Sampler"),
        ({"actions": 1}, "--actions 1: give at least 2"),
        ({"instances": 0}, "--instances 0"),
        ({"seeds": 0}, "--seeds 0"),
        ({"steps": 0}, "--steps 0"),
        ({"beta": -1.0}, "--beta -1.0"),
        ({"loss": "dpo(beta=0.1)"}, "give beta once, by --beta"),
        ({"rate": "fast"}, "--rate 'fast': give matched, best or a number above 0"),
        ({"rate": "-1"}, "--rate '-1': give matched, best or a number above 0"),
        ({"noise": 0.7}, "--noise 0.7"),
        ({"samples": 0}, "--samples 0"),
        ({"ref_spread": -1.0}, "--ref-spread -1.0"),
    ],
)
def test_refusals_before_work(config: bandit.Config, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bandit.run(replace(config, **options))
    assert not config.out.exists()
