"""What labels for free: scores that do not change while nothing is learned, updates counted, labels learned."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pyrite.core import specs as parts
from pyrite.data import text
from pyrite.data.responses import Responses
from pyrite.models.policy import Lora, Policy, RewardModel
from pyrite.training import live_rewards
from pyrite.training.live_rewards import Annotator, Maker, Rewards
from pyrite.training.rollouts import Players

PROMPTS = ["tell me about the cat", "please tell me", "a big dog and a small bird sat"]
GOOD, BAD = ["red", "blue", "big"], ["mat", "tree", "in"]


def labels(policy: Policy, n: int = 16) -> Responses:
    """A rule to learn: one kind of words is better than the other. Chosen and rejected in turn."""
    asked = [{"prompt_id": PROMPTS[i % 3], "prompt": PROMPTS[i % 3]} for i in range(n) for _ in "ab"]
    said = [words for i in range(n) for words in (f"the {GOOD[i % 3]} cat", f"the cat {BAD[(i // 3) % 3]}")]
    return text.encode(policy.tokenizer, Responses.said(asked, said))


def chosen(pairs: Responses) -> Responses:
    return pairs.take(range(0, len(pairs), 2))


@pytest.fixture
def players(tiny: Path) -> Players:
    policy = Policy.load(tiny)
    return Players(policy, copy.deepcopy(policy).requires_grad_(False))


def make(spec: str, players: Players, seed: int = 0) -> Annotator:
    maker: Maker = parts.part(spec, live_rewards).function
    return maker(players, seed)


def specs(tiny: Path) -> list[str]:
    return [
        f"reward(path={str(tiny)!r}, cold=True, lr=0.01, epochs=4)",
        f"reward(path={str(tiny)!r}, cold=True, members=2, lr=0.01, epochs=4)",
        f"reward(path={str(tiny)!r}, cold=True, rank=4, lr=0.03, epochs=4)",
        "implicit(lr=0.003, epochs=4)",
    ]


def accuracy(judge: Annotator, pairs: Responses) -> float:
    scores = judge.scores(pairs).mean(0)
    return (scores[::2] > scores[1::2]).float().mean().item()


@pytest.mark.parametrize("which", range(4))
def test_it_learns_what_it_is_told_and_nothing_else_moves(tiny: Path, players: Players, which: int) -> None:
    made, pairs = make(specs(tiny)[which], players), labels(players.policy)
    before = {name: value.clone() for name, value in players.policy.state_dict().items()}
    still = made.scores(chosen(pairs))
    assert torch.equal(still, made.scores(chosen(pairs)))  # scoring twice gives the same
    first = accuracy(made, pairs)
    found = made.learn(pairs, seed=1)
    assert accuracy(made, pairs) > max(first, 0.9)
    assert found["loss"] > 0
    assert not torch.equal(still, made.scores(chosen(pairs)))
    assert all(torch.equal(before[name], value) for name, value in players.policy.state_dict().items())


@pytest.mark.parametrize("which", range(4))
def test_a_score_does_not_depend_on_its_neighbors(tiny: Path, players: Players, which: int) -> None:
    made, pairs = make(specs(tiny)[which], players), labels(players.policy, 9)
    made.learn(pairs, seed=0)
    together = made.scores(pairs)
    alone = torch.cat([made.scores(pairs.take([i])) for i in range(len(pairs))], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert made.scores(pairs.take([])).shape == (len(together), 0)


def test_updates_are_counted(tiny: Path, players: Players) -> None:
    """3 epochs of 16 labels in batches of 4: 12 updates."""
    made = make(f"reward(path={str(tiny)!r}, cold=True, epochs=3, batch_size=4)", players)
    made.learn(labels(players.policy), seed=0)
    states = made.learners[0].optimizer.state.values()
    assert {int(state["step"]) for state in states} == {12}


def test_members_differ_by_head_and_order(tiny: Path, players: Players) -> None:
    made = make(f"reward(path={str(tiny)!r}, cold=True, members=3)", players)
    scores = made.scores(chosen(labels(players.policy)))
    assert scores.shape == (3, 16)
    assert len({tuple(row) for row in scores.tolist()}) == 3


def test_a_reward_run_is_where_it_starts(tiny: Path, players: Players, tmp_path: Path) -> None:
    """Raw scores, whatever constants were measured: their differences are log-odds."""
    model = RewardModel.load(tiny, head_seed=3)
    model.mean, model.std = 5.0, 7.0
    model.save(tmp_path / "reward")
    made = make(f"reward(path={str(tmp_path / 'reward')!r})", players)
    some = chosen(labels(players.policy, 4))
    assert isinstance(made, Rewards)
    wanted = model.scores(some.prompts, some.texts) * 7 + 5
    torch.testing.assert_close(made.scores(some)[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_policy_read_as_a_reward_begins_at_zero(tiny: Path, players: Players) -> None:
    for spec in ("implicit()", "self_reward()"):
        made = make(spec, players)
        assert made.scores(chosen(labels(players.policy))).abs().max() < 1e-5
    assert make("self_reward()", players).learn(labels(players.policy), seed=0) == {}


def test_self_reward_follows_the_policy(players: Players) -> None:
    made, pairs = make("self_reward(beta=0.5)", players), labels(players.policy, 3)
    with torch.no_grad():
        for parameter in players.policy.parameters():
            parameter.mul_(1.1)
    scores = made.scores(chosen(pairs))
    assert scores.abs().max() > 1e-3
    twice = make("self_reward(beta=1.0)", players).scores(chosen(pairs))
    torch.testing.assert_close(twice, 2 * scores)


def test_an_adapted_policy_is_its_own_reference(tiny: Path) -> None:
    policy = Policy.load(tiny, lora=Lora(r=4))
    made = make("self_reward()", Players(policy, policy))
    some = chosen(labels(policy, 3))
    assert made.scores(some).abs().max() < 1e-5
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    assert made.scores(some).abs().max() > 1e-3


def test_refusals(tiny: Path, players: Players) -> None:
    with pytest.raises(ValueError, match="no reward model here"):
        make(f"reward(path={str(tiny.parent)!r})", players)
    with pytest.raises(ValueError, match="lr"):
        make("implicit(lr=-1.0)", players)
    with pytest.raises(ValueError, match="needs the option 'path'"):
        make("reward()", players)
    with pytest.raises(ValueError, match="did you mean reward"):
        make("rewards()", players)
