"""From a user's messages to tokens, and where an answer ends: chat templates in the style of the public families."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite import cli
from tests.conftest import tiny_config

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def build(folder: Path, template: str | None, *tags: str, eos: str = "</s>", special: bool = True) -> Path:
    """A tiny random policy in `folder` that spells letter by letter, with a template and the tags it writes."""
    names = ["<pad>", "<s>", eos, "<unk>"]
    tokens = [*names, *(tag for tag in tags if tag not in names), *LETTERS]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )
    tokenizer.add_tokens([tag for tag in tags if tag not in names], special_tokens=special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(vocab_size=len(tokens), max_position_embeddings=256))
    model.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pyrite(*options: object) -> None:
    """The command line, in this process."""
    before, sys.argv = sys.argv, ["pyrite", *map(str, options)]
    try:
        cli.main()
    finally:
        sys.argv = before


def refused(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """What the command line says to a command it does not run."""
    with pytest.raises(SystemExit) as caught:
        pyrite(*options)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


SHORT = ("--batch-size", 2, "--epochs", 1, "--lr", 1e-3)
SYSTEM = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize("job", ["sft", "dpo", "reward"])
def test_a_row_that_the_template_refuses_is_named_by_its_line_after_the_random_split(tmp_path, capsys, job):
    model = build(tmp_path / "model", MISTRAL)
    rows = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    rows[6]["prompt"] = SYSTEM
    if job == "sft":
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    data = write(tmp_path / "data.jsonl", [*rows[:3], *rows[3:]])
    data.write_text("\n" + data.read_text())  # lines are counted as an editor counts them
    for seed in (0, 1, 2):
        said = refused(capsys, job, "--model", model, "--data", data, "--out", tmp_path / f"{seed}", "--seed", seed,
                       "--held-out", 0.3, *SHORT)  # fmt: skip
        assert f"{data}, line 8: " in said
        assert "must alternate" in said


def test_a_row_of_a_held_out_file_is_named_by_that_file(tmp_path, capsys):
    model = build(tmp_path / "model", MISTRAL)
    good = write(tmp_path / "good.jsonl", [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(4)])
    bad = write(
        tmp_path / "bad.jsonl",
        [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": SYSTEM, "chosen": "a", "rejected": "b"}],
    )
    for job in ("dpo", "reward"):
        said = refused(
            capsys, job, "--model", model, "--data", good, "--held-out", bad, "--out", tmp_path / job, *SHORT
        )
        assert f"{bad}, line 2: " in said


@pytest.mark.parametrize("job", ["generate", "online", "ppo", "evaluate"])
def test_a_prompt_that_the_template_refuses_is_named_by_its_line(tmp_path, capsys, job):
    model = build(tmp_path / "model", MISTRAL)
    rows = [{"prompt": f"ask {i}"} for i in range(8)]
    rows[5] = {"prompt": SYSTEM}
    prompts = write(tmp_path / "prompts.jsonl", rows)
    more = {"online": ("--judge", "bradley_terry(gold='length()')"), "ppo": ("--reward", "length()")}.get(job, ())
    said = refused(capsys, job, "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *more,
                   "--max-new-tokens", 4)  # fmt: skip
    assert f"{prompts}, line 6" in said
