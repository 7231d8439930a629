"""One round of online learning: answers from policy and reference, pairs as rows, updates of the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrite.data import text
from pyrite.data.responses import Prompt, Responses
from pyrite.feedback.pairing import Pair
from pyrite.math import samplers, seeds
from pyrite.math.logps import Logps, PairLogps, Running
from pyrite.math.losses.needs import needs
from pyrite.math.samplers import Arm, Sampler
from pyrite.models.forward import Groups, token_logps
from pyrite.models.generation import Samples, sample, sample_mixed
from pyrite.models.policy import Policy, backbone
from pyrite.training import loop
from pyrite.training.loop import Learner, Precision, Training, TrainingError
from pyrite.training.pairs import Preferences, batch_loss

WHOLE = 1 << 40  # tokens; no batch is larger


@dataclass(frozen=True)
class Answer:
    """One drawn answer: the text that judges read, and the tokens that were drawn, its end token among them.

    asked, preferences: the raw prompt and the ids of the options that the prompt was made from, where it was.
    """

    prompt_id: Any
    prompt: Prompt
    response: str
    finished: bool
    prompt_ids: list[int]
    ids: list[int]
    asked: Prompt | None = None
    preferences: list[str] | None = None


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn: k a prompt, each two of them by one pair of the sampler's arms."""

    sampler: Sampler
    k: int = 2
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def arms(self, number: int, prompt_id: str) -> list[Arm]:
        """The arms of a prompt's answers, drawn from the stream (seed, round, prompt)."""
        g = seeds.generator(self.seed, "arms", number, prompt_id)
        chosen = samplers.pick(self.sampler, torch.rand(self.k // 2, generator=g)).tolist()
        return [arm for i in chosen for arm in (self.sampler.pairs[i].first, self.sampler.pairs[i].second)]


@dataclass(frozen=True)
class Players:
    """Who answers: the policy, and its reference, which is the policy itself where adapters can be switched off.

    precision: that of learning. Everything a step learns from is read within `reading`: policy, reference, values and
    rewards are then rounded as the learner rounds, so that a policy that is still its reference has margins of 0,
    KL 0 and ratios of 1. Softmax, mixtures and draws are float32 in any case.
    """

    policy: Policy
    ref: Policy
    precision: Precision = "float32"

    def draw(self, rows: Sequence[dict], ids: Sequence[list[int]], how: Sampling, *, number: int) -> Samples:
        """k answers to each prompt {prompt_id}; a sample's stream belongs to (seed, round, prompt_id, sample)."""
        options: dict[str, Any] = {
            "eos": self.policy.stops,
            "max_new_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "seed": seeds.derive(how.seed, "online", number),
            "keys": [seeds.derive(0, str(row["prompt_id"])) for row in rows],
        }
        arms = [how.arms(number, str(row["prompt_id"])) for row in rows]
        with self.reading():
            if all(arm == Arm(policy=1.0) for some in arms for arm in some):
                drawn = sample(backbone(self.policy.model), ids, k=how.k, **options)
            else:
                exponents = torch.stack([samplers.exponents(some) for some in arms])
                ref = None if self.ref is self.policy else self.ref.model
                drawn = sample_mixed(self.policy.model, ref, ids, exponents=exponents, **options)
        return replace(drawn, **{name: value.cpu() for name, value in vars(drawn).items() if isinstance(value, Tensor)})

    def answers(self, rows: Sequence[dict], ids: Sequence[list[int]], drawn: Samples) -> list[Answer]:
        """What was drawn, answer by answer."""
        texts = text.decode(self.policy.tokenizer, drawn.responses())
        every = zip(drawn.prompt.tolist(), texts, drawn.finished.tolist(), drawn.responses(), strict=True)
        made_from = [{name: row.get(name) for name in ("asked", "preferences")} for row in rows]
        return [
            Answer(rows[p]["prompt_id"], rows[p]["prompt"], said, done, list(ids[p]), tokens, **made_from[p])
            for p, said, done, tokens in every
        ]

    def preferences(self, answers: Sequence[Answer], pairs: Sequence[Pair], wanted: frozenset[str]) -> Preferences:
        """The drawn tokens of each pair, with the reference's log-probabilities where the loss wants them."""
        both = torch.tensor([[pair.chosen, pair.rejected] for pair in pairs], dtype=torch.int64).view(-1, 2)
        made = Preferences.of(tokens_of(answers), both, torch.tensor([pair.strength for pair in pairs]))
        ref = self.ref_logps(made.responses, made.groups) if pairs and "ref" in wanted else None
        if ref is not None and not wanted & {"tokens", "ref_tokens"}:
            ref = replace(ref, tokens=None, mask=None)
        return replace(made, ref=ref)

    def policy_logps(self, responses: Responses, groups: Groups) -> Logps:
        """Log-probabilities of all responses under the policy, as it is learned by."""
        with self.reading():
            return token_logps(self.policy, responses, groups)

    def ref_logps(self, responses: Responses, groups: Groups) -> Logps:
        """Log-probabilities of all responses under the reference."""
        off = self.policy.without_adapters() if self.ref is self.policy else nullcontext()
        with self.reading(), off:
            return token_logps(self.ref, responses, groups)

    def reading(self) -> torch.autocast:
        """The one context in which everything is read that a step learns from."""
        return torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def tokens_of(answers: Sequence[Answer]) -> Responses:
    """The drawn tokens."""
    return Responses.of([(one.prompt_ids, [one.ids]) for one in answers])


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
        whole = self.wanted & {"batch", "running"}
        self.learner = Learner(policy, replace(training, micro_batch_tokens=WHOLE) if whole else training)
        self.step = torch.zeros((), dtype=torch.int64)
        torch.manual_seed(seeds.derive(seed, "dropout"))

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and moments."""
        return {"step": self.step} | (dict(vars(self.running)) if self.running else {})

    def learn(self, prefs: Preferences, number: int) -> dict[str, float]:
        """One round's updates; means of loss, metrics and gradient norm over them; {} where there is no pair.

        Raises TrainingError where one of them is not finite.
        """
        if not len(prefs):
            return {}
        training = self.learner.training
        of = batch_loss(
            self.policy,
            self.loss,
            prefs,
            tokens=bool(self.wanted & {"tokens", "ref_tokens"}),
            details="collision" in self.wanted,
            running=self.running,
        )
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
        means = {name: torch.stack([row[name].float() for row in seen]).mean().item() for name in seen[0]}
        if not all(map(math.isfinite, means.values())):
            raise TrainingError(
                f"round {number + 1}: loss or gradient not finite; the last good checkpoint is in checkpoints/; "
                "lower --lr or look at this round's pairs"
            )
        return means
