"""Rollouts of a tiny model: log-probabilities, scores and values of the very tokens drawn; what is taught by them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import read_rows
from reading import drawn
from torch import Tensor

from pyrite.data.conditioning import Dimensions, Option, conditioned
from pyrite.data.responses import Responses
from pyrite.math import ensembles, seeds
from pyrite.math.policy_gradient import gae, policy_loss, rloo, token_rewards, value_loss, whiten
from pyrite.models.policy import Policy, RewardModel, ValueModel, WithValue
from pyrite.training.loop import BatchLoss, Learner, Training
from pyrite.training.ppo import Reward, Rollouts, batch_loss, collect, estimates, scored
from pyrite.training.rollouts import Players

PROMPTS = [{"prompt_id": str(i), "prompt": words} for i, words in enumerate(["tell me", "please", "a cat then"])]
IDS = [[1, 20, 21], [1, 22], [1, 4, 6, 20]]


def count(answers: Responses) -> Tensor:
    """Two members: words, and words less one without an end."""
    words = torch.tensor([float(len(said.split())) for said in answers.texts])
    return torch.stack([words, words - (~answers.finished).float()])


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return Policy.load(tiny)


def moved(policy: Policy, by: float = 1.05) -> Policy:
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(by)
    return other


def rolled(policy: Policy, **options: Any) -> Rollouts:
    rewards = [Reward("words", count, ensembles.wco)]
    how = {"k": 3, "max_new_tokens": 16, "seed": 0, "number": 0, **options}
    return collect(Players(policy, moved(policy)), rewards, PROMPTS, IDS, **how)


def learned(learner: Learner, batch: list[int], found: Rollouts, loss: BatchLoss, lr: float = 0.0) -> dict[str, Tensor]:
    return learner.update(batch, found.responses, found.responses.groups(), loss, weights=found.weights, lr=lr)


def test_everything_is_of_the_tokens_drawn(policy: Policy, tiny: Path) -> None:
    critic = ValueModel.load(tiny)
    torch.nn.init.normal_(critic.model.score.weight, generator=seeds.generator(0, "test"))  # type: ignore[union-attr,arg-type]
    found = rolled(policy, critic=critic)
    groups = found.responses.groups()
    assert len(found.responses) == 9 and groups == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [row["prompt_id"] for row in found.responses.owners] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert found.mask.sum(1).tolist() == [len(ids) for ids in found.responses.tokens()]
    assert found.logps.tokens is not None and found.ref.tokens is not None and found.values is not None
    torch.testing.assert_close(found.logps.tokens, read_rows(policy, found.responses).tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.ref.tokens, read_rows(moved(policy), found.responses).tokens)
    assert found.values.shape == found.mask.shape and not found.values[~found.mask].any()
    with torch.no_grad():
        flat = torch.cat([critic(critic.pack(found.responses, [group])) for group in groups])
    torch.testing.assert_close(found.values[found.mask], flat, atol=1e-5, rtol=1e-5)
    assert found.responses.finished.any() and not found.responses.finished.all()


def test_a_draw_belongs_to_its_prompt_and_batch(policy: Policy) -> None:
    first, again, next_ = rolled(policy), rolled(policy), rolled(policy, number=1)
    alone = collect(
        *(Players(policy, policy), [Reward("words", count)], PROMPTS[1:2], IDS[1:2]),
        **{"k": 3, "max_new_tokens": 16, "seed": 0, "number": 0},
    )
    ids = [found.responses.tokens() for found in (first, again, next_, alone)]
    assert ids[0] == ids[1] != ids[2] and ids[3] == ids[0][3:6]


def test_rewards_are_combined_and_weighted(policy: Policy) -> None:
    answers = rolled(policy).responses
    other = Reward("other", lambda some: torch.tensor([[float(len(said)) for said in some.texts]]), weight=-0.5)
    found = scored([Reward("words", count, ensembles.wco, 2.0), other], answers)
    words = count(answers)
    letters = torch.tensor([float(len(said)) for said in answers.texts])
    torch.testing.assert_close(found.total, 2 * words.amin(0) - 0.5 * letters)
    assert torch.equal(found.members["words"], words) and torch.equal(found.combined["other"], letters)
    summary = found.summary()
    assert summary["words mean"] == pytest.approx(words.amin(0).mean().item())
    assert summary["words member 0"] == pytest.approx(words[0].mean().item())
    assert summary["words variance"] == pytest.approx(words.var(0, correction=0).mean().item())
    assert "other member 0" not in summary


def test_reward_models_and_scorers(policy: Policy, tiny: Path, tmp_path: Path) -> None:
    model = RewardModel.load(tiny, head_seed=1, head_std=0.5)
    model.mean, model.std = 0.1, 2.0
    model.save(tmp_path / "reward")
    answers = rolled(policy).responses
    found = scored([Reward.of_models(str(tmp_path / "reward"), ensemble="uwo(weight=0.5)")], answers)
    torch.testing.assert_close(
        found.total, model.scores(answers.prompts, answers.texts, finished=answers.finished.tolist())
    )
    torch.testing.assert_close(scored([Reward.of_scorer("length()")], answers).total, count(answers)[0])


def test_preferences_of_a_prompt_reach_the_reward(policy: Policy) -> None:
    """Each answer is scored by the options of its own prompt, raw prompt and answer alone being read by golds."""
    along = Dimensions(
        (
            Option("long", "size", "big", "Longer.", gold="length()"),
            Option("cat", "animal", "cat", "Cats.", gold='with_prompt(gold=\'word_collector(words=["cat", "a"])\')'),
        )
    )
    rows = [conditioned(PROMPTS[i], along.chosen(ids)) for i, ids in enumerate((["long"], ["cat"], ["cat", "long"]))]
    reward = Reward.of_preferences(None, along)
    reward.check(rows)
    found = collect(Players(policy, policy), [reward], rows, IDS, k=2, max_new_tokens=8, seed=0, number=0)
    for row, said, total in zip(
        found.responses.owners, found.responses.texts, found.scores.total.tolist(), strict=True
    ):
        words = f"{row['asked']} {said}".split()
        scores = {"long": len(said.split()), "cat": ("cat" in words) + ("a" in words)}
        assert total == pytest.approx(sum(scores[id] for id in row["preferences"]) / len(row["preferences"]))
    assert found.scores.summary()["preferences long"] == pytest.approx(found.scores.members["preferences"][0].nanmean())
    with pytest.raises(ValueError, match="prompt 0 has no preferences"):
        collect(Players(policy, policy), [reward], PROMPTS, IDS, k=2, max_new_tokens=8, seed=0, number=0)


def test_refusals(policy: Policy, tmp_path: Path) -> None:
    answers = drawn([{"prompt_id": "0", "prompt": "tell me"}], ["a cat"])
    with pytest.raises(ValueError, match="at least one"):
        scored([], answers)
    with pytest.raises(ValueError, match="each once"):
        scored([Reward("words", count)] * 2, answers)
    with pytest.raises(ValueError, match="broken scored row 1"):
        scored([Reward("broken", lambda _: torch.tensor([[torch.nan]]))], answers)
    with pytest.raises(ValueError, match="no reward model"):
        Reward.of_models(str(tmp_path))
    found = rolled(policy)
    with pytest.raises(ValueError, match="needs values"):
        estimates(found, torch.zeros(found.mask.shape))
    with pytest.raises(ValueError, match="unknown method"):
        estimates(found, torch.zeros(found.mask.shape), method="ppo")  # type: ignore[arg-type]


def shaped(found: Rollouts) -> Tensor:
    assert found.logps.tokens is not None and found.ref.tokens is not None
    options: dict[str, Any] = {"beta": 0.2, "finished": found.responses.finished, "missing_eos": 1.0}
    return token_rewards(found.scores.total, found.logps.tokens, found.ref.tokens, found.mask, **options)


def test_advantages_by_every_method(policy: Policy, tiny: Path) -> None:
    found = rolled(policy, critic=ValueModel.load(tiny))
    rewards = shaped(found)
    assert found.values is not None
    expected = gae(rewards, found.values, found.mask, gamma=0.9, lam=0.8)
    torch.testing.assert_close(estimates(found, rewards, gamma=0.9, lam=0.8).advantages, expected.advantages)
    made = estimates(found, rewards, method="rloo")
    for n in range(9):
        mine, mates = rewards[n].sum(), rewards[[m for m in range(n // 3 * 3, n // 3 * 3 + 3) if m != n]].sum(1)
        torch.testing.assert_close(made.advantages[n], (mine - mates.mean()) * found.mask[n])
    scores = rewards.sum(1)
    for baseline, mean in ((None, scores.mean()), (0.5, 0.5)):
        plain = estimates(found, rewards, method="reinforce", baseline=baseline).advantages
        torch.testing.assert_close(plain, (scores - mean)[:, None] * found.mask)
    grouped = estimates(found, rewards, method="group").advantages[:, 0].view(3, 3)
    torch.testing.assert_close(grouped, (s := scores.view(3, 3)).sub(s.mean(1, True)) / (s.std(1, keepdim=True) + 1e-4))


@pytest.mark.parametrize("kind", ["policy", "value", "both"])
@pytest.mark.parametrize("micro", [1, 8192])
def test_a_step_is_that_of_the_whole_padded_batch(policy: Policy, tiny: Path, kind: str, micro: int) -> None:
    """However it is cut: gradients through `Learner` against the losses on (N, T) tables, weighed by tokens."""
    value = ValueModel.load(tiny)
    found = rolled(policy, critic=value)
    rewards = shaped(found)
    made = estimates(found, rewards)
    made = made._replace(advantages=whiten(made.advantages, found.mask))
    learns = {"policy": moved(policy, 1.01), "value": value, "both": WithValue(moved(policy, 1.01))}[kind]
    step, expected = copy.deepcopy(learns), learns
    assert found.logps.tokens is not None and found.values is not None

    def table(flat: Tensor) -> Tensor:
        return torch.zeros(found.mask.shape).masked_scatter(found.mask, flat)

    out = expected(expected.pack(found.responses))
    logp, values = out if kind == "both" else (out, out)
    loss = torch.zeros(())
    if kind != "value":
        loss = loss + policy_loss(table(logp), found.logps.tokens, made.advantages, found.mask).loss
    if kind != "policy":
        error = value_loss(table(values), found.values, made.returns, found.mask).loss
        loss = loss + (0.1 if kind == "both" else 1.0) * error
    loss.backward()
    learner = Learner(step, Training(batch_size=3, micro_batch_tokens=micro, max_grad_norm=1e9))
    metrics = learned(learner, [2, 0, 1], found, batch_loss(step, found, made))
    torch.testing.assert_close(metrics["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
    norm = torch.stack([p.grad.norm() for p in expected.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(metrics["grad_norm"], norm, atol=1e-5, rtol=1e-4)


def test_at_first_nothing_has_moved(policy: Policy) -> None:
    """Step 0: ratio 1, KL 0, nothing clipped, where policy and learner are the same model."""
    found = collect(
        *(Players(policy, policy), [Reward("words", count)], PROMPTS, IDS),
        **{"k": 2, "max_new_tokens": 6, "seed": 0, "number": 0},
    )
    assert (found.logps.sum - found.ref.sum).abs().max() < 1e-4
    made = estimates(found, shaped(found), method="rloo")
    learner = Learner(policy, Training(batch_size=3))
    metrics = learned(learner, [0, 1, 2], found, batch_loss(policy, found, made))
    assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert metrics["step_kl"].abs() < 1e-8 and metrics["clip_fraction"] == 0


def test_learning_raises_the_reward(policy: Policy) -> None:
    """RLOO on the number of words, a few batches: more words. With the sign turned, fewer."""
    ends = {}
    for sign in (1.0, -1.0):
        mine = copy.deepcopy(policy)
        learner = Learner(mine, Training(batch_size=3))
        reward = Reward("words", lambda some, sign=sign: sign * count(some)[:1])
        for number in range(8):
            found = collect(
                Players(mine, policy), [reward], PROMPTS, IDS, k=16, max_new_tokens=10, seed=0, number=number
            )
            made = estimates(found, shaped(found), method="rloo")
            learned(learner, [0, 1, 2], found, batch_loss(mine, found, made), lr=0.01)
        ends[sign] = sign * found.scores.total.mean().item()
    assert ends[1.0] > ends[-1.0] + 2


def test_rloo_of_rollouts_is_of_whole_answers(policy: Policy) -> None:
    """The KL is in the answer's score: its sum over tokens is score − β log π/π_ref − penalty."""
    found = rolled(policy)
    whole = found.scores.total - 0.2 * (found.logps.sum - found.ref.sum) - (~found.responses.finished).float()
    torch.testing.assert_close(shaped(found).sum(1), whole, atol=1e-5, rtol=1e-5)
    made = estimates(found, shaped(found), method="rloo").advantages[:, 0]
    torch.testing.assert_close(made, rloo(whole.view(3, 3)).flatten(), atol=1e-5, rtol=1e-5)
