"""One long prompt stops no job: it is cut, left out or refused as asked, counted, and named by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_tokenizer
from reading import asked, each
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite.core.runs import read_json
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.files import read
from pyrite.models.policy import RewardModel
from walks.command import pyrite

FAST = "--batch-size 8 --lr-scheduler-type cosine(warmup_steps=0)".split()
NEW = ("--max-new-tokens", 6)
LONG = "tell me " + "about the cat " * 40  # 122 words, for a model that reads 64 tokens
PLACE = "rows.jsonl, line 4"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}in {{ m.content }} then "
    "{% elif m.role == 'user' %}please {{ m.content }} . {% else %}on {{ m.content }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}on {% endif %}"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows for every kind of job; the prompt of the fourth is long."""
    some = []
    for i in range(24):
        prompt = LONG if i == 3 else f"tell me about the {'cat dog bird'.split()[i % 3]}" + " and" * (i // 3)
        some.append({"prompt": prompt, "response": "the cat sat", "chosen": "the cat sat", "rejected": "a dog ran"})
    path = tmp_path_factory.mktemp("long") / "rows.jsonl"
    data.write(some, path)
    return path


@pytest.fixture(scope="module")
def jobs(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """The command of every job that reads prompts."""
    asked, judge = ("--model", tiny, "--prompts", rows), ("--judge", "bradley_terry(gold='length()')")
    learned = ("--model", tiny, "--data", rows, *FAST, "--logging-steps", 1)
    return {
        "sft": ("sft", *learned),
        "dpo": ("dpo", *learned),
        "reward": ("reward", *learned),
        "generate": ("generate", *asked, *NEW),
        "evaluate": ("evaluate", *asked, *NEW, "--gold", "length()"),
        "online": ("online", *asked, *judge, "--rounds", 1, *NEW, "--gold", "length()", *FAST),
        "ppo": ("ppo", *asked, "--reward", "length()", "--steps", 1, *NEW, "--gold", "length()", *FAST),
        "reference": ("reference", "--model", tiny, "--data", rows),
    }


JOBS = ("sft", "dpo", "reward", "generate", "evaluate", "online", "ppo", "reference")


def said(*arguments: object) -> tuple[int, str]:
    status, out, err = pyrite(*arguments)
    return status, out + err


def counted(folder: Path, name: str) -> int:
    done = read_json(folder / "done.json")
    return sum(count for key, count in done.items() if key.endswith(name))


@pytest.mark.parametrize("job", JOBS)
def test_one_long_prompt_is_cut_dropped_or_refused(jobs: dict[str, tuple[Any, ...]], tmp_path: Path, job: str) -> None:
    status, words = said(*jobs[job], "--out", tmp_path / "cut")
    assert status == 0, words
    assert "1 of" in words and "are cut, keeping their ends" in words and PLACE in words
    assert counted(tmp_path / "cut", "prompts_cut") == 1
    status, words = said(*jobs[job], "--on-long", "drop", "--out", tmp_path / "drop")
    assert status == 0, words
    assert "are left out" in words and PLACE in words
    done = tmp_path / "drop"
    if job == "dpo":
        assert any(PLACE in row.get("place", "") for row in read(str(done / "dropped.jsonl")).rows)
    else:
        assert counted(done, "prompts_dropped") == 1
    status, words = said(*jobs[job], "--on-long", "error", "--out", tmp_path / "error")
    assert (
        status == 2
        and PLACE in words
        and "--on-long truncate" in words
        and "max_prompt" not in words
        and not (tmp_path / "error").exists()
    )


@pytest.mark.parametrize("job", JOBS)
def test_prompts_may_be_made_shorter_than_the_context(
    jobs: dict[str, tuple[Any, ...]], tmp_path: Path, job: str
) -> None:
    """12 tokens at most, start token included: all those with more than six further words are cut."""
    status, words = said(*jobs[job], "--max-prompt", 12, "--out", tmp_path / "run")
    assert status == 0 and "have more than 12 tokens and are cut" in words, words
    assert counted(tmp_path / "run", "prompts_cut") > 1


def test_what_is_left_out_makes_no_rows(jobs: dict[str, tuple[Any, ...]], tmp_path: Path) -> None:
    for way, count in (("truncate", 48), ("drop", 46)):
        status, words = said(*jobs["generate"], "--on-long", way, "--out", tmp_path / way)
        assert status == 0, words
        drawn = read(str(tmp_path / way / "candidates.parquet")).rows
        assert len(drawn) == count
        assert any(row["prompt"] == LONG for row in drawn) == (way == "truncate")  # the prompt is stored as it is


def test_if_all_prompts_are_too_long_an_option_is_wrong(tiny: Path, rows: Path, tmp_path: Path) -> None:
    generate = ("generate", "--model", tiny, "--prompts", rows, "--out", tmp_path / "run")
    status, words = said(*generate, "--max-new-tokens", 62)
    assert status == 2 and "leaves no room" in words and "24 of 24 prompts have more than 2 tokens" in words
    status, words = said(*generate, "--max-new-tokens", 64)
    assert status == 2 and "--max-new-tokens 64: the model reads 64 tokens at most" in words
    status, words = said(*generate, "--max-new-tokens", 30, "--max-prompt", 40)
    assert status == 2 and "--max-prompt 40" in words and "give at most 34" in words
    status, words = said(*generate, "--max-new-tokens", 62, "--on-long", "truncate")
    assert status == 0, words


# Chat templates ---------------------------------------------------------------------------------------------------


def chat() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def spelled(ids: list[int]) -> list[str]:
    return chat().convert_ids_to_tokens(ids)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("most", [8, 12, 20, 33])
def test_a_cut_prompt_keeps_what_its_template_writes(most: int) -> None:
    """The content is cut, at its beginning, to the longest end that fits; start and generation prompt stay."""
    (cut,) = text.encode_prompts(chat(), [LONG], max_prompt=most)
    assert len(cut) == most
    assert spelled(cut)[:2] == ["<bos>", "please"] and spelled(cut)[-2:] == [".", "on"]
    assert spelled(cut)[2:-2] == LONG.split()[-(most - 4) :]


def test_a_long_conversation_loses_its_oldest_turns_first() -> None:
    talk = [
        turn("system", "blue"),
        turn("user", "cat " * 30),
        turn("assistant", "dog " * 20),
        turn("user", "bird tree"),
    ]
    whole = text.encode_prompts(chat(), [talk])[0]
    for most, first in ((len(whole) - 5, ["please", "cat"]), (30, ["please", "cat"]), (10, ["please", "bird"])):
        (cut,) = text.encode_prompts(chat(), [talk], max_prompt=most)
        assert len(cut) <= most
        assert spelled(cut)[:4] == ["<bos>", "in", "blue", "then"]
        assert spelled(cut)[-5:] == ["please", "bird", "tree", ".", "on"]
        assert most == 30 or spelled(cut)[4:6] == first
    (cut,) = text.encode_prompts(chat(), [talk], max_prompt=8)  # no room but for the end of the last turn
    assert spelled(cut) == ["<bos>", "in", "blue", "then", "please", "tree", ".", "on"]


def test_a_policy_is_asked_and_a_reward_model_reads_whole_templates(tmp_path: Path) -> None:
    """From the command line: every candidate to a long question was drawn behind the generation prompt."""
    model = tmp_path / "model"
    LlamaForCausalLM(tiny_config()).save_pretrained(model)
    chat().save_pretrained(model)
    rows = [{"prompt": LONG if i == 1 else f"tell me {i}", "chosen": "the cat", "rejected": "a dog"} for i in range(6)]
    data.write(rows, tmp_path / "rows.jsonl")
    status, words = said(
        "generate", "--model", model, "--prompts", tmp_path / "rows.jsonl", *NEW, "--out", tmp_path / "g"
    )
    assert status == 0 and "1 of 6 prompts have more than 58 tokens and are cut" in words, words
    reward = RewardModel.load(model, head_seed=0, max_length=40)
    (one,) = each(reward.encode(asked([LONG], ["the cat"])))
    assert spelled(one.prompt)[:2] == ["<bos>", "please"] and spelled(one.prompt)[-2:] == [".", "on"]
    assert len(one.prompt) == 30
