import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrite.data import rows as data
from pyrite.data.rows import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")

PAIRS = [
    {"prompt_id": "a", "prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."},
    {"prompt_id": "b", "prompt": "Say bye.", "chosen": "Bye!", "rejected": ""},
]
CANDIDATE = {"prompt": "p", "sample": 0, "response": "", "finished": True, "length": 1, "logp": -0.5}


def put(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def refusal(path, kind="pairs", **options):
    with pytest.raises(DataError) as caught:
        data.load(path, kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(tmp_path, row, kind="pairs", **options):
    (found,) = data.load(put(tmp_path, [row]), kind, **options)
    del found["prompt_id"]
    return found


PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_what_is_written_is_loaded(tmp_path, suffix):
    rows = [{**row, "strength": 1.5, "flipped": False} for row in PAIRS]
    data.write(rows, tmp_path / "new" / f"rows{suffix}")
    assert data.load(tmp_path / "new" / f"rows{suffix}", "pairs") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"rows{suffix}"]


def test_conversations_and_missing_extras_survive_parquet(tmp_path):
    rows = [
        {"prompt_id": 1, "prompt": turns("a", "b", "c"), "chosen": "x", "rejected": "y", "strength": 2.0},
        {"prompt_id": 2, "prompt": turns("d"), "chosen": "x", "rejected": "y"},
    ]
    data.write(rows, tmp_path / "rows.parquet")
    assert data.load(tmp_path / "rows.parquet", "pairs") == rows


def test_candidates_are_read_as_they_are(tmp_path):
    assert loaded(tmp_path, CANDIDATE, "candidates") == CANDIDATE


def test_columns_rename_and_may_swap(tmp_path):
    row = {"question": "Q", "good": "good", "bad": "bad"}
    renames = "prompt=question, chosen=good,rejected=bad"
    assert loaded(tmp_path, row, columns=renames) == PAIR
    assert loaded(tmp_path, PAIR, columns={"chosen": "rejected", "rejected": "chosen"})["chosen"] == "bad"
    path = put(tmp_path, [row])
    assert "no column 'goood' (present: question, good, bad; nearest: good)" in refusal(path, columns="chosen=goood")
    assert "write ours=theirs" in refusal(path, columns="chosen")


def test_extra_columns_stay_and_messages_lose_theirs(tmp_path):
    prompt = [{"role": "user", "content": "Q", "name": "x"}]
    assert loaded(tmp_path, {**PAIR, "prompt": prompt, "model": "m"}) == {**PAIR, "prompt": turns("Q"), "model": "m"}


# Refusals


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chosen": ""}, "line 2: chosen is empty"),
        ({"chosen": " \n"}, "line 2: chosen is empty"),
        ({"chosen": 3}, "line 2: chosen must be text, not 3"),
        ({"rejected": None}, "line 2: rejected must be text, not None"),
        ({"prompt": ""}, "line 2: prompt is empty"),
        ({"prompt": 1}, "line 2: prompt must be text or a list of messages, not 1"),
        ({"prompt": []}, "line 2: prompt must be a list of messages"),
        ({"prompt": [{"role": "user"}]}, "line 2: prompt must be a list of messages"),
        ({"prompt": turns("Q", "A")}, "line 2: prompt ends with an assistant turn"),
        ({"chosen": turns("Q", "A")}, "line 2: rejected must be a list of messages"),
        ({"strength": float("nan")}, "line 2: strength is nan; numbers must be finite"),
        ({"score": float("inf")}, "line 2: score is inf; numbers must be finite"),
        ({"strength": "2"}, "line 2: strength must be a number, not '2'"),
        ({"strength": True}, "line 2: strength must be a number, not True"),
        ({"flipped": 1}, "line 2: flipped must be true or false, not 1"),
        ({"probability": 1.5}, "line 2: probability is 1.5; it must be between 0 and 1"),
        ({"prompt_id": 1.5}, "line 2: prompt_id must be text or a whole number, not 1.5"),
        ({"prompt_id": "b"}, "line 3: prompt_id 'b' already belongs to another prompt"),
    ],
)
def test_a_bad_pair_is_named_by_file_and_line(tmp_path, bad, message):
    path = put(tmp_path, [{**PAIRS[0], "prompt_id": "0"}, {**PAIRS[0], **bad}, PAIRS[1]])
    assert refusal(path).startswith(f"{path}, {message}")


