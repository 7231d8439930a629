"""Rewards that label pairs during training, and learn live from the few labels that are paid for: annotators.

An annotator scores answers, (E, N) for E members; a difference of two scores is a log-odds in nats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.data.responses import Responses
from pyrite.feedback import schedules
from pyrite.math import losses, reward_losses, seeds
from pyrite.math.ranges import Count, Natural, Positive
from pyrite.models.forward import singles, token_logps
from pyrite.models.loading import Dtype, member_paths
from pyrite.models.policy import Lora, Policy, RewardEnsemble, RewardModel
from pyrite.training import loop
from pyrite.training.loop import BatchLoss, Learner, Training
from pyrite.training.pairs import Preferences, batch_loss, in_pairs, pair_loss
from pyrite.training.rollouts import Players

__all__ = ["implicit", "reward", "self_reward"]


class Annotator(Protocol):
    """An annotator: scores answers, and learns from labeled pairs if it has learners."""

    @property
    def schedule(self) -> str:
        """When it buys labels and learns from them, a spec of `feedback.schedules`."""
        ...

    @property
    def learners(self) -> Sequence[Learner]:
        """Of its members, for checkpoints."""
        ...

    def scores(self, answers: Responses) -> Tensor:
        """(E, N): the score of each answer by each member; a difference is a log-odds, nats."""
        ...

    def learn(self, labels: Responses, *, seed: int) -> dict[str, float]:
        """Learn from pairs, chosen and rejected in turn; means of loss and accuracy over the updates."""
        ...


Maker = Callable[[Players, int], Annotator]


def reward(
    *,
    path: str,
    cold: bool = False,
    members: Count = 1,
    rank: Natural = 0,
    lr: Positive = 1e-4,
    epochs: Count = 2,
    batch_size: Count = 16,
    precision: Dtype = "float32",
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

    def make(players: Players, seed: int) -> Annotator:
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
    precision: Dtype = "float32",
    schedule: str = "even()",
) -> Maker:
    """A second policy that learns the labels by DPO and is read as a reward: r(x, y) = β log π_D(y|x) / π_0(y|x).

    path: where it starts; the policy's own start by default, and then it scores every answer 0 until it has learned.
    Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """
    training = _training(lr, epochs, batch_size, precision)
    specs.part(schedule, schedules)

    def make(players: Players, seed: int) -> Annotator:
        lora = Lora(r=rank) if rank else None
        own = Policy.load(path, lora=lora) if path else copy.deepcopy(players.policy)
        loop.set_dropout(own, name=path)
        return Implicit(own, replace(players, precision=precision), beta, [Learner(own, training)], schedule)

    return make


def self_reward(*, beta: Positive = 0.1, schedule: str = "even()") -> Maker:
    """The policy itself: r(x, y) = β log π(y|x) / π_0(y|x). It has no training of its own.

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

    def scores(self, answers: Responses) -> Tensor:
        """Raw scores (E, N)."""
        return RewardEnsemble(self.models).raw(answers)

    def learn(self, labels: Responses, *, seed: int) -> dict[str, float]:
        """One pass of every member; means over members."""
        found = []
        for member, (model, learner) in enumerate(zip(self.models, self.learners, strict=True)):
            read = model.encode(labels, as_drawn=True)
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

    def scores(self, answers: Responses) -> Tensor:
        """β log-ratio of the very tokens that were drawn, (1, N)."""
        if not len(answers):
            return torch.empty(1, 0)
        with self.players.reading():
            own = token_logps(self.policy, answers, singles(answers)).sum.double()
        ratio = own - self.players.ref_logps(answers, singles(answers)).sum.double()
        return (self.beta * ratio).float()[None]

    def learn(self, labels: Responses, *, seed: int) -> dict[str, float]:
        """One pass of DPO."""
        if not self.learners:
            return {}
        chosen, rejected = torch.arange(len(labels)).view(-1, 2).unbind(1)
        prefs = Preferences(labels, chosen, rejected, ref=self.players.ref_logps(labels, in_pairs(labels)))
        loss = batch_loss(self.policy, partial(losses.dpo, beta=self.beta), prefs)
        found = _taught(self.learners[0], labels, loss, seed)
        return {"loss": found["loss"], "accuracy": found["accuracy"]}


def _training(lr: float, epochs: int, batch_size: int, precision: Dtype) -> Training:
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
    return loop.means(seen, "the annotator", "lower its lr")
