"""Evaluation: KL is 0 from itself, its estimators are what they say, errors are over prompts; analyses of pairs."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reading import encode

from pyrite.core.runs import read_json
from pyrite.data import rows as data
from pyrite.jobs import evaluate
from pyrite.math import statistics
from pyrite.models.policy import Policy, RewardEnsemble


@pytest.fixture
def config(tuned: Path, few: Path, tmp_path: Path) -> evaluate.Config:
    return evaluate.Config(str(tuned / "model"), str(few), tmp_path / "run", gold="length()", k=3, max_new_tokens=8)


def answers(config: evaluate.Config) -> tuple[dict, list[dict]]:
    run = evaluate.run(config)
    import pyarrow.parquet as pq

    return read_json(run.folder / "done.json"), pq.read_table(run.folder / "answers.parquet").to_pylist()


def test_kl_from_itself_is_zero(config: evaluate.Config) -> None:
    results, rows = answers(replace(config, ref=config.model))
    for name in ("kl_k1", "kl_k3", "kl_exact"):
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
    results, rows = answers(replace(config, proxy=str(rewards), ensemble="wco()"))
    assert {row["finished"] for row in rows} == {True, False}
    ensemble = RewardEnsemble.load(rewards)
    for row in rows:
        want = ensemble.scores([row["prompt"]], [row["response"]], finished=row["finished"]).amin(0).item()
        assert row["proxy"] == pytest.approx(want, abs=1e-4)
    assert results["proxy"]["mean"] == pytest.approx(sum(row["proxy"] for row in rows) / 30)


def token_logps(policy: Policy, prompt: str, response: str, *, finished: bool = True) -> tuple[list[int], torch.Tensor]:
    """Response tokens, and the log-probabilities (T, V) of everything in their places, by the model's own forward."""
    encoded = encode(policy.tokenizer, prompt, response, finished=finished)
    logits = policy.model(input_ids=torch.tensor([encoded.ids])).logits
    return encoded.response, logits.double().log_softmax(-1)[0, len(encoded.prompt) - 1 : -1].detach()


def test_exact_kl_of_each_position(config: evaluate.Config, tiny: Path) -> None:
    results, rows = answers(replace(config, ref=str(tiny)))
    policy, ref = Policy.load(config.model), Policy.load(tiny)
    by_position = defaultdict(list)
    for row in rows:
        ours, theirs = (
            token_logps(model, row["prompt"], row["response"], finished=row["finished"])[1] for model in (policy, ref)
        )
        kl = (ours.exp() * (ours - theirs)).sum(-1).tolist()
        assert row["kl_exact"] == pytest.approx(sum(kl), abs=1e-4)
        for t, nats in enumerate(kl):
            by_position[t].append(nats)
    found = read_json(config.out / "analyses.json")["answers"]
    assert found["answers_by_position"] == [len(values) for values in by_position.values()]
    want = [sum(values) / len(values) for values in by_position.values()]
    assert found["kl_by_position"] == pytest.approx(want, abs=1e-4)
    assert min(want) > 0
    # both are unbiased for the KL of whole answers
    assert abs(results["kl_exact"]["mean"] - results["kl_k1"]["mean"]) < 4 * results["kl_k1"]["se"]
    assert results["kl_exact"]["se"] < results["kl_k1"]["se"]


def test_degeneration_is_reported_with_its_numbers(config: evaluate.Config) -> None:
    results, rows = answers(config)
    found = read_json(config.out / "analyses.json")["answers"]
    assert found == {name: results[name] for name in ("degenerate", "repetition")} | {
        "missing_eos": results["missing_eos"]["mean"]
    }
    tokenizer = Policy.load(config.model).tokenizer
    for row in rows:
        tokens = encode(tokenizer, row["prompt"], row["response"], finished=row["finished"]).response
        assert row["repetition"] == statistics.repetition(tokens)
    assert results["degenerate"] == (results["missing_eos"]["mean"] > 0.2 or results["repetition"] > 0.5)


