"""Duels of methods: who meets whom, who is asked what, what is counted, and the whole way from a model's answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pyrite.core import runs
from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions, Variants, conditioned
from pyrite.jobs import duel, generate
from pyrite.models.policy import RewardModel

MINE = """
- {id: long, dimension: size, sentence: big, criterion: The longer one., gold: length()}
- id: short
  dimension: size
  sentence: small
  criterion: The shorter one.
  gold: "weighted_sum(golds=['length()'], weights=[-1.0])"
- {id: cat, dimension: animal, sentence: about the cat, criterion: More cats., gold: "word_collector(words=['cat'])"}
- {id: dog, dimension: animal, sentence: about the dog, criterion: More dogs., gold: "word_collector(words=['dog'])"}
"""
JUDGE = """
import json
import pathlib

import torch

ASKED = pathlib.Path(__file__).with_name("asked.jsonl")


def judge(*, criterion):
    def verdicts(prompts, a, b):
        with ASKED.open("a") as file:
            file.writelines(json.dumps([criterion, *case]) + "\\n" for case in zip(prompts, a, b))
        if (ASKED.parent / "stop").exists() and criterion == "More cats.":
            raise ValueError("the judge is gone")
        sign = -1 if "shorter" in criterion or "dogs" in criterion else 1
        gaps = torch.tensor([float(sign * (len(x.split()) - len(y.split()))) for x, y in zip(a, b)])
        silent = torch.tensor(["none" in x + y for x, y in zip(a, b)])
        return torch.sigmoid(gaps).masked_fill(silent, float("nan"))

    return verdicts
"""
FOUR = [("long", "cat"), ("long", "dog"), ("short", "cat"), ("short", "dog")]
NAMES = ["+".join(ids) for ids in FOUR]


@pytest.fixture
def mine(tmp_path: Path) -> Dimensions:
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "mine.py").write_text(JUDGE)
    return Dimensions.load(tmp_path / "mine.yaml")


@pytest.fixture
def judge(mine: Dimensions, tmp_path: Path) -> str:
    return f"{tmp_path / 'mine.py'}:judge(criterion={{criterion}})"


def answers(known: Dimensions, combinations: Any, said: list[list[str]]) -> list[dict[str, Any]]:
    """A row a combination, prompt and sample: said[prompt][sample] + how often the combination's place."""
    rows = []
    for i, ids in enumerate(combinations):
        for q, texts in enumerate(said):
            row = conditioned({"prompt_id": f"q{q}", "prompt": f"tell me {q}"}, known.chosen(ids))
            rest = {"finished": True, "length": 3, "logp": -1.0}
            rows += [{**row, "sample": s, "response": " ".join([t] * (i + 1)), **rest} for s, t in enumerate(texts)]
    return rows


def config(folder: Path, methods: dict[str, list[dict]], **options: Any) -> duel.Config:
    """The rows of each method in two files."""
    given = []
    for name, rows in methods.items():
        for i, some in enumerate((rows[::2], rows[1::2])):
            data.write(some, folder / f"{name}{i}.parquet")
            given.append(f"{name}={folder / f'{name}{i}.parquet'}")
    chosen = {"dimensions": str(folder / "mine.yaml"), "out": folder / "run", "times": 50}
    return duel.Config(answers=tuple(given), **{**chosen, **options})


def results(asked: duel.Config) -> dict[str, Any]:
    found = duel.run(asked).results
    assert found is not None
    return found


