"""What is measured on as held out was not learned from; what was learned from is never called held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyrite.core.runs import read_json, read_metrics
from pyrite.data import rows as data
from walks.command import pyrite

FAST = "--batch-size 8 --lr-scheduler-type cosine(warmup_steps=0)".split()
LOG = ("--logging-steps", 1)


def rows(begin: int, end: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"tell me about the cat {i}", "chosen": "the cat sat", "rejected": "a dog ran", "response": "a cat"}
        for i in range(begin, end)
    ]


def written(path: Path, some: list[dict[str, str]]) -> Path:
    data.write(some, path)
    return path


def said(*arguments: object) -> tuple[int, str]:
    status, out, err = pyrite(*arguments)
    return status, out + err


@pytest.mark.parametrize("job", ["dpo", "reward", "sft"])
def test_rows_of_held_out_prompts_are_not_learned_from(tiny: Path, tmp_path: Path, job: str) -> None:
    """12 rows, 4 of them of prompts in the held-out file, once as messages, with other ids and other white space."""
    train = written(tmp_path / "train.jsonl", rows(0, 12))
    other = [{**row, "prompt": [{"role": "user", "content": row["prompt"] + "\n"}]} for row in rows(8, 16)]
    held = written(tmp_path / "held.jsonl", [{**row, "prompt_id": f"h{i}"} for i, row in enumerate(other)])
    command = (job, "--model", tiny, "--data", train, *FAST, *LOG)
    status, words = said(*command, "--held-out", held, "--out", tmp_path / "out")
    assert status == 0, words
    assert f"4 of 12 rows left out: their prompt is held out ({train}, line 9" in words
    done = read_json(tmp_path / "out" / "done.json")
    assert done["train_rows" if job == "sft" else "pairs"] == 8
    status, words = said(*command, "--held-out", train, "--out", tmp_path / "all")
    assert status == 2 and "all 12 rows are of prompts that are held out" in words
    assert not (tmp_path / "all").exists()
    ids = [{**row, "prompt_id": str(i)} for i, row in enumerate(rows(20, 24))]  # equal ids, other prompts
    apart = written(tmp_path / "apart.jsonl", ids)
    numbered = written(tmp_path / "numbered.jsonl", [{**row, "prompt_id": str(i)} for i, row in enumerate(rows(0, 12))])
    status, words = said(
        job, "--model", tiny, "--data", numbered, *FAST, *LOG, "--held-out", apart, "--out", tmp_path / "ids"
    )
    assert status == 0 and "left out" not in words, words


@pytest.mark.parametrize("job", ["online", "ppo"])
def test_prompts_to_measure_on_are_counted_out_of_those_to_learn_from(tiny: Path, tmp_path: Path, job: str) -> None:
    prompts, held = written(tmp_path / "p.jsonl", rows(0, 12)), written(tmp_path / "h.jsonl", rows(8, 14))
    how = ("--judge", "bradley_terry(gold='length()')", "--rounds", 1)
    how = how if job == "online" else ("--reward", "length()", "--steps", 1)
    command = (job, "--model", tiny, "--prompts", prompts, *how, *FAST, "--max-new-tokens", 4, "--gold", "length()")
    status, words = said(*command, "--eval-prompts", held, "--out", tmp_path / "out")
    assert status == 0 and "4 of 12 rows left out: their prompt is held out" in words, words
    status, words = said(*command, "--held-out", 0, "--out", tmp_path / "none")
    assert status == 2 and "0 to measure on; give --held-out" in words


def test_dpo_without_held_out_pairs_measures_on_training_pairs_and_says_so(tiny: Path, tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", rows(0, 16))
    how = (*FAST, "--held-out", 0, "--epochs", 4, "--lr", 3e-2, "--measure-every", 1)
    status, words = said("dpo", "--model", tiny, "--data", train, *how, "--out", tmp_path / "out")
    assert status == 0 and "measured on 16 training pairs, as part=train" in words, words
    assert "0 held out" in words
    done, metrics = read_json(tmp_path / "out" / "done.json"), read_metrics(tmp_path / "out")
    assert {row["part"] for row in metrics} == {"dpo", "train"}
    assert done["best"] == done["last"] and done["last"]["step"] == 8
    assert "held_out" not in json.dumps(done)
    first, last = (tmp_path / "out" / name / "model.safetensors" for name in ("best", "model"))
    assert first.read_bytes() == last.read_bytes()


def test_a_reward_model_without_held_out_pairs_has_no_accuracy_but_a_training_accuracy(
    tiny: Path, tmp_path: Path
) -> None:
    train = written(tmp_path / "train.jsonl", rows(0, 16))
    status, words = said(
        "reward", "--model", tiny, "--data", train, *FAST, *LOG, "--held-out", 0, "--out", tmp_path / "out"
    )
    assert status == 0 and "called train_accuracy" in words, words
    done = read_json(tmp_path / "out" / "done.json")
    assert done["held_out_pairs"] == 0 and done["pairs"] == 16
    assert "train_accuracy" in done["members"][0] and "train_length_accuracy" in done
    assert not {"accuracy", "length_accuracy"} & {*done, *done["members"][0]}


def test_held_out_pairs_that_are_all_dropped_are_not_replaced_by_training_pairs(tiny: Path, tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", rows(0, 12))
    same = [{**row, "chosen": "the cat " * 60, "rejected": "the cat " * 70} for row in rows(20, 24)]
    held = written(tmp_path / "held.jsonl", same)  # equal once they are cut to the model's context
    status, words = said(
        "dpo", "--model", tiny, "--data", train, *FAST, *LOG, "--held-out", held, "--out", tmp_path / "out"
    )
    assert status == 2 and "no held-out pair is left of 4" in words


def test_prompts_of_answers_that_are_learned_from_are_told(tiny: Path, tmp_path: Path) -> None:
    train, prompts = written(tmp_path / "train.jsonl", rows(0, 12)), written(tmp_path / "p.jsonl", rows(10, 16))
    measured = ("--eval-prompts", prompts, "--gold", "length()", "--max-new-tokens", 4)
    status, words = said("dpo", "--model", tiny, "--data", train, *FAST, *LOG, *measured, "--out", tmp_path / "out")
    assert status == 0 and "2 of the 6 prompts in --eval-prompts are prompts of the training pairs" in words, words
