"""Reward models: E members that differ only in their head's first weights and the order of the data.

loss = mean over pairs of -log sigmoid(r_chosen - r_rejected) + center/2 (r_chosen^2 + r_rejected^2)

Afterwards each member's mean and standard deviation over answers are measured, saved and used by its scorer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data.files import Row
from pyrite.data.responses import Responses
from pyrite.data.rows import Fitted, OnContradiction, OnLong, clusters, fit, load_apart, place
from pyrite.data.text import Template
from pyrite.math import reward_losses, seeds, statistics
from pyrite.math.ranges import Count, Fraction, Natural, NonNegative, Several
from pyrite.models.policy import Lora, Pooling, RewardModel
from pyrite.training import loop
from pyrite.training.loop import Logging, Training
from pyrite.training.pairs import in_pairs, pair_loss, paired_texts

OUTPUTS = {"member_*/": "reward models, Hugging Face layout", "metrics.jsonl": "loss and accuracy by step"}


@dataclass(frozen=True)
class Config:
    """Train an ensemble of reward models on preference pairs."""

    model: str
    """Folder or Hub name of the model to start from."""
    data: str
    """Preference pairs: prompt, chosen, rejected. Pairs whose answers are equal are left out and counted."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    held_out: Fraction | str = 0.1
    """Pairs for measuring accuracy: a file, whose prompts are not learned from, or the share of the prompts to keep.
    With 0, accuracy is that on the training pairs, and called train_accuracy."""
    members: Count = 1
    """Number of reward models in the ensemble."""
    loss: str = "bradley_terry(center=0.001)"
    """Loss of the two scores, with its options; see `pyrite list reward_losses`."""
    pooling: Pooling = "last"
    """Where to read the score: at the end token, or as the mean over the response."""
    head_std: NonNegative = 0.02
    """Standard deviation of a new head's initial weights."""
    max_length: Several | None = None
    """Longest prompt + response in tokens; the model's context by default."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; three quarters of max_length by default."""
    on_long: OnLong = "truncate"
    """What to do with a longer prompt: cut it to its end, leave its pair out, or stop."""
    on_contradiction: OnContradiction = "error"
    """What to do with a pair whose strength is below 0, or probability below one half, so that its rejected answer is
    the better one: stop, exchange the answers, leave it out, or take it as it stands, as a label that was drawn."""
    template: Template = Template()
    lora: str | None = None
    """Low-rank adapters in place of the weights: "lora(r=16, alpha=32)"; see `pyrite.models.loading.Lora`."""
    training: Training = Training(epochs=2)
    logging: Logging = Logging()
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    held = {"held_out": config.held_out} if isinstance(config.held_out, str) else {}
    return {"model": config.model, "data": config.data, **held}


def run(config: Config) -> Run:
    """Train every member on the same pairs, measure it on held-out pairs, save it."""
    run = runs.start("reward", config, inputs=inputs)
    if run.done:
        return run
    loss = specs.part(config.loss, reward_losses)
    loss(torch.zeros(1), torch.zeros(1))  # one that cannot be called is refused now
    pairs, held = _read(config)
    model = _member(config, 0)
    long = [_fitting(model, some, config) for some in (pairs, held)]
    pairs, held = (fitted.rows for fitted in long)
    learn, clean = _encoded(model, pairs), _encoded(model, held)
    test, prompts = (clean, clusters(held)) if held else (learn, clusters(pairs))
    run.open()
    say(f"reward: {len(pairs)} pairs, {len(held)} held out, {config.members} members")
    if not held:
        say("reward: no pairs are held out: accuracy is that on the training pairs, and called train_accuracy")
    for member in range(config.members):
        folder = run.folder / f"member_{member}"
        if (folder / "measured.json").exists():
            continue
        model = model if member == 0 else _member(config, member)
        first, before = loop.Weights.of(model), _margins(model, test)
        loop.fit(
            model,
            learn,
            in_pairs(learn),
            partial(pair_loss, loss),
            training=config.training,
            logging=config.logging,
            seed=seeds.derive(config.seed, "member", member),
            run=run,
            label=f"member {member}",
            folder=f"checkpoints/{member}",
        )
        measured = _measure(model, test, prompts, "" if held else "train_")
        margin = loop.shift("margin", before, _margins(model, test), least=0.1)
        name = f"reward: member {member}" if config.members > 1 else "reward"
        measured["moved"] = loop.tell(name, first.change(model), config.training.lr, margin)
        if run.writes:
            model.save(folder)
            runs.write_json(folder / "measured.json", measured)
        run.wait()
    loop.discard_checkpoints(run)
    counts = {"pairs": len(pairs), "held_out_pairs": len(held), **long[0].counts()}
    return run.finish(members=_results(run, config), **counts, **_baseline(test, prompts, "" if held else "train_"))


