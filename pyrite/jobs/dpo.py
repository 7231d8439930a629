"""Direct preference optimization: any loss, against any reference.

mean over pairs of loss(log pi(chosen), log pi(rejected), the same two under the reference)

The reference's log-probabilities are computed once, kept in a file and reused by every run that can: a sweep over
beta, loss and seed reads the reference once. The last policy and the best on held-out pairs are both kept.
"""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.core.processes import say, world
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.math import losses, seeds
from pyrite.math.logps import Logps, Running
from pyrite.math.losses.needs import needs, takes_ties
from pyrite.math.ranges import Count, Fraction, Natural, Several
from pyrite.models import references
from pyrite.models.policy import Lora, Policy
from pyrite.training import loop
from pyrite.training.evaluation import Evaluation, Evaluator
from pyrite.training.loop import BatchLoss, Logging, Training
from pyrite.training.pairs import (
    Loss,
    Preferences,
    batch_loss,
    encode_pairs,
    gaps,
    measure,
    value_at_ref,
    whole_batches,
)

OUTPUTS = {
    "model/": "the last policy, Hugging Face layout",
    "best/": "the policy with the lowest held-out loss",
    "metrics.jsonl": "loss, accuracies and margins by step; part=held_out on held-out pairs and evaluation prompts "
    "(part=train with --held-out 0)",
    "dropped.jsonl": "pairs that were left out, with the reason",
}
MEASURED = 512  # training pairs to measure on if none are held out


@dataclass(frozen=True)
class Config:
    """Train a policy on preference pairs with a direct loss."""

    model: str
    """Folder or Hub name of the policy to start from."""
    data: str
    """Preference pairs: prompt, chosen, rejected. Pairs whose answers are equal are left out and counted."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    held_out: Fraction | str = 0.1
    """Pairs to measure on: a file, whose prompts are not learned from, or the share of the prompts to keep. With 0 the
    policy is measured on the training pairs, as part=train, and the last policy counts as the best."""
    loss: str = "dpo(beta=0.1)"
    """Direct preference loss with its options; see `pyrite list losses`."""
    ref: str = "self"
    """Reference: self, none, prior, column, a model, a reference folder, ema(rate=0.01), or a weighted sum of some:
    "0.5*self + 0.5*PATH"."""
    max_length: Several | None = None
    """Longest prompt + response in tokens; the model's context by default."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; three quarters of max_length by default."""
    on_long: OnLong = "truncate"
    """What to do with a longer prompt: cut it to its end, leave its pair out, or stop."""
    on_contradiction: rows.OnContradiction = "error"
    """What to do with a pair whose strength is below 0, or probability below one half, so that its rejected answer is
    the better one: stop, exchange the answers, leave it out, or take it as it stands, as a label that was drawn."""
    measure_every: Count | None = None
    """Steps between measurements on held-out pairs; a tenth of the run by default."""
    evaluation: Evaluation = Evaluation()
    template: Template = Template()
    lora: str | None = None
    """Low-rank adapters in place of the weights: "lora(r=16, alpha=32)"; see `pyrite.models.loading.Lora`."""
    training: Training = Training(lr=1e-6)
    logging: Logging = Logging()
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    held = {"held_out": config.held_out} if isinstance(config.held_out, str) else {}
    refs = {f"ref {i}": source.path for i, source in enumerate(references.parse(config.ref)) if source.path}
    return {"model": config.model, "data": config.data, **held, **refs, **config.evaluation.inputs()}


