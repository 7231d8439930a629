"""A reference: the log-probabilities of preference pairs under any model, in a file that `--ref` takes.

One file, made anywhere, serves every loss, beta and seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.math.ranges import Count, Several
from pyrite.models import references
from pyrite.models.loading import Dtype
from pyrite.models.policy import Policy
from pyrite.training.pairs import paired_texts

OUTPUTS = {"table/": "the reference: part-*.parquet and manifest.json, to be named in --ref"}


@dataclass(frozen=True)
class Config:
    """Score the answers of preference pairs with any model: its own tokenizer, its own chat template."""

    model: str
    """Folder or Hub name of the model that scores."""
    data: str
    """Preference pairs: prompt, chosen, rejected."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    conditioning: references.Conditioning = "prompt"
    """prompt: score answers after their prompts; prior: without them."""
    max_length: Several | None = None
    """Longest prompt + response in tokens; the model's context by default. Give the same value as in training."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; three quarters of max_length by default."""
    on_long: OnLong = "truncate"
    """What to do with a longer prompt: cut it to its end, leave its pair out, or stop."""
    template: Template = Template()
    dtype: Dtype = "float32"
    """Data type of the weights."""
    precision: Dtype = "float32"
    """Precision of matrix products."""
    micro_batch_tokens: Count = 16384
    """Packed tokens in one forward pass."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"model": config.model, "data": config.data}


def run(config: Config) -> Run:
    """Read, score, store; an interrupted run goes on where it stopped."""
    run = runs.start("reference", config, inputs=inputs)
    if run.done:
        return run
    pairs = rows.load(config.data, "pairs", columns=config.columns, note=say)
    policy = Policy.load(config.model, dtype=config.dtype, template=config.template)
    max_length, max_prompt = references.limits(policy.context, config.max_length, config.max_prompt)
    long: dict[str, int] = {}
    if config.conditioning == "prompt":
        limits: dict[str, Any] = {"most": max_prompt, "context": max_length, "on_long": config.on_long}
        fitted = rows.fit(policy.tokenizer, pairs, **limits, note=lambda words: say(f"reference: {words}"))
        pairs, long = fitted.rows, fitted.counts()
    said = paired_texts(pairs)
    reading = references.read(
        policy.tokenizer, said, conditioning=config.conditioning, max_length=max_length, max_prompt=max_prompt
    )
    recipe = references.recipe_of(policy, reading, precision=config.precision)
    run.open()
    say(f"reference: {len(reading.ids)} different answers of {len(pairs)} pairs, scored by {config.model}")
    table = references.compute(
        policy,
        reading,
        recipe,
        folder=run.folder / "table",
        scorer=config.model,
        files=references.files_hash(config.model),
        budget=config.micro_batch_tokens,
    )
    found = references.margins(table.sum_logp[table.rows(said)])
    words = f"mean {found['mean']:.4g}, sd {found['sd']:.4g} nats; accuracy {found['accuracy']:.1%}"
    say(f"reference: margins: {words}; use it as --ref {table.folder}")
    return run.finish(rows=len(table), fingerprint=table.manifest["fingerprint"], margins=found, **long)
