"""Who learns: the critic that was asked for, what it trains, what is saved; the running numbers of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyrite.math.policy_gradient import KLControl
from pyrite.models.loading import Lora
from pyrite.models.policy import Policy, ValueModel, WithValue
from pyrite.recipes import toy
from pyrite.training.loop import Training
from pyrite.training.ppo import Critic, Learners, Reward, Rollouts, State, collect, estimates
from pyrite.training.rollouts import Players

TRAINING = Training(lr=3e-3, epochs=2, batch_size=2, lr_scheduler_type="cosine(warmup_steps=0)")
PROMPTS = [{"prompt_id": str(i), "prompt": words} for i, words in enumerate(["tell me", "please", "a cat"])]
IDS = [[1, 20, 21], [1, 22], [1, 4, 6]]


def drawn(policy: Policy, learners: Learners) -> Rollouts:
    rewards = [Reward.of_scorer("length()")]
    how: dict[str, Any] = {"k": 2, "max_new_tokens": 6, "seed": 0, "number": 0, "critic": learners.critic}
    return collect(Players(policy, policy.frozen_copy()), rewards, PROMPTS, IDS, **how)


def shaped(found: Rollouts) -> torch.Tensor:
    last = found.logps.length - 1
    return torch.zeros_like(found.mask, dtype=torch.float32).scatter_(1, last[:, None], found.scores.total[:, None])


def test_moments_and_beta_are_restored_in_place() -> None:
    state, control = State.of(KLControl(0.1, 1.0, 0.8)), KLControl(0.1, 1.0, 0.8)
    before = state.see("scores", torch.tensor([1.0, 3.0]))
    assert before.count == 0 and state.scores.mean == 2
    state.see("scores", torch.tensor([5.0]))
    assert state.scores.mean == 3 and state.scores.count == 3
    state.follow(control, 9.0, answers=4)
    assert state.beta.item() == pytest.approx(0.2)
    other = State.of(control)
    for name, value in state.tensors().items():
        other.tensors()[name].copy_(value)
    assert {name: value.item() for name, value in other.tensors().items()} == {
        name: value.item() for name, value in state.tensors().items()
    }


@pytest.mark.parametrize(
    ("options", "kind", "beside"),
    [
        (None, None, False),
        ({"kind": "shared"}, WithValue, False),
        ({"kind": "detached"}, WithValue, False),
        ({"kind": "model", "lr": 1e-2}, ValueModel, True),
        ({"kind": "model", "lora": Lora(r=2)}, ValueModel, True),
    ],
)
def test_the_critic_asked_for_learns_and_goes_on(
    tiny: Path, tmp_path: Path, options: dict[str, Any] | None, kind: type | None, beside: bool
) -> None:
    """Trained, stopped and gone on, it has the weights of one that was not stopped."""
    own = {"path": str(tiny)} if kind is ValueModel else {}
    value = Critic(**own, **options) if options else None

    def made() -> tuple[Policy, Learners]:
        policy = Policy.load(tiny)
        return policy, Learners.make(policy, TRAINING, value, steps=3)

    policy, learners = made()
    assert type(learners.critic) is (kind or type(None)) and (learners.value is not None) == beside
    if learners.value:
        assert learners.value.training.lr == ((value and value.lr) or TRAINING.lr)
        names = {name for name, p in learners.value.model.named_parameters() if p.requires_grad}
        assert all("lora_" in name or "score" in name for name in names) == bool(value and value.lora)
    found = drawn(policy, learners)
    by = estimates(found, shaped(found), method="gae" if kind else "reinforce")
    before = [parameter.detach().clone() for parameter in weights(learners)]
    seen = learners.learn(found, by, 0)
    assert seen["updates"] == 4 and ("critic_value_loss" in seen) == beside
    assert not any(
        torch.equal(old, new) for old, new in zip(before, weights(learners), strict=True) if new.numel() > 40
    )
    state = State.of(KLControl(0.1))
    learners.save(tmp_path, 1, state)
    learners.learn(found, by, 1)
    _, again = made()
    assert again.resume(tmp_path, state) == 1
    again.learn(found, by, 1)
    assert all(torch.equal(one, other) for one, other in zip(weights(learners), weights(again), strict=True))


def weights(learners: Learners) -> list[torch.Tensor]:
    both = (learners.policy, learners.value)
    return [p for one in both if one is not None for p in one.model.parameters() if p.requires_grad]


def test_a_critic_of_other_tokens_is_refused(tiny: Path, tmp_path: Path) -> None:
    toy.tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(len(toy.tokenizer()))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its vocabulary is not the policy's"):
        Learners.make(Policy.load(tiny), TRAINING, Critic("model", str(tmp_path)), steps=1)