def test_missing_columns_are_named_with_those_present_and_the_nearest(tmp_path):
    path = put(tmp_path, [{"prompt": "Q", "choosen": "a", "rejected": "b"}])
    assert refusal(path) == (
        f"{path}, line 1: pairs need prompt, chosen, rejected; missing chosen "
        "(present: prompt, choosen, rejected; nearest: choosen); rename with columns chosen=NAME"
    )
    path = put(tmp_path, [PAIRS[0], {"prompt": "Q", "chosen": "a"}])
    assert refusal(path) == f"{path}, line 2: missing rejected"


def test_options_are_checked(tmp_path):
    path = put(tmp_path, PAIRS)
    assert "unknown kind of data 'pair'; it is one of prompts, demos" in refusal(path, "pair")


# Ids, strength, repeats


def test_equal_pairs_are_dropped_and_counted(tmp_path):
    notes = []
    path = put(tmp_path, [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}])
    assert data.load(path, "pairs", note=notes.append) == PAIRS
    assert notes == [f"{path}: 1 of 3 rows left out: chosen equals rejected"]


def test_ids_come_from_the_prompt_alone(tmp_path):
    rows = [
        {"prompt": "Q", "response": "a"},
        {"prompt": turns("Q"), "response": "b"},
        {"prompt": "R", "response": "a"},
    ]
    one, same, other = (row["prompt_id"] for row in data.load(put(tmp_path, rows), "demos"))
    assert one == same == data.prompt_id("Q") == "4ae81572f06e1b88"
    assert one != other


def test_a_judges_probability_becomes_log_odds(tmp_path):
    rows = [{**PAIRS[0], "probability": p} for p in (0.75, 0.5, 1, 0.25)]
    found = [row["strength"] for row in data.load(put(tmp_path, rows), "pairs")]
    assert found == pytest.approx([math.log(3), 0, math.log(9999), -math.log(3)])
    (row,) = data.load(put(tmp_path, [{**rows[0], "strength": 7.0}]), "pairs")
    assert row["strength"] == 7.0


def test_prompts_are_kept_once(tmp_path):
    notes = []
    path = put(tmp_path, [PAIRS[0], PAIRS[1], PAIRS[0]])
    assert [row["prompt_id"] for row in data.load(path, "prompts", note=notes.append)] == ["a", "b"]
    assert "1 of 3 rows left out: the prompt is there already" in notes[0]


def conditioned(raw, preferences, **rest):
    """A row as `pyrite.data.conditioning` makes it."""
    prompt = " ".join([raw, *preferences])
    made = {"prompt_id": data.prompt_id(prompt), "prompt": prompt, "asked": raw, "asked_id": f"id {raw}"}
    return {**made, "preferences": preferences, **rest}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_prompts_keep_what_they_were_made_from(tmp_path, name):
    rows = [conditioned(raw, ids) for raw in "pq" for ids in (["P1A"], [], ["P1A", "P2B"])]
    data.write(rows, tmp_path / name)
    assert data.load(tmp_path / name, "prompts") == rows
    pairs = [{**row, "chosen": "a", "rejected": "b"} for row in rows]
    data.write(pairs, tmp_path / name)
    assert data.load(tmp_path / name, "pairs") == pairs
    assert data.load(tmp_path / name, "prompts") == rows


