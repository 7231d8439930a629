"""Who learns in policy optimization: the policy, its critic, and the running numbers that last from step to step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite import seeds, train
from pyrite.kl_control import KLControl, controlled
from pyrite.loading import Lora
from pyrite.models import Policy
from pyrite.moments import Moments, merged, moments
from pyrite.policy_gradient import Estimates
from pyrite.rollouts import Rollouts, batch_loss
from pyrite.runs import Run
from pyrite.train import Learner, Training, TrainingError
from pyrite.values import ValueModel, WithValue

HEADS = ("shared", "detached")


@dataclass
class State:
    """0-dim tensors that belong in a checkpoint: the price of KL, moments of scores and of shaped returns, updates."""

    beta: Tensor
    scores: Moments
    returns: Moments
    updates: Tensor

    @classmethod
    def of(cls, control: KLControl) -> State:
        beta = torch.tensor(control.beta, dtype=torch.float64)
        return cls(beta, Moments.zero(), Moments.zero(), torch.zeros((), dtype=torch.int64))

    def tensors(self) -> dict[str, Tensor]:
        """By name; the state itself is restored through them."""
        parts = {"scores": self.scores, "returns": self.returns}
        both = {f"{name}.{field}": value for name, part in parts.items() for field, value in vars(part).items()}
        return {"beta": self.beta, "updates": self.updates, **both}

    def follow(self, control: KLControl, kl: float, *, answers: int) -> None:
        """Move beta, once a batch."""
        self.beta.fill_(controlled(replace(control, beta=self.beta.item()), kl, answers=answers).beta)

    def see(self, name: Literal["scores", "returns"], values: Tensor) -> Moments:
        """Merge new values into the moments, in place; returns those before."""
        mine: Moments = getattr(self, name)
        before = Moments(*(value.clone() for value in vars(mine).values()))
        for field, new in vars(merged(mine, moments(values))).items():
            getattr(mine, field).copy_(new)
        return before


@dataclass(frozen=True)
class Passes:
    """How batches of answers are learned, so many in all; `stop_kl` in nats a token from the policy that drew."""

    steps: int
    seed: int = 0
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_weight: float = 0.1
    stop_kl: float | None = None


@dataclass
class Learners:
    """The policy's optimizer, with the value head on its trunk if it has one, or beside it the critic's."""

    passes: Passes
    policy: Learner
    critic: ValueModel | WithValue | None = None
    value: Learner | None = None

    @classmethod
    def make(
        cls,
        policy: Policy,
        training: Training,
        passes: Passes,
        *,
        value: str | None = None,
        top: int | None = None,
        lora: Lora | None = None,
        lr: float | None = None,
    ) -> Learners:
        """value: shared or detached, a head on the policy's trunk; a folder, a critic of its own; None for none.

        top, lora, lr: of a critic of its own. Raises ValueError where it cannot be loaded, or reads other tokens.
        """
        torch.manual_seed(seeds.derive(passes.seed, "dropout"))
        if value is None:
            return cls(passes, Learner(policy, training))
        if value in HEADS:
            both = WithValue(policy, detach=value == "detached")
            return cls(passes, Learner(both, training), both)
        critic = ValueModel.load(value, top=top, lora=lora)
        if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ValueError(f"--value {value}: its vocabulary is not the policy's, whose tokens it reads")
        train.ready(critic, training, name=value)
        return cls(passes, Learner(policy, training), critic, Learner(critic, replace(training, lr=lr or training.lr)))

    def learn(self, drawn: Rollouts, made: Estimates, number: int) -> dict[str, float]:
        """A few passes over a batch; means over the updates. Raises TrainingError where one is not finite."""
        training, by = self.policy.training, self.passes
        seen: list[dict[str, Tensor]] = []
        each = train.steps(len(drawn.rows), training)
        order = train.batches(len(drawn.rows), training, seed=seeds.derive(by.seed, "order", number))
        for update, batch in enumerate(order):
            found = self._update(batch, drawn, made, at=number * each + update, of=by.steps * each)
            seen.append(found)
            if by.stop_kl is not None and found["step_kl"].item() > by.stop_kl:
                break
        means = {name: torch.stack([row[name].float() for row in seen]).mean().item() for name in seen[0]}
        if not all(torch.tensor(list(means.values())).isfinite()):
            raise TrainingError(
                f"step {number + 1}: loss or gradient not finite; the last good checkpoint is in checkpoints/; "
                "lower --lr, or raise --beta"
            )
        return {**means, "updates": len(seen)}

    def save(self, folder: Path, number: int, state: State) -> None:
        """The critic's checkpoint first: that of the policy is the one that counts."""
        if self.value:
            train.save(folder / "checkpoints" / "value", number, self.value, {})
        train.save(folder / "checkpoints", number, self.policy, state.tensors())

    def resume(self, folder: Path, state: State) -> int:
        """Steps done."""
        begin = train.resume(folder / "checkpoints", self.policy, state.tensors())
        if self.value and begin:
            train.resume(folder / "checkpoints" / "value", self.value, {}, step=begin)
        return begin

    def finish(self, run: Run) -> None:
        """Save what was learned."""
        if run.writes:
            self.policy.model.save(run.folder / "model")  # type: ignore[operator]
            if self.value:
                self.value.model.save(run.folder / "value")  # type: ignore[operator]
        train.discard_checkpoints(run)

    def _update(self, batch: list[int], drawn: Rollouts, made: Estimates, *, at: int, of: int) -> dict[str, Tensor]:
        """Update `at` of so many, by everybody who learns."""
        by, found = self.passes, {}
        options: dict[str, Any] = {"clip": by.clip, "value_clip": by.value_clip, "value_weight": by.value_weight}
        for learner in (self.policy, self.value):
            if learner is None:
                continue
            loss = batch_loss(learner.model, drawn, made, **options)  # type: ignore[arg-type]
            lr = train.learning_rate(at, of, learner.training)
            new = learner.update(batch, drawn.rows, loss, weights=drawn.weights, lr=lr)
            found |= new if learner is self.policy else {f"critic_{name}": value for name, value in new.items()}
        return found
