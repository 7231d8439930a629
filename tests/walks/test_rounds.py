"""Which prompts an online run learns from, round by round, read from the pairs it leaves behind."""

from __future__ import annotations

from pathlib import Path

from pyrite.core.runs import read_metrics
from pyrite.data import rows
from pyrite.data.files import read
from walks.command import pyrite

ROUNDS = "--rounds 4 --prompts-per-round 16 --held-out .2 --k 2 --max-new-tokens 6 --pairing all".split()
FAST = "--batch-size 16 --lr-scheduler-type cosine(warmup_steps=0) --eval-limit 4 --gold length() --lr 1e-3".split()


def asked(out: Path, number: int) -> set[str]:
    return {row["prompt_id"] for row in read(str(out / "rounds" / f"{number:05d}.parquet")).rows}


def test_rounds_go_through_the_prompts(tiny: Path, tmp_path: Path) -> None:
    """48 prompts to learn from, 16 a round: three rounds ask each once, the fourth begins again, none is left alone.

    The judge finds every pair decided, so that every prompt is seen in the pairs of its round."""
    judge = tmp_path / "mine.py"
    judge.write_text("import torch\n\n\ndef judge(prompts, a, b):\n    return torch.full((len(a),), 0.75)\n")
    prompts = tmp_path / "prompts.jsonl"
    rows.write(
        [
            {
                "prompt_id": str(i),
                "prompt": "tell me " + "cat dog bird tree red blue".split()[i % 6] + " and" * (i // 6),
            }
            for i in range(60)
        ],
        prompts,
    )
    command = ("online", "--model", tiny, "--prompts", prompts, "--judge", f"{judge}:judge()", *ROUNDS, *FAST)
    status, out, err = pyrite(*command, "--out", tmp_path / "run")
    assert status == 0, out + err
    rounds = [asked(tmp_path / "run", number) for number in (1, 2, 3, 4)]
    for i, one in enumerate(rounds[:3]):
        assert len(one) >= 14  # two equal answers make no pair
        assert not any(one & other for other in rounds[:i])
    assert rounds[3] != rounds[0] and len(rounds[3]) >= 14
    assert read_metrics(tmp_path / "run")[-1]["answers"] == 4 * 32
