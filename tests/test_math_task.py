"""The math task: expressions, demonstrations the gold finds perfect, tokenizer, model and files."""

from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
from families import Row
from reading import encode
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyrite.data import rows as data
from pyrite.data.responses import Responses
from pyrite.feedback import scorers
from pyrite.models.policy import Policy
from pyrite.recipes import toy


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return toy.math_demos(2000, seed=1)


def test_every_demonstration_is_perfect_and_small(rows):
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    assert not scorers.math_chain(strict=True)(prompts, responses).any()
    values = [int(response.split(" = ")[-1]) for response in responses]
    assert all(abs(value) < 99 for value in values) and min(values) < -50 and max(values) > 90
    wrong = [response[:-1] + str((int(response[-1]) + 1) % 10) for response in responses]
    assert (scorers.math_chain(strict=True)(prompts, wrong) < 0).all()


def test_demonstrations_are_distinct_and_a_function_of_the_seed(rows):
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["prompt_id"] == data.prompt_id(row["prompt"]) for row in rows)
    assert toy.math_demos(50, seed=1) == rows[:50] != toy.math_demos(50, seed=2)


def test_expressions_have_the_published_shapes():
    """Shares of 3 … 7 parentheses at depth 2 (50,068 / 62,581 / 37,392 / 37,568 / 12,391 of 200,000), in 4.5 s.e."""
    rng, n = np.random.default_rng(0), 4000
    seen = Counter(toy.expression(rng, depth=2).count("(") for _ in range(n))
    expected = {3: 0.25, 4: 0.313, 5: 0.187, 6: 0.188, 7: 0.062}
    assert set(seen) == set(expected)
    for pairs, p in expected.items():
        assert abs(seen[pairs] / n - p) < 4.5 * np.sqrt(p * (1 - p) / n), pairs
    assert {toy.expression(rng, depth=1).count("(") for _ in range(50)} == {2, 3}
    assert {len(toy.expression(rng, depth=0)) for _ in range(50)} == {7}
    assert set("".join(toy.expression(rng, depth=2) for _ in range(100))) == set("123456789+-* ()")


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 3, "depths": ()}, {"n": 3, "depths": (-1,)}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="give 1 or more"):
        toy.math_demos(seed=0, **options)


def test_expressions_that_run_out_are_counted():
    with pytest.raises(ValueError, match=r"only 243 distinct expressions of depths \[0\], not 300"):
        toy.math_demos(300, seed=0, depths=[0])


def test_tokenizer_round_trip(rows):
    tokenizer = toy.math_tokenizer()
    texts = [row["prompt"] + row["response"] for row in rows]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert max(len(row) for row in ids) + 2 <= 192
    apart = [encode(tokenizer, row["prompt"], row["response"]).ids for row in rows]
    assert apart == [[1, *whole, 2] for whole in ids]
    assert tokenizer("(3 - -12)")["input_ids"] == tokenizer.convert_tokens_to_ids(["(", "3", " - ", "-", "1", "2", ")"])
    assert tokenizer("7x")["input_ids"][1] == tokenizer.unk_token_id


def test_write(tmp_path):
    task = toy.write_math(tmp_path / "task", seed=4, n_demos=200, n_prompts=30, n_pool=20)
    demos, prompts, pool = (
        data.load(str(path), kind)
        for path, kind in ((task.demos, "demos"), (task.pair_prompts, "prompts"), (task.pool_prompts, "prompts"))
    )
    assert (len(demos), len(prompts), len(pool)) == (200, 30, 20)
    assert len({row["prompt_id"] for row in demos + prompts + pool}) == 250
    assert all(row["prompt"].endswith(" = ") for row in demos + prompts + pool)
    columns = {"prompt_id", "prompt", "response"}
    assert set(pyarrow.parquet.read_table(task.demos).to_pylist()[0]) == columns

    saved, tokenizer = AutoModelForCausalLM.from_pretrained(task.model), AutoTokenizer.from_pretrained(task.model)
    assert 3e5 < saved.num_parameters() < 6e5 and saved.config.vocab_size == len(tokenizer)
    policy = Policy.load(task.model)
    encoded = encode(policy.tokenizer, demos[0]["prompt"], demos[0]["response"])
    logps = policy.logps(policy.pack(Responses.of([Row(encoded.prompt, [encoded.response])])))
    per_token = logps.sum / logps.length
    assert policy.context == 192 and -6 < per_token.item() < -1  # about -log 25 before training

    again = toy.write_math(tmp_path / "again", seed=4, n_demos=200, n_prompts=30, n_pool=20)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (task.model, again.model)]
    assert weights[0] == weights[1]
    assert again.demos.read_bytes() == task.demos.read_bytes()
    assert again.pool_prompts.read_bytes() == task.pool_prompts.read_bytes()


@pytest.mark.parametrize("name", ["n_demos", "n_prompts", "n_pool"])
def test_bad_sizes_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        toy.write_math(tmp_path / "task", seed=0, **{name: 0})
    assert not (tmp_path / "task").exists()


def test_easier_expressions() -> None:
    rows = toy.math_demos(300, seed=1, depths=(1,), operators="+-", largest=5)
    assert not set("".join(row["prompt"] for row in rows)) & set("*6789")
    with pytest.raises(ValueError, match="knows"):
        toy.math_demos(3, seed=1, operators="+/")
    with pytest.raises(ValueError, match="knows"):
        toy.math_demos(3, seed=1, largest=10)
