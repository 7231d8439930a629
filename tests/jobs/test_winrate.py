"""Job winrate: the table as it is read, what it writes, and every bad row named."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyrite.core.runs import read_json
from pyrite.data import rows as data
from pyrite.jobs import winrate
from pyrite.math import winrates


def comparisons(models: int = 3, prompts: int = 40, **options: Any) -> list[dict[str, Any]]:
    """Models of which the later win more often, and prompts of different difficulty."""
    g = random.Random(0)
    return [
        {
            "prompt_id": f"p{q}",
            "model": f"model {m}",
            "preference": 1 + (g.random() < (0.2 + 0.2 * m + 0.3 * (q % 2))),
            "length": g.randrange(100, 900),
            "baseline_length": 300 + 10 * q,
            **options,
        }
        for m in range(models)
        for q in range(prompts)
    ]


def config(rows: list[dict[str, Any]], folder: Path, **options: Any) -> winrate.Config:
    folder.mkdir(exist_ok=True)
    data.write(rows, folder / "table.jsonl")
    return winrate.Config(str(folder / "table.jsonl"), folder / "run", **{"n_boot": 50, **options})


def results(asked: winrate.Config) -> dict[str, Any]:
    run = winrate.run(asked)
    assert run.results is not None
    found = read_json(run.folder / "winrates.json")
    for row in found["models"]:
        assert run.results["models"][row["model"]] == {name: row[name] for name in ("raw", "raw_se", "lc", "lc_se")}
    return found


def of(found: dict[str, Any], model: str) -> dict[str, Any]:
    return next(row for row in found["models"] if row["model"] == model)


def test_what_it_finds(tmp_path: Path) -> None:
    rows = comparisons()
    rows[5]["preference"], rows[6]["preference"] = 0, None
    found = results(config(rows, tmp_path))
    table = winrate.tabled(str(tmp_path / "table.jsonl"))
    gap = winrates.length_gap(table.baseline_length, table.length)
    hard = winrates.difficulty(table.wins, gap)
    for m in range(3):
        row = of(found, f"model {m}")
        rate, error = winrates.win_rate(table.wins[m])
        assert (row["raw"], row["raw_se"]) == pytest.approx((rate.item(), error.item()))
        fitted = winrates.fit(table.wins[m], gap[m], hard)
        assert [row["phi"], row["psi"], row["theta"]] == pytest.approx(fitted.tolist(), abs=1e-6)
        assert row["lc"] == pytest.approx(winrates.controlled(fitted, hard).mean().item())
        assert row["raw_lo"] < row["raw"] < row["raw_hi"] and row["lc_lo"] < row["lc"] < row["lc_hi"]
    first = of(found, "model 0")
    assert (first["prompts"], first["tied"]) == (39, 1)
    assert first["won"] + first["lost"] + first["tied"] == 39
    assert found["difficulty"] == "estimated from 3 models"
    assert [row["lc"] for row in found["models"]] == sorted((row["lc"] for row in found["models"]), reverse=True)


def test_differences_are_paired(tmp_path: Path) -> None:
    """A copy of a model differs from it by nothing at all; every pair is there."""
    rows = comparisons()
    rows += [{**row, "model": "copy"} for row in rows if row["model"] == "model 1"]
    found = results(config(rows, tmp_path))
    assert len(found["differences"]) == 6
    (same,) = [row for row in found["differences"] if (row["a"], row["b"]) == ("model 1", "copy")]
    zero = {name: value for name, value in same.items() if name not in "ab"}
    assert list(zero.values()) == pytest.approx([0] * 6, abs=1e-9)
    for row in found["differences"]:
        assert row["lc"] == pytest.approx(of(found, row["a"])["lc"] - of(found, row["b"])["lc"])


def test_forms_of_a_row_are_one(tmp_path: Path) -> None:
    rows = comparisons()
    plain = results(config(rows, tmp_path / "plain"))
    shuffled = random.Random(1).sample(rows, len(rows))
    renamed = [{("score" if k == "preference" else k): v for k, v in row.items()} for row in rows]
    probability = [{**row, "win": row["preference"] - 1.0} for row in rows]
    for row in probability:
        del row["preference"]
    texts = [
        {
            "instruction": row["prompt_id"],
            "generator_1": "baseline",
            "generator_2": row["model"],
            "output_1": "x" * row["baseline_length"],
            "output_2": "x" * row["length"],
            "preference": float(row["preference"]),
        }
        for row in rows
    ]
    for name, other in (("score", renamed), ("win", probability), ("texts", texts)):
        assert results(config(other, tmp_path / name)) == plain
    for row in plain["models"]:  # the resamples go by the order of prompts, the rates do not
        again = of(results(config(shuffled, tmp_path / "shuffled")), row["model"])
        assert [again[k] for k in ("raw", "raw_se", "lc")] == pytest.approx([row[k] for k in ("raw", "raw_se", "lc")])


def test_csv_and_printed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(config(comparisons(), tmp_path))
    with (tmp_path / "run" / "winrates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [row["model"] for row in found["models"]]
    assert [float(row["lc"]) for row in rows] == [row["lc"] for row in found["models"]]
    lines = winrate.aligned(found["models"])
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    printed = capsys.readouterr().err
    assert all(line in printed for line in lines)
    assert "3 models on 40 prompts against baseline" in printed


def test_difficulty_is_given_estimated_or_left_out(tmp_path: Path) -> None:
    rows = comparisons()
    given = [{**row, "difficulty": 2.0 * (int(row["prompt_id"][1:]) % 2)} for row in rows]
    itself = comparisons(1, model="baseline", preference=1.5)
    sources = {
        "given": (given, {}, "from the table"),
        "off": (given, {"difficulty": "none"}, "left out"),
        "two": (comparisons(2), {}, "left out, 3 models are needed to estimate it"),
        "itself": (comparisons(2) + itself, {}, "left out, 3 models are needed to estimate it"),
    }
    for name, (table, options, want) in sources.items():
        found = results(config(table, tmp_path / name, **options))
        assert found["difficulty"] == want
        assert all((row["psi"] != 0) == (name == "given") for row in found["models"])


def test_prior_and_gamed_baselines(tmp_path: Path) -> None:
    rows = comparisons()
    phi = {
        name: [of(results(config(rows, tmp_path / name, **options)), f"model {m}")["phi"] for m in range(3)]
        for name, options in {
            "default": {},
            "none": {"length_precision": 0.0},
            "certain": {"length_mean": -0.7, "length_precision": 1e9},
            "gamed": {"gamed": ("model 1", "model 2")},
        }.items()
    }
    assert phi["certain"] == pytest.approx([-0.7] * 3, abs=1e-3)
    for m in range(3):
        assert abs(phi["default"][m] + 1.61) < abs(phi["none"][m] + 1.61)
    assert phi["gamed"][0] != pytest.approx(phi["default"][0], abs=1e-3)


def test_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(comparisons(), tmp_path)
    first = winrate.run(asked).results
    monkeypatch.setattr(winrates, "rates", lambda *_, **__: pytest.fail("estimated again"))
    assert winrate.run(asked).results == first
    assert set(winrate.OUTPUTS) <= {path.name for path in (tmp_path / "run").iterdir()}
    assert winrate.inputs(asked) == {"data": asked.data}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no verdict": ({"preference": ...}, "no verdict; give one of preference"),
    "two verdicts": ({"win": 0.5}, "verdicts preference and win; give one of"),
    "preference": ({"preference": 2.5}, "preference is 2.5; it must be 1 .* to 2"),
    "half": ({"preference": 0.5}, "preference is 0.5"),
    "win": ({"preference": ..., "win": 1.5}, "win is 1.5; it must be a probability"),
    "text": ({"preference": "m"}, "preference is 'm'; it must be a finite number"),
    "truth": ({"preference": True}, "preference is True"),
    "model": ({"model": None}, "model is None; give every comparison a model"),
    "prompt": ({"prompt_id": ...}, "prompt_id is None"),
    "length": ({"length": ...}, "neither length nor output"),
    "baseline length": ({"baseline_length": ...}, "neither baseline_length nor baseline_output"),
    "negative": ({"length": -1}, "length is -1; a length is at least 0"),
    "again": ({"prompt_id": "p0"}, "a second verdict on 'model 0' for prompt 'p0'; keep one"),
    "baseline": ({"baseline": "another"}, "compared with 'another', not 'baseline' as before"),
    "difficulty": ({"difficulty": 1.0}, "difficulty is in some rows only"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path: Path, name: str) -> None:
    change, words = BAD[name]
    rows = comparisons()
    rows[6] = {key: value for key, value in (rows[6] | change).items() if value is not ...}
    asked = config(rows, tmp_path)
    with pytest.raises(data.DataError, match=rf"table\.jsonl, line 7: .*{words}") as error:
        winrate.run(asked)
    assert "\n" not in str(error.value)
    assert not asked.out.exists()


def test_a_length_that_is_not_finite(tmp_path: Path) -> None:
    asked = config(comparisons(), tmp_path)
    lines = (tmp_path / "table.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "length": float("nan")})
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    with pytest.raises(data.DataError, match="line 3: length is nan; it must be a finite number"):
        winrate.run(asked)


def test_bad_tables_and_options(tmp_path: Path) -> None:
    lone = [*comparisons(1), {**comparisons(1, 1)[0], "model": "lone"}]
    torn = [{**row, "difficulty": float(i)} for i, row in enumerate(comparisons())]
    cases = [
        (lone, {}, r"too few verdicts on lone \(1\); give at least 2, or drop its rows"),
        (torn, {}, "prompt 'p0' has two difficulties"),
        (comparisons(), {"gamed": ("modell 1",)}, "no such model; did you mean 'model 1'"),
        (comparisons(), {"n_boot": 1}, "--n-boot 1"),
        (comparisons(), {"level": 95.0}, r"--level 95\.0"),
        (comparisons(), {"length_precision": -1.0}, r"--length-precision -1\.0"),
    ]
    for rows, options, words in cases:
        asked = config(rows, tmp_path, **options)
        with pytest.raises(ValueError, match=words):
            winrate.run(asked)
        assert not asked.out.exists()


def test_seeds_differ_in_the_intervals_only(tmp_path: Path) -> None:
    asked = config(comparisons(), tmp_path)
    one, two = results(asked), results(replace(asked, seed=1, out=tmp_path / "other"))
    for a, b in zip(one["models"], two["models"], strict=True):
        assert (a["raw"], a["lc"]) == (b["raw"], b["lc"]) and a["lc_lo"] != b["lc_lo"]
