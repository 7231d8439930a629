"""What labels pairs for free and may learn from the few that are paid: scores (E, N) of answers, in nats of log-odds.

Each function here is a factory of options; what it returns is given the run's players and makes the discriminator:
a reward model, a second policy read as a reward (DPO), or the policy itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyrite import estimators, losses, parts, reward_losses, seeds, train
from pyrite.evaluation import response_logps
from pyrite.members import member_paths
from pyrite.models import Lora, Policy, RewardEnsemble, RewardModel
from pyrite.options import Count, Natural, Positive
from pyrite.packing import Row
from pyrite.preferences import Preferences, batch_loss
from pyrite.rounds import Answer, Players
from pyrite.text import Encoded
from pyrite.train import BatchLoss, Learner, Training

__all__ = ["implicit", "reward", "self_reward"]

Better = tuple[Answer, Answer]  # chosen, rejected


class Discriminator(Protocol):
    """Scores answers; learns from labeled pairs, where it has learners."""

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
    precision: train.Precision = "float32",
    loss: str = "bradley_terry(center=0.001)",
) -> Maker:
    """A reward model or an ensemble of them, r(x, y): a folder of `pyrite reward`, or any model with a new head (cold).

    rank: of adapters to train in place of all weights. Learning: AdamW at a constant rate over `epochs` passes.
    Bradley-Terry; arXiv:2405.01511.
    """
    training = _training(lr, epochs, batch_size, precision)
    teach = parts.part(loss, reward_losses)
    teach(torch.zeros(1), torch.zeros(1))  # an option out of range is refused now

    def make(players: Players, seed: int) -> Discriminator:
        lora = Lora(lora_rank=rank) if rank else None
        paths = [path] * members if cold else member_paths(path)
        heads = [seeds.derive(seed, "head", i) if cold else None for i in range(len(paths))]
        models = [RewardModel.load(p, lora=lora, head_seed=h) for p, h in zip(paths, heads, strict=True)]
        for i, model in enumerate(models):
            train.ready(model, training, name=None if i else path)
        return Rewards(models, [Learner(model, training) for model in models], teach)

    return make


def implicit(
    *,
    path: str | None = None,
    beta: Positive = 0.1,
    rank: Natural = 0,
    lr: Positive = 1e-5,
    epochs: Count = 2,
    batch_size: Count = 16,
    precision: train.Precision = "float32",
) -> Maker:
    """A second policy that learns the labels by DPO and is read as a reward: r(x, y) = β log π_D(y|x) / π_0(y|x).

    path: where it starts; the policy's own start by default, and then it scores every answer 0 until it has learned.
    Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """
    training = _training(lr, epochs, batch_size, precision)

    def make(players: Players, seed: int) -> Discriminator:
        lora = Lora(lora_rank=rank) if rank else None
        own = Policy.load(path, lora=lora) if path else copy.deepcopy(players.policy)
        train.ready(own, training, name=path)
        return Implicit(own, replace(players, precision=precision), beta, [Learner(own, training)])

    return make


def self_reward(*, beta: Positive = 0.1) -> Maker:
    """The policy itself: r(x, y) = β log π(y|x) / π_0(y|x). What it is taught it learns as the policy.

    At the start it scores every answer 0: only paid labels make pairs then.
    """
    return lambda players, seed: Implicit(players.policy, players, beta, [])


@dataclass(frozen=True)
class Rewards:
    """E reward models, each with its own optimizer; every one sees the labels in its own order."""

    models: list[RewardModel]
    learners: list[Learner]
    loss: Callable[..., Tensor]

    def scores(self, answers: Sequence[Answer]) -> Tensor:
        """Raw scores (E, N)."""
        if not answers:
            return torch.empty(len(self.models), 0)
        prompts, responses = [answer.prompt for answer in answers], [answer.response for answer in answers]
        return RewardEnsemble(self.models).raw(prompts, responses, finished=[answer.finished for answer in answers])

    def learn(self, labels: Sequence[Better], *, seed: int) -> dict[str, float]:
        """One pass of every member; means over members."""
        found = []
        for member, (model, learner) in enumerate(zip(self.models, self.learners, strict=True)):
            rows = pair_rows(model, labels)
            found.append(_taught(learner, rows, partial(pair_loss, model.pack, self.loss), seeds.derive(seed, member)))
        return {name: sum(row[name] for row in found) / len(found) for name in found[0]}


@dataclass(frozen=True)
class Implicit:
    """A policy read as a reward against the start, both in the precision of `players`: that in which it learns."""

    policy: Policy
    players: Players
    beta: Positive
    learners: list[Learner]

    def scores(self, answers: Sequence[Answer]) -> Tensor:
        """β log-ratio of the very tokens that were drawn, (1, N)."""
        if not answers:
            return torch.empty(1, 0)
        rows = [Row(answer.prompt_ids, [answer.ids]) for answer in answers]
        with self.players.reading():
            own = response_logps(self.policy, rows).sum.double()
        ratio = own - self.players.ref_logps(rows).sum.double()
        return (self.beta * ratio).float()[None]

    def learn(self, labels: Sequence[Better], *, seed: int) -> dict[str, float]:
        """One pass of DPO."""
        if not self.learners:
            return {}
        rows = [Row(chosen.prompt_ids, [chosen.ids, rejected.ids]) for chosen, rejected in labels]
        prefs = Preferences(rows, self.players.ref_logps(rows))
        loss = batch_loss(self.policy, partial(losses.dpo, beta=self.beta), prefs)
        found = _taught(self.learners[0], rows, loss, seed)
        return {"loss": found["loss"], "accuracy": found["accuracy"]}


def pair_rows(model: RewardModel, labels: Sequence[Better]) -> list[Row]:
    """One row a pair as a reward model reads it: the prompt, then chosen and rejected."""

    def encoded(side: Sequence[Answer]) -> list[Encoded]:
        asked, said, done = ([getattr(a, name) for a in side] for name in ("prompt", "response", "finished"))
        return model.encode(asked, said, finished=done, as_drawn=True)

    chosen, rejected = (encoded(side) for side in zip(*labels, strict=True))
    return [Row(a.prompt, [a.response, b.response]) for a, b in zip(chosen, rejected, strict=True)]


def pair_loss(
    pack: Callable, loss: Callable[..., Tensor], model: nn.Module, rows: list[Row], _: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a reward model over rows of a chosen and a rejected answer, with accuracy and margin."""
    chosen, rejected = model(pack(rows)).view(-1, 2).unbind(1)
    return loss(chosen, rejected).sum(), {
        "accuracy": estimators.wins(chosen.detach(), rejected.detach()).sum().float(),
        "margin": (chosen - rejected).sum(),
    }


def _training(lr: float, epochs: int, batch_size: int, precision: train.Precision) -> Training:
    return Training(
        lr=lr, epochs=epochs, batch_size=batch_size, schedule="constant", warmup=0, floor=1.0, precision=precision
    )


def _taught(learner: Learner, rows: list[Row], loss: BatchLoss, seed: int) -> dict[str, float]:
    """Every batch of every epoch once; means over the updates."""
    model: Any = learner.model
    model.train()
    seen = [
        learner.update(batch, rows, loss, weights=[1.0] * len(rows), lr=learner.training.lr)
        for batch in train.batches(len(rows), learner.training, seed=seed)
    ]
    model.eval()
    return {name: torch.stack([row[name].float() for row in seen]).mean().item() for name in seen[0]}
