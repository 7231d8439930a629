"""Adapters into their base: W + s B A for every adapted matrix, and what is left is an ordinary model.

Policies and reward models alike; the kind is read from the adapters' own config.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import text
from pyrite.data.responses import Responses
from pyrite.models.loading import Dtype, adapters_of
from pyrite.models.policy import Policy, RewardModel

OUTPUTS = {"model/": "the merged model, Hugging Face layout"}


@dataclass(frozen=True)
class Config:
    """Merge a model's adapters into its base."""

    model: str
    """Folder of a policy or reward model with adapters."""
    out: Path
    """Folder of the run, new or empty."""
    dtype: Dtype = "float32"
    """Data type of the merged weights."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"model": config.model}


def run(config: Config) -> Run:
    """Load, merge, compare base and merged model on a text, save. The results hold the largest difference."""
    run = runs.start("merge", config, inputs=inputs)
    if run.done:
        return run
    kind = adapters_of(config.model).get("task_type")
    model = RewardModel.load(config.model) if kind == "SEQ_CLS" else Policy.load(config.model)
    run.open()
    before = _read(model)
    assert isinstance(model.model, PeftModel)  # adapters_of has refused anything else
    model.model = model.model.merge_and_unload()  # type: ignore[operator,assignment]
    if isinstance(model, RewardModel):
        model.adapter = None
    difference = (_read(model) - before).abs().max().item()
    model.model.to(getattr(torch, config.dtype))  # type: ignore[arg-type,union-attr]
    say(f"merge: adapters of {config.model}; largest difference in float32 {difference:.1e}")
    if run.writes:
        model.save(run.folder / "model")
    return run.finish(kind="reward model" if isinstance(model, RewardModel) else "policy", difference=difference)


@torch.inference_mode()
def _read(model: Policy | RewardModel) -> torch.Tensor:
    """What the model makes of some tokens: log-probabilities, or a score."""
    model.eval()
    ids = [*range(min(len(model.tokenizer), 16)), text.end_id(model.tokenizer)]
    return model(model.pack(Responses.of([(ids[:2], [ids[2:]])])))
