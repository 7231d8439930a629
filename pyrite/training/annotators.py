"""Who labels a round's pairs: the judge all of them, or a discriminator beside it; what is paid for is in a ledger."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyrite.core import runs, specs
from pyrite.core.processes import on_main, say, world
from pyrite.data import text
from pyrite.data.responses import Responses
from pyrite.feedback import schedules
from pyrite.feedback.ledger import Account
from pyrite.feedback.pairing import (
    Judge,
    Labelled,
    Labels,
    LabelSource,
    Pairing,
    check_verdicts,
    decided,
    label,
    paired,
)
from pyrite.feedback.schedules import Schedule
from pyrite.feedback.selection import pick
from pyrite.math import losses, reward_losses, seeds, statistics
from pyrite.math.ranges import Count, Natural, NonNegative, Positive
from pyrite.models.forward import Packed, singles, token_logps
from pyrite.models.loading import member_paths
from pyrite.models.policy import Lora, Policy, RewardEnsemble, RewardModel
from pyrite.training import loop
from pyrite.training.loop import BatchLoss, Learner, Training
from pyrite.training.pairs import Preferences, batch_loss, in_pairs
from pyrite.training.rounds import Answer, Players, tokens_of

__all__ = ["implicit", "reward", "self_reward"]

# Discriminators -------------------------------------------------------------------------------------------------------

# What labels pairs for free and may learn from the few that are paid: scores (E, N) of answers, in nats of log-odds.


Better = tuple[Answer, Answer]  # chosen, rejected


class Discriminator(Protocol):
    """Scores answers; learns from labeled pairs, if it has learners. schedule: when it does (`feedback.schedules`)."""

    @property
    def schedule(self) -> str: ...

    @property
    def learners(self) -> Sequence[Learner]:
        """Of its members, for checkpoints."""
        ...

    def scores(self, answers: Sequence[Answer]) -> Tensor:
        """(E, N): what each member makes of each answer; a difference is a log-odds, nats."""
        ...

    def learn(self, labels: Sequence[Better], *, seed: int) -> dict[str, float]:
        """One pass of learning; means of loss and accuracy over its updates."""
        ...


Maker = Callable[[Players, int], Discriminator]


def reward(
    *,
    path: str,
    cold: bool = False,
    members: Count = 1,
    rank: Natural = 0,
    lr: Positive = 1e-4,
    epochs: Count = 2,
    batch_size: Count = 16,
    precision: loop.Precision = "float32",
    loss: str = "bradley_terry(center=0.001)",
    schedule: str = "even()",
) -> Maker:
    """A reward model or an ensemble of them, r(x, y): a folder of `pyrite reward`, or any model with a new head (cold).

    rank: of adapters to train in place of all weights. Learning: AdamW at a constant rate over `epochs` passes.
    Bradley-Terry; arXiv:2405.01511.
    """
    training = _training(lr, epochs, batch_size, precision)
    teach = specs.part(loss, reward_losses)
    teach(torch.zeros(1), torch.zeros(1))  # an option out of range is refused now
    specs.part(schedule, schedules)

    def make(players: Players, seed: int) -> Discriminator:
        lora = Lora(r=rank) if rank else None
        paths = [path] * members if cold else member_paths(path)
        heads = [seeds.derive(seed, "head", i) if cold else None for i in range(len(paths))]
        models = [RewardModel.load(p, lora=lora, head_seed=h) for p, h in zip(paths, heads, strict=True)]
        for i, model in enumerate(models):
            loop.set_dropout(model, name=None if i else path)
        return Rewards(models, [Learner(model, training) for model in models], teach, schedule)

    return make


def implicit(
    *,
    path: str | None = None,
    beta: Positive = 0.1,
    rank: Natural = 0,
    lr: Positive = 1e-5,
    epochs: Count = 2,
    batch_size: Count = 16,
    precision: loop.Precision = "float32",
    schedule: str = "even()",
) -> Maker:
    """A second policy that learns the labels by DPO and is read as a reward: r(x, y) = β log π_D(y|x) / π_0(y|x).

    path: where it starts; the policy's own start by default, and then it scores every answer 0 until it has learned.
    Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """
    training = _training(lr, epochs, batch_size, precision)
    specs.part(schedule, schedules)

    def make(players: Players, seed: int) -> Discriminator:
        lora = Lora(r=rank) if rank else None
        own = Policy.load(path, lora=lora) if path else copy.deepcopy(players.policy)
        loop.set_dropout(own, name=path)
        return Implicit(own, replace(players, precision=precision), beta, [Learner(own, training)], schedule)

    return make


def self_reward(*, beta: Positive = 0.1, schedule: str = "even()") -> Maker:
    """The policy itself: r(x, y) = β log π(y|x) / π_0(y|x). What it is taught it learns as the policy.

    At the start it scores every answer 0: only paid labels make pairs then.
    """
    specs.part(schedule, schedules)
    return lambda players, seed: Implicit(players.policy, players, beta, [], schedule)


@dataclass(frozen=True)
class Rewards:
    """E reward models, each with its own optimizer; every one sees the labels in its own order."""

    models: list[RewardModel]
    learners: list[Learner]
    loss: Callable[..., Tensor]
    schedule: str = "even()"

    def scores(self, answers: Sequence[Answer]) -> Tensor:
        """Raw scores (E, N)."""
        if not answers:
            return torch.empty(len(self.models), 0)
        return RewardEnsemble(self.models).raw(said(answers))

    def learn(self, labels: Sequence[Better], *, seed: int) -> dict[str, float]:
        """One pass of every member; means over members."""
        found = []
        for member, (model, learner) in enumerate(zip(self.models, self.learners, strict=True)):
            read = model.encode(said([answer for pair in labels for answer in pair]), as_drawn=True)
            found.append(_taught(learner, read, partial(pair_loss, self.loss), seeds.derive(seed, member)))
        return {name: sum(row[name] for row in found) / len(found) for name in found[0]}


@dataclass(frozen=True)
class Implicit:
    """A policy read as a reward against the start, both in the precision of `players`: that in which it learns."""

    policy: Policy
    players: Players
    beta: Positive
    learners: list[Learner]
    schedule: str = "even()"

    def scores(self, answers: Sequence[Answer]) -> Tensor:
        """β log-ratio of the very tokens that were drawn, (1, N)."""
        if not answers:
            return torch.empty(1, 0)
        drawn = tokens_of(answers)
        with self.players.reading():
            own = token_logps(self.policy, drawn, singles(drawn)).sum.double()
        ratio = own - self.players.ref_logps(drawn, singles(drawn)).sum.double()
        return (self.beta * ratio).float()[None]

    def learn(self, labels: Sequence[Better], *, seed: int) -> dict[str, float]:
        """One pass of DPO."""
        if not self.learners:
            return {}
        drawn = tokens_of([answer for pair in labels for answer in pair])
        both = torch.arange(len(drawn)).view(-1, 2)
        prefs = Preferences(drawn, both[:, 0], both[:, 1], ref=self.players.ref_logps(drawn, in_pairs(drawn)))
        loss = batch_loss(self.policy, partial(losses.dpo, beta=self.beta), prefs)
        found = _taught(self.learners[0], drawn, loss, seed)
        return {"loss": found["loss"], "accuracy": found["accuracy"]}


def said(answers: Sequence[Answer]) -> Responses:
    """The texts, without the tokens that were drawn."""
    return Responses.said(
        [{"prompt": one.prompt} for one in answers],
        [one.response for one in answers],
        finished=[one.finished for one in answers],
    )


def pair_loss(
    loss: Callable[..., Tensor], model: nn.Module, batch: Packed, _: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a reward model over pairs of a chosen and a rejected answer, with accuracy and margin."""
    chosen, rejected = model(batch).view(-1, 2).unbind(1)
    return loss(chosen, rejected).sum(), {
        "accuracy": statistics.wins(chosen.detach(), rejected.detach()).sum().float(),
        "margin": (chosen - rejected).sum(),
    }


