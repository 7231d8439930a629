"""Pairs along preferences: who is set against whom, who is asked what, what is left out, no prompt on both sides."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions, Variants, conditioned
from pyrite.data.responses import Responses
from pyrite.jobs import generate, pairs, reward
from pyrite.training.loop import Training
from pyrite.training.ppo import Reward, scored

MINE = """
- {id: long, dimension: size, sentence: big, criterion: The longer one., gold: length()}
- id: short
  dimension: size
  sentence: small
  criterion: The shorter one.
  gold: "weighted_sum(golds=['length()'], weights=[-1.0])"
- {id: cat, dimension: animal, sentence: about the cat, criterion: More cats., gold: "word_collector(words=['cat'])"}
- {id: dog, dimension: animal, sentence: about the dog, criterion: More dogs., gold: "word_collector(words=['dog'])"}
- {id: red, dimension: color, sentence: in red, criterion: Redder., later: true}
"""
JUDGE = """
import json
import pathlib

import torch

ASKED = pathlib.Path(__file__).with_name("asked.jsonl")


def judge(*, criterion, id=""):
    longer = "longer" in criterion

    def verdicts(prompts, a, b):
        with ASKED.open("a") as file:
            file.writelines(json.dumps([criterion, id, *case]) + "\\n" for case in zip(prompts, a, b))
        better = [(len(x.split()) > len(y.split())) == longer for x, y in zip(a, b)]
        return torch.tensor([float("nan") if "none" in x else 0.9 if f else 0.1 for x, f in zip(a, better)])

    return verdicts
