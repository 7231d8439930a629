"""Online direct preference optimization: answer, judge, learn, round by round.

for every round:
    candidates = answers drawn by the sampler from the policy, the reference, or both mixed
    pairs      = what the judge makes of them; with --annotator, what an annotator makes of them, which learns from
                 the pairs whose labels the budget pays for
    policy     = a direct loss on the pairs
    measure      gold, proxy and KL from the start, always together, and labels spent

Pairs are learned from the very tokens that were drawn. Rounds may be one step each (strictly on-policy) or large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pyrite.core import processes, runs, specs
from pyrite.core.processes import progress, say, world
from pyrite.core.runs import Run
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.feedback import judges, schedules
from pyrite.feedback.ledger import GoldLimits, Ledger
from pyrite.feedback.pairing import check_verdicts
from pyrite.math import losses, samplers, seeds
from pyrite.math.losses.needs import needs
from pyrite.math.ranges import Count, Fraction, Natural, Positive, Several
from pyrite.math.samplers import Sampler
from pyrite.models.policy import Lora, Policy
from pyrite.training import annotators, loop, prompts
from pyrite.training.annotators import Discriminator, Labeler, Live, Maker, Rules
from pyrite.training.evaluation import Evaluation, Evaluator
from pyrite.training.loop import Training
from pyrite.training.metrics import Journal, check_stopping
from pyrite.training.prompts import Turns
from pyrite.training.rounds import Players, RoundLearner, Sampling

OUTPUTS = {
    "model/": "the last policy, Hugging Face layout",
    "rounds/*.parquet": "every pair: prompt_id, prompt, chosen, rejected, strength",
    "best/": "with --early-stopping-patience: the policy with the most gold",
    "metrics.jsonl": "a row a round: gold, proxy, KL, length, agreement with gold, labels spent",
    "ledger.db": "every paid label, and every paid score of gold, where they are paid for",
}


@dataclass(frozen=True)
class Config:
    """Train a policy on preferences over its own answers, round by round."""

    model: str
    """Folder or Hub name of the policy to start from."""
    prompts: str
    """Prompts: prompt, prompt_id."""
    judge: str
    """Who says which answer is better: "bradley_terry(gold='length()')"."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Names of the columns where they differ, as ours=theirs: "prompt=question,response=answer"."""
    held_out: Fraction = 0.1
    """Share of the prompts kept for measuring, where no --eval-prompts are given."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; what --max-new-tokens leaves of the model's context by default."""
    on_long: OnLong | None = None
    """What to do with a longer prompt: cut it to its end, leave its row out, or stop. By default it is cut, unless all
    prompts are too long."""
    sampler: str = "on_policy()"
    """Which two distributions a pair is drawn from: reference(), on_policy(), hybrid(), mixed(kappa=0.5), ..."""
    loss: str = "soft_dpo(beta=0.1)"
    """The direct loss of a pair, with its options; see `pyrite list losses`."""
    rounds: Count = 3
    """Rounds of answering, judging and learning."""
    prompts_per_round: Count | None = None
    """Prompts answered in a round, all by default: each round takes the next ones, and once all have been asked, they
    come again in a new order."""
    k: Several = 2
    """Answers a prompt; an even number."""
    pairing: str = "best_worst()"
    """Which answers to a prompt make pairs: best_worst(), consecutive() or all(). labels="soft" or "hard": the likelier
    answer is chosen; "sampled": drawn by the judge's probability. min_margin: log-odds, nats, by which a pair's answers
    must differ; closer ones are ties."""
    ref: Literal["start", "previous"] = "start"
    """The reference of loss and sampler: the first policy, or the one each round begins with."""
    temperature: Positive = 1.0
    """Of the draws, after mixing."""
    reset_optimizer: bool = True
    """Every round has its own optimizer and learning rate schedule; --no-reset-optimizer carries both through the
    run."""
    annotator: str | None = None
    """What labels the pairs that the judge is not paid for: "reward(path='runs/reward')", implicit() or self_reward().
    Its option schedule says when it buys labels and learns from them: "even(selector='random()')", "never()". Without
    an annotator the judge labels every pair."""
    measure_every: Count = 1
    """Rounds between measurements and checkpoints."""
    early_stopping_patience: Count | None = None
    """Stop once gold has fallen from its best while the proxy has not, in so many measurements in a row; the best
    policy by gold is kept in best/."""
    evaluation: Evaluation = Evaluation()
    gold_budget: Natural | None = None
    """Labels of the judge to buy at most."""
    gold_limits: str = "limits()"
    """What asking gold costs and how often it is asked: "limits(cost=0.01, max_cost=5, ledger='gold.db', batch=8,
    every=2, prompts=64)". Paid answers are kept in the ledger, which runs may share; every and prompts are about
    measurements: one in so many asks gold, about answers to the first prompts."""
    template: Template = Template()
    lora: str | None = None
    """Low-rank adapters in place of the weights: "lora(r=16, alpha=32)"; see `pyrite.models.loading.Lora`."""
    training: Training = Training(lr=5e-7)
    seed: Natural = 0
    """Of everything that is drawn at random."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"model": config.model, "prompts": config.prompts, **config.evaluation.inputs()}


def run(config: Config) -> Run:
    """Round after round; goes on from the last checkpoint."""
    run = runs.start("online", config, inputs=inputs)
    if run.done:
        return run
    asking = GoldLimits.parse(config.gold_budget, config.gold_limits)
    named = _parts(config, asking)
    asked, test = prompts.split(
        config.prompts, config.evaluation, columns=config.columns, held_out=config.held_out, seed=config.seed
    )
    policy = Policy.load(config.model, lora=Lora.parse(config.lora), template=config.template)
    loop.set_dropout(policy, name=config.model)
    weights = loop.Weights.of(policy)
    start = policy if policy.reversible else policy.frozen_copy()
    limits: dict[str, Any] = {"max_prompt": config.max_prompt, "on_long": config.on_long}
    evaluator = Evaluator.load(
        config.evaluation,
        policy,
        ref=start,
        seed=config.seed,
        prompts=test,
        asking=asking.measuring(config.evaluation.gold),
        **limits,
    )
    ref = start if config.ref == "start" else policy.frozen_copy()
    players = Players(policy, ref, config.training.precision)
    learner = RoundLearner(
        policy, named.loss, config.training, rounds=config.rounds, restart=config.reset_optimizer, seed=config.seed
    )
    # a discriminator has a precision of its own, in which it reads its policy and the start
    silver = named.silver(Players(policy, start), seeds.derive(config.seed, "silver")) if named.silver else None
    drawing = _drawing(named.sampler, config)
    fitted = prompts.encoded(policy, asked, new=config.evaluation.max_new_tokens, **limits)
    asked, ids = fitted.rows, fitted.ids
    turns = Turns(len(asked), min(config.prompts_per_round or len(asked), len(asked)), config.seed)
    players.draw(asked[:1], ids[:1], replace(drawing, max_new_tokens=1), number=0)  # refuses options out of range
    run.open()
    say(f"online: {config.rounds} rounds of {turns.size} prompts, {len(test)} to measure on")
    labeler = _labeler(run, config, asking, named, silver)
    journal = Journal(run, evaluator, policy, silver, patience=config.early_stopping_patience)
    begin = loop.resume(run.folder / "checkpoints", learner.learner, learner.state)
    journal.begin(begin)
    labeler.resume(begin, journal.labels)
    with (
        progress("online", config.rounds, unit="rounds", done=begin) as advance,
        processes.after_steps("round") as stops,
    ):
        for number in range(begin, config.rounds):
            if config.ref == "previous":
                players.ref.load_state_dict(policy.state_dict())
            places = turns(number)
            rows, some = [asked[i] for i in places], [ids[i] for i in places]
            answers = players.answers(rows, some, players.draw(rows, some, drawing, number=number))
            judged = labeler(answers, number)
            prefs = players.preferences(judged.answers, judged.labelled.pairs, learner.wanted)
            over = number + 1 == config.rounds or (labeler.spent(number) and not silver)
            measured = over or (number + 1) % config.measure_every == 0
            learned = learner.learn(prefs, number)
            journal.write(number, len(answers), judged, learned, measured=measured, over=over)
            advance(1)
            if over or (measured and journal.parted()):
                break
            stop = stops()
            if measured or stop:
                labeler.save(number + 1)
                loop.save(run.folder / "checkpoints", number + 1, learner.learner, learner.state)
                run.pause()
            if stop:
                raise processes.Stopped(stop, f"online has {number + 1} of {config.rounds} rounds")
    if run.writes:
        policy.save(run.folder / "model")
    loop.discard_checkpoints(run)
    journal.tell()
    counts = {"labels": journal.labels, "answers": journal.answers}
    found = loop.tell("online", weights.change(policy), config.training.lr, journal.shift)
    long = fitted.counts() | {f"eval_{name}": count for name, count in evaluator.long.items()}
    return run.finish(start=journal.start, last=journal.last, fit=journal.fit, **counts, moved=found, **long)


@dataclass(frozen=True)
class Parts:
    """What the options name."""

    sampler: Sampler
    judge: judges.Judge
    loss: Any
    rules: Rules
    silver: Maker | None


def _parts(config: Config, asking: GoldLimits) -> Parts:
    """The named parts, and whatever the options alone show to be impossible."""
    if asking.ledger and Path(asking.ledger).exists():
        Ledger(asking.ledger).close()  # refuses a file that is none
    check_stopping(config.early_stopping_patience, config.evaluation)
    sampler: Any = specs.part(config.sampler, samplers).function
    judge = specs.part(config.judge, judges)
    if judge.own and not asking.counted:  # one that cannot judge is refused now, unless a try has a price
        check_verdicts(judge(["Say hi."] * 2, ["hi", "hello"], ["hello", "hi"]), 2, name=config.judge)
    silver: Any = specs.part(config.annotator, annotators).function if config.annotator else None
    try:
        rules: Any = specs.part(config.pairing, annotators.PAIRINGS).function
    except ValueError as error:
        raise ValueError(f"--pairing {config.pairing}: {error}") from None
    try:
        samplers.check_decodable(sampler)
    except ValueError as error:
        raise ValueError(f"--sampler {config.sampler}: {error}") from None
    loss = specs.part(config.loss, losses)
    if "kl" in needs(loss):
        raise ValueError(f"--loss {config.loss} reads the reference's whole distribution, which rounds do not keep")
    if config.k % 2:
        raise ValueError(f"--k {config.k}: answers are drawn two by two; give an even number")
    if needs(loss) & {"batch", "running"} and world().num_processes > 1:
        raise ValueError(f"--loss {config.loss} reads the whole batch at once: run it in one process")
    return Parts(sampler, judge, loss, rules, silver)


def _labeler(run: Run, config: Config, limits: GoldLimits, named: Parts, silver: Discriminator | None) -> Labeler:
    rules = replace(named.rules, seed=config.seed, judge=config.judge)
    counted = silver or limits.counted
    account = limits.account(run.folder, config.judge, "verdict") if counted else None
    live = None
    if silver:
        schedule: Any = specs.part(silver.schedule, schedules).function
        live = Live(silver, schedule, rules, config.rounds, limits.budget)
    return Labeler(named.judge, rules, run.folder, limits.budget, account, live)


def _drawing(sampler: Sampler, config: Config) -> Sampling:
    return Sampling(
        sampler,
        k=config.k,
        max_new_tokens=config.evaluation.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
