"""The policy and its reference: drawing answers, and the log-probabilities of what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pyrite.data.responses import Responses
from pyrite.math import samplers, seeds
from pyrite.math.logps import Logps
from pyrite.math.samplers import Arm, Sampler
from pyrite.models.forward import Groups, token_logps
from pyrite.models.loading import Dtype
from pyrite.models.policy import Policy


@dataclass(frozen=True)
class Players:
    """A policy and its reference; the same object twice if the reference is the policy without its adapters.

    precision: of training. Drawing and reading use it too: policy, reference, values and rewards are then rounded as
    the learner rounds, so that a policy that is still its reference has margins of 0, KL 0 and ratios of 1. Softmax,
    mixtures and draws are float32 in any case.
    """

    policy: Policy
    ref: Policy
    precision: Dtype = "float32"

    def draw(
        self,
        rows: Sequence[dict[str, Any]],
        ids: Sequence[list[int]],
        number: int,
        *,
        k: int = 2,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> Responses:
        """k answers to each prompt {prompt_id, prompt}, given as token ids too; `number` is that of the round.

        sampler: each two answers are drawn from one of its pairs of arms; without one, all are the policy's. An answer
        belongs to (seed, round, prompt_id, its number), whatever else is drawn.
        """
        exponents = None
        if sampler:
            each = [arms(sampler, k, seed=seed, number=number, prompt_id=str(row["prompt_id"])) for row in rows]
            if any(arm != Arm(policy=1.0) for some in each for arm in some):
                exponents = torch.stack([samplers.exponents(some) for some in each])
        with self.reading():
            return self.policy.draw(
                rows,
                ids,
                k=k,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seeds.derive(seed, "online", number),
                exponents=exponents,
                ref=None if self.ref is self.policy else self.ref,
            )

    def policy_logps(self, responses: Responses, groups: Groups) -> Logps:
        """Log-probabilities of all responses under the policy."""
        with self.reading():
            return token_logps(self.policy, responses, groups)

    def ref_logps(self, responses: Responses, groups: Groups) -> Logps:
        """Log-probabilities of all responses under the reference."""
        off = self.policy.without_adapters() if self.ref is self.policy else nullcontext()
        with self.reading(), off:
            return token_logps(self.ref, responses, groups)

    def reading(self) -> torch.autocast:
        """The context in which everything is read that a step learns from."""
        return self.policy.reading(self.precision)


def arms(sampler: Sampler, k: int, *, seed: int, number: int, prompt_id: str) -> list[Arm]:
    """The arms that draw k answers to a prompt, two by two, chosen by the stream (seed, round, prompt)."""
    g = seeds.generator(seed, "arms", number, prompt_id)
    chosen = samplers.pick(sampler, torch.rand(k // 2, generator=g)).tolist()
    return [arm for i in chosen for arm in (sampler.pairs[i].first, sampler.pairs[i].second)]
