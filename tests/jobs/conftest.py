"""The main job on the tiny model, once: sft, candidates, labels, reward models."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyrite.data import rows
from pyrite.jobs import generate, label, reward, sft
from pyrite.training.loop import Logging, Training


@pytest.fixture(scope="session")
def tuned(tiny: Path, demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sft."""
    out = tmp_path_factory.mktemp("chain") / "sft"
    training = Training(lr=1e-2, epochs=3, batch_size=8)
    return sft.run(
        sft.Config(model=str(tiny), data=str(demos), out=out, training=training, logging=Logging(logging_steps=1))
    ).folder


@pytest.fixture(scope="session")
def candidates(tuned: Path, demos: Path) -> Path:
    """A run of generate: 8 answers to each of 60 prompts, some of them cut."""
    out = tuned.parent / "candidates"
    config = generate.Config(model=str(tuned / "model"), prompts=str(demos), out=out, k=8, max_new_tokens=12)
    return generate.run(config).folder


@pytest.fixture(scope="session")
def labels(candidates: Path) -> Path:
    """A run of label: the longer answer is better, a quarter of the labels flipped."""
    out = candidates.parent / "labels"
    found = label.run(
        label.Config(candidates=str(candidates / "candidates.parquet"), gold="length()", out=out, noise=0.25)
    )
    return found.folder


@pytest.fixture(scope="session")
def rewards(tuned: Path, labels: Path) -> Path:
    """A run of reward with two members."""
    out = labels.parent / "rewards"
    config = reward.Config(
        model=str(tuned / "model"),
        data=str(labels / "pairs.parquet"),
        held_out=str(labels / "held_out.parquet"),
        out=out,
        members=2,
        training=Training(lr=3e-3, epochs=2, batch_size=16),
        logging=Logging(logging_steps=1),
    )
    return reward.run(config).folder


@pytest.fixture
def few(demos: Path, tmp_path: Path) -> Path:
    """Ten of the prompts."""
    rows.write(rows.load(demos, "demos")[:10], tmp_path / "few.jsonl")
    return tmp_path / "few.jsonl"
