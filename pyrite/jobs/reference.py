"""References: compute the log-probabilities of a data set under a model, verify a file of them, import one.

`pyrite reference compute|verify|import`. One file, made anywhere, serves every loss, beta and seed: --ref PATH.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.responses import Responses
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.math import ranges
from pyrite.math.ranges import Count, Natural, Several
from pyrite.models import reference_tables, references
from pyrite.models.loading import Dtype
from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, ReferenceTable, margins
from pyrite.training.pairs import encode_pairs, paired_texts

OUTPUTS = {"table/": "the reference: part-*.parquet and manifest.json, to be named in --ref"}


@dataclass(frozen=True)
class Compute:
    """Score the answers of preference pairs with any model: its own tokenizer, its own chat template."""

    model: str
    """Folder or Hub name of the model that scores."""
    data: str
    """Preference pairs: prompt, chosen, rejected."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Names of the columns where they differ, as ours=theirs: "prompt=question,response=answer"."""
    conditioning: Literal["prompt", "prior"] = "prompt"
    """prior scores the answers without their prompts."""
    max_length: Several | None = None
    """Longest prompt + response in tokens; the model's context by default. As in training, for the same tokenizer."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; three quarters of max_length by default."""
    on_long: OnLong = "truncate"
    """What to do with a longer prompt: cut it to its end, leave its pair out, or stop."""
    template: Template = Template()
    dtype: Dtype = "float32"
    """Of the weights."""
    precision: Dtype = "float32"
    """Of the products."""
    micro_batch_tokens: Count = 16384
    """Packed tokens in one forward pass."""


@dataclass(frozen=True)
class Verify:
    """Check a reference against pairs and the policy to be trained on them, rule by rule."""

    table: Path
    """Folder of the reference."""
    data: str
    """Preference pairs: prompt, chosen, rejected."""
    model: str | None = None
    """Folder or Hub name of the policy; where it is the model that scored, rows are computed again (R6)."""
    columns: str | None = None
    """Names of the columns where they differ, as ours=theirs: "prompt=question,response=answer"."""
    tokens: bool = False
    """The loss reads token log-probabilities."""
    max_length: Several | None = None
    """Longest prompt + response in tokens, as in training; the model's context by default."""
    max_prompt: Count | None = None
    """Longest prompt in tokens, as in training; three quarters of max_length by default."""
    rows: Count = 32
    """Answers to compute again."""
    template: Template = Template()
    seed: Natural = 0
    """Of everything that is drawn at random."""


@dataclass(frozen=True)
class Import:
    """Take in log-probabilities computed elsewhere: prompt, chosen, rejected and one sum (nats) for each answer."""

    file: str
    """Pairs with their sums, in any form that pairs can have."""
    scorer: str
    """The model that gave the log-probabilities, in your words."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Names of the columns where they differ, as ours=theirs: "prompt=question,response=answer"."""
    chosen: str = "chosen_logprob"
    """Column with the log-probability of the chosen answer."""
    rejected: str = "rejected_logprob"
    """Column with the log-probability of the rejected answer."""


Config = Compute | Verify | Import


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    if isinstance(config, Import):
        return {"file": config.file}
    if isinstance(config, Compute):
        return {"model": config.model, "data": config.data}
    model = {"model": config.model} if config.model else {}
    return {"table": config.table, "data": config.data, **model}


def run(config: Config) -> Run:
    """Do what the kind of config says."""
    ranges.check(config)
    if isinstance(config, Compute):
        return compute(config)
    return verify(config) if isinstance(config, Verify) else import_(config)


def compute(config: Compute) -> Run:
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
        files=reference_tables.files_hash(config.model),
        budget=config.micro_batch_tokens,
    )
    return run.finish(**_summary(table, said), **long)


def import_(config: Import) -> Run:
    """Check every number, then store."""
    run = runs.start("reference", config, inputs=inputs)
    if run.done:
        return run
    pairs = rows.load(config.file, "pairs", columns=config.columns, note=say)
    said, names = paired_texts(pairs), (config.chosen, config.rejected)
    sums = references.by_id(said, references.given_sums(said, names))
    run.open()
    if run.writes:
        about = {"file": Path(config.file).name, "sha256": runs.fingerprint(config.file), "names": list(names)}
        references.store(sums, folder=run.folder / "table", scorer=config.scorer, about=about)
    run.wait()
    return run.finish(**_summary(references.load(run.folder / "table"), said))


def verify(config: Verify) -> Run:
    """Every rule with its outcome, until one is broken, which is the error. Writes nothing."""
    pairs = rows.load(config.data, "pairs", columns=config.columns, note=say)
    policy = Policy.load(config.model, template=config.template) if config.model else None
    outcome: dict[str, str] = {}

    def keep(rule: str, result: str) -> None:
        outcome[rule] = result
        say(f"  {rule} kept: {result}")

    try:
        table = references.load(config.table)
        keep("R7", f"{len(table.manifest['parts'])} parts, whole and unchanged")
        keep("R5", "sums in float64, " + ("no tokens" if table.token_logp is None else "tokens in float32"))
        said, dropped = paired_texts(pairs), Counter()
        if policy:
            limits: dict[str, Any] = {"max_length": config.max_length or policy.context}
            left = encode_pairs(policy.tokenizer, pairs, max_prompt=config.max_prompt, source=config.data, **limits)
            said, dropped = left.responses, Counter(row["reason"] for row in left.dropped)
        tokenizer = policy.tokenizer if policy else None
        reasons = references.verify(table, said, tokenizer=tokenizer, tokens=config.tokens)
        keep("R1", f"all {len(said)} answers are there, finite and at most 0")
        if policy is None:
            keep("R2", "not checked; name the policy with --model")
        elif references.same_tokenizer(table, tokenizer):
            keep("R2", "the tokenizer is the policy's, and so are the ids")
        else:
            keep("R3", "another tokenizer, or an unknown one: for losses of sums")
        dropped += Counter(why for pair in zip(reasons[::2], reasons[1::2], strict=True) if (why := pair[0] or pair[1]))
        lost = ", ".join(f"{count} pairs: {reason}" for reason, count in dropped.items()) or "no pair"
        keep("R4", f"to be dropped: {lost}")
        if policy is None or table.imported or table.recipe["weights"] != reference_tables.weights_hash(policy.model):
            keep("R6", "not checked: it needs the model that scored as --model")
        else:
            worst = references.spot_check(table, policy, said, rows=config.rows, seed=config.seed)
            keep("R6", f"{min(config.rows, len(said))} answers computed again differ by {worst:.2g} nats at most")
        keep("R9", _words(margins(table.sum_logp[table.rows(said)])))
    except BadReference as error:
        say(f"  {str(error)[:2]} broken")
        raise
    return Run(config.table, runs.plain_config(config), {}, {"rules": outcome})


def _summary(table: ReferenceTable, said: Responses) -> dict[str, Any]:
    found = margins(table.sum_logp[table.rows(said)])
    say(f"reference: {_words(found)}; use it as --ref {table.folder}")
    return {"rows": len(table), "fingerprint": table.manifest["fingerprint"], "margins": found}


def _words(margins: dict[str, float]) -> str:
    return f"margins: mean {margins['mean']:.4g}, sd {margins['sd']:.4g} nats; accuracy {margins['accuracy']:.1%}"