def test_an_asked_id_is_derived_and_half_of_it_is_not_kept(tmp_path):
    talk = turns("hello")
    whole = {"prompt": "p x", "asked": talk, "preferences": ["x"]}
    (row,) = data.load(put(tmp_path, [whole]), "prompts")
    assert row == {"prompt_id": data.prompt_id("p x"), **whole, "asked_id": data.prompt_id(talk)}
    for half in ({"asked": "p"}, {"preferences": ["x"]}, {"asked": None, "preferences": None, "asked_id": None}):
        assert set(data.load(put(tmp_path, [{"prompt": "p x", **half}]), "prompts")[0]) == {"prompt_id", "prompt"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preferences": "P1A"}, "preferences must be a list of texts, not 'P1A'"),
        ({"preferences": [1]}, r"preferences must be a list of texts, not \[1\]"),
        ({"asked": 3}, "asked must be text or a list of messages"),
        ({"asked": " "}, "asked is empty"),
        ({"asked_id": 1.5}, "asked_id must be text or a whole number"),
    ],
)
def test_what_a_prompt_was_made_from_is_checked(tmp_path, change, words):
    path = put(tmp_path, [conditioned("p", ["P1A"]), {**conditioned("q", ["P1A"]), **change}])
    with pytest.raises(DataError, match=f"line 2: {words}"):
        data.load(path, "prompts")


# Writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    data.write(PAIRS, path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="cannot write"):
        data.write([{"logp": float("nan")}], path)
    with pytest.raises(DataError, match="cannot write"):
        data.write([{"prompt": "a"}, {"prompt": turns("b")}], tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="must end in"):
        data.write(PAIRS, tmp_path / "rows.csv")
    with pytest.raises(DataError, match="cannot write") as caught:
        data.write(PAIRS, path / "rows.jsonl")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        data.write(PAIRS, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


# Splits and noise

groups = st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(lambda ids: len(set(ids)) > 1)


@given(groups, st.floats(0.01, 0.99), st.integers(0, 99), st.randoms())
def test_split_divides_prompts_and_ignores_the_order_of_rows(ids, fraction, seed, order):
    rows = [{"prompt_id": i, "prompt": f"p{i}", "row": n} for n, i in enumerate(ids)]
    train, held = data.split(rows, fraction=fraction, seed=seed)
    of = [{row["prompt_id"] for row in side} for side in (train, held)]
    assert not of[0] & of[1]
    assert sorted(row["row"] for row in train + held) == list(range(len(rows)))
    n = len(set(ids))
    assert len(of[1]) == min(max(1, round(fraction * n)), n - 1)
    order.shuffle(rows)
    assert {row["row"] for row in data.split(rows, fraction=fraction, seed=seed)[1]} == {row["row"] for row in held}


def test_split_depends_on_the_seed_and_reaches_every_prompt():
    rows = [{"prompt_id": i, "prompt": f"p{i}"} for i in range(20)]
    held = [data.split(rows, fraction=0.25, seed=seed)[1] for seed in range(400)]
    counts = Counter(row["prompt_id"] for side in held for row in side)
    assert len(counts) == 20
    expected, spread = 100, math.sqrt(400 * 0.25 * 0.75)
    assert all(abs(count - expected) < 4.5 * spread for count in counts.values())


def test_a_prompt_under_two_ids_stays_on_one_side():
    rows = [{"prompt_id": i, "prompt": f"p{i // 2}"} for i in range(40)]
    for seed in range(20):
        train, held = data.split(rows, fraction=0.3, seed=seed)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
        assert len(held) == 12


def test_no_raw_prompt_on_both_sides_whatever_its_preferences():
    """Rendered prompts differ, raw ones do not: they go by asked_id, two ids of one raw prompt together."""
    rows = [conditioned(f"p{i}", ids) for i in range(40) for ids in (["P1A"], [], ["P1B", "P2A"])]
    rows += [{**conditioned(f"p{i}", ["P2B"]), "asked_id": f"other {i}"} for i in range(5)]
    rows += [{"prompt_id": f"plain {i}", "prompt": f"p{i}"} for i in range(3, 8)]
    for seed in range(20):
        train, held = data.split(rows, fraction=0.3, seed=seed)
        assert not {data.origin(row)[1] for row in train} & {data.origin(row)[1] for row in held}
        assert len({data.origin(row)[1] for row in held}) == 12
    leaks = data.split(rows, fraction=0.3, seed=0, by="prompt_id")
    assert {row["prompt"] for row in leaks[0]}.isdisjoint(row["prompt"] for row in leaks[1])


def test_a_split_of_plain_rows_goes_by_their_ids():
    rows = [{"prompt_id": i, "prompt": f"p{i}"} for i in range(30)]
    for seed in range(5):
        assert data.split(rows, fraction=0.3, seed=seed) == data.split(rows, fraction=0.3, seed=seed, by="prompt_id")


def test_splits_of_nothing_are_refused():
    rows = [{"prompt_id": 1, "prompt": "p"}] * 3
    assert data.split(rows, fraction=0, seed=0) == (rows, [])
    with pytest.raises(DataError, match="1 distinct"):
        data.split(rows, fraction=0.5, seed=0)
    with pytest.raises(DataError, match="fraction is 1"):
        data.split(rows, fraction=1, seed=0)
    with pytest.raises(DataError, match="row 1 has no column 'source'"):
        data.split(rows, fraction=0.5, seed=0, by="source")


def pairs(n):
    return [{"prompt_id": i, "prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(n)]


def test_noise_flips_exactly_the_stated_number():
    rows = pairs(46_000)
    noisy, mask = data.flip_labels(rows, p=0.25, seed=3)
    assert mask.sum() == 11_500
    assert [row["flipped"] for row in noisy] == mask.tolist()
    swapped = np.array([row["chosen"].startswith("r") for row in noisy])
    assert (swapped == mask).all()
    assert all(row["rejected"][0] == "rc"[row["chosen"][0] == "r"] for row in noisy)
    assert rows == pairs(46_000)


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 2**40))
def test_noise_is_exact_repeatable_and_its_own_inverse(n, p, seed):
    noisy, mask = data.flip_labels(pairs(n), p=p, seed=seed)
    assert mask.sum() == round(p * n)
    assert (data.flip_labels(pairs(n), p=p, seed=seed)[1] == mask).all()
    assert data.apply_flips(noisy, mask) == [{**row, "flipped": False} for row in pairs(n)]
    assert data.apply_flips(data.apply_flips(noisy, mask), mask) == noisy


def test_noise_seeds_differ_and_every_pair_is_hit_alike():
    masks = np.stack([data.flip_labels(pairs(40), p=0.25, seed=seed)[1] for seed in range(400)])
    assert len(np.unique(masks, axis=0)) == 400
    assert (np.abs(masks.sum(0) - 100) < 4.5 * math.sqrt(400 * 0.25 * 0.75)).all()


def test_bad_noise_is_refused():
    with pytest.raises(DataError, match="between 0 and 1"):
        data.flip_labels(pairs(2), p=1.5, seed=0)
    with pytest.raises(DataError, match="3 entries for 2 pairs"):
        data.apply_flips(pairs(2), np.zeros(3, dtype=bool))


# Real data


def divided(rows):
    train, held = data.split(rows, fraction=0.1, seed=0)
    texts = [{json.dumps(row["prompt"]) for row in side} for side in (train, held)]
    assert not texts[0] & texts[1]
    assert len(train) + len(held) == len(rows)
    return len(texts[1])


@real
def test_real_judged_pairs():
    path = REAL / "judged_pairs.jsonl.gz"
    notes = []
    rows = data.load(path, "pairs", note=notes.append)
    assert notes == [f"{path}: 20 of 6440 rows left out: chosen equals rejected"]
    assert len(rows) == 6420
    assert all(0 <= row["strength"] < 9.3 for row in rows)
    assert divided(rows) == round(0.1 * len({row["prompt_id"] for row in rows}))
    prompts = data.load(path, "prompts")
    assert len(prompts) == 805


@real
def test_real_transcripts():
    notes = []
    rows = data.load(REAL / "hh_harmless_test.jsonl.gz", "pairs", note=notes.append)
    assert len(notes) == 1
    assert "4 of 2312 rows left out: the preferred answer of the transcript is empty" in notes[0]
    assert len(rows) == 2308
    roles = {tuple(turn["role"] for turn in row["prompt"])[:3] for row in rows}
    assert roles == {("user",), ("user", "assistant", "user")}
    assert divided(rows) > 200