def _read(config: Config) -> tuple[list[Row], list[Row]]:
    pairs, held = load_apart(
        config.data,
        "pairs",
        config.held_out,
        seed=seeds.derive(config.seed, "held out"),
        columns=config.columns,
        on_contradiction=config.on_contradiction,
        on_tie="drop",
        note=say,
    )
    measured = len(held or pairs)
    if measured < 2:
        raise ValueError(f"{config.data}: {measured} pair to measure accuracy on; at least 2 are needed")
    return pairs, held


def _member(config: Config, member: int) -> RewardModel:
    model = RewardModel.load(
        config.model,
        lora=Lora.parse(config.lora),
        pooling=config.pooling,
        max_length=config.max_length,
        max_prompt=config.max_prompt,
        head_seed=seeds.derive(config.seed, "head", member),
        head_std=config.head_std,
        template=config.template,
    )
    loop.set_dropout(model, name=None if member else config.model)
    return model


def _fitting(model: RewardModel, pairs: list[dict[str, Any]], config: Config) -> Fitted:
    """Pairs whose prompts are no longer than the model is to read."""
    limits: dict[str, Any] = {"most": model.max_prompt, "context": model.max_length, "on_long": config.on_long}
    return fit(model.tokenizer, pairs, **limits, note=lambda words: say(f"reward: {words}"))


def _encoded(model: RewardModel, pairs: list[dict[str, Any]]) -> Responses:
    """Chosen and rejected of each pair, in turn, as the model reads them."""
    return model.encode(paired_texts(pairs), where=lambda i: place(pairs[i // 2]))


def _measure(model: RewardModel, test: Responses, prompts: list[int], what: str) -> dict[str, Any]:
    """Accuracy (`what` stands before its name) with its interval over prompts, and the constants that standardize this
    member's scores."""
    scores = model.raw_scores(test)
    model.mean, model.std = scores.mean().item(), scores.std(correction=0).item()
    wins = statistics.wins(*scores.view(-1, 2).unbind(1))
    return {**_interval(f"{what}accuracy", f"{what}accuracy", wins, prompts), "mean": model.mean, "std": model.std}


def _margins(model: RewardModel, test: Responses) -> Tensor:
    """Raw scores of chosen less rejected, of some of the pairs, (N,)."""
    chosen, rejected = model.raw_scores(test.take(range(min(len(test), 2 * loop.ROWS)))).view(-1, 2).unbind(1)
    return chosen - rejected


def _results(run: Run, config: Config) -> list[dict[str, Any]]:
    return [runs.read_json(run.folder / f"member_{member}" / "measured.json") for member in range(config.members)]


def _baseline(test: Responses, prompts: list[int], what: str) -> dict[str, Any]:
    """How often the longer answer is the chosen one: what a reward model must beat."""
    wins = statistics.wins(*test.lengths.view(-1, 2).unbind(1))
    return _interval(f"{what}length_accuracy", f"{what}length", wins, prompts)


def _interval(name: str, prefix: str, wins: Tensor, prompts: list[int]) -> dict[str, float | None]:
    """A mean with its interval over prompts, which one prompt alone does not give."""
    mean, lo, hi = (value.item() for value in statistics.bootstrap(wins, prompts=prompts))
    known = lo == lo  # NaN differs from itself
    return {name: mean, f"{prefix}_lo": lo if known else None, f"{prefix}_hi": hi if known else None}
