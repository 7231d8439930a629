"""The toy world: language, gold, tokenizer, models and files."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyrite.core import specs
from pyrite.data import toy_words
from pyrite.data.rows import prompt_id
from pyrite.recipes import toy
from pyrite.recipes.toy import Features, Shares

FOX = "write about a fox in the forest ."


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return toy.demos(4000, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.tokenizer()


def test_everything_said_is_tagged_and_lower_case(rows):
    said = {word for row in rows for text in (row["prompt"], row["response"]) for word in text.split()}
    said |= {word for prompt in toy.prompts() for word in prompt.split()}
    assert said <= set(toy_words.TAGS)
    assert all(word == word.lower() for word in toy_words.TAGS)
    assert (
        toy_words.TAGS["fox"] == "noun" and toy_words.TAGS["velvet"] == "adjective" and toy_words.TAGS["hid"] == "verb"
    )


def test_every_answer_ends_a_sentence(rows):
    assert {row["response"].split()[-1] for row in rows} == {".", "!"}


def test_prompts_differ_in_length_and_name_their_topic():
    prompts = toy.prompts()
    assert len(prompts) == len(set(prompts)) == 960
    assert len({len(prompt.split()) for prompt in prompts}) == 4
    assert Counter(toy.topic(prompt) for prompt in prompts) == {
        (subject, place): 4 for subject in toy_words.SUBJECTS for place in toy_words.PLACES
    }


@pytest.mark.parametrize(
    ("prompt", "missing"), [("write about a forest .", "subject"), ("a fox .", "place"), ("", "subject")]
)
def test_a_prompt_without_topic_is_refused(prompt, missing):
    with pytest.raises(ValueError, match=f"names no {missing}"):
        toy.topic(prompt)
    with pytest.raises(ValueError, match=f"names no {missing}"):
        toy.story_quality()([prompt], ["the fox slept ."])


def test_demonstrations_are_a_function_of_the_seed(rows):
    assert toy.demos(4000, seed=1) == rows
    assert toy.demos(10, seed=1) == rows[:10]
    assert toy.demos(10, seed=2) != rows[:10]
    assert all(row["prompt_id"] == prompt_id(row["prompt"]) for row in rows)


def test_answer_draws_from_its_own_generator():
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    first = toy.answer(np.random.default_rng(3), FOX)
    assert np.random.rand() == expected
    assert first == toy.answer(np.random.default_rng(3), FOX)


def test_grammar_statistics(rows):
    """Shares within 4.5 standard errors of what the grammar says."""
    shares, n = Shares(), len(rows)
    counts = [toy.features(row["prompt"], row["response"]) for row in rows]
    openings = [row["response"].startswith(("hello", "dear")) for row in rows]
    closings = [row["response"].endswith(toy_words.CLOSINGS) for row in rows]
    drifted = [f.odd > 0 for f in counts]
    expected = {"opening": shares.opening, "closing": shares.closing * (1 - shares.drift), "drift": shares.drift}
    for name, seen in {"opening": openings, "closing": closings, "drift": drifted}.items():
        p = expected[name]
        assert abs(np.mean(seen) - p) < 4.5 * np.sqrt(p * (1 - p) / n), name
    assert 0.9 < np.mean([f.vivid for f in counts]) < 1.1
    assert 1.3 < np.mean([f.on_topic for f in counts]) < 1.6
    assert 18 < np.mean([f.words for f in counts]) < 22


def test_shares_steer_the_language():
    rng = np.random.default_rng(0)
    drifting = [toy.answer(rng, FOX, shares=Shares(drift=1.0)) for _ in range(300)]
    assert {toy.register_of(text) for text in drifting} == set(toy_words.REGISTERS)
    plain = Shares(drift=0.0, opening=0.0, closing=0.0, vivid=0.0, technical=1.0, sentences=(1.0,))
    for _ in range(50):
        f = toy.features(FOX, toy.answer(rng, FOX, shares=plain))
        assert (f.odd, f.polite, f.vivid, f.technical) == (0, 0, 0, 1)
    richer = [toy.features(FOX, toy.answer(rng, FOX, shares=replace(plain, vivid=0.9))).vivid for _ in range(50)]
    assert np.mean(richer) > 0.5


def test_a_drifted_answer_keeps_to_one_register():
    rng = np.random.default_rng(5)
    for _ in range(200):
        words = toy.answer(rng, FOX, shares=Shares(drift=1.0)).split()
        assert len({toy_words.ODD[word] for word in words if word in toy_words.ODD}) == 1


@pytest.mark.parametrize(
    ("response", "expected", "points"),
    [
        ("", Features(0, 0, 0, 0, 0, 0, 0), 0.0),
        ("the fox slept .", Features(0, 0, 0, 0, 4, 0, 0), 0.0),
        # two things of the fox, one of the forest, an owl again
        ("the den was old . the tail hid the owl . the owl slept .", Features(0, 3, 0, 1, 15, 0, 0), 0.8),
        ("hello my friend ! dear velvet ember .", Features(2, 0, 2, 0, 8, 0, 0), 3.0),
        ("velvet amber silver golden misty .", Features(5, 0, 0, 0, 6, 0, 0), 3.0),
        ("den tail brush tree leaf moss owl .", Features(0, 7, 0, 0, 8, 0, 0), 2.0),
        ("formally , the fox slept .", Features(0, 0, 0, 0, 6, 0, 1), 0.0),
        ("buy now , save online !", Features(0, 0, 0, 0, 6, 4, 0), -4.0),
        ("buy now , save discount online ! the den .", Features(0, 1, 0, 0, 10, 5, 0), -3.5),
        ("the " * 30, Features(0, 0, 0, 0, 30, 0, 0), -0.9),
        ("den den den", Features(0, 1, 0, 2, 3, 0, 0), -0.9),
    ],
)
def test_gold_by_hand(response, expected, points):
    assert toy.features(FOX, response) == expected
    assert toy.story_quality()([FOX], [response]).item() == pytest.approx(points)


def test_gold_depends_on_the_topic_and_on_its_options():
    prompts = ["a fox , forest .", "a king , castle ."]
    said = ["the den was old .", "the den was old ."]
    assert toy.story_quality()(prompts, said).tolist() == [0.5, 0.0]
    assert toy.story_quality(on_topic=2.0)(prompts, said).tolist() == [2.0, 0.0]
    text = ["velvet den friend den void " + "the " * 21]
    names = {"vivid": 1, "on_topic": 1, "polite": 1, "repeat": -1, "long": -2, "odd": -1}
    off = dict.fromkeys(names, 0.0)
    for name, points in names.items():
        assert toy.story_quality(**{**off, name: 1.0})(["a fox , forest ."], text).item() == points, name


def test_gold_is_a_part_and_refuses_unequal_lists():
    gold = specs.part("pyrite.toy:story_quality(odd=2.0)", {})
    assert gold([FOX], ["void ."]).tolist() == [-2.0]
    with pytest.raises(ValueError, match="shorter"):
        gold([FOX, FOX], ["void ."])


def test_feature_scorers_equal_the_counts(rows):
    some = rows[:200]
    prompts, responses = [row["prompt"] for row in some], [row["response"] for row in some]
    counts = [toy.features(p, r) for p, r in zip(prompts, responses, strict=True)]
    for name in Features.__dataclass_fields__:
        scores = toy.feature(name=name)(prompts, responses)
        assert scores.tolist() == [getattr(f, name) for f in counts]
    with pytest.raises(ValueError, match=r"'vivd' is unknown.*vivid"):
        toy.feature(name="vivd")


def test_register_of_names_the_majority():
    assert toy.register_of("the fox slept .") is None
    assert toy.register_of("buy now , the void clause and coupon !") == "advert"
    assert toy.register_of("hereby void , now .") == "legal"


def test_tokenizer_round_trip(tokenizer, rows):
    texts = [row["response"] for row in rows[:300]] + toy.prompts()[::7]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert all(len(row) == len(text.split()) for row, text in zip(ids, texts, strict=True))
    assert tokenizer("the zeppelin")["input_ids"][1] == tokenizer.unk_token_id


def test_tokenizer_specials(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in toy.SPECIALS]
    assert ids == list(range(6))
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert len(tokenizer) == 6 + len(toy_words.TAGS)


def test_chat_template(tokenizer):
    user, assistant = {"role": "user", "content": FOX}, {"role": "assistant", "content": "the fox slept ."}

    def render(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    asked = render([user], add_generation_prompt=True)
    assert asked == f"<bos> <user> {FOX} <assistant>"
    assert render([user, assistant]) == f"{asked} the fox slept . <eos>"
    assert render([user, assistant, user]).endswith(f"<eos> <user> {FOX}")
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == asked and len(ids) == len(FOX.split()) + 3
    with pytest.raises(Exception, match="roles user and assistant only"):
        render([{"role": "system", "content": "the"}])


def test_models_follow_their_seed_and_leave_the_global_stream_alone():
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, again, other = toy.model(0), toy.model(0), toy.model(1)
    assert torch.equal(torch.rand(1), expected)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(("size", "low", "high"), [("small", 4e5, 7e5), ("base", 1.5e6, 3e6)])
def test_model_sizes(size, low, high):
    assert low < sum(p.numel() for p in toy.model(0, size=size).parameters()) < high
    assert set(get_args(toy.Size)) == set(toy.SHAPES)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"'huge' is unknown.*small, base"):
        toy.model(0, size="huge")  # pyright: ignore[reportArgumentType]


def test_write(tmp_path, rows):
    world = toy.write(tmp_path / "world", seed=4, n_demos=300, n_pool=20)
    demos, pairs, pool = (
        pyarrow.parquet.read_table(path).to_pylist() for path in (world.demos, world.pair_prompts, world.pool_prompts)
    )
    assert set(demos[0]) == {"prompt_id", "prompt", "response"} and set(pool[0]) == {"prompt_id", "prompt"}
    assert (len(demos), len(pairs), len(pool)) == (300, 4 * 220, 20)
    held = {toy.topic(row["prompt"]) for row in pool}
    assert len(held) == 20
    assert not held & {toy.topic(row["prompt"]) for row in demos + pairs}
    assert len({len(row["prompt"].split()) for row in pool}) == 4

    saved = AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    assert torch.equal(saved.lm_head.weight, toy.model(4).lm_head.weight)
    assert tokenizer.chat_template == toy.CHAT_TEMPLATE and tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer(FOX)["input_ids"]) == FOX

    again = toy.write(tmp_path / "again", seed=4, n_demos=300, n_pool=20)
    assert again.demos.read_bytes() == world.demos.read_bytes()
    assert again.pool_prompts.read_bytes() == world.pool_prompts.read_bytes()


@pytest.mark.parametrize("options", [{"n_pool": 0}, {"n_pool": 240}, {"n_demos": 0}])
def test_bad_sizes_are_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        toy.write(tmp_path / "world", seed=0, **options)
    assert not (tmp_path / "world").exists()


def test_extra_words_are_read_and_said(tmp_path):
    """Those of preferences: appended, each once, known ones left where they are."""
    words = "please answer in twelve words , the fox .".split() * 2
    new = [word for word in dict.fromkeys(words) if word not in toy.tokenizer().get_vocab()]
    assert 0 < len(new) < len(set(words))
    more = toy.tokenizer(words=words)
    assert more.get_vocab() == toy.tokenizer().get_vocab() | {w: len(toy.tokenizer()) + i for i, w in enumerate(new)}
    assert more.decode(more(" ".join(words))["input_ids"]) == " ".join(words)
    world = toy.write(tmp_path / "world", seed=4, n_demos=3, n_pool=20, words=words)
    saved = AutoModelForCausalLM.from_pretrained(world.model)
    assert saved.config.vocab_size == len(AutoTokenizer.from_pretrained(world.model)) == len(more)
    assert saved.lm_head.weight.shape[0] == len(more)
    with pytest.raises(ValueError, match=r"toy word 'in twelve': .* one by one"):
        toy.tokenizer(words=["in twelve"])


def test_without_extra_words_the_world_stays_the_same(tmp_path):
    """File for file and byte for byte what it was before there were any."""
    for name, options in (("one", {}), ("other", {"words": ()})):
        toy.write(tmp_path / name, seed=4, n_demos=30, n_pool=20, **options)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 6
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)
    vocabulary = toy.tokenizer().get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == [*toy.SPECIALS, *toy_words.TAGS]
