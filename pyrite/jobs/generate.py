"""Candidates: K answers of a policy to each prompt, as it is or under each of some preferences.

Randomness belongs to (seed, prompt_id, sample), so a candidate does not depend on batch size, number of processes,
an interruption or the other preferences that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pyrite.core import runs
from pyrite.core.processes import Advance, progress, say
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.conditioning import Variants
from pyrite.data.responses import Responses
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.math import seeds
from pyrite.math.ranges import Amplitude, Count, Natural, NonNegative
from pyrite.models.policy import Policy

OUTPUTS = {
    "candidates.parquet": "prompt_id, prompt, sample, response, finished, length, logp; of prompts under preferences "
    "also asked, asked_id, preferences"
}


@dataclass(frozen=True)
class Config:
    """Sample K candidate answers to every prompt."""

    model: str
    """Folder or Hub name of a causal language model."""
    prompts: str
    """Prompts: prompt, prompt_id."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    k: Count = 2
    """Answers per prompt."""
    limit: Count | None = None
    """Use only the first N prompts."""
    variants: Variants = Variants()
    max_prompt: Count | None = None
    """Longest prompt in tokens; what --max-new-tokens leaves of the model's context by default."""
    on_long: OnLong | None = None
    """What to do with a longer prompt: cut it to its end, leave its row out, or stop. By default it is cut, unless all
    prompts are too long."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Amplitude = 1.0
    """Sample only among the likeliest tokens that hold this share of the probability; 1 for all."""
    top_k: Natural = 0
    """Sample only among the top_k likeliest tokens; 0 for all."""
    rows: Count = 512
    """Answers decoded together. Changes memory and speed, not the result."""
    template: Template = Template()
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"model": config.model, "prompts": config.prompts, **config.variants.inputs()}


def run(config: Config) -> Run:
    """Sample, mark what was cut, store."""
    run = runs.start("generate", config, inputs=inputs)
    if run.done:
        return run
    prompts = config.variants.of(rows.load(config.prompts, "prompts", columns=config.columns)[: config.limit])
    policy = Policy.load(config.model, template=config.template)
    fitted = rows.fit(
        policy.tokenizer,
        prompts,
        most=rows.room(policy.context, config.max_new_tokens, config.max_prompt),
        context=policy.context,
        on_long=config.on_long,
        note=lambda words: say(f"generate: {words}"),
    )
    prompts, ids = fitted.rows, fitted.ids
    _sample(policy, prompts[:1], ids[:1], config, new=min(1, config.max_new_tokens))  # refuses options out of range
    run.open()
    say(f"generate: {config.k} answers to each of {len(prompts)} prompts")
    some = max(1, config.rows // config.k) * 4
    with progress("generate", len(prompts) * config.k, unit="answers") as advance:
        table = runs.in_parts(
            run.folder / "parts",
            len(prompts),
            lambda begin, end: _part(policy, prompts[begin:end], ids[begin:end], config, advance),
            size=some,
        )
    table = _with_preferences(table, prompts)
    if run.writes:
        pq.write_table(table, run.folder / ".candidates.parquet")
        (run.folder / ".candidates.parquet").replace(run.folder / "candidates.parquet")
    finished = table["finished"].to_numpy()
    return run.finish(
        answers=len(table),
        missing_eos=1 - float(finished.mean()),
        mean_length=float(table["length"].to_numpy().mean()),
        **fitted.counts(),
    )


def _sample(
    policy: Policy,
    prompts: list[dict],
    ids: list[list[int]],
    config: Config,
    *,
    new: int,
    progress: Advance | None = None,
) -> Responses:
    return policy.draw(
        prompts,
        ids,
        k=config.k,
        max_new_tokens=new,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=seeds.derive(config.seed, "generate"),
        max_rows=config.rows,
        progress=progress,
    )


def _part(policy: Policy, prompts: list[dict], ids: list[list[int]], config: Config, advance: Advance) -> dict:
    drawn = _sample(policy, prompts, ids, config, new=config.max_new_tokens, progress=advance)
    assert drawn.logps is not None  # it was drawn
    return {
        "prompt_id": [row["prompt_id"] for row in drawn.owners],
        "prompt": drawn.prompts,
        "sample": drawn.sample,
        "response": drawn.texts,
        "finished": drawn.finished.tolist(),
        "length": drawn.lengths.tolist(),
        "logp": drawn.padded(drawn.logps).double().sum(1).tolist(),
    }


def _with_preferences(table: pa.Table, prompts: list[dict]) -> pa.Table:
    """The candidates with what their prompts were made from, where these carry it."""
    if not any("preferences" in row for row in prompts):
        return table
    owner = {row["prompt_id"]: row for row in prompts}
    for name, kind in {"asked": None, "asked_id": None, "preferences": pa.list_(pa.string())}.items():
        values = [owner[key].get(name) for key in table["prompt_id"].to_pylist()]
        table = table.append_column(name, pa.array(values, kind))
    return table