"""


@pytest.fixture
def mine(tmp_path: Path) -> Dimensions:
    (tmp_path / "mine.yaml").write_text(MINE)
    return Dimensions.load(tmp_path / "mine.yaml")


def answers(
    mine: Dimensions, preferences: list[str], said: list[str], *, prompt: int = 0, finished: bool = True
) -> list[dict]:
    row = conditioned({"prompt_id": f"q{prompt}", "prompt": f"tell me {prompt}"}, mine.chosen(preferences))
    rest = {"finished": finished, "length": 3, "logp": -1.0}
    return [{**row, "sample": s, "response": text, **rest} for s, text in enumerate(said)]


def run(rows: list[dict], folder: Path, **options: Any) -> tuple[dict[str, Any], list[dict], list[dict], list[dict]]:
    data.write(rows, folder / "candidates.parquet")
    chosen = {"dimensions": str(folder / "mine.yaml"), "options": ("long",), "held_out": 0.0, "out": folder / "run"}
    found = pairs.run(pairs.Config(candidates=str(folder / "candidates.parquet"), **{**chosen, **options}))
    files = [found.folder / f"{name}.parquet" for name in ("pairs", "held_out", "demos")]
    kinds = ("pairs", "pairs", "demos")
    tables = [data.load(file, kind) if file.exists() else [] for file, kind in zip(files, kinds, strict=True)]
    assert found.results is not None
    return found.results, *tables


def brief(rows: list[dict]) -> list[tuple]:
    return [(row["kind"], row["preferences"], row["chosen"], row["rejected"]) for row in rows]


def four(mine: Dimensions, prompt: int = 0) -> list[dict]:
    """Two answers each: under long, short, cat, both of size and animal, and neutral."""
    p = f"w{prompt}"
    return [
        *answers(mine, ["long"], [f"{p} a", f"{p} a b c"], prompt=prompt),
        *answers(mine, [], [f"{p} n", f"{p} n n"], prompt=prompt),
        *answers(mine, ["short"], [f"{p} s s", f"{p} s"], prompt=prompt),
        *answers(mine, ["cat"], [f"{p} cat", f"{p} cow"], prompt=prompt),
        *answers(mine, ["dog"], [f"{p} cow", f"{p} dog"], prompt=prompt),
    ]


def test_all_kinds_of_an_option(mine: Dimensions, tmp_path: Path) -> None:
    results, found, _, demos = run(four(mine), tmp_path)
    assert brief(found) == [
        ("labelled", ["long"], "w0 a b c", "w0 a"),
        ("positive_vs_neutral", ["long"], "w0 a", "w0 n"),
        ("positive_vs_neutral", ["long"], "w0 a b c", "w0 n n"),
        ("positive_vs_negative", ["long"], "w0 a", "w0 s s"),
        ("positive_vs_negative", ["long"], "w0 a b c", "w0 s"),
        ("neutral_vs_negative", ["long"], "w0 n", "w0 s s"),
        ("neutral_vs_negative", ["long"], "w0 n n", "w0 s"),
    ]
    made = conditioned({"prompt_id": "q0", "prompt": "tell me 0"}, mine.chosen(["long"]))
    assert made["prompt"] == "tell me 0 big"
    assert all({name: row[name] for name in made} == made for row in found)
    assert found[0]["strength"] == pytest.approx(math.log(0.9999 / 0.0001))
    assert not any("strength" in row for row in found[1:])  # nobody has judged them
    assert demos == [{**made, "response": "w0 a b c"}]
    kinds = {"labelled": 1, "positive_vs_neutral": 2, "positive_vs_negative": 2, "neutral_vs_negative": 2}
    assert results["options"] == {"long": {**kinds, "held_out": 0}}
    assert (results["pairs"], results["held_out"], results["demos"]) == (7, 0, 1)
    assert not any(results[f"left_out_{reason}"] for reason in pairs.REASONS)


def test_every_option_has_its_gold_and_its_prompt(mine: Dimensions, tmp_path: Path) -> None:
    """Those added later take part only when named; the judge of an option is the one of its own gold."""
    results, found, _, demos = run(four(mine), tmp_path, options=(), kinds=("labelled", "positive_vs_negative"))
    assert list(results["options"]) == ["long", "short", "cat", "dog"]
    labelled = [row for row in brief(found) if row[0] == "labelled"]
    assert labelled == [
        ("labelled", ["long"], "w0 a b c", "w0 a"),
        ("labelled", ["short"], "w0 s", "w0 s s"),
        ("labelled", ["cat"], "w0 cat", "w0 cow"),
        ("labelled", ["dog"], "w0 dog", "w0 cow"),
    ]
    known = [row[1:] for row in brief(found) if row[0] != "labelled" and row[1] in (["cat"], ["dog"])]
    assert known == [(["cat"], "w0 cow", "w0 dog"), (["dog"], "w0 cow", "w0 cat")]
    assert results["left_out_duplicate"] == 2  # w0 cat and w0 dog against w0 cow, which the judge has seen already
    assert {row["prompt"] for row in found} == {f"tell me 0 {option.sentence}" for option in mine.options[:4]}
    assert [row["response"] for row in demos] == [row[2] for row in labelled]


def test_other_preferences_must_be_equal(mine: Dimensions, tmp_path: Path) -> None:
    """Answers under combinations: long against short where both are about cats, or both about dogs."""
    rows = [
        *answers(mine, ["long", "cat"], ["a lc", "b lc"]),
        *answers(mine, ["short", "cat"], ["a sc", "b sc"]),
        *answers(mine, ["short", "dog"], ["a sd", "b sd"]),
        *answers(mine, ["cat"], ["a c", "b c"]),
        *answers(mine, [], ["a n", "b n"]),
    ]
    _, found, *_ = run(rows, tmp_path, kinds=pairs.KINDS[1:])
    assert [(chosen, rejected) for _, _, chosen, rejected in brief(found)] == [
        *(("a lc", "a c"), ("b lc", "b c")),
        *(("a lc", "a sc"), ("b lc", "b sc")),
        *(("a c", "a sc"), ("b c", "b sc")),
    ]
    assert {tuple(row["preferences"]) for row in found} == {("long",)}


def test_every_other_option_of_a_dimension_is_its_opposite(tmp_path: Path) -> None:
    soups = Dimensions.load("soups")
    rows = [row for id in ("P3A", "P3B", "P3D") for row in answers(soups, [id], [f"{id} a", f"{id} b"])]
    options = {"dimensions": "soups", "options": ("P3A",), "kinds": ("positive_vs_negative",)}
    _, found, *_ = run(rows, tmp_path, **options)
    assert sorted(row["rejected"] for row in found) == ["P3B a", "P3B b", "P3D a", "P3D b"]


def test_what_carries_no_preference_is_left_out_and_counted(mine: Dimensions, tmp_path: Path) -> None:
    rows = [
        *answers(mine, ["long"], ["a", "b"], finished=False),
        *answers(mine, ["long"], ["same", "same"], prompt=1),
        *answers(mine, ["long"], ["", "a b"], prompt=2),
        *answers(mine, ["long"], ["a b", "a", "a", "a b", "a b c", "a"], prompt=3),
        *answers(mine, ["long"], ["none", "a b c"], prompt=4),
        *answers(mine, ["long"], ["alone"], prompt=5),
    ]
    (tmp_path / "mine.py").write_text(JUDGE)
    judge = f"{tmp_path / 'mine.py'}:judge(criterion={{criterion}})"
    results, found, *_ = run(rows, tmp_path, kinds=("labelled",), judge=judge)
    assert [row[2:] for row in brief(found)] == [("a b", "a"), ("a b c", "a")]
    counted = {reason: results[f"left_out_{reason}"] for reason in pairs.REASONS}
    assert counted == {"cut": 1, "equal": 1, "empty": 1, "duplicate": 1, "no_verdict": 1, "tie": 0}


def test_no_pair_stands_twice_or_both_ways(mine: Dimensions, tmp_path: Path) -> None:
    """A known pair never contradicts or repeats what the judge has said of the same two answers."""
    rows = [
        *answers(mine, ["long"], ["a", "a b"]),
        *answers(mine, [], ["a b", "a"]),
        *answers(mine, ["short"], ["a b", "a"]),
    ]
    results, found, *_ = run(rows, tmp_path)
    assert brief(found) == [("labelled", ["long"], "a b", "a")]
    assert (results["left_out_duplicate"], results["left_out_equal"]) == (4, 2)


def test_ties_are_dropped_or_kept_without_a_winner(mine: Dimensions, tmp_path: Path) -> None:
    rows = [row for p in range(60) for row in answers(mine, ["long"], ["x", "y"], prompt=p)]
    rows += answers(mine, ["long"], ["x", "y y"], prompt=60)
    results, found, _, demos = run(rows, tmp_path, kinds=("labelled",), ties="keep")
    assert len(found) == 61 and sum(row["strength"] == 0 for row in found) == 60
    assert all(row["chosen"] == "x" for row in found if row["strength"] == 0)
    assert [row["response"] for row in demos] == ["y y"]  # of a tie neither answer is a demonstration
    results, found, *_ = run(rows, tmp_path, kinds=("labelled",), out=tmp_path / "drop")
    assert len(found) == 1 and results["left_out_tie"] == 60


def test_a_judge_is_asked_each_options_criterion_of_the_raw_prompt(mine: Dimensions, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    judge = f"{tmp_path / 'mine.py'}:judge(criterion={{criterion}}, id={{id}})"
    _, found, *_ = run(four(mine), tmp_path, options=("long", "short"), judge=judge)
    asked = tmp_path / "asked.jsonl"
    assert [json.loads(line) for line in asked.read_text().splitlines()] == [
        ["The longer one.", "long", "tell me 0", "w0 a", "w0 a b c"],
        ["The shorter one.", "short", "tell me 0", "w0 s s", "w0 s"],
    ]
    labelled = [row for row in found if row["kind"] == "labelled"]
    assert [row["chosen"] for row in labelled] == ["w0 a b c", "w0 s"]
    assert [row["strength"] for row in labelled] == pytest.approx([math.log(9)] * 2, abs=1e-3)
    asked.unlink()
    run(four(mine), tmp_path, kinds=pairs.KINDS[1:], judge=judge, out=tmp_path / "known")
    assert not asked.exists()  # the label of these kinds is known


def test_an_interruption_asks_nothing_twice(mine: Dimensions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for p in range(70) for id in ("long", "short") for row in answers(mine, [id], ["x", "y y"], prompt=p)]
    want = run(rows, tmp_path, options=("long", "short"), kinds=("labelled",), out=tmp_path / "whole")
    asked: list[int] = []
    real = pairs.pairing.check_verdicts

    def check(verdicts, n: int, *, name: str):
        if len(asked) == 2:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(n)
        return real(verdicts, n, name=name)

    monkeypatch.setattr(pairs.pairing, "check_verdicts", check)
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path, options=("long", "short"), kinds=("labelled",))
    got = run(rows, tmp_path, options=("long", "short"), kinds=("labelled",))
    assert got[1:] == want[1:] and asked == [64, 6, 0, 64, 6]
    assert not (tmp_path / "run" / "parts").exists()


def test_no_prompt_on_both_sides_and_nothing_twice(mine: Dimensions, tmp_path: Path) -> None:
    """Whatever preferences made of a prompt; two ids of one raw prompt stay together."""
    rows = [row for p in range(40) for row in four(mine, p)]
    twins = [{**row, "asked_id": "other"} for row in four(mine, 3)]
    results, found, held, demos = run([*rows, *twins], tmp_path, options=("long", "cat"), held_out=0.25)
    sides = [{row[name] for row in some} for some in (found, held) for name in ("asked_id", "asked", "prompt_id")]
    assert all(not a & b for a, b in zip(sides[:3], sides[3:], strict=True))
    assert len(sides[4]) == 10 and len(sides[1]) == 30
    assert sides[2].isdisjoint(sides[5])
    for some in (found, held):
        keys = [(row["prompt_id"], row["chosen"], row["rejected"]) for row in some if row["asked_id"] != "other"]
        assert len(keys) == len(set(keys))
    assert {row["asked_id"] for row in demos} <= sides[0]
    assert results["options"]["long"]["held_out"] == sum(row["preferences"] == ["long"] for row in held)
    for other in (found, held):  # what a job holds out of these pairs goes by the raw prompt as well
        a, b = data.split(other, fraction=0.3, seed=1)
        assert not {row["asked"] for row in a} & {row["asked"] for row in b}


def test_general_pairs_of_neutral_answers(mine: Dimensions, tmp_path: Path) -> None:
    options = {"dimensions": None, "options": (), "general": "length(unit='chars')"}
    results, found, _, demos = run(four(mine), tmp_path, **options)
    assert brief(found) == [("general", [], "w0 n n", "w0 n")]
    assert (found[0]["prompt"], found[0]["prompt_id"], found[0]["asked_id"]) == ("tell me 0", "q0", "q0")
    assert demos[0]["response"] == "w0 n n" and demos[0]["prompt"] == "tell me 0"
    assert results["options"] == {"general": {"general": 1, "held_out": 0}}
    (tmp_path / "mine.py").write_text(JUDGE)
    judge = f"{tmp_path / 'mine.py'}:judge(criterion={{criterion}})"
    _, found, *_ = run(four(mine), tmp_path, **{**options, "general": "The shorter."}, judge=judge, out=tmp_path / "g")
    assert found[0]["chosen"] == "w0 n"


def test_plain_candidates_are_neutral(tmp_path: Path) -> None:
    names = ("prompt_id", "prompt", "sample", "response", "finished", "length", "logp")
    rest = (True, 1, -1.0)
    rows = [dict(zip(names, ("q", "tell me", s, said, *rest), strict=True)) for s, said in enumerate(("a", "a b"))]
    _, found, *_ = run(rows, tmp_path, dimensions=None, options=(), general="length()")
    assert (found[0]["chosen"], found[0]["asked_id"]) == ("a b", "q")


def test_the_option_may_stand_in_the_system_turn(mine: Dimensions, tmp_path: Path) -> None:
    _, found, *_ = run(four(mine), tmp_path, preference_turn="system")
    turns = [{"role": "system", "content": "big"}, {"role": "user", "content": "tell me 0"}]
    assert {str(row["prompt"]) for row in found} == {str(turns)} and found[0]["asked"] == "tell me 0"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"general": "length()"}, "needs --dimensions.* or --general; and not both"),
    ({"dimensions": None}, "needs --dimensions.* or --general; and not both"),
    ({"dimensions": None, "general": "length()"}, "--options are of --dimensions"),
    ({"options": ("lang",)}, "unknown preference 'lang': did you mean long"),
    ({"kinds": ()}, r"--kinds \(nothing\): give at least one"),
    ({"options": ("red",)}, "preference red has no gold"),
    ({"judge": "bradley_terry(gold='length()')"}, "says the same of every preference"),
    ({"judge": "bradley_tery(gold={gold})"}, "did you mean bradley_terry"),
    (
        {"options": ("dog",), "kinds": ("neutral_vs_negative",)},
        "no two answers for neutral_vs_negative of dog",
    ),
    ({"held_out": 1.0}, "--held-out 1.0"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_options_are_refused_before_work(
    mine: Dimensions, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    rows = [row for row in four(mine) if row["preferences"] != ["cat"]]
    with pytest.raises(ValueError, match=words):
        run(rows, tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_candidates_of_other_dimensions_are_refused(mine: Dimensions, tmp_path: Path) -> None:
    rows = [*four(mine), *answers(Dimensions.load("soups"), ["P1A"], ["a", "b"], prompt=1)]
    with pytest.raises(ValueError, match=r"candidates\.parquet: unknown preference 'P1A': known: long, short"):
        run(rows, tmp_path)
    assert not (tmp_path / "run").exists()


def test_no_pair_at_all_is_an_error(mine: Dimensions, tmp_path: Path) -> None:
    rows = answers(mine, ["long"], ["a", "a b"], finished=False)
    with pytest.raises(ValueError, match=r"no pair to train on for long \(left out: 1 cut\)"):
        run(rows, tmp_path, kinds=("labelled",))


def test_a_changed_gold_file_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text("def score(prompts, responses):\n    return [len(y) for y in responses]\n")
    entry = f"- {{id: long, dimension: d, sentence: s, criterion: c, gold: '{tmp_path / 'gold.py'}:score()'}}\n"
    (tmp_path / "mine.yaml").write_text(entry)
    rows = answers(Dimensions.load(tmp_path / "mine.yaml"), ["long"], ["a", "a b"])
    assert run(rows, tmp_path, kinds=("labelled",))[1][0]["chosen"] == "a b"
    (tmp_path / "gold.py").write_text("def score(prompts, responses):\n    return [-len(y) for y in responses]\n")
    with pytest.raises(ValueError, match=r"gold\.py file or model has changed"):
        run(rows, tmp_path, kinds=("labelled",))


def test_the_chain_from_prompts_to_a_reward_of_preferences(
    tuned: Path, demos: Path, mine: Dimensions, tmp_path: Path
) -> None:
    """Two dimensions of two options, judged by lengths and words: the conditioned reward model tells them apart."""
    file = str(tmp_path / "mine.yaml")
    variants = Variants(file, ("long", "short", "cat", "dog", "neutral"))
    drawn = generate.run(
        generate.Config(str(tuned / "model"), str(demos), tmp_path / "drawn", k=4, max_new_tokens=24, variants=variants)
    )
    candidates = str(drawn.folder / "candidates.parquet")
    made = pairs.run(pairs.Config(candidates, tmp_path / "pairs", file, kinds=("labelled",), held_out=0.2, ties="drop"))
    assert made.results is not None and all(made.results["options"][id]["labelled"] > 20 for id in ("long", "short"))
    learned = reward.run(
        reward.Config(
            str(tuned / "model"),
            str(made.folder / "pairs.parquet"),
            tmp_path / "reward",
            held_out=str(made.folder / "held_out.parquet"),
            training=Training(lr=1e-2, epochs=6, batch_size=16),
        )
    )
    proxy = Reward.of_preferences(str(learned.folder), mine)
    said = ["a cat sat on the mat and then the dog ran about the tree .", "a cat"]

    def totals(id: str) -> torch.Tensor:
        row = conditioned({"prompt_id": "q", "prompt": "tell me about the tree"}, mine.chosen([id]))
        return scored([proxy], Responses.said([row] * len(said), said)).total

    long, short = totals("long"), totals("short")
    assert long[0] > long[1] and short[1] > short[0]
    assert replace(proxy, weight=2.0).objectives == mine.ids
