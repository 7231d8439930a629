"""Labels on their way from a judge to a loss: none is invented, none is learned against its own numbers, none counts
for several draws, and intervals know that pairs of one prompt are not independent."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrite.core.runs import read_json, read_metrics
from pyrite.data import rows as data
from pyrite.data.files import read
from pyrite.feedback import pairing
from pyrite.jobs.best_of_n import answer_grid
from pyrite.math.statistics import bootstrap
from walks.command import pyrite as command_line

FAST = "--batch-size 8 --lr-scheduler-type cosine(warmup_steps=0)".split()
LOG = ("--logging-steps", 1)


def pyrite(*arguments: object) -> tuple[int, str]:
    """Exit status of a command, and all that it said."""
    status, out, said = command_line(*arguments)
    return status, out + said


def candidate(prompt: int, sample: int, response: str, *, finished: bool = True) -> dict[str, Any]:
    row = {"prompt_id": f"q{prompt}", "prompt": f"tell me {prompt}", "sample": sample, "response": response}
    return {**row, "finished": finished, "length": len(response.split()) + finished, "logp": -1.0}


def preference(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"tell me about {'cat dog bird'.split()[i % 3]} {i}", "chosen": "the cat sat", **more}


def pair(i: int, **more: Any) -> dict[str, Any]:
    return preference(i, rejected="a dog ran", **more)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    data.write(rows, path)
    return path


# Ties -------------------------------------------------------------------------------------------------------------

TIES = [candidate(p, s, ("x", "y")[s]) for p in range(20) for s in range(2)]
CLEAR = [candidate(p, s, "a " * (s + 1)) for p in range(20, 32) for s in range(2)]


@pytest.mark.parametrize("how", [("--gold", "length()"), ("--judge", "bradley_terry(gold='length()')")])
def test_twenty_ties_are_no_twenty_labels(tmp_path: Path, how: tuple[str, str]) -> None:
    file = written(tmp_path / "c.jsonl", TIES + CLEAR)
    for command, name, counted in (("label", "ties", ""), ("pairs", "left_out_tie", "")):
        ways = ("--general", "length()") if command == "pairs" else how
        out = tmp_path / command
        status, said = pyrite(command, "--candidates", file, *ways, "--held-out", 0.25, "--out", out)
        assert status == 0, said
        done = read_json(out / "done.json")
        assert (done["pairs"], done["held_out"], done[name]) == (
            (9, 3, 20) if command == "label" else (done["pairs"], 12 - done["pairs"], 20)
        ), counted
        rows = data.load(out / "pairs.parquet", "pairs") + data.load(out / "held_out.parquet", "pairs")
        assert {row["chosen"].strip() for row in rows} == {"a a"}


def test_a_coin_is_no_choice(tmp_path: Path) -> None:
    file = written(tmp_path / "c.jsonl", TIES + CLEAR)
    for command, ways in (("label", ("--gold", "length()")), ("pairs", ("--general", "length()"))):
        status, _ = pyrite(command, "--candidates", file, *ways, "--ties", "random", "--out", tmp_path / "x")
        assert status == 2 and not (tmp_path / "x").exists()


def test_kept_ties_are_one_half_to_a_soft_loss_and_left_out_by_others(tiny: Path, tmp_path: Path) -> None:
    """From the judge to the loss: soft_dpo reads a tie as ½, so the order of the two answers does not matter to it."""
    words = [candidate(p, s, ("the cat", "a dog")[s]) for p in range(12) for s in range(2)]
    clear = [candidate(p, s, "tell " * (s + 1)) for p in range(12, 20) for s in range(2)]
    file = written(tmp_path / "c.jsonl", words + clear)
    label = ("label", "--candidates", file, "--gold", "length()", "--ties", "keep", "--held-out", 0)
    assert pyrite(*label, "--out", tmp_path / "kept")[0] == 0
    rows = data.load(tmp_path / "kept" / "pairs.parquet", "pairs")
    assert sum(row["strength"] == 0 for row in rows) == 12
    exchanged = [data.exchanged(row) if row["strength"] == 0 else row for row in rows]
    files = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", exchanged)
    common = ("--model", tiny, "--held-out", written(tmp_path / "h.jsonl", [pair(i, strength=1.0) for i in range(4)]))
    found = {}
    for loss in ("soft_dpo()", "sppo(soft=True)", "dpo()", "odpo()"):
        for i, one in enumerate(files):
            out = tmp_path / f"{loss} {i}"
            status, said = pyrite(
                "dpo", "--data", one, *common, "--loss", loss, *FAST, *LOG, "--lr", 1e-2, "--out", out
            )
            assert status == 0, said
            losses = [row["loss"] for row in read_metrics(out) if "part" not in row]
            found[loss, i] = (read_json(out / "done.json")["pairs"], losses)
    for loss, kept in (("soft_dpo()", 20), ("sppo(soft=True)", 20), ("dpo()", 8), ("odpo()", 8)):
        assert found[loss, 0][0] == found[loss, 1][0] == kept
        assert found[loss, 0][1] == pytest.approx(found[loss, 1][1], abs=1e-6), loss
    assert "12 of 20 rows left out: neither answer is better" in said
    out = tmp_path / "reward"
    status, said = pyrite("reward", "--model", tiny, "--data", files[0], *common[2:], *FAST, *LOG, "--out", out)
    assert status == 0 and read_json(out / "done.json")["pairs"] == 8 and "neither answer is better" in said


# Sampled labels ---------------------------------------------------------------------------------------------------


def correlation(draws: Tensor) -> float:
    """Largest correlation between the labels of two pairs that share their first answer, over groups (G, C)."""
    found = torch.corrcoef(draws.T)
    return found[~torch.eye(len(found), dtype=torch.bool)].abs().max().item()


def first_wins(pairs: list[pairing.Pair], groups: int) -> Tensor:
    """Whether answer 0 of each group beat answers 1, 2 and 3, (G, 3)."""
    won = {(p.chosen, p.rejected) for p in pairs}
    return torch.tensor([[(4 * g, 4 * g + k) in won for k in (1, 2, 3)] for g in range(groups)]).double()


def even_judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
    return torch.full((len(a),), 0.6)


def test_every_pair_has_its_own_draw() -> None:
    """One uniform number a first answer made one draw of its three labels: a correlation of 1."""
    groups = 2000
    answers = [f"{g} {k}" for g in range(groups) for k in range(4)]
    places = [list(range(4 * g, 4 * g + 4)) for g in range(groups)]
    made = pairing.label(even_judge, ["p"] * len(answers), answers, places, pairing="all", labels="sampled", seed=5)
    draws = first_wins(made.pairs, groups)
    far = 4 / math.sqrt(groups)  # four standard saidors of a correlation of 0
    assert correlation(draws) < far
    assert abs(draws.mean().item() - 0.6) < 4 * math.sqrt(0.24 / (3 * groups))
    shared = (torch.rand(groups, 1, generator=torch.Generator().manual_seed(0)) < 0.6).expand(groups, 3).double()
    assert correlation(shared) > 0.99 > far  # the fault would be seen


def test_a_draw_does_not_depend_on_the_batch() -> None:
    """Named answers are drawn alike alone and among others, in whatever order."""
    names = [f"q{g} {k}" for g in range(40) for k in range(4)]
    places = [list(range(4 * g, 4 * g + 4)) for g in range(40)]
    options: dict[str, Any] = {"pairing": "all", "labels": "sampled", "seed": 1}
    whole = pairing.label(even_judge, ["p"] * 160, names, places, names=names, **options)
    told = {frozenset((names[p.chosen], names[p.rejected])): names[p.chosen] for p in whole.pairs}
    for g in reversed(range(40)):
        some = names[4 * g : 4 * g + 4]
        alone = pairing.label(even_judge, ["p"] * 4, some, [[0, 1, 2, 3]], names=some, **options)
        assert all(told[frozenset((some[p.chosen], some[p.rejected]))] == some[p.chosen] for p in alone.pairs)
    other = pairing.label(even_judge, ["p"] * 160, names, places, names=names, **{**options, "seed": 2})
    assert other.pairs != whole.pairs


def test_sampled_labels_of_an_online_run(tiny: Path, demos: Path, tmp_path: Path) -> None:
    """All pairs of four answers to a prompt: labels drawn online go against the likelier answer as often as they must,
    and a file of such labels is learned as it stands when asked to, and not by accident."""
    judge = tmp_path / "mine.py"
    judge.write_text("import torch\n\n\ndef judge(prompts, a, b):\n    return torch.full((len(a),), 0.75)\n")
    out = tmp_path / "online"
    online = ("online", "--model", tiny, "--prompts", demos, "--judge", f"{judge}:judge()")
    drawn = ("--pairing", "all(labels='sampled')", "--k", 4, "--rounds", 1, "--max-new-tokens", 6, "--eval-limit", 4)
    status, said = pyrite(*online, *drawn, "--gold", "length()", *FAST, "--out", out)
    assert status == 0, said
    drawn_pairs = read(str(out / "rounds" / "00001.parquet")).rows
    rows = [row for row in drawn_pairs if row["chosen"] and row["chosen"] != row["rejected"]]
    against = sum(row["strength"] < 0 for row in rows)
    assert len(rows) > 150 and abs(against / len(rows) - 0.25) < 4 * math.sqrt(0.1875 / len(rows))
    file = written(tmp_path / "drawn.jsonl", rows)
    dpo = ("dpo", "--model", tiny, "--data", file, "--held-out", 0.1, *FAST, *LOG)
    status, said = pyrite(*dpo, "--out", tmp_path / "dpo")
    assert status == 2 and "--on-contradiction" in said and f"{against} of {len(rows)} rows" in said
    status, said = pyrite(*dpo, "--on-contradiction", "keep", "--out", tmp_path / "dpo")
    assert status == 0, said


# Pairs against their own numbers ----------------------------------------------------------------------------------

WRONG = {
    "probability": ([pair(i, probability=0.9 if i else 0.1) for i in range(12)], "probability is 0.1"),
    "strength": ([pair(i, strength=2.0 if i else -2.0) for i in range(12)], "strength is -2"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("job", ["dpo", "reward", "evaluate"])
def test_a_pair_that_contradicts_its_numbers_is_refused(tiny: Path, tmp_path: Path, name: str, job: str) -> None:
    rows, words = WRONG[name]
    file, out = written(tmp_path / "p.jsonl", [*rows[1:5], rows[0], *rows[5:]]), tmp_path / "out"
    command: tuple[object, ...] = (job, "--model", tiny, "--data", file, "--held-out", 0.25, *FAST, *LOG)
    if job == "evaluate":
        prompts = written(tmp_path / "prompts.jsonl", [{"prompt": "tell me"}])
        command = (job, "--model", tiny, "--prompts", prompts, "--ref", tiny, "--pairs", file, "--max-new-tokens", 4)
    status, said = pyrite(*command, "--out", out)
    assert status == 2 and not out.exists()
    assert f"{file}, line 5: {words}" in said and "1 of 12 rows" in said and "--on-contradiction swap" in said
    status, said = pyrite(*command, "--on-contradiction", "swap", "--out", out)
    assert status == 0 and "in 1 of 12 rows chosen and rejected are exchanged" in said, said


@pytest.mark.parametrize("loss", ["dpo()", "soft_dpo()", "rebel()"])
def test_an_exchanged_pair_is_learned_as_its_numbers_say(tiny: Path, tmp_path: Path, loss: str) -> None:
    """Half of a file turned around, with its strengths and its reference columns: exchanged, it is the file again."""
    sides = {"chosen_logp": -3.0, "rejected_logp": -5.0}
    right = [pair(i, strength=1.5, **sides) for i in range(16)]
    turned = [{**data.exchanged(row), "strength": -1.5} if i % 2 else row for i, row in enumerate(right)]
    losses = []
    for name, rows in (("right", right), ("turned", turned)):
        file = written(tmp_path / f"{name}.jsonl", rows)
        how = ("--ref", "column(chosen=chosen_logp, rejected=rejected_logp)", "--on-contradiction", "swap")
        command = (
            "dpo",
            "--model",
            tiny,
            "--data",
            file,
            "--loss",
            loss,
            *how,
            *FAST,
            *LOG,
            "--lr",
            1e-2,
            "--epochs",
            2,
        )
        status, said = pyrite(*command, "--out", tmp_path / name)
        assert status == 0, said
        losses.append([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1]
    bad = tuple("column(chosen=lw, rejected=ll)" if "column" in str(one) else one for one in command)
    status, said = pyrite(*bad, "--out", tmp_path / "bad")
    assert status == 2 and "--on-contradiction swap exchanges the columns" in said


def test_left_out_pairs_are_counted_and_numbers_that_disagree_refused(tiny: Path, tmp_path: Path) -> None:
    rows = [pair(i, probability=(0.1, 0.5, 0.9)[i % 3]) for i in range(24)]
    command = ("dpo", "--model", tiny, "--data", written(tmp_path / "p.jsonl", rows), "--held-out", 0.25, *FAST, *LOG)
    status, said = pyrite(*command, "--on-contradiction", "drop", "--out", tmp_path / "out")
    assert status == 0 and "8 of 24 rows left out: their strength or probability says" in said
    assert "8 of 24 rows left out: neither answer is better" in said
    assert read_json(tmp_path / "out" / "done.json")["pairs"] == 6
    both = written(tmp_path / "both.jsonl", [*rows[2:3], pair(30, probability=0.2, strength=1.0)])
    status, said = pyrite("dpo", "--model", tiny, "--data", both, "--out", tmp_path / "both")
    assert status == 2 and "line 2: strength is 1 but probability is 0.2: they disagree" in said


def test_flipped_labels_take_their_columns_along() -> None:
    rows = [pair(i, chosen_score=2.0, rejected_score=1.0, chosen_by="a person") for i in range(10)]
    noisy, mask = data.flip_labels(rows, p=0.5, seed=0)
    for row, flip in zip(noisy, mask, strict=True):
        assert (row["chosen_score"], row["rejected_score"]) == ((1.0, 2.0) if flip else (2.0, 1.0))
        assert row["chosen_by"] == "a person"
    assert [{k: v for k, v in r.items() if k != "flipped"} for r in data.apply_flips(noisy, mask)] == rows


# Intervals --------------------------------------------------------------------------------------------------------


def coverage(*, by_prompt: bool, times: int = 400) -> float:
    """How often the 95 % interval of an accuracy covers the truth: 60 prompts of 6 pairs that are alike."""
    g = torch.Generator().manual_seed(3)
    prompts = torch.arange(60).repeat_interleave(6)
    hits = 0
    for _ in range(times):
        right = torch.rand(60, generator=g) < 0.7  # whether a prompt's pairs are easy
        p = torch.where(right, 0.9, 0.3)[prompts]
        wins = (torch.rand(360, generator=g) < p).double()
        _, lo, hi = bootstrap(wins, prompts=prompts if by_prompt else None, n_boot=400)
        hits += bool(lo <= 0.72 <= hi)
    return hits / times


def test_intervals_of_pairs_resample_prompts() -> None:
    assert coverage(by_prompt=True) > 0.91
    assert coverage(by_prompt=False) < 0.85  # pairs taken as independent: too narrow by a half


def test_reward_accuracy_and_analyses_know_the_prompts(tiny: Path, tmp_path: Path) -> None:
    """Four pairs a prompt, all alike but in one word: the interval is that of prompts, twice as wide."""
    rows = [pair(i, note=k) for i in range(12) for k in range(4)]
    for i, row in enumerate(rows):
        said = ("the cat sat then", "a dog") if (i // 4) % 2 else ("the", "a dog on")
        row["chosen"], row["rejected"] = said[0], said[1] + " ran" * (i % 2)
        row.pop("note")
    single = [row for i, row in enumerate(rows) if i % 4 == 0]
    found = {}
    for name, held in (("four", rows), ("one", single)):
        file = written(tmp_path / f"{name}.jsonl", held)
        train = written(tmp_path / "train.jsonl", [pair(100 + i) for i in range(8)])
        out = tmp_path / name
        command = ("reward", "--model", tiny, "--data", train, "--held-out", file, *FAST, *LOG)
        status, said = pyrite(*command, "--out", out)
        assert status == 0, said
        found[name] = read_json(out / "done.json")
    width = {name: done["length_hi"] - done["length_lo"] for name, done in found.items()}
    assert width["four"] == pytest.approx(width["one"], rel=0.25)  # and not half as wide
    one = written(tmp_path / "same.jsonl", [row | {"prompt": "tell me"} for row in rows[:4]])
    command = ("reward", "--model", tiny, "--data", train, "--held-out", one, *FAST, *LOG)
    assert pyrite(*command, "--out", tmp_path / "same")[0] == 0
    assert read_json(tmp_path / "same" / "done.json")["length_lo"] is None  # one prompt has no interval


# Answers cut before their end -------------------------------------------------------------------------------------


def test_what_is_left_of_cut_answers_is_said_with_a_way_out(tmp_path: Path) -> None:
    whole = {(p, s) for p in range(6) for s in (0, 3)} | {(0, 1), (0, 2)}
    rows = [candidate(p, s, "a " * (s + 1), finished=(p, s) in whole) for p in range(6) for s in range(4)]
    file = written(tmp_path / "c.jsonl", rows)
    label = ("label", "--candidates", file, "--gold", "length()", "--held-out", 0)
    status, said = pyrite(*label, "--out", tmp_path / "out")
    assert status == 0 and read_json(tmp_path / "out" / "done.json")["pairs"] == 2
    assert "10 cut" in said and "10 of 24 answers were cut, the longest at 3 tokens" in said
    assert "--max-new-tokens" in said and "--on-cut rematch" in said
    status, said = pyrite(*label, "--on-cut", "rematch", "--out", tmp_path / "more")
    assert status == 0 and read_json(tmp_path / "more" / "done.json")["pairs"] == 7
    none = written(tmp_path / "none.jsonl", [row | {"finished": False} for row in rows])
    status, said = pyrite("label", "--candidates", none, "--gold", "length()", "--out", tmp_path / "none")
    assert (
        status == 2
        and re.search(r"no pair.*12 cut.*24 of 24 answers were cut", said)
        and not (tmp_path / "none").exists()
    )


def pool(finished: list[int], answers: int = 8) -> list[dict[str, Any]]:
    """Candidates with gold scores, of which the first so many to each prompt are finished."""
    rows = [
        candidate(p, s, "a " * (1 + s + p % 3), finished=s < k) for p, k in enumerate(finished) for s in range(answers)
    ]
    return [row | {"gold": float((7 * row["sample"] + p) % 5)} for p, row in enumerate(rows)]


def test_one_prompt_with_one_finished_answer_does_not_limit_n_for_all(tiny: Path, tmp_path: Path) -> None:
    """Seven prompts with eight finished answers, one with one, one with none: the curve is that of the seven."""
    reward = ("reward", "--model", tiny, "--data", written(tmp_path / "p.jsonl", [pair(i) for i in range(12)]))
    assert pyrite(*reward, "--held-out", 0.25, *FAST, *LOG, "--out", tmp_path / "reward")[0] == 0
    best = ("best_of_n", "--proxy", tmp_path / "reward", "--candidates")
    rows = pool([8] * 7 + [1, 0])
    file, only = written(tmp_path / "c.jsonl", rows), written(tmp_path / "only.jsonl", rows[: 7 * 8])
    status, said = pyrite(*best, file, "--out", tmp_path / "all")
    assert status == 0, said
    assert "7 prompts x 8 answers" in said and "2 of 9 prompts are left out, as they have fewer than 8" in said
    assert "--min-answers" in said and "15 of 72 answers were cut" in said and "--truncated keep" in said
    done = read_json(tmp_path / "all" / "done.json")
    assert (done["prompts"], done["prompts_left_out"], done["answers"], done["n"]) == (7, 2, 8, [1, 2, 4, 8])
    assert pyrite(*best, only, "--out", tmp_path / "only")[0] == 0
    assert read_json(tmp_path / "all" / "curves.json") == read_json(tmp_path / "only" / "curves.json")
    status, said = pyrite(*best, file, "--min-answers", 1, "--out", tmp_path / "one")
    assert status == 0 and "8 prompts x 1 answers" in said and "1 of 9 prompts are left out" in said
    assert "nothing to choose from; 15 of 72 answers were cut" in said
    status, said = pyrite(*best, file, "--min-answers", 1, "--n", 1, 4, "--out", tmp_path / "bad")
    assert status == 2 and "n = 4 but the fewest finished answers to a prompt are 1, and the most are 8" in said


def test_the_most_is_made_of_the_answers() -> None:
    """4 prompts x 8 beat 6 x 5 and 7 x 2; --n 2 6 and --n 1 are met as well."""
    rows = pool([8, 5, 8, 2, 8, 5, 8])
    for n, size in (((), (4, 8)), ((2, 6), (4, 8)), ((1,), (4, 8))):
        grid, left_out = answer_grid(rows, truncated="exclude", n=n)
        assert tuple(grid.shape) == size and left_out == 7 - size[0]
    grid, left_out = answer_grid(pool([8, 5, 8, 5, 5, 5, 5]), truncated="exclude")
    assert tuple(grid.shape) == (7, 5) and left_out == 0
    grid, left_out = answer_grid(pool([2, 1, 1, 3, 1, 1, 1]), truncated="exclude")
    assert tuple(grid.shape) == (2, 2) and left_out == 5  # 7 x 1 would be no curve