def run(config: Config) -> Run:
    """Score the reference once, train, measure the last and the best policy on held-out pairs."""
    run = runs.start("dpo", config, inputs=inputs)
    if run.done:
        return run
    loss = specs.part(config.loss, losses)
    wanted = needs(loss)
    _refuse(config, wanted)
    pairs, held = rows.load_apart(
        config.data,
        "pairs",
        config.held_out,
        seed=seeds.derive(config.seed, "held out"),
        columns=config.columns,
        on_contradiction=config.on_contradiction,
        on_tie="keep" if takes_ties(loss) else "drop",
        note=say,
    )
    policy = Policy.load(config.model, lora=Lora.parse(config.lora), template=config.template)
    loop.set_dropout(policy, name=config.model)
    evaluator = _evaluator(config, policy)
    if evaluator:
        _tell_overlap(pairs, evaluator)
    learn, test, dropped, cut = _prepare(run, policy, pairs, held, config, wanted)
    live = LiveReference.of(policy, config, wanted)
    running = Running.zero(device=policy.device) if "running" in wanted else None
    training = whole_batches(config.training, wanted)
    of = partial(batch_loss, policy, loss, wanted=wanted, live=live.policy if live else None, running=running)
    total = loop.steps(len(learn), training)
    part = "held_out" if len(test) else "train"
    if not len(test):
        test = learn.at(range(min(len(learn), MEASURED)))
        say(f"dpo: no pairs are held out: measured on {len(test)} training pairs, as part=train")
    every = config.measure_every or max(1, total // 10)
    watch = Watch(run, policy, of(test), test, evaluator, training, every, total, part)
    start = watch.measure()
    first, before = loop.Weights.of(policy), gaps(policy, test.at(range(min(len(test), loop.ROWS))), training.precision)
    _check_start(start, test, loss, config)
    run.open()
    held_out = len(test) if part == "held_out" else 0
    say(f"dpo: {len(learn)} pairs, {held_out} held out, {len(dropped)} dropped; at the start {_line(start)}")
    if run.writes:
        rows.write(dropped, run.folder / "dropped.jsonl")
    watch.begin(start)
    loop.fit(
        policy,
        learn.responses,
        learn.groups,
        of(learn),
        training=training,
        logging=config.logging,
        seed=config.seed,
        run=run,
        label="dpo",
        state=(dict(vars(running)) if running else {}) | (live.state() if live else {}),
        watch=lambda step: _after(step, policy, live, watch),
    )
    if run.writes:
        policy.save(run.folder / "model")
    loop.discard_checkpoints(run)
    after = gaps(policy, test.at(range(min(len(test), loop.ROWS))), training.precision)
    margin = loop.shift("margin", before, after, least=0.1)
    found = loop.tell("dpo", first.change(policy), training.lr, margin)
    long = {"prompts_cut": cut} if cut else {}
    ends = {"start": start, "last": watch.last, "best": watch.best}
    return run.finish(pairs=len(learn), dropped=len(dropped), **long, **ends, moved=found)


def _refuse(config: Config, wanted: frozenset[str]) -> None:
    """Raises ValueError for options that cannot work, whatever the data."""
    if wanted & {"batch", "running"} and world().num_processes > 1:
        raise ValueError(f"--loss {config.loss} reads the whole batch at once: run it in one process")
    sources = references.parse(config.ref)
    if "kl" in wanted and [(source.kind, source.weight) for source in sources] not in ([("self", 1)], [("ema", 1)]):
        raise ValueError(f"--loss {config.loss} reads the reference's whole distribution: use --ref self or ema(...)")
    columns = [source.options for source in sources if source.kind == "column"]
    twins = [rows.twins(names.get("chosen", "chosen"), names.get("rejected", "rejected")) for names in columns]
    if config.on_contradiction == "swap" and not all(twins):
        raise ValueError(
            f"--on-contradiction swap exchanges the columns of --ref {config.ref} too, and knows by their names alone "
            "which belong together: let these differ in chosen and rejected only, as chosen_logp and rejected_logp do"
        )
    if "ref_tokens" in wanted and columns:
        raise ValueError(f"--loss {config.loss} reads the reference token by token; --ref column has sums only")


def _evaluator(config: Config, policy: Policy) -> Evaluator | None:
    if config.evaluation.eval_prompts is None:
        if config.evaluation.gold or config.evaluation.proxy:
            raise ValueError("--gold and --proxy score answers to --eval-prompts: name that file too")
        return None
    return Evaluator.load(
        config.evaluation,
        policy,
        ref=policy if policy.reversible else config.model,
        seed=config.seed,
        on_long=config.on_long,
    )


def _tell_overlap(pairs: list[dict[str, Any]], evaluator: Evaluator) -> None:
    """Say how many prompts that answers are measured on are learned from."""
    known = rows.seen(evaluator.prompts, pairs)
    if known:
        say(f"dpo: {known} of the {len(evaluator.prompts)} prompts in --eval-prompts are prompts of the training pairs")


def _prepare(
    run: Run, policy: Policy, pairs: list[dict], held: list[dict], config: Config, wanted: frozenset[str]
) -> tuple[Preferences, Preferences, list[dict[str, Any]], int]:
    """Both sets of pairs as token rows with the reference's log-probabilities, what was left out of them, and of how
    many the prompt was cut.

    One reference file covers both, so that it serves every seed's way of dividing the data.
    """
    length = config.max_length or policy.context
    prompt = config.max_prompt if config.max_prompt is not None else length * 3 // 4
    limits: dict[str, Any] = {"max_length": length, "max_prompt": prompt}
    fitted = rows.fit(
        policy.tokenizer,
        pairs + held,
        most=prompt,
        context=length,
        on_long=config.on_long,
        note=lambda words: say(f"dpo: {words}"),
    )
    made = encode_pairs(policy.tokenizer, fitted.rows, source=config.data, **limits)
    made = replace(made, dropped=fitted.dropped + made.dropped)
    if "strength" in wanted and made.strength is None:
        raise ValueError(f"--loss {config.loss} reads how strong a preference is: give {config.data} a strength column")
    run.checked()
    sources = references.parse(config.ref)
    if sources[0].kind == "none" and "ref" in wanted:  # the posterior: a reference that likes all texts alike
        made = replace(made, ref=made.zeros(tokens="ref_tokens" in wanted))
    elif "ref" in wanted and sources[0].kind not in ("none", "ema"):
        ref, reasons, notes = references.obtain(
            sources,
            made.responses,
            policy=policy,
            policy_path=config.model,
            cache=Path(config.out).parent / "references",
            tokens="ref_tokens" in wanted,
            precision=config.training.precision,
            **limits,
        )
        made = replace(made, ref=_suitable(ref, config, wanted)).without(reasons)
        for note in notes:
            say(f"  {note}")
    held_ids = {id(pair) for pair in held}
    test = [i for i, pair in enumerate(made.pairs) if id(pair) in held_ids]
    learn = [i for i, pair in enumerate(made.pairs) if id(pair) not in held_ids]
    if not learn:
        raise ValueError(f"{config.data}: no pair is left to learn from ({len(made.dropped)} dropped)")
    if held and not test:
        raise ValueError(f"{config.held_out}: no held-out pair is left of {len(held)} ({len(made.dropped)} dropped)")
    return made.at(learn), made.at(test), made.dropped, fitted.cut


def _suitable(ref: Logps | None, config: Config, wanted: frozenset[str]) -> Logps:
    assert ref is not None  # some source has been asked
    if "aligned" in wanted and not ref.aligned:
        raise ValueError(
            f"R3: --loss {config.loss} divides by lengths or reads tokens, and --ref {config.ref} counts its own "
            "tokens: choose a loss of sums, or a reference with the policy's tokenizer"
        )
    if "ref_tokens" in wanted and ref.tokens is None:
        raise ValueError(f"--loss {config.loss} reads the reference token by token; --ref {config.ref} has sums only")
    return ref


def _check_start(start: dict[str, float], test: Preferences, loss: Loss, config: Config) -> None:
    """Rule R6 on the means: before the first step the policy is its reference."""
    if config.ref.strip() != "self" or test.ref is None:
        return
    near = 2e-2 if config.training.precision == "bfloat16" else 1e-3
    if abs(start["margin"]) > near * max(1.0, test.ref.length[test.chosen].float().mean().item()):
        raise ValueError(
            f"R6: before the first step the mean margin is {start['margin']:.4f} nats, and must be 0: the reference "
            "file is not this policy's; delete it to have it computed again"
        )
    want = value_at_ref(test, loss)
    if want is not None and abs(start["loss"] - want) > 1e-3 * max(1.0, abs(want)):
        raise ValueError(
            f"R6: before the first step the loss is {start['loss']:.5f}, and must be {want:.5f} where policy = "
            "reference: the reference file is not this policy's; delete it to have it computed again"
        )


def _after(step: int, policy: Policy, live: LiveReference | None, watch: Watch) -> None:
    if live:
        live.follow(policy, step)
    watch(step)


def _line(measured: dict[str, float]) -> str:
    names = ("loss", "accuracy", "policy_accuracy", "margin", "gold", "proxy", "kl_k1")
    return ", ".join(f"{name} {measured[name]:.4g}" for name in names if name in measured)


@dataclass
class LiveReference:
    """A reference that runs along: a copy of the first policy, or one that follows the policy.

    ref <- (1 - rate) ref + rate policy, every `every` steps (Gorbatovski et al. 2024, arXiv:2404.09656, eq. 5, 6).
    """

    policy: Policy
    rate: float
    every: int

    @classmethod
    def of(cls, policy: Policy, config: Config, wanted: frozenset[str]) -> LiveReference | None:
        """None if log-probabilities from a file are enough."""
        source, *_ = references.parse(config.ref)
        moves = source.kind == "ema" and "ref" in wanted
        if not moves and "kl" not in wanted:
            return None
        options = source.options if moves else {"rate": 0.0, "every": 1}
        return cls(copy.deepcopy(policy).eval().requires_grad_(False), **options)

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Move, when it is time."""
        if self.rate and step % self.every == 0:
            for mine, theirs in zip(self.policy.parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs, self.rate)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {f"ref.{name}": value for name, value in self.policy.named_parameters()} if self.rate else {}


@dataclass
class Watch:
    """Measures the policy as it learns. Keeps that of the lowest held-out loss, or the last without held-out pairs.

    part: what it is measured on, held_out or train.
    """

    run: Run
    policy: Policy
    loss: BatchLoss
    test: Preferences
    evaluator: Evaluator | None
    training: Training
    every: int
    total: int
    part: str
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    def measure(self) -> dict[str, float]:
        """Loss, accuracies and margin on held-out pairs, in the precision of training; gold, proxy, KL of answers."""
        with self.policy.reading(self.training.precision):
            measured = measure(self.policy, self.loss, self.test, size=self.training.batch_size)
        if self.evaluator:
            measured |= self.evaluator(self.policy).means()
        return measured

    def begin(self, start: dict[str, float]) -> None:
        """Write down the start, unless a resumed run finds it written; remember the best so far."""
        kept = self.run.folder / "best" / "best.json"
        if kept.exists():
            self.best = runs.read_json(kept)
        if not any(row.get("part") == self.part and row["step"] == 0 for row in runs.read_metrics(self.run.folder)):
            self.run.log(step=0, part=self.part, **start)

    def __call__(self, step: int) -> None:
        """Measure after this step, if it is time."""
        if step % self.every and step != self.total:
            return
        self.last = {"step": step, **self.measure()}
        self.run.rewind(step - 1, part=self.part)  # a resumed run comes here again
        self.run.log(part=self.part, **self.last)
        lower = self.last["loss"] < self.best.get("loss", math.inf)
        if lower if self.part == "held_out" else step == self.total:
            self.best = self.last
            if self.run.writes:
                self._keep()

    def _keep(self) -> None:
        folder, beside = self.run.folder / "best", self.run.folder / ".best"
        shutil.rmtree(beside, ignore_errors=True)
        self.policy.save(beside)
        runs.write_json(beside / "best.json", self.best)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
