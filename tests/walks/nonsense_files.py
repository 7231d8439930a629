"""Files and folders that no command can use, and some that it can, by the names that nonsense.yaml has for them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from pyrite.models.policy import Lora, Policy, RewardModel
from walks.command import pyrite

MINE = """
import torch
def raises():
    def score(prompts, responses):
        return [1 / 0 for _ in responses]
    return score
def none():
    return lambda prompts, responses: None
def short():
    return lambda prompts, responses: torch.zeros(0)
def words():
    return lambda prompts, responses: ["good" for _ in responses]
def judge_raises():
    def judge(prompts, a, b):
        raise RuntimeError("no judge today")
    return judge
def loss_raises(pair):
    return pair.chosen.sums - pair.rejected.sums
def loss_scalar(pair):
    return (pair.rejected.sum - pair.chosen.sum).mean()
def loss_none(pair):
    pass
def loss_nan(pair):
    return (pair.rejected.sum - pair.chosen.sum) * float("nan")
"""


def lay_out(root: Path, *, model: Path, pairs: Path, demos: Path) -> dict[str, str]:
    """Everything that nonsense.yaml names, below `root`."""
    found = {"model": model, "pairs": pairs, "demos": demos, "nothing": root / "nothing" / "here"}
    (root / "files").mkdir()
    found |= _good(root / "files", model, pairs, demos)
    found |= _files(root / "files", pairs)
    (root / "models").mkdir()
    found |= _models(root / "models", model)
    found |= _folders(root)
    return {name: str(path) for name, path in found.items()} | {"criterion": "helpful"}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _good(folder: Path, model: Path, pairs: Path, demos: Path) -> dict[str, Path]:
    """What sound commands read."""
    reward, adapters, other = folder / "reward", folder / "adapters", folder / "other"
    RewardModel.load(model, head_seed=0).save(reward)
    Policy.load(model, lora=Lora(r=2)).save(adapters)
    moved = Policy.load(model)
    for parameter in moved.parameters():
        parameter.data *= 1.01
    moved.save(other)
    assert pyrite("reference", "--model", model, "--data", pairs, "--out", folder / "scored")[0] == 0
    answers = [
        {
            "prompt_id": str(i),
            "prompt": f"tell me {i}",
            "sample": s,
            "response": said,
            "finished": True,
            "gold": float(s),
        }
        | {"length": 4, "logp": -9.0}
        for i in range(12)
        for s, said in enumerate(("a cat sat", "the dog ran on"))
    ]
    plain = [{name: value for name, value in row.items() if name != "gold"} for row in answers]
    for name, rows in (("scored", answers), ("candidates", plain)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    for name, side in (("first", 0), ("second", 1)):
        pq.write_table(pa.Table.from_pylist(plain[side::2]), folder / f"{name}.parquet")
        for row in plain:
            row["sample"] = 0
    judged = [
        {
            "prompt_id": str(i),
            "model": m,
            "baseline": "base",
            "win": float(i % 2),
            "length": 9 + i,
            "baseline_length": 12,
        }
        for i in range(8)
        for m in ("one", "two")
    ]
    changed = [{**row, "chosen": row["chosen"] + " red"} for row in _rows(pairs)]
    return {
        "reward": reward,
        "adapters": adapters,
        "other": other,
        "table": folder / "scored" / "table",
        "candidates": folder / "candidates.parquet",
        "scored": folder / "scored.parquet",
        "first": folder / "first.parquet",
        "second": folder / "second.parquet",
        "judged": _write(folder / "judged.jsonl", judged),
        "other_pairs": _write(folder / "other_pairs.jsonl", changed),
    }


def _files(folder: Path, pairs: Path) -> dict[str, Path]:
    """Data that cannot be read, or say something else."""
    rows = _rows(pairs)[:6]
    text = "".join(json.dumps(row) + "\n" for row in rows)

    def having(name: str, **columns: Any) -> Path:
        return _write(folder / name, [{**row, **columns} for row in rows])

    named = {
        name: folder / name for name in ("empty.jsonl", "blank.jsonl", "garbage.jsonl", "cut.json", "cut.jsonl.gz")
    }
    named["empty.jsonl"].write_text("")
    named["blank.jsonl"].write_text("\n\n  \n")
    named["garbage.jsonl"].write_bytes(bytes(range(256)) * 40)
    named["cut.json"].write_text(json.dumps(rows)[:-30])
    named["cut.jsonl.gz"].write_bytes(gzip.compress(text.encode() * 50)[:-40])
    (folder / "no.jsonl.gz").write_text(text)
    pq.write_table(pa.Table.from_pylist(rows), folder / "whole.parquet")
    (folder / "cut.parquet").write_bytes((folder / "whole.parquet").read_bytes()[:-50])
    (folder / "bad.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (folder / "numbers.json").write_text("[1, 2, 3]")
    (folder / "text.json").write_text('"only text"')
    (folder / "latin.jsonl").write_bytes(text.replace("tell", "t\u00e9ll").encode("latin-1"))
    (folder / "bad_line.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]) + '{"prompt": "a", \n' + text)
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("def score(:\n")
    (folder / "bad.yaml").write_text("lr: [1\n - : :")
    (folder / "list.yaml").write_text("- lr\n- 1\n")
    (folder / "odd.yaml").write_text("no_such_option: 1\n")
    (folder / "group.yaml").write_text("trainin:\n  lr: 0.1\n")
    (folder / "typed.yaml").write_text("training:\n  lr: fast\n")
    return {
        "empty": named["empty.jsonl"],
        "blank": named["blank.jsonl"],
        "garbage": named["garbage.jsonl"],
        "cut_json": named["cut.json"],
        "cut_gz": named["cut.jsonl.gz"],
        "no_gz": folder / "no.jsonl.gz",
        "cut_parquet": folder / "cut.parquet",
        "bad_parquet": folder / "bad.parquet",
        "numbers": folder / "numbers.json",
        "text_json": folder / "text.json",
        "latin": folder / "latin.jsonl",
        "bad_line": folder / "bad_line.jsonl",
        "half_pairs": _write(folder / "half.jsonl", [{"prompt": "a", "chosen": "b"}] * 3),
        "one_pair": _write(folder / "one.jsonl", rows[:1]),
        "number_pairs": having("number_pairs.jsonl", chosen=3),
        "null_pairs": having("null_pairs.jsonl", chosen=None),
        "empty_pairs": having("empty_pairs.jsonl", chosen=""),
        "equal_pairs": having("equal_pairs.jsonl", chosen="a cat", rejected="a cat"),
        "prompts_alone": _write(
            folder / "prompts.jsonl", [{"prompt_id": str(i), "prompt": "tell me"} for i in range(5)]
        ),
        "no_prompts": _write(folder / "no_prompts.jsonl", [{"prompt_id": str(i), "text": 1} for i in range(5)]),
        "number_demos": _write(folder / "number_demos.jsonl", [{"prompt": "a", "response": 7}] * 5),
        "null_demos": _write(folder / "null_demos.jsonl", [{"prompt": None, "response": "a"}] * 5),
        "repeated": _write(
            folder / "repeated.jsonl", [{"prompt_id": "1", "prompt": said} for said in ("a cat", "a dog", "a bird")]
        ),
        "mine": folder / "mine.py",
        "broken_part": folder / "broken.py",
        "bad_yaml": folder / "bad.yaml",
        "list_yaml": folder / "list.yaml",
        "odd_yaml": folder / "odd.yaml",
        "group_yaml": folder / "group.yaml",
        "typed_yaml": folder / "typed.yaml",
    }


def _models(folder: Path, model: Path) -> dict[str, Path]:
    """Models with one thing wrong."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, folder / name))

    weights = "model.safetensors"
    (copy("no_weights") / weights).unlink()
    (copy("bad_config") / "config.json").write_text("{not json")
    (copy("other_config") / "config.json").write_text('{"model_type": "nonesuch"}')
    (copy("empty_weights") / weights).write_bytes(b"")
    whole = (model / weights).read_bytes()
    (copy("cut_weights") / weights).write_bytes(whole[: len(whole) // 2])
    (copy("garbage_weights") / weights).write_bytes(bytes(range(256)) * 99)
    tensors = load_file(model / weights)
    kept = {name: value for name, value in tensors.items() if "self_attn" not in name}
    save_file(kept, copy("lost_weights") / weights, metadata={"format": "pt"})
    (copy("pickled") / weights).unlink()
    torch.save(tensors, folder / "pickled" / "pytorch_model.bin")
    for file in copy("no_tokenizer").glob("token*"):
        file.unlink()
    (copy("bad_tokenizer") / "tokenizer.json").write_bytes(b"\xff\xfe{]")
    Policy.load(model, lora=Lora(r=2)).save(folder / "orphan")
    about = folder / "orphan" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": str(folder / "gone")}))
    Policy.load(model, lora=Lora(r=2)).save(folder / "bad_adapters")
    (folder / "bad_adapters" / "adapter_model.safetensors").write_bytes(b"no adapters")
    return {path.name: path for path in folder.iterdir()}


def _folders(root: Path) -> dict[str, Path]:
    """Folders that hold something else."""
    for name in ("empty_folder", "foreign", "another_run", "bad_run", "unwritable", "cut_table"):
        (root / name).mkdir()
    (root / "foreign" / "thesis.txt").write_text("all of it")
    (root / "another_run" / "config.json").write_text('{"job": "label", "gold": "length()"}')
    (root / "another_run" / "manifest.json").write_text('{"inputs": {}}')
    (root / "another_run" / "done.json").write_text("{}")
    (root / "another_run" / "metrics.jsonl").write_text("")
    (root / "bad_run" / "config.json").write_text('{"job": ')
    shutil.copytree(root / "files" / "scored" / "table", root / "cut_table", dirs_exist_ok=True)
    part = next((root / "cut_table").glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    os.chmod(root / "unwritable", 0o500)
    return {path.name: path for path in root.iterdir() if path.name not in ("files", "models")}