def _training(lr: float, epochs: int, batch_size: int, precision: loop.Precision) -> Training:
    return Training(
        lr=lr, epochs=epochs, batch_size=batch_size, lr_scheduler_type="constant(warmup_steps=0)", precision=precision
    )


def _taught(learner: Learner, responses: Responses, loss: BatchLoss, seed: int) -> dict[str, float]:
    """Every batch of pairs of every epoch once; means over the updates."""
    model: Any = learner.model
    pairs = in_pairs(responses)
    model.train()
    seen = [
        learner.update(batch, responses, pairs, loss, lr=learner.training.lr)
        for batch in loop.batches(len(pairs), learner.training, seed=seed)
    ]
    model.eval()
    return {name: torch.stack([row[name].float() for row in seen]).mean().item() for name in seen[0]}


# Live reward models ---------------------------------------------------------------------------------------------------

# Labels of a discriminator that learns, round by round, from the few pairs the judge is paid for.


Couple = tuple[int, int]


@dataclass(frozen=True)
class Judged:
    """A round's pairs, as indices into `answers` (which may be of earlier rounds too), and what else was seen."""

    answers: list[Answer]
    labelled: Labelled
    found: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """How pairs are made of answers."""

    pairing: Pairing = "best_worst"
    labels: Labels = "soft"
    min_margin: float = 0.0
    seed: int = 0
    judge: str = "judge"
    """Its name, for messages."""

    def stream(self, *names: Any) -> int:
        return seeds.derive(self.seed, *names)


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


