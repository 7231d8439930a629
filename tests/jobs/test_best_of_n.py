"""Best-of-n: gold stays with its answer, cut answers stay out, every refusal comes before work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reading import asked
from safetensors.torch import load_file

from pyrite.core import specs as parts
from pyrite.core.runs import read_json
from pyrite.data import rows as data
from pyrite.jobs import best_of_n
from pyrite.math import ensembles, statistics
from pyrite.models.policy import RewardModel, member_paths


@pytest.fixture
def config(labels: Path, rewards: Path, tmp_path: Path) -> best_of_n.Config:
    return best_of_n.Config(str(labels / "candidates.parquet"), str(rewards), tmp_path / "run", n=(1, 2, 4))


def standardized(gold: torch.Tensor, value: float) -> float:
    return ((value - gold.mean()) / gold.std(correction=0)).item()


def test_gold_stays_with_its_answer() -> None:
    """Two members that rank four answers differently; a second prompt repeats the first, as bands need two."""
    proxy = torch.tensor([[0.0, 1, 2, 3], [9, 8, 1, 0]], dtype=torch.float64)[:, None].expand(2, 2, 4)
    gold = torch.tensor([[4.0, 0, 2, 1]] * 2, dtype=torch.float64)
    specs = ("uwo(weight=0.5)", "wco()")
    rows = best_of_n.curves(proxy, gold, [1, 4], {spec: parts.part(spec, ensembles) for spec in specs})
    found = {(row["objective"], row["n"]): row["gold"] for row in rows}
    assert found["uwo(weight=0.5)", 4] == pytest.approx(standardized(gold, 2.0))
    assert found["wco()", 4] == pytest.approx(standardized(gold, 1.0))
    assert found["member 0", 4] == pytest.approx(standardized(gold, 1.0))
    assert found["member 1", 4] == pytest.approx(standardized(gold, 4.0))
    assert found["single", 4] == pytest.approx(standardized(gold, 2.5))
    assert all(found[name, 1] == pytest.approx(0) for name in ("single", "member 0", *specs))
    assert {row["n"]: row["kl"] for row in rows} == {n: pytest.approx(statistics.best_of_n_kl(n)) for n in (1, 4)}


def test_scores_belong_to_their_rows(config: best_of_n.Config) -> None:
    run = best_of_n.run(config)
    stored = load_file(run.folder / "scores.safetensors")
    rows = data.load(config.candidates, "candidates")
    grid = stored["row"]
    assert stored["proxy"].shape == (2, *grid.shape)
    for index, path in enumerate(member_paths(config.proxy)):
        model = RewardModel.load(path)
        some = [rows[i] for i in grid.flatten().tolist()]
        encoded = model.encode(asked([row["prompt"] for row in some], [row["response"] for row in some]))
        alone = [model.raw_scores(encoded.take([i])) for i in range(len(encoded))]
        raw = torch.cat(alone).view_as(grid)
        torch.testing.assert_close(stored["raw"][index], raw, atol=1e-5, rtol=1e-5)
        z = (raw - raw.mean()) / raw.std(correction=0)
        torch.testing.assert_close(stored["proxy"][index], z, atol=1e-4, rtol=1e-4)
    assert stored["gold"].flatten().tolist() == [rows[i]["gold"] for i in grid.flatten().tolist()]
    assert all(rows[i]["finished"] for i in grid.flatten().tolist())
    assert all(len({rows[i]["prompt_id"] for i in line}) == 1 for line in grid.tolist())
    curves = read_json(run.folder / "curves.json")
    names = ["single", "member 0", "member 1", *config.objectives]
    assert [(row["objective"], row["n"]) for row in curves] == [(name, n) for name in names for n in (1, 2, 4)]
    gold = (stored["gold"] - stored["gold"].mean()) / stored["gold"].std(correction=0)
    worst = statistics.best_of_n(stored["proxy"].amin(0), gold, [4]).mean().item()
    found = {(row["objective"], row["n"]): row["gold"] for row in curves}
    assert found["wco()", 4] == pytest.approx(worst, abs=1e-5)
    assert all(row["gold_lo"] <= row["gold"] <= row["gold_hi"] for row in curves)
    assert best_of_n.run(config).done


def test_cut_answers(config: best_of_n.Config) -> None:
    rows = data.load(config.candidates, "candidates")
    cut = sum(not row["finished"] for row in rows)
    assert cut > 0
    excluded = best_of_n.run(config).results
    kept = best_of_n.run(replace(config, truncated="keep", out=config.out.with_name("kept"))).results
    assert excluded is not None
    assert kept is not None
    assert (excluded["truncated"], kept["truncated"]) == (cut, cut)
    assert excluded["answers"] < kept["answers"] == 8


def test_one_reward_model_folder_is_an_ensemble_of_one(config: best_of_n.Config) -> None:
    run = best_of_n.run(replace(config, proxy=str(Path(config.proxy) / "member_1")))
    assert load_file(run.folder / "scores.safetensors")["proxy"].shape[0] == 1


def changed(config: best_of_n.Config, folder: Path, change) -> str:
    rows = [change(row) for row in data.load(config.candidates, "candidates")]
    path = folder / "changed.jsonl"
    data.write([row for row in rows if row], path)
    return str(path)


def test_refusals_before_work(config: best_of_n.Config, tmp_path: Path) -> None:
    first = data.load(config.candidates, "candidates")[0]["prompt_id"]
    cases = [
        ({"n": (1, 50)}, "n = 50 but the fewest finished answers to a prompt are"),
        ({"n": (0, 2)}, "--n 0 2: give at least 1"),
        ({"objectives": ("wko()",)}, "did you mean wco"),
        ({"proxy": str(tmp_path / "nowhere")}, "no reward model here"),
        ({"candidates": lambda row: {k: v for k, v in row.items() if k != "gold"}}, "row 1 has no `gold`"),
        ({"candidates": lambda row: {**row, "finished": False}}, "every answer was cut"),
        ({"candidates": lambda row: {**row, "gold": 1.0}}, "gold scores every answer 1"),
        (
            {"candidates": lambda row: row if row["prompt_id"] == first else None},
            "at least 2 prompts",
        ),
    ]
    for case, words in cases:
        change = {k: changed(config, tmp_path, v) if callable(v) else v for k, v in case.items()}
        with pytest.raises(ValueError, match=words) as error:
            best_of_n.run(replace(config, **{"n": (), **change}))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_nan_gold_is_refused_with_its_row(config: best_of_n.Config, tmp_path: Path) -> None:
    rows = data.load(config.candidates, "candidates")
    rows[3]["gold"] = float("nan")
    data.write(rows, tmp_path / "nan.parquet")
    with pytest.raises(ValueError, match=r"nan\.parquet, row 4: gold is nan; numbers must be finite"):
        best_of_n.run(replace(config, candidates=str(tmp_path / "nan.parquet")))
    assert not config.out.exists()
