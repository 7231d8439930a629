"""Candidates: k to each prompt, by prompt and sample alone, with the log-probabilities of the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import Row
from reading import encode, prompt_ids

from pyrite.core import runs
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.conditioning import Dimensions, Variants, conditioned
from pyrite.data.responses import Responses
from pyrite.jobs import generate
from pyrite.models.generation import sample
from pyrite.models.policy import Policy

MINE = """
- {id: cat, dimension: animal, sentence: about the cat, criterion: More cats.}
- {id: dog, dimension: animal, sentence: about the dog, criterion: More dogs.}
- {id: big, dimension: size, sentence: big, criterion: Bigger.}
- {id: small, dimension: size, sentence: small, criterion: Smaller.}
"""


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
        logps = policy.logps(policy.pack(Responses.of([Row(encoded.prompt, [encoded.response])])))
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
    ({"k": 0}, "--k 0"),
    ({"rows": 0}, "rows"),
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 0.0}, "--top-p 0.0"),
    ({"top_k": -1}, "--top-k -1"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ({"max_new_tokens": 64}, "max-new-tokens 64: .* reads 64 tokens at most"),
    ({"max_new_tokens": 62}, "leaves no room"),
    ({"limit": 0}, "--limit 0"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_options_are_refused_before_work(config: generate.Config, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate.run(replace(config, **change))
    assert not config.out.exists()


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(MINE)
    return str(tmp_path / "mine.yaml")


def said(rows: list[dict]) -> dict[tuple, str]:
    return {(row["asked_id"], tuple(row["preferences"]), row["sample"]): row["response"] for row in rows}


def test_every_prompt_under_every_preference(config: generate.Config, few: Path, mine: str) -> None:
    variants = Variants(mine, ("cat", "neutral", "dog", "all"))
    rows = rows_of(replace(config, variants=variants, limit=4))
    raw = data.load(few, "prompts")[:4]
    under = [["cat"], [], ["dog"], ["cat", "big"], ["cat", "small"], ["dog", "big"], ["dog", "small"]]
    assert [(r["asked_id"], r["preferences"], r["sample"]) for r in rows] == [
        (r["prompt_id"], preferences, s) for r in raw for preferences in under for s in range(5)
    ]
    known = Dimensions.load(mine)
    prompts = {row["prompt_id"]: row["prompt"] for row in raw}
    for row in rows:
        made = conditioned({"prompt_id": row["asked_id"], "prompt": row["asked"]}, known.chosen(row["preferences"]))
        assert {name: row[name] for name in made} == made
        assert row["asked"] == prompts[row["asked_id"]]
    again = data.load(config.out / "candidates.parquet", "prompts")
    assert [row["preferences"] for row in again] == under * 4 and "asked" in again[0]


def test_a_draw_belongs_to_its_rendered_prompt(config: generate.Config, mine: str) -> None:
    """Whatever else is asked for, however many rows at once: the same answers; a neutral one is the plain one."""
    every = Variants(mine, ("cat", "neutral", "dog", "all"))
    whole = said(rows_of(replace(config, variants=every)))
    some = replace(config, out=config.out.with_name("some"), variants=Variants(mine, ("dog", "cat+small")), rows=7)
    part = said(rows_of(some))
    assert len(part) == 100 and part.items() <= whole.items()
    assert len({whole[key] for key in whole if key[0] == "0"}) > 20
    plain = rows_of(replace(config, out=config.out.with_name("plain")))
    assert {(row["prompt_id"], (), row["sample"]): row["response"] for row in plain}.items() <= whole.items()
    assert set(plain[0]) == {"prompt_id", "prompt", "sample", "response", "finished", "length", "logp"}


def test_an_interruption_keeps_what_was_drawn_under_preferences(
    config: generate.Config, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of neutral prompts only, and others: one table."""
    config = replace(config, variants=Variants(mine, ("neutral", "cat")), k=1, rows=1, limit=6)
    want = rows_of(replace(config, out=config.out.with_name("whole"), rows=512))
    calls = []
    real = generate._part

    def part(*given):
        calls.append(given[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(generate, "_part", part)
    with pytest.raises(KeyboardInterrupt):
        generate.run(config)
    assert [{**row, "logp": 0} for row in rows_of(config)] == [{**row, "logp": 0} for row in want]
    assert [len(some) for some in calls] == [4, 4, 4, 4]


def test_prompts_that_carry_preferences_keep_them(config: generate.Config, mine: str, tmp_path: Path) -> None:
    """Answers of a conditioned policy, to prompts made before."""
    rows = Variants(mine, ("cat", "neutral")).of(data.load(config.prompts, "prompts"))
    data.write(rows, tmp_path / "made.parquet")
    made = rows_of(replace(config, prompts=str(tmp_path / "made.parquet")))
    variants = replace(config, out=config.out.with_name("variants"), variants=Variants(mine, ("cat", "neutral")))
    assert made == rows_of(variants)


def test_changed_dimensions_are_another_run(config: generate.Config, mine: str) -> None:
    config = replace(config, variants=Variants(mine, ("cat",)), limit=2)
    generate.run(config)
    Path(mine).write_text(MINE.replace("about the cat", "the cat"))
    with pytest.raises(ValueError, match="the dimensions file or model has changed"):
        generate.run(config)


def test_bad_preferences_are_refused_before_work(config: generate.Config, mine: str) -> None:
    with pytest.raises(ValueError, match="needs --dimensions"):
        generate.run(replace(config, variants=Variants(preferences=("cat",))))
    with pytest.raises(ValueError, match="unknown preference 'cot': did you mean cat"):
        generate.run(replace(config, variants=Variants(mine, ("cot",))))
    assert not config.out.exists()


def test_an_answer_is_sliced_by_ids_after_a_prompt_that_was_cut(tuned: Path) -> None:
    """The prompt's text is longer than what the model read, which therefore says nothing of where the answer begins."""
    policy = Policy.load(str(tuned / "model"))
    whole = "tell me about the cat and the small red dog on the mat ."
    (cut,) = text.encode_prompts(policy.tokenizer, [whole], max_prompt=5)
    assert len(cut) == 5 and cut != prompt_ids(policy.tokenizer, whole)
    eos = text.end_id(policy.tokenizer)
    drawn = sample(policy.model, [cut], eos=eos, max_new_tokens=8, temperature=0.0)
    ids = policy.model.generate(  # type: ignore[operator]
        torch.tensor([cut]), attention_mask=torch.ones(1, 5, dtype=torch.int64), do_sample=False, max_new_tokens=8
    )
    assert drawn.responses() == [ids[0, 5:].tolist()]
    (answer,) = text.decode(policy.tokenizer, drawn.responses())
    assert answer == policy.tokenizer.decode(ids[0, 5:], skip_special_tokens=True) and answer