@dataclass
class Shelf:
    """What lasts from round to round: labels so far, those not learned yet, pairs that still compete, counts."""

    learned: list[Better] = field(default_factory=list)
    fresh: list[Better] = field(default_factory=list)
    pool: list[tuple[int, Answer, Answer]] = field(default_factory=list)
    """(round, a, b) of pairs that no label was bought for."""
    used: int = 0

    def rows(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def read(cls, rows: dict[str, Any]) -> Shelf:
        """What `rows` gave."""
        pairs = {name: [(Answer(**a), Answer(**b)) for a, b in rows[name]] for name in ("learned", "fresh")}
        pool = [(number, Answer(**a), Answer(**b)) for number, a, b in rows["pool"]]
        return cls(**pairs, pool=pool, used=rows["used"])


@dataclass
class Live:
    """Silver labels from a discriminator, gold ones from the judge as the schedule says."""

    discriminator: Discriminator
    schedule: Schedule
    rules: Rules
    rounds: int
    budget: int | None = None
    shelf: Shelf = field(default_factory=Shelf)

    def __call__(self, judge: Judge, answers: Sequence[Answer], number: int) -> Judged:
        """The verdicts of one round."""
        pool = [row for row in self.shelf.pool if number - row[0] < self.schedule.window]
        every = [*answers, *(answer for _, a, b in pool for answer in (a, b))]
        scores = self.discriminator.scores(every)
        drawn = paired(groups(answers), self.rules.pairing, scores[:, : len(answers)].mean(0))
        own = [couple for couple in drawn if every[couple[0]].response != every[couple[1]].response]
        couples = own + [(i, i + 1) for i in range(len(answers), len(every), 2)]
        gold = self._buy(judge, every, couples, _margins(scores, couples), number)
        learned = self._learn(number)
        if learned:
            scores = self.discriminator.scores(every)
        verdicts, sources = self._verdicts(gold, torch.sigmoid(_margins(scores, couples).double().mean(0)), len(own))
        pairs = decided(
            couples,
            verdicts,
            len(every),
            labels=self.rules.labels,
            min_margin=self.rules.min_margin,
            seed=self.rules.stream("labels", number),
            sources=sources,
            names=[*names(answers), *(f"{begun} {i}" for i, (begun, _, _) in enumerate(pool) for _ in "ab")],
        )
        waiting = [(number, every[a], every[b]) for i, (a, b) in enumerate(own) if i not in gold]
        pool = [row for i, row in enumerate(pool, start=len(own)) if i not in gold] + waiting
        self.shelf.pool = [row for row in pool if number + 1 - row[0] < self.schedule.window]
        missing = sum(math.isnan(p) for p in gold.values())
        ties = len(drawn) - len(own) + sum(p == 0.5 for p in gold.values())
        kinds = [pair.source for pair in pairs]
        found = {"gold_pairs": kinds.count("gold"), "silver_pairs": len(kinds) - kinds.count("gold"), **learned}
        return Judged(every, Labelled(pairs, len(gold) - missing, ties, missing), found)

    def _buy(
        self, judge: Judge, answers: Sequence[Answer], couples: Sequence[Couple], margins: Tensor, number: int
    ) -> dict[int, float]:
        """The judge's verdicts on the couples that compete best, by their place; NaN where it gave none."""
        wanted = self.schedule.allotment(
            number,
            rounds=self.rounds,
            budget=self.budget,
            used=self.shelf.used,
            pairs=len(couples),
        )
        generator = seeds.generator(self.rules.seed, "select", number)
        chosen = pick(self.schedule.selector, margins, wanted, generator=generator) if wanted else []
        asked = [couples[i] for i in chosen]
        prompts = [text.plain(answers[a].prompt) for a, _ in asked]
        sides = [[answers[couple[side]].response for couple in asked] for side in (0, 1)]
        verdicts = judge(prompts, *sides) if asked else torch.empty(0)
        known = check_verdicts(verdicts, len(asked), name=self.rules.judge).double().tolist()
        given = sum(not math.isnan(p) for p in known)
        self.shelf.used += given
        for (a, b), p in zip(asked, known, strict=True):
            if not math.isnan(p) and p != 0.5:
                self.shelf.fresh.append((answers[a], answers[b]) if p > 0.5 else (answers[b], answers[a]))
        return dict(zip(chosen, known, strict=True))

    def _learn(self, number: int) -> dict[str, float]:
        """The labels not learned yet, with earlier ones beside them."""
        shelf, new = self.shelf, self.shelf.fresh
        if not new:
            return {}
        again = min(len(shelf.learned), round(self.schedule.replay * len(new)))
        order = torch.randperm(len(shelf.learned), generator=seeds.generator(self.rules.seed, "replay", number))
        some = [shelf.learned[i] for i in order[:again].tolist()]
        found = self.discriminator.learn([*new, *some], seed=self.rules.stream("learn", number))
        shelf.learned, shelf.fresh = [*shelf.learned, *new], []
        return {f"reward_{name}": value for name, value in found.items()}

    def _verdicts(self, gold: dict[int, float], silver: Tensor, own: int) -> tuple[list[float], list[LabelSource]]:
        """P(a beats b) of every couple of this round, and of earlier ones that were labeled just now."""
        verdicts, sources = [], []
        for i, guess in enumerate(silver.double().tolist()):
            p = gold.get(i, math.nan)
            silver_here = guess if i < own else 0.5
            verdict, source = (silver_here, "silver") if math.isnan(p) else (p, "gold")
            verdicts.append(verdict)
            sources.append(source)
        return verdicts, sources


def groups(answers: Sequence[Answer]) -> list[list[int]]:
    """Indices of the answers to each prompt."""
    found: dict[Any, list[int]] = {}
    for i, answer in enumerate(answers):
        found.setdefault(answer.prompt_id, []).append(i)
    return list(found.values())


def names(answers: Sequence[Answer]) -> list[str]:
    """Of each answer: its prompt's id and its place among the answers to that prompt."""
    place = {i: k for group in groups(answers) for k, i in enumerate(group)}
    return [f"{answer.prompt_id} {place[i]}" for i, answer in enumerate(answers)]


def _margins(scores: Tensor, couples: Sequence[Couple]) -> Tensor:
    """r(a) − r(b) of every member, (E, C)."""
    first, second = ([couple[side] for couple in couples] for side in (0, 1))
    return scores[:, first] - scores[:, second]


# Labelers -------------------------------------------------------------------------------------------------------------

# Who labels a round's pairs: the judge all of them, or a discriminator beside it; what is paid for is in a ledger.


@dataclass
class Labeler:
    """Verdicts of one round after another, and what must outlast a stop."""

    judge: Judge
    rules: Rules
    folder: Path
    budget: Natural | None = None
    account: Account | None = None
    live: Live | None = None
    used: int = 0
    told: bool = False

    def __call__(self, answers: Sequence[Answer], number: int) -> Judged:
        """The pairs of a round."""
        judge = on_main(partial(self.account.ask, self.judge, round=number)) if self.account else self.judge
        judged = self.live(judge, answers, number) if self.live else self._all(judge, answers, number)
        self.used += judged.labelled.labels
        if self.spent(number) and not self.told:
            goes_on = "silver labels go on alone" if self.live else "there is nothing more to learn from"
            say(f"online: the budget is spent after round {number + 1}, with {self.used} labels; {goes_on}")
            self.told = True
        return judged

    def spent(self, number: int) -> bool:
        """Whether this run has had all the labels it may have, after a round."""
        if self.budget is not None and self.used >= self.budget:
            return True
        return self.account is not None and self.account.broke(round=number)

    def save(self, number: int) -> None:
        """What the next rounds need, beside the policy's checkpoint; the last two are kept."""
        if not self.live or not world().is_main_process:
            return
        for member, learner in enumerate(self.live.discriminator.learners):
            loop.save(self._checkpoints(member), number, learner, {})
        shelf = self._shelf(number)
        shelf.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(shelf, self.live.shelf.rows())
        kept = sorted(shelf.parent.glob("shelf-*.json"), key=lambda path: int(path.stem.split("-")[1]))
        for old in kept[:-2]:
            old.unlink()

    def resume(self, number: int, used: int) -> None:
        """Go on after so many rounds, which had so many labels."""
        self.used = used
        if not self.live or not number:
            return
        for member, learner in enumerate(self.live.discriminator.learners):
            loop.resume(self._checkpoints(member), learner, {}, step=number)
        self.live.shelf = Shelf.read(runs.read_json(self._shelf(number)))

    def _all(self, judge: Judge, answers: Sequence[Answer], number: int) -> Judged:
        """Every pair is the judge's."""
        made = label(
            judge,
            [text.plain(answer.prompt) for answer in answers],
            [answer.response for answer in answers],
            groups(answers),
            pairing=self.rules.pairing,
            labels=self.rules.labels,
            min_margin=self.rules.min_margin,
            seed=self.rules.stream("labels", number),
            name=self.rules.judge,
            names=names(answers),
        )
        return Judged(list(answers), made)

    def _checkpoints(self, member: int) -> Path:
        return self.folder / "checkpoints" / "silver" / str(member)

    def _shelf(self, number: int) -> Path:
        return self.folder / "checkpoints" / "silver" / f"shelf-{number}.json"
