"""Evaluation: KL is 0 from itself, its estimators are what they say, errors are over prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrite import data
from pyrite.jobs import evaluate
from pyrite.models import Policy, RewardEnsemble
from pyrite.runs import read_json
from pyrite.text import encode


@pytest.fixture
def config(tuned: Path, few: Path, tmp_path: Path) -> evaluate.Config:
    return evaluate.Config(str(tuned / "model"), str(few), tmp_path / "run", gold="length()", k=3, max_new_tokens=8)


def answers(config: evaluate.Config) -> tuple[dict, list[dict]]:
    run = evaluate.run(config)
    import pyarrow.parquet as pq

    return read_json(run.folder / "done.json"), pq.read_table(run.folder / "answers.parquet").to_pylist()


def test_kl_from_itself_is_zero(config: evaluate.Config) -> None:
    results, rows = answers(replace(config, ref=config.model))
    for name in ("kl_k1", "kl_k3"):
        assert results[name]["mean"] == pytest.approx(0, abs=1e-5)
        assert all(row[name] == pytest.approx(0, abs=1e-5) for row in rows)


def test_kl_estimators_against_a_direct_computation(config: evaluate.Config, tiny: Path) -> None:
    results, rows = answers(replace(config, ref=str(tiny)))
    policy, ref = Policy.load(config.model), Policy.load(tiny)
    for row in rows:
        encoded = encode(policy.tokenizer, row["prompt"], row["response"], finished=row["finished"])
        ids = torch.tensor([encoded.ids])
        ours, theirs = (
            model.model(input_ids=ids)
            .logits.log_softmax(-1)[0, :-1]
            .gather(1, ids[0, 1:, None])[len(encoded.prompt) - 1 :]
            for model in (policy, ref)
        )
        ratio = (ours - theirs).double()
        assert row["kl_k1"] == pytest.approx(ratio.sum().item(), abs=1e-4)
        assert row["kl_k3"] == pytest.approx((torch.exp(-ratio) - 1 + ratio).sum().item(), abs=1e-4)
        assert row["length"] == len(encoded.response)
    assert results["kl_k3"]["mean"] > 0.1


def test_summaries_are_over_prompts(config: evaluate.Config, few: Path) -> None:
    results, rows = answers(config)
    assert results["answers"] == len(rows) == 30
    asked = data.load(few, "prompts")
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in asked for _ in range(3)]
    gold = torch.tensor([row["gold"] for row in rows], dtype=torch.float64).view(10, 3).mean(1)
    assert all(row["gold"] == len(row["response"].split()) for row in rows)
    assert results["gold"]["mean"] == pytest.approx(gold.mean().item())
    assert results["gold"]["se"] == pytest.approx(gold.std().item() / 10**0.5)
    assert results["missing_eos"]["mean"] == pytest.approx(sum(not row["finished"] for row in rows) / 30)
    assert 0 < results["distinct_1"] <= results["distinct_2"] <= 1


def test_proxy_sees_an_end_token_only_where_there_is_one(config: evaluate.Config, rewards: Path) -> None:
    results, rows = answers(replace(config, rewards=str(rewards), ensemble="wco()"))
    assert {row["finished"] for row in rows} == {True, False}
    ensemble = RewardEnsemble.load(rewards)
    for row in rows:
        want = ensemble.scores([row["prompt"]], [row["response"]], finished=row["finished"]).amin(0).item()
        assert row["proxy"] == pytest.approx(want, abs=1e-4)
    assert results["proxy"]["mean"] == pytest.approx(sum(row["proxy"] for row in rows) / 30)


def test_distinct_worked() -> None:
    assert evaluate.distinct([[1, 2, 1], [1, 2]], 1) == pytest.approx(2 / 5)
    assert evaluate.distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)
    assert evaluate.distinct([[1]], 2) == 0.0


def test_refusals_before_work(config: evaluate.Config, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    Policy.load(tiny).save(other)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    for change, words in (
        ({"gold": "lenth()"}, "did you mean length"),
        ({"ensemble": "uwo(wait=1)"}, "did you mean weight"),
        ({"rewards": str(tmp_path / "nowhere")}, "no reward model here"),
        ({"ref": str(other)}, "other vocabularies"),
        ({"ref": str(tmp_path / "nowhere")}, "no tokenizer at"),
        ({"k": 0}, "k=0"),
        ({"max_new_tokens": 64}, "reads 64 at most"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            evaluate.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_a_done_run_loads_no_model(config: evaluate.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate.run(config).results
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert evaluate.run(config).results == first
