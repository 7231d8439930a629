"""Supervised fine-tuning: a language model learns to write the responses of a data set.

loss = -1/|tokens of the batch| sum over response tokens of log pi(token | prompt, tokens before it)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import text
from pyrite.data.files import Row
from pyrite.data.responses import Responses
from pyrite.data.rows import Fitted, OnLong, answer, fit, load_apart, place
from pyrite.data.text import Template
from pyrite.math.ranges import Count, Fraction, Natural, Several, Share
from pyrite.models.forward import Packed, score, singles, token_logps
from pyrite.models.policy import Lora, Policy
from pyrite.training import loop
from pyrite.training.loop import Logging, Training

OUTPUTS = {"model/": "the fine-tuned model, Hugging Face layout", "metrics.jsonl": "loss by step"}


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning on prompts and responses."""

    model: str
    """Folder or Hub name of a causal language model."""
    data: str
    """Demonstrations: prompt, response."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    held_out: Fraction | str = 0.02
    """Demonstrations for measuring perplexity: a file, whose prompts are not learned from, or the share of the prompts
    to keep."""
    max_length: Several | None = None
    """Longest prompt + response in tokens; the model's context by default."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; three quarters of max_length by default."""
    on_long: OnLong | None = None
    """What to do with a longer prompt: cut it to its end, leave its row out, or stop. By default it is cut, unless all
    prompts are too long."""
    template: Template = Template()
    lora: str | None = None
    """Low-rank adapters in place of the weights: "lora(r=16, alpha=32)"; see `pyrite.models.loading.Lora`."""
    training: Training = Training()
    dropout: Share | None = None
    """Dropout during training; the model's own by default."""
    logging: Logging = Logging()
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    held = {"held_out": config.held_out} if isinstance(config.held_out, str) else {}
    return {"model": config.model, "data": config.data, **held}


def run(config: Config) -> Run:
    """Train, measure held-out perplexity, save."""
    run = runs.start("sft", config, inputs=inputs)
    if run.done:
        return run
    training, held = load_apart(
        config.data, "demos", config.held_out, seed=config.seed, columns=config.columns, note=say
    )
    policy = Policy.load(config.model, lora=Lora.parse(config.lora), template=config.template)
    loop.set_dropout(policy, config.dropout, name=config.model)
    first = loop.Weights.of(policy)
    fitted = _fitting(policy, training + held, config)
    kept = {id(row) for row in held}
    learn = _encoded(policy, [row for row in fitted.rows if id(row) not in kept], config)
    held_out = _encoded(policy, [row for row in fitted.rows if id(row) in kept], config)
    if not len(learn):
        raise ValueError(f"{config.data}: no demonstration is left to learn from ({len(fitted.dropped)} dropped)")
    run.open()
    say(f"sft: {len(learn)} demonstrations, {len(held_out)} held out, {_size(policy)} parameters")

    def loss(model: nn.Module, batch: Packed, _: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return -model(batch).sum(), {}

    before = _token_nll(policy, held_out)
    loop.fit(
        policy,
        learn,
        singles(learn),
        loss,
        weights=learn.lengths.double().tolist(),
        training=config.training,
        logging=config.logging,
        seed=config.seed,
        run=run,
        label="sft",
    )
    nll = negative_log_likelihood(policy, held_out) if len(held_out) else None
    if run.writes:
        policy.save(run.folder / "model")
    loop.discard_checkpoints(run)
    perplexity = math.exp(nll) if nll is not None else None
    change = loop.shift("held-out loss", before, _token_nll(policy, held_out), least=0.01)
    found = loop.tell("sft", first.change(policy), config.training.lr, change)
    counts = {"train_rows": len(learn), "held_out_rows": len(held_out)}
    return run.finish(held_out_nll=nll, perplexity=perplexity, **counts, **fitted.counts(), moved=found)


def negative_log_likelihood(policy: Policy, held_out: Responses) -> float:
    """Mean over response tokens, nats."""
    return -score(policy, held_out, singles(held_out)).double().sum().item() / len(held_out.ids)


def _token_nll(policy: Policy, held_out: Responses) -> Tensor:
    """Of some of the demonstrations, (N,) nats a token."""
    some = held_out.take(range(min(len(held_out), loop.ROWS)))
    return -token_logps(policy, some, singles(some)).mean if len(some) else torch.zeros(0)


def _limits(policy: Policy, config: Config) -> tuple[int, int]:
    """Longest text and longest prompt in tokens."""
    context = config.max_length or policy.context
    return context, context * 3 // 4 if config.max_prompt is None else config.max_prompt


def _fitting(policy: Policy, rows: list[Row], config: Config) -> Fitted:
    """Demonstrations with prompts that leave room for the response."""
    context, most = _limits(policy, config)
    limits: dict[str, Any] = {"most": most, "context": context, "on_long": config.on_long}
    return fit(policy.tokenizer, rows, **limits, note=lambda words: say(f"sft: {words}"))


def _encoded(policy: Policy, rows: list[Row], config: Config) -> Responses:
    context, most = _limits(policy, config)
    said = Responses.said(rows, [answer(row, "response") for row in rows])
    read = text.encode(policy.tokenizer, said, max_length=context, max_prompt=most, where=lambda i: place(rows[i]))
    if cut := int((~read.finished).sum()):
        say(f"sft: {cut} of {len(read)} responses end beyond {context} tokens: they are cut, without an end token")
    return read


def _size(policy: Policy) -> str:
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return f"{trained / 1e6:.2f} M trained"