def asked_of(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def counts(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in ("wins", "losses", "ties", "missing"))


TWO = {"a": [["x"], ["x y z"], ["x"]], "b": [["x y"], ["x y"], ["x"]]}


def two(known: Dimensions) -> dict[str, list[dict]]:
    return {name: answers(known, FOUR, said) for name, said in TWO.items()}


def test_rates_of_two_methods(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    """Longer is better for long and cat, worse for short and dog: half of the combinations are ties."""
    found = results(config(tmp_path, two(mine), judge=judge))
    assert found["methods"] == ["a", "b"] and found["calls"] == 4 * 3 * 2
    forth, back = found["matrix"]
    assert (forth["first"], forth["second"], back["first"], back["second"]) == ("a", "b", "b", "a")
    assert counts(forth) == (2, 2, 8, 0) and forth["half"] == forth["without"] == 0.5
    assert [row["combination"] for row in found["by_combination"][::2]] == NAMES  # in the order AA, AB, BA, BB
    each = {row["combination"]: counts(row) for row in found["by_combination"][::2]}
    assert each == {"long+cat": (1, 1, 1, 0), "long+dog": (0, 0, 3, 0), "short+cat": (0, 0, 3, 0)} | {
        "short+dog": (1, 1, 1, 0)
    }
    along = {row["option"]: counts(row) for row in found["by_criterion"][::2]}
    assert along == dict.fromkeys(("long", "short", "cat", "dog"), (2, 2, 2, 0))
    assert found["averages"] == [{"method": "a", "half": 0.5}, {"method": "b", "half": 0.5}]
    names = {"half", "half_lo", "half_hi", "without", "without_lo", "without_hi"}
    assert set(forth) == names | {"first", "second", "wins", "losses", "ties", "missing"}
    sections = {"methods", "matrix", "averages", "by_combination", "by_criterion", "scores", "pareto", "calls"}
    assert set(found) == sections | {"seconds"}


def test_the_judge_reads_the_raw_prompt_and_the_right_answers(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    folder = duel.run(config(tmp_path, two(mine), judge=judge)).folder
    wanted = [
        [mine.option(option).criterion, f"tell me {q}", " ".join(TWO["a"][q] * n), " ".join(TWO["b"][q] * n)]
        for n, ids in enumerate(FOUR, 1)
        for q in range(3)
        for option in ids
    ]
    assert sorted(asked_of(tmp_path)) == sorted(wanted)
    rows = data.read(str(folder / "verdicts.parquet")).rows
    assert len(rows) == 24 and {row["verdict"] for row in rows} == {1, 0, -1}
    assert all(row["verdict"] == (row["p"] > 0.5) - (row["p"] < 0.5) for row in rows)


def test_swapping_two_methods_mirrors_every_count(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    """The judge is antisymmetric; in one run and in two, whatever the order of rows and files."""
    given = two(mine)
    given["b"][0] |= {"response": "none"}
    (tmp_path / "other").mkdir()
    forth = results(config(tmp_path, given, judge=judge))
    swapped = {"b": given["b"][::-1], "a": given["a"][::-1]}
    options = {"judge": judge, "dimensions": str(tmp_path / "mine.yaml")}
    back = results(config(tmp_path / "other", swapped, **options))
    keys = ("first", "second", "combination", "option")
    for table in ("matrix", "by_combination", "by_criterion"):
        one, other = ({tuple(r.get(k) for k in keys): r for r in found[table]} for found in (forth, back))
        assert one.keys() == other.keys()
        for key, row in one.items():
            mirror = one[key[1], key[0], *key[2:]]
            assert counts(row) == counts(other[key]) == tuple(mirror[k] for k in ("losses", "wins", "ties", "missing"))
            assert row == pytest.approx(other[key])
            if row["half"] is not None:
                assert row["half"] + mirror["half"] == pytest.approx(1)


def test_a_missing_verdict_drops_its_unit_or_ties(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    given = {name: answers(mine, [("long", "cat")], said) for name, said in TWO.items()}
    given["a"][1] |= {"response": "none at all"}
    dropped = results(config(tmp_path, given, judge=judge))
    assert counts(dropped["matrix"][0]) == (0, 1, 1, 1)
    tied = results(config(tmp_path, given, judge=judge, missing="tie", out=tmp_path / "tie"))
    assert counts(tied["matrix"][0]) == (0, 1, 2, 0)
    for found in (dropped, tied):  # what the judge did not say stays visible by option
        assert [counts(row) for row in found["by_criterion"][::2]] == [(0, 1, 1, 1)] * 2


@pytest.mark.parametrize("options", [8, 16])
def test_calls_of_a_pair(mine: Dimensions, tmp_path: Path, judge: str, options: int) -> None:
    """8 combinations x 50 prompts x 3 criteria = 1,200 calls, 16 combinations 2,400."""
    soups = Dimensions.load("soups")
    combinations = soups.combinations(None if options == 8 else soups.ids)
    assert len(combinations) == options
    third = ("P1A", "P2B", "P3A") if options == 8 else ("P1A", "P2A", "P3C")
    assert combinations[:3] == [("P1A", "P2A", "P3A"), ("P1A", "P2A", "P3B"), third]
    methods = {name: answers(soups, combinations, [["x"]] * 50) for name in ("a", "b")}
    found = results(config(tmp_path, methods, judge=judge, dimensions="soups"))
    assert found["calls"] == len(asked_of(tmp_path)) == 150 * options
    assert [row["combination"] for row in found["by_combination"][::2]] == ["+".join(ids) for ids in combinations]
    assert found["scores"] == [] and found["pareto"] == []  # no golds, no reward runs


def test_neutral_answers_serve_every_combination(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    """Whether they say that they are neutral, or know nothing of preferences; alone they meet under all."""
    neutral = answers(mine, [()], TWO["b"])
    told = results(config(tmp_path, {"a": two(mine)["a"], "b": neutral}, judge=judge))
    assert told["calls"] == 24 and [row["combination"] for row in told["by_combination"][::2]] == NAMES
    bare = [{k: row[k] for k in row if k not in ("asked", "asked_id", "preferences")} for row in neutral]
    plain = results(config(tmp_path, {"a": two(mine)["a"], "b": bare}, judge=judge, out=tmp_path / "bare"))
    assert {**plain, "seconds": 0} == {**told, "seconds": 0}
    both = results(config(tmp_path, {"a": bare, "b": neutral}, judge=judge, out=tmp_path / "both"))
    assert both["matrix"][0]["ties"] == 12


def test_one_general_criterion(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    found = results(config(tmp_path, two(mine), judge=judge, general="The most helpful one."))
    assert found["calls"] == 12 and {row[0] for row in asked_of(tmp_path)} == {"The most helpful one."}
    assert [row["option"] for row in found["by_criterion"]] == ["general"] * 2
    assert counts(found["matrix"][0]) == (4, 4, 4, 0)


def test_three_methods_all_meet(mine: Dimensions, tmp_path: Path) -> None:
    """By the options' golds; the average is over the two opponents."""
    methods = two(mine) | {"c": answers(mine, FOUR, [["cat cat cat cat"]] * 3)}
    found = results(config(tmp_path, methods))
    matrix = {(row["first"], row["second"]): row["half"] for row in found["matrix"]}
    assert list(matrix) == [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")]
    assert all(matrix[a, b] + matrix[b, a] == pytest.approx(1) for a, b in matrix)
    for row in found["averages"]:
        others = [matrix[row["method"], other] for other in "abc" if other != row["method"]]
        assert row["half"] == pytest.approx(sum(others) / 2)


def test_scores_by_golds(mine: Dimensions, tmp_path: Path) -> None:
    """Means over prompts of the means over samples."""
    said = {"a": [["x", "x y z"], ["x", "x"]], "b": [["cat", "cat"], ["cat cat cat", "cat cat cat"]]}
    found = results(config(tmp_path, {name: answers(mine, FOUR[:2], texts) for name, texts in said.items()}))
    rows = {(r["method"], r["combination"], r["option"]): (r["mean"], r["se"]) for r in found["scores"]}
    assert {r["by"] for r in found["scores"]} == {"gold"} and len(rows) == 8
    assert rows["a", "long+cat", "long"] == pytest.approx((1.5, 0.5))  # prompts 2 and 1
    assert rows["a", "long+dog", "long"] == pytest.approx((3.0, 1.0))  # said twice
    assert rows["b", "long+cat", "cat"] == pytest.approx((1.0, 0.0))
    a, b = found["pareto"]
    assert (a["long"], b["long"]) == pytest.approx((2.25, 3.0)) and set(a) == {"method", "long", "cat", "dog", "front"}
    assert (a["front"], b["front"]) == (False, True)


def test_scores_by_reward_models(tiny: Path, mine: Dimensions, tmp_path: Path, judge: str) -> None:
    """One run for all options or one each; the golds, where there are any, tell who is in front."""
    for seed, name in enumerate(("one", "two")):
        RewardModel.load(tiny, head_seed=seed, head_std=0.5).save(tmp_path / name)
    asked = config(tmp_path, two(mine), judge=judge, rewards=(str(tmp_path / "one"),))
    found = results(asked)
    by = {kind: [row for row in found["scores"] if row["by"] == kind] for kind in ("gold", "reward")}
    assert len(by["gold"]) == len(by["reward"]) == 16
    model = RewardModel.load(tmp_path / "one")
    given = model.scores(["tell me 0 big", "tell me 1 big", "tell me 2 big"], ["x", "x y z", "x"])
    assert by["reward"][0]["mean"] == pytest.approx(given.mean().item(), abs=1e-5)
    assert by["reward"][0]["se"] == pytest.approx(given.std().item() / 3**0.5, abs=1e-5)
    golds = [row["mean"] for row in by["gold"] if (row["method"], row["option"]) == ("a", "long")]
    assert found["pareto"][0]["long"] == pytest.approx(sum(golds) / 2)
    each = tuple(f"{id}={tmp_path / ('one' if id == 'long' else 'two')}" for id in mine.ids)
    several = results(config(tmp_path, two(mine), judge=judge, rewards=each, out=tmp_path / "several"))
    other = [row for row in several["scores"] if row["by"] == "reward"]
    assert [row["mean"] for row in other[:4]] == pytest.approx([row["mean"] for row in by["reward"][:4]])
    assert other[-1]["mean"] != pytest.approx(by["reward"][-1]["mean"])


def test_an_interruption_asks_nothing_twice(mine: Dimensions, tmp_path: Path, judge: str) -> None:
    asked = config(tmp_path, two(mine), judge=judge)
    (tmp_path / "stop").touch()
    with pytest.raises(ValueError, match="judge is gone"):
        duel.run(asked)
    (tmp_path / "stop").unlink()
    found = results(asked)
    criteria = [row[0] for row in asked_of(tmp_path)]
    assert {name: criteria.count(name) for name in set(criteria)} == {
        **{"The longer one.": 6, "The shorter one.": 6, "More dogs.": 6},
        "More cats.": 12,  # half of them without an answer
    }
    assert found == results(asked) and len(asked_of(tmp_path)) == 30
    assert not (asked.out / "parts").exists()
    assert {**results(config(tmp_path, two(mine), judge=judge, out=tmp_path / "whole")), "seconds": 0} == {
        **found,
        "seconds": 0,
    }


def without(rows: list[dict], **values: Any) -> list[dict]:
    return [row for row in rows if not all(row[name] == value for name, value in values.items())]


def test_unequal_ids_are_refused_before_work(mine: Dimensions, tmp_path: Path) -> None:
    """Paired by position they would fit; the error names both methods and what is missing."""
    given = two(mine)
    moved = [{**row, "asked_id": "q7"} if row["asked_id"] == "q2" else row for row in given["b"]]
    with pytest.raises(ValueError, match=r"a has an answer to prompt q2 under long\+cat, sample 0, b has none"):
        duel.run(config(tmp_path, {"a": given["a"], "b": moved}))
    short = without(given["a"], preferences=["short", "dog"])
    with pytest.raises(ValueError, match=r"b has an answer to prompt q. under short\+dog, sample 0, a has none"):
        duel.run(config(tmp_path, {"a": short, "b": given["b"]}))
    other = [{**row, "asked": "tell me no"} if row["asked_id"] == "q0" else row for row in given["b"]]
    with pytest.raises(ValueError, match="a and b were asked different things as prompt q0"):
        duel.run(config(tmp_path, {"a": given["a"], "b": other}))
    twice = [*given["b"], given["b"][0]]
    with pytest.raises(ValueError, match=r"b has two answers to prompt q0 under long\+cat, sample 0"):
        duel.run(config(tmp_path, {"a": given["a"], "b": twice}))
    mixed = [*given["b"], *answers(mine, [()], [["x"]])]
    with pytest.raises(ValueError, match="b has neutral answers and others"):
        duel.run(config(tmp_path, {"a": given["a"], "b": mixed}))
    unknown = [{**row, "preferences": ["cats"]} for row in given["b"]]
    with pytest.raises(ValueError, match=r"b0\.parquet: prompt q0: unknown preference 'cats': did you mean cat"):
        duel.run(config(tmp_path, {"a": given["a"], "b": unknown}))
    assert not (tmp_path / "run").exists()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"answers": ()}, "two methods or more, and there is none"),
    ({"answers": ("a.parquet",)}, "'a.parquet': write METHOD=FILE"),
    ({"dimensions": "soup"}, "no preference dimensions 'soup'"),
    ({"judge": "bradley_terry(gold='length()')"}, "says the same of every preference"),
    ({"judge": "bradley_terri(gold={gold})"}, "bradley_terri"),
    ({"rewards": ("one", "two")}, "one folder for all options, or OPTION=FOLDER"),
    ({"rewards": ("cats=one",)}, "unknown preference 'cats'"),
    ({"rewards": ("nowhere",)}, "nowhere"),
    ({"times": 1}, "--times 1: give at least 2"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_options_are_refused_before_work(
    mine: Dimensions, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    asked = config(tmp_path, two(mine))
    with pytest.raises(ValueError, match=words):
        duel.run(duel.Config(**{**vars(asked), **change}))
    assert not (tmp_path / "run").exists()


def test_a_changed_file_is_another_run(mine: Dimensions, tmp_path: Path) -> None:
    asked = config(tmp_path, two(mine))
    duel.run(asked)
    data.write(two(mine)["a"][:1], tmp_path / "a0.parquet")
    with pytest.raises(ValueError, match="another config"):
        duel.run(asked)


def test_from_a_model_to_the_winner(tiny: Path, mine: Dimensions, tmp_path: Path, judge: str) -> None:
    """Two dimensions of two options, a tiny random model that answers at length or briefly, a judge that measures.

    Under long and cat the longer answer is better, under short and dog the shorter one.
    """
    prompts = [{"prompt_id": word, "prompt": f"tell me about the {word}"} for word in ("mat", "tree")]
    data.write(prompts, tmp_path / "p.jsonl")
    files = {}
    for name, tokens in (("brief", 1), ("wordy", 12)):
        drawn = generate.Config(
            str(tiny),
            str(tmp_path / "p.jsonl"),
            tmp_path / name,
            variants=Variants(str(tmp_path / "mine.yaml"), preferences=("all",)),
            max_new_tokens=tokens,
        )
        files[name] = generate.run(drawn).folder / "candidates.parquet"
    given = tuple(f"{name}={file}" for name, file in files.items())
    found = duel.run(duel.Config(given, tmp_path / "duel", str(tmp_path / "mine.yaml"), judge=judge, times=50))
    brief, wordy = (
        {(*row["preferences"], row["asked_id"], row["sample"]): len(row["response"].split()) for row in rows}
        for rows in (data.load(file, "candidates") for file in files.values())
    )
    assert all(brief[key] <= wordy[key] for key in wordy) and sum(brief.values()) < sum(wordy.values())
    results = found.results
    assert results is not None and results["calls"] == 4 * 2 * 2 * 2
    each = {(r["first"], r["combination"]): counts(r) for r in results["by_combination"]}
    assert each["wordy", "long+cat"][0] >= 3 and each["wordy", "long+cat"][1] == 0
    assert each["brief", "short+dog"][0] >= 3 and each["brief", "short+dog"][1] == 0
    assert each["wordy", "long+dog"][2] == each["wordy", "short+cat"][2] == 4
    scores = {(r["method"], r["combination"], r["option"]): r["mean"] for r in results["scores"]}
    for name, ids in itertools.product(NAMES, ("long", "short")):
        if ids in name:
            assert (scores["wordy", name, ids] > scores["brief", name, ids]) == (ids == "long")
    assert runs.read_json(found.folder / "done.json") == results
