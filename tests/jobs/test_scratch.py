"""A model from scratch: reads any text back, trains, and is the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reading import response_ids

from pyrite.data import rows
from pyrite.data.text import decode
from pyrite.jobs import scratch
from pyrite.models.policy import Policy, RewardModel


@pytest.fixture
def config(pairs: Path, tmp_path: Path) -> scratch.Config:
    return scratch.Config(str(pairs), tmp_path / "run", vocabulary=300, hidden=16, heads=2, context=96)


def test_its_model_is_an_ordinary_one(config: scratch.Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = scratch.run(config)
    assert run.results is not None
    assert run.results["vocabulary"] <= 300
    said = capsys.readouterr().err
    policy = Policy.load(run.folder / "model")
    assert "note" not in said + capsys.readouterr().err
    assert policy.packed
    assert policy.context == 96
    texts = ["the cat sat .", "Grüße, 世界 🙂\n\ttab", "<eos> is only text"]
    assert decode(policy.tokenizer, [response_ids(policy.tokenizer, one) for one in texts]) == texts
    assert RewardModel.load(run.folder / "model", head_seed=0).packed
    assert sum(p.numel() for p in policy.parameters()) == run.results["parameters"]
    assert scratch.run(config).done


def test_one_seed_one_model(config: scratch.Config) -> None:
    runs = [
        scratch.run(replace(config, out=config.out / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    one, same, other = (list(Policy.load(run.folder / "model").parameters()) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["demos", "prompts"])
def test_other_kinds_of_rows(config: scratch.Config, demos: Path, kind) -> None:
    assert scratch.run(replace(config, data=str(demos), kind=kind)).done


def test_refusals_before_work(config: scratch.Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--hidden 16 is no multiple of --heads 3"):
        scratch.run(replace(config, heads=3))
    rows.write([{"prompt": "a"}], tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match="missing chosen"):
        scratch.run(replace(config, data=str(tmp_path / "prompts.jsonl")))
    assert not config.out.exists()