def test_pairs_against_a_direct_computation(config: evaluate.Config, tiny: Path, pairs: Path) -> None:
    asked = replace(config, ref=str(tiny), pairs=str(pairs), min_count=20, k=1)
    results, _ = answers(asked)
    policy, ref = Policy.load(asked.model), Policy.load(tiny)
    ratios, ends, rewards, sums = defaultdict(list), [], [], []
    for pair in data.load(pairs, "pairs"):
        reward, total, end = {}, {}, {}
        for side in ("chosen", "rejected"):
            ids, ours = token_logps(policy, pair["prompt"], pair[side])
            _, theirs = token_logps(ref, pair["prompt"], pair[side])
            mine, yours = (values[range(len(ids)), ids] for values in (ours, theirs))
            for token, ratio in zip(ids, (mine - yours).tolist(), strict=True):
                ratios[token].append(ratio)
            reward[side], total[side], end[side] = (mine - yours).sum().item(), mine.sum().item(), mine[-1].item()
        ends.append((end["chosen"], end["rejected"]))
        rewards.append(reward["chosen"] - reward["rejected"])
        sums.append(total["chosen"] > total["rejected"])
    found = read_json(asked.out / "analyses.json")["pairs"]
    assert (found["pairs"], found["dropped"], found["tokens"]) == (80, 0, sum(map(len, ratios.values())))
    assert results["accuracy"] == found["accuracy"] and results["policy_accuracy"] == found["policy_accuracy"]
    assert found["accuracy"]["mean"] == pytest.approx(sum(r > 0 for r in rewards) / 80)
    assert found["policy_accuracy"]["mean"] == pytest.approx(sum(sums) / 80)
    assert found["margin"]["mean"] == pytest.approx(sum(rewards) / 80, abs=1e-4)
    assert found["end_token"]["chosen"]["mean"] == pytest.approx(sum(c for c, _ in ends) / 80, abs=1e-4)
    assert found["end_token"]["gap"]["mean"] == pytest.approx(sum(c - r for c, r in ends) / 80, abs=1e-4)
    flat = [ratio for values in ratios.values() for ratio in values]
    assert found["ratio"]["mean"] == pytest.approx(sum(flat) / len(flat), abs=1e-5)
    assert found["tail_mass"] == sum(ratio < -10 for ratio in flat) / len(flat)
    means = {token: sum(values) / len(values) for token, values in ratios.items()}
    often = sorted((mean, token) for token, mean in means.items() if len(ratios[token]) >= 20)
    assert [row["token"] for row in found["down"]] == [token for _, token in often[:10]]
    assert [row["token"] for row in found["up"]] == [token for _, token in often[::-1][:10]]
    assert sum(found["histogram"]["counts"]) == len(means)
    with (asked.out / "tokens.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {int(row["token"]): int(row["count"]) for row in table} == {t: len(v) for t, v in ratios.items()}
    assert [float(row["ratio"]) for row in table] == pytest.approx(sorted(means.values()), abs=1e-5)
    names = policy.tokenizer.convert_ids_to_tokens([int(row["token"]) for row in table])
    assert [row["text"] for row in table] == names


def test_pairs_with_the_policy_as_its_reference(config: evaluate.Config, pairs: Path) -> None:
    """Every ratio 0, every ranking by reward a tie; a cut answer has no end token to speak of."""
    rows = data.load(pairs, "pairs")[:6]
    rows[0]["chosen"] = rows[0]["rejected"] = "cat " * 200  # equal after truncation
    rows[0]["rejected"] += "dog"
    rows[1]["chosen"] = "the " * 200
    data.write(rows, config.out.parent / "pairs.jsonl")
    asked = replace(config, ref=config.model, pairs=str(config.out.parent / "pairs.jsonl"), k=1)
    results, _ = answers(asked)
    found = read_json(asked.out / "analyses.json")["pairs"]
    assert (found["pairs"], found["dropped"]) == (4, 2)
    assert results["accuracy"] == {"mean": 0.5, "se": 0.0}
    assert found["margin"]["mean"] == pytest.approx(0, abs=1e-5) and found["tail_mass"] == 0
    assert found["ratio"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["end_token"] == found["end_token_ref"] and found["end_token"]["chosen"]["mean"] < 0
    assert found["down"] == [] == found["up"]  # no token occurs 100 times
    data.write(rows[:1], config.out.parent / "none.jsonl")
    with pytest.raises(ValueError, match="none of 1 pairs can be scored, the first because both answers are"):
        evaluate.run(replace(asked, pairs=str(config.out.parent / "none.jsonl"), out=config.out.parent / "other"))


def test_refusals_before_work(config: evaluate.Config, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    policy, tokenizer = Policy.load(tiny), AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["zebra"])
    policy.model.resize_token_embeddings(len(tokenizer))
    policy.save(other)
    tokenizer.save_pretrained(other)
    for change, words in (
        ({"gold": "lenth()"}, "did you mean length"),
        ({"ensemble": "uwo(wait=1)"}, "did you mean weight"),
        ({"proxy": str(tmp_path / "nowhere")}, "no reward model here"),
        ({"ref": str(other)}, "other vocabularies"),
        ({"ref": str(tmp_path / "nowhere")}, "no such folder"),
        ({"pairs": str(tmp_path / "pairs.jsonl")}, "give --ref too"),
        ({"pairs": str(tmp_path / "pairs.jsonl"), "ref": str(tiny)}, "no file"),
        ({"min_count": 0}, "--min-count 0"),
        ({"k": 0}, "--k 0"),
        ({"max_new_tokens": 64}, "reads 64 tokens at most"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            evaluate.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_a_done_run_loads_no_model(config: evaluate.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate.run(config).results
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert evaluate.run(config).results == first


def test_answers_for_alpaca_eval(config: evaluate.Config, few: Path) -> None:
    _, rows = answers(replace(config, alpaca_eval="mine"))
    written = read_json(config.out / "alpaca_eval.json")
    assert [row["output"] for row in written] == [row["response"] for row in rows if row["sample"] == 0]
    assert written[0] == {"instruction": rows[0]["prompt"], "output": rows[0]["response"], "generator": "mine"} | {
        "dataset": few.stem
    }
