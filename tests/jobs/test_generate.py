"""Candidates: k to each prompt, by prompt and sample alone, with the log-probabilities of the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pyrite import data, runs
from pyrite.jobs import generate
from pyrite.models import Policy
from pyrite.packing import Row
from pyrite.text import encode


@pytest.fixture
def config(tuned: Path, few: Path, tmp_path: Path) -> generate.Config:
    return generate.Config(str(tuned / "model"), str(few), tmp_path / "run", k=5, max_new_tokens=8)


def rows_of(config: generate.Config) -> list[dict]:
    return data.load(generate.run(config).folder / "candidates.parquet", "candidates")


def test_k_answers_a_prompt_with_their_logps(config: generate.Config, few: Path) -> None:
    rows = rows_of(config)
    ids = [row["prompt_id"] for row in data.load(few, "prompts")]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(i, s) for i in ids for s in range(5)]
    assert {row["finished"] for row in rows} == {True, False}
    assert all(row["length"] == 8 for row in rows if not row["finished"])
    policy = Policy.load(config.model)
    read_back = 0
    for row in rows:
        encoded = encode(policy.tokenizer, row["prompt"], row["response"], finished=row["finished"])
        if len(encoded.response) != row["length"]:
            continue  # it wrote a special token, which the text does not show
        read_back += 1
        logps = policy.logps(policy.pack([Row(encoded.prompt, [encoded.response])]))
        assert logps.sum.item() == pytest.approx(row["logp"], abs=1e-3)
    assert read_back > 40
    results = runs.read_json(config.out / "done.json")
    assert results["answers"] == 50
    assert results["missing_eos"] == pytest.approx(1 - sum(row["finished"] for row in rows) / 50)
    assert results["mean_length"] == pytest.approx(sum(row["length"] for row in rows) / 50)


@pytest.mark.parametrize("change", [{"rows": 3}, {"rows": 12}], ids=str)
def test_rows_at_once_change_nothing(config: generate.Config, change: dict) -> None:
    one, other = rows_of(config), rows_of(replace(config, out=config.out.with_name("other"), **change))
    assert [{**row, "logp": 0} for row in one] == [{**row, "logp": 0} for row in other]


def test_more_answers_keep_the_first_and_seeds_differ(config: generate.Config) -> None:
    one = rows_of(config)
    more = rows_of(replace(config, out=config.out.with_name("more"), k=7))
    assert [row["response"] for row in more if row["sample"] < 5] == [row["response"] for row in one]
    other = rows_of(replace(config, out=config.out.with_name("other"), seed=1))
    assert [row["response"] for row in other] != [row["response"] for row in one]


def test_an_interruption_repeats_no_work(config: generate.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, rows=5)  # parts of 4 prompts
    want = rows_of(replace(config, out=config.out.with_name("whole")))
    sizes: list[int] = []
    real = generate._part

    def part(policy, prompts, ids, config, advance):
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return real(policy, prompts, ids, config, advance)

    monkeypatch.setattr(generate, "_part", part)
    with pytest.raises(KeyboardInterrupt):
        generate.run(config)
    assert rows_of(config) == want
    assert sizes == [4, 4, 4, 2]
    assert not (config.out / "parts").exists()


BAD = [
    ({"k": 0}, "k=0"),
    ({"rows": 0}, "rows"),
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 64}, "max-new-tokens 64: .* reads 64 at most"),
    ({"max_new_tokens": 62}, "leaves no room"),
    ({"limit": 0}, "no prompts"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_options_are_refused_before_work(config: generate.Config, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate.run(replace(config, **change))
    assert not config.out.exists()
