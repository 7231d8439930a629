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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.core.processes import on_main, say, world
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.responses import Responses
from pyrite.data.rows import OnLong
from pyrite.data.text import Template, plain
from pyrite.feedback import judges, schedules
from pyrite.feedback.ledger import Account, GoldLimits, Ledger
from pyrite.feedback.pairing import (
    Judge,
    Labelled,
    Labels,
    Pair,
    Pairing,
    check_verdicts,
    decided,
    label,
    paired,
)
from pyrite.feedback.schedules import Schedule
from pyrite.feedback.selection import pick
from pyrite.math import losses, samplers, seeds, statistics
from pyrite.math.logps import PairLogps, Running
from pyrite.math.losses.needs import needs
from pyrite.math.ranges import Count, Fraction, Natural, NonNegative, Positive, Several
from pyrite.math.samplers import Sampler
from pyrite.models.policy import Lora, Policy
from pyrite.training import live_rewards, loop, rounds
from pyrite.training.evaluation import Evaluation, Evaluator
from pyrite.training.live_rewards import Annotator, Maker
from pyrite.training.loop import Learner, Training
from pyrite.training.pairs import Preferences, batch_loss, whole_batches
from pyrite.training.rollouts import Players
from pyrite.training.rounds import Journal

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
    """The judge that compares two answers: "bradley_terry(gold='length()')"."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    held_out: Fraction = 0.1
    """Share of the prompts to hold out for measuring if no --eval-prompts are given."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; what --max-new-tokens leaves of the model's context by default."""
    on_long: OnLong | None = None
    """What to do with a longer prompt: cut it to its end, leave its row out, or stop. By default it is cut, unless all
    prompts are too long."""
    sampler: str = "on_policy()"
    """The two distributions to draw a pair from: reference(), on_policy(), hybrid(), mixed(kappa=0.5), ..."""
    loss: str = "soft_dpo(beta=0.1)"
    """Direct preference loss with its options; see `pyrite list losses`."""
    rounds: Count = 3
    """Number of rounds; each draws answers, judges them and learns."""
    prompts_per_round: Count | None = None
    """Prompts answered in a round, all by default: each round takes the next ones, and once all have been asked, they
    come again in a new order."""
    k: Several = 2
    """Answers per prompt; an even number."""
    pairing: str = "best_worst()"
    """Which answers to a prompt make pairs: best_worst(), consecutive() or all(). labels="soft" or "hard": the likelier
    answer is chosen; "sampled": drawn by the judge's probability. min_margin: log-odds, nats, by which a pair's answers
    must differ; closer ones are ties."""
    ref: Literal["start", "previous"] = "start"
    """Reference of loss and sampler: the initial policy, or the policy at the start of each round."""
    temperature: Positive = 1.0
    """Sampling temperature, applied after mixing."""
    reset_optimizer: bool = True
    """Every round has its own optimizer and learning rate schedule; --no-reset-optimizer carries both through the
    run."""
    annotator: str | None = None
    """What labels the pairs that the judge is not paid for: "reward(path='runs/reward')", implicit() or self_reward().
    Its option schedule says when it buys labels and learns from them: "even(selector='random()')", "never()". Without
    an annotator the judge labels every pair."""
    measure_every: Count = 1
    """Measure and save a checkpoint every N rounds."""
    early_stopping_patience: Count | None = None
    """Stop once gold has fallen from its best while the proxy has not, in so many measurements in a row; the best
    policy by gold is kept in best/."""
    evaluation: Evaluation = Evaluation()
    gold_budget: Natural | None = None
    """The most labels to buy from the judge."""
    gold_limits: str = "limits()"
    """What asking gold costs and how often it is asked: "limits(cost=0.01, max_cost=5, ledger='gold.db', batch=8,
    every=2, prompts=64)". Paid answers are kept in the ledger, which runs may share; every and prompts are about
    measurements: one in so many asks gold, about answers to the first prompts."""
    template: Template = Template()
    lora: str | None = None
    """Low-rank adapters in place of the weights: "lora(r=16, alpha=32)"; see `pyrite.models.loading.Lora`."""
    training: Training = Training(lr=5e-7)
    seed: Natural = 0
    """Random seed."""


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
    asked, test = rounds.split(
        config.prompts, config.evaluation, columns=config.columns, held_out=config.held_out, seed=config.seed
    )
    policy = Policy.load(config.model, lora=Lora.parse(config.lora), template=config.template)
    ready = rounds.prepare(
        policy,
        asked,
        config.evaluation,
        test,
        name=config.model,
        size=config.prompts_per_round,
        seed=config.seed,
        asking=asking.measuring(config.evaluation.gold),
        max_prompt=config.max_prompt,
        on_long=config.on_long,
    )
    start = ready.start
    players = Players(policy, start if config.ref == "start" else policy.frozen_copy(), config.training.precision)
    learner = RoundLearner(
        policy, named.loss, config.training, rounds=config.rounds, restart=config.reset_optimizer, seed=config.seed
    )
    # an annotator has a precision of its own, in which it reads its policy and the start
    annotator = (
        named.annotator(Players(policy, start), seeds.derive(config.seed, "silver")) if named.annotator else None
    )
    drawing: dict[str, Any] = {
        "sampler": named.sampler,
        "k": config.k,
        "max_new_tokens": config.evaluation.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    first = ready.prompts.rows[:1], ready.prompts.ids[:1]
    players.draw(*first, 0, **{**drawing, "max_new_tokens": 1})  # refuses options out of range
    run.open()
    say(f"online: {config.rounds} rounds of {ready.size} prompts, {len(test)} to measure on")
    labeler = Labeler(
        named.judge,
        config.judge,
        named.pairing,
        run.folder,
        seed=config.seed,
        rounds=config.rounds,
        budget=asking.budget,
        account=asking.account(run.folder, config.judge, "verdict") if annotator or asking.counted else None,
        annotator=annotator,
    )
    rankers = {"live": lambda answers: annotator.scores(answers).mean(0)} if annotator else {}
    patience = config.early_stopping_patience
    journal = Journal(run, ready.evaluator, policy, "online", patience, rankers)
    begin = loop.resume(run.folder / "checkpoints", learner.learner, learner.state)
    journal.begin(begin)
    labeler.resume(begin, journal.labels)

    def step(number: int) -> tuple[int, int, dict[str, float], bool]:
        if config.ref == "previous":
            players.ref.load_state_dict(policy.state_dict())
        drawn = players.draw(*ready.turn(number), number, **drawing)
        answers, labelled, found = labeler(drawn, number)
        prefs = preferences(players, answers, labelled.pairs, learner.wanted)
        over = labeler.spent(number) and not annotator
        found |= _agreement(ready.evaluator, prefs) | learner.learn(prefs, number)
        _write(run, number, prefs, labelled)
        counts = {"pairs": len(prefs), "ties": labelled.ties, "no_verdict": labelled.missing}
        return len(drawn), labelled.labels, counts | found, over

    def save(done: int) -> None:
        labeler.save(done)
        loop.save(run.folder / "checkpoints", done, learner.learner, learner.state)

    journal.go(step, save, begin=begin, total=config.rounds, every=config.measure_every, unit="round")
    if run.writes:
        policy.save(run.folder / "model")
    loop.discard_checkpoints(run)
    return journal.finish(ready, config.training.lr, labels=journal.labels)


# Options --------------------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """Which answers to a prompt make pairs, and how a verdict labels them; see `feedback.pairing.label`."""

    pairing: Pairing = "best_worst"
    labels: Labels = "soft"
    min_margin: float = 0.0


def best_worst(*, labels: Labels = "soft", min_margin: NonNegative = 0.0) -> Rules:
    """The best and the worst answer to a prompt."""
    return Rules("best_worst", labels, min_margin)


def consecutive(*, labels: Labels = "soft", min_margin: NonNegative = 0.0) -> Rules:
    """Answers 0 and 1, 2 and 3, ..."""
    return Rules("consecutive", labels, min_margin)


def every_two(*, labels: Labels = "soft", min_margin: NonNegative = 0.0) -> Rules:
    """Every two answers to a prompt."""
    return Rules("all", labels, min_margin)


PAIRINGS = {"all": every_two, "best_worst": best_worst, "consecutive": consecutive}


class Parts(NamedTuple):
    """The parts that the options name."""

    sampler: Sampler
    judge: Judge
    loss: Any
    pairing: Rules
    annotator: Maker | None


def _parts(config: Config, asking: GoldLimits) -> Parts:
    """The parts that the options name. Raises ValueError for options that cannot work, whatever the prompts."""
    if asking.ledger and Path(asking.ledger).exists():
        Ledger(asking.ledger).close()  # refuses a file that is none
    rounds.check_stopping(config.early_stopping_patience, config.evaluation)
    sampler: Any = specs.part(config.sampler, samplers).function
    judge = specs.part(config.judge, judges)
    if judge.own and not asking.counted:  # one that cannot judge is refused now, unless a try has a price
        check_verdicts(judge(["Say hi."] * 2, ["hi", "hello"], ["hello", "hi"]), 2, name=config.judge)
    annotator: Any = specs.part(config.annotator, live_rewards).function if config.annotator else None
    try:
        pairing: Any = specs.part(config.pairing, PAIRINGS).function
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
    return Parts(sampler, judge, loss, pairing, annotator)


# Labels ---------------------------------------------------------------------------------------------------------------

NOTHING = Responses.of([])
Couple = tuple[int, int]
ASKED = ("prompt_id", "prompt", "asked", "preferences")  # of a prompt, what an annotator may read in later rounds


@dataclass
class Labeler:
    """The pairs of one round after another: labeled by the judge, or by an annotator that learns from the judge.

    With an annotator, its schedule says for how many pairs the judge is asked, and the annotator labels the others.
    A pair that no label was bought for competes for one in later rounds too, as long as the schedule's window lasts.
    """

    judge: Judge
    name: str  # of the judge, for messages
    rules: Rules
    folder: Path
    seed: int = 0
    rounds: int = 1
    budget: int | None = None
    account: Account | None = None
    annotator: Annotator | None = None
    used: int = 0
    told: bool = False
    learned: Responses = NOTHING  # chosen and rejected in turn, as the annotator has learned them
    fresh: Responses = NOTHING  # chosen and rejected in turn, as it has not learned them yet
    pool: Responses = NOTHING  # pairs that no label was bought for, two answers each
    begun: list[int] = field(default_factory=list)  # the round of each of these pairs
    schedule: Schedule | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.annotator:  # read once: a schedule of your own may keep a state
            named: Any = specs.part(self.annotator.schedule, schedules).function
            self.schedule = named

    def __call__(self, answers: Responses, number: int) -> tuple[Responses, Labelled, dict[str, float]]:
        """The pairs of a round as indices into answers, of earlier rounds too, and metrics."""
        judge = on_main(partial(self.account.ask, self.judge, round=number)) if self.account else self.judge
        if self.annotator:
            answers, labelled, found = self._beside(self.annotator, judge, answers, number)
        else:
            labelled, found = self._alone(judge, answers, number), {}
        self.used += labelled.labels
        if self.spent(number) and not self.told:
            goes_on = "silver labels go on alone" if self.annotator else "there is nothing more to learn from"
            say(f"online: the budget is spent after round {number + 1}, with {self.used} labels; {goes_on}")
            self.told = True
        return answers, labelled, found

    def spent(self, number: int) -> bool:
        """Whether this run has had all the labels it may have, after a round."""
        if self.budget is not None and self.used >= self.budget:
            return True
        return self.account is not None and self.account.broke(round=number)

    def save(self, done: int) -> None:
        """Write what the next rounds need beside the policy's checkpoint; keeps the last two."""
        if not self.annotator or not world().is_main_process:
            return
        for member, learner in enumerate(self.annotator.learners):
            loop.save(self._silver / str(member), done, learner, {})
        self._silver.mkdir(parents=True, exist_ok=True)
        kept = {name: _as_rows(getattr(self, name)) for name in ("learned", "fresh", "pool")}
        runs.write_json(self._silver / f"shelf-{done}.json", {**kept, "begun": self.begun})
        shelves = sorted(self._silver.glob("shelf-*.json"), key=lambda path: int(path.stem.split("-")[1]))
        for old in shelves[:-2]:
            old.unlink()

    def resume(self, done: int, used: int) -> None:
        """Go on after so many rounds, which used so many labels."""
        self.used = used
        if not self.annotator or not done:
            return
        for member, learner in enumerate(self.annotator.learners):
            loop.resume(self._silver / str(member), learner, {}, step=done)
        shelf = self._silver / f"shelf-{done}.json"
        kept = runs.read_json(shelf)
        if "begun" not in kept:
            raise ValueError(f"{shelf}: an earlier version wrote it, with other things; choose another --out")
        self.learned, self.fresh, self.pool = (_from_rows(kept[name]) for name in ("learned", "fresh", "pool"))
        self.begun = kept["begun"]

    @property
    def _silver(self) -> Path:
        return self.folder / "checkpoints" / "silver"

    def _alone(self, judge: Judge, answers: Responses, number: int) -> Labelled:
        """Every pair is the judge's."""
        return label(
            judge,
            [plain(prompt) for prompt in answers.prompts],
            list(answers.texts),
            answers.groups(),
            pairing=self.rules.pairing,
            labels=self.rules.labels,
            min_margin=self.rules.min_margin,
            seed=seeds.derive(self.seed, "labels", number),
            name=self.name,
            names=_names(answers),
        )

    def _beside(
        self, annotator: Annotator, judge: Judge, drawn: Responses, number: int
    ) -> tuple[Responses, Labelled, dict[str, float]]:
        """The judge labels the pairs that the schedule pays for; the annotator learns them, and labels the others."""
        schedule = self.schedule
        assert schedule is not None
        recent = [i for i, begun in enumerate(self.begun) if number - begun < schedule.window]
        begun = [self.begun[i] for i in recent]
        pool = self.pool.take([i for pair in recent for i in (2 * pair, 2 * pair + 1)])
        answers = Responses.joined([drawn, pool])
        scores = annotator.scores(answers)
        ends = paired(drawn.groups(), self.rules.pairing, scores[:, : len(drawn)].mean(0))
        own = [(a, b) for a, b in ends if answers.texts[a] != answers.texts[b]]
        couples = own + [(i, i + 1) for i in range(len(drawn), len(answers), 2)]
        gold = self._buy(schedule, judge, answers, couples, _margins(scores, couples), number)
        learned = self._learn(annotator, schedule.replay, number)
        if learned:
            scores = annotator.scores(answers)
        silver = torch.sigmoid(_margins(scores, couples).double().mean(0)).double().tolist()
        verdicts: list[float] = []
        for i, guess in enumerate(silver):
            bought = gold.get(i, math.nan)
            verdicts.append((guess if i < len(own) else 0.5) if math.isnan(bought) else bought)
        pairs = decided(
            couples,
            verdicts,
            len(answers),
            labels=self.rules.labels,
            min_margin=self.rules.min_margin,
            seed=seeds.derive(self.seed, "labels", number),
            sources=["silver" if math.isnan(gold.get(i, math.nan)) else "gold" for i in range(len(couples))],
            names=[*_names(drawn), *(f"{round} {i}" for i, round in enumerate(begun) for _ in "ab")],
        )
        since = [*[number] * len(own), *begun]
        older_first = [*range(len(own), len(couples)), *range(len(own))]
        left = [i for i in older_first if i not in gold and number + 1 - since[i] < schedule.window]
        self.pool = answers.alone([i for couple in left for i in couples[couple]])
        self.begun = [since[i] for i in left]
        missing = sum(map(math.isnan, gold.values()))
        ties = len(ends) - len(own) + sum(p == 0.5 for p in gold.values())
        kinds = [pair.source for pair in pairs]
        found = {"gold_pairs": kinds.count("gold"), "silver_pairs": len(kinds) - kinds.count("gold"), **learned}
        return answers, Labelled(pairs, len(gold) - missing, ties, missing), found

    def _buy(
        self,
        schedule: Schedule,
        judge: Judge,
        answers: Responses,
        couples: Sequence[Couple],
        margins: Tensor,
        number: int,
    ) -> dict[int, float]:
        """The judge's verdicts on the couples that the selector prefers, by their place; NaN if it gave none."""
        wanted = schedule.allotment(number, rounds=self.rounds, budget=self.budget, used=self.used, pairs=len(couples))
        generator = seeds.generator(self.seed, "select", number)
        chosen = pick(schedule.selector, margins, wanted, generator=generator) if wanted else []
        asked = [couples[i] for i in chosen]
        every = answers.prompts
        prompts = [plain(every[a]) for a, _ in asked]
        sides = [[answers.texts[couple[side]] for couple in asked] for side in (0, 1)]
        verdicts = judge(prompts, *sides) if asked else torch.empty(0)
        known = check_verdicts(verdicts, len(asked), name=self.name).double().tolist()
        better = [(a, b) if p > 0.5 else (b, a) for (a, b), p in zip(asked, known, strict=True) if p != 0.5 and p == p]
        self.fresh = Responses.joined([self.fresh, answers.alone([i for pair in better for i in pair])])
        return dict(zip(chosen, known, strict=True))

    def _learn(self, annotator: Annotator, replay: float, number: int) -> dict[str, float]:
        """The labels not learned yet, with earlier ones beside them."""
        new, old = len(self.fresh) // 2, len(self.learned) // 2
        if not new:
            return {}
        order = torch.randperm(old, generator=seeds.generator(self.seed, "replay", number)).tolist()
        again = [i for pair in order[: min(old, round(replay * new))] for i in (2 * pair, 2 * pair + 1)]
        labels = Responses.joined([self.fresh, self.learned.alone(again)])
        found = annotator.learn(labels, seed=seeds.derive(self.seed, "learn", number))
        self.learned, self.fresh = Responses.joined([self.learned, self.fresh]), NOTHING
        return {f"reward_{name}": value for name, value in found.items()}


def _names(answers: Responses) -> list[str]:
    """Of each answer: its prompt's id and its place among the answers to that prompt."""
    return [f"{row['prompt_id']} {k}" for row, k in zip(answers.owners, answers.sample, strict=True)]


def _margins(scores: Tensor, couples: Sequence[Couple]) -> Tensor:
    """r(a) − r(b) of every member, (E, C)."""
    first, second = ([couple[side] for couple in couples] for side in (0, 1))
    return scores[:, first] - scores[:, second]


def _as_rows(answers: Responses) -> list[dict[str, Any]]:
    """Answers, each with a prompt of its own, as JSON has them."""
    columns = zip(
        answers.owners, answers.asked(), answers.texts, answers.tokens(), answers.finished.tolist(), strict=True
    )
    return [
        {**{name: row[name] for name in ASKED if name in row}, "prompt_ids": [*ids], "text": said, "ids": tokens}
        | {"finished": done}
        for row, ids, said, tokens, done in columns
    ]


def _from_rows(rows: Sequence[dict[str, Any]]) -> Responses:
    """The answers that `_as_rows` wrote."""
    made = Responses.of([(row["prompt_ids"], [row["ids"]]) for row in rows])
    asked = [{name: row[name] for name in ASKED if name in row} for row in rows]
    finished = torch.tensor([row["finished"] for row in rows], dtype=torch.bool)
    return replace(made, rows=asked, texts=[row["text"] for row in rows], finished=finished)


# Learning -------------------------------------------------------------------------------------------------------------


def preferences(players: Players, answers: Responses, pairs: Sequence[Pair], wanted: frozenset[str]) -> Preferences:
    """The drawn tokens of each pair, with the reference's log-probabilities if the loss wants them."""
    both = torch.tensor([[pair.chosen, pair.rejected] for pair in pairs], dtype=torch.int64).view(-1, 2)
    made = Preferences.of(answers, both, torch.tensor([pair.strength for pair in pairs]))
    if not pairs or "ref" not in wanted:
        return made
    ref = players.ref_logps(made.responses, made.groups)
    return replace(made, ref=ref if wanted & {"tokens", "ref_tokens"} else replace(ref, tokens=None, mask=None))


class RoundLearner:
    """The policy's optimizer over the rounds.

    restart: every round has its own moments and learning rate schedule; otherwise both last through all rounds.
    """

    def __init__(
        self,
        policy: Policy,
        loss: Callable[[PairLogps], Tensor],
        training: Training,
        *,
        rounds: int,
        restart: bool = True,
        seed: int = 0,
    ) -> None:
        self.policy, self.loss, self.wanted = policy, loss, needs(loss)
        self.rounds, self.restart, self.seed = rounds, restart, seed
        self.running = Running.zero(device=policy.device) if "running" in self.wanted else None
        self.learner = Learner(policy, whole_batches(training, self.wanted))
        self.step = torch.zeros((), dtype=torch.int64)
        torch.manual_seed(seeds.derive(seed, "dropout"))

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold beside weights and moments."""
        return {"step": self.step} | (dict(vars(self.running)) if self.running else {})

    def learn(self, prefs: Preferences, number: int) -> dict[str, float]:
        """One round's updates; means of loss, metrics and gradient norm over them; {} without a pair.

        Raises TrainingError if one of them is not finite.
        """
        if not len(prefs):
            return {}
        training = self.learner.training
        of = batch_loss(self.policy, self.loss, prefs, wanted=self.wanted, running=self.running)
        total = loop.steps(len(prefs), training)
        if self.restart:
            self.learner.restart()
            self.step.zero_()
        else:
            total *= self.rounds
        seen: list[dict[str, Tensor]] = []
        self.policy.train()
        for batch in loop.batches(len(prefs), training, seed=seeds.derive(self.seed, "order", number)):
            lr = loop.learning_rate(int(self.step), total, training)
            seen.append(self.learner.update(batch, prefs.responses, prefs.groups, of, lr=lr))
            self.step += 1
        self.policy.eval()
        return loop.means(seen, f"round {number + 1}", "lower --lr or look at this round's pairs")


# What a round leaves behind -------------------------------------------------------------------------------------------


def _agreement(evaluator: Evaluator, prefs: Preferences) -> dict[str, float]:
    """How often gold prefers the chosen answer too, ties one half; empty if gold is asked sparingly."""
    if not evaluator.gold or evaluator.asking.sparing or not len(prefs):
        return {}
    asked = [plain(row["prompt"]) for row in prefs.pairs]
    sides = ([prefs.responses.texts[i] for i in side.tolist()] for side in (prefs.chosen, prefs.rejected))
    chosen, rejected = (evaluator.gold(asked, said) for said in sides)
    return {"agreement": statistics.wins(chosen, rejected).mean().item()}


def _write(run: Run, number: int, prefs: Preferences, labelled: Labelled) -> None:
    """The pairs of a round."""
    if not len(prefs):
        why = f"{labelled.ties} ties, {labelled.missing} without verdict"
        say(f"online: round {number + 1} gave no pair ({why}): skipped")
    elif run.writes:
        texts = prefs.responses.texts
        pairs = [
            {
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                "strength": pair.strength,
                "source": pair.source,
            }
            for row, chosen, rejected, pair in zip(
                prefs.pairs, prefs.chosen.tolist(), prefs.rejected.tolist(), labelled.pairs, strict=True
            )
        ]
        rows.write(pairs, run.folder / "rounds" / f"{number + 1:05d}.parquet")
