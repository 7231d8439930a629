"""One round: arms, drawn tokens as rows, reference log-probabilities, an optimizer that restarts or lasts."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from families import read_rows
from reading import each

from pyrite.feedback.pairing import Pair
from pyrite.jobs.online import RoundLearner, preferences
from pyrite.math import losses, samplers
from pyrite.math.logps import Logps
from pyrite.math.samplers import Arm, Sampler
from pyrite.models.forward import singles
from pyrite.models.loading import Dtype
from pyrite.models.policy import Lora, Policy
from pyrite.training.loop import Training
from pyrite.training.rollouts import Players, arms

ROWS = [{"prompt_id": "a", "prompt": "tell me"}, {"prompt_id": "b", "prompt": "please"}]
IDS = [[1, 20, 21], [1, 22]]


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return Policy.load(tiny)


def test_arms_come_two_by_two_and_belong_to_the_prompt() -> None:
    how = partial(arms, samplers.mixed(on_policy=0.5), 8, seed=1)
    assert how(number=0, prompt_id="a") == how(number=0, prompt_id="a")
    every = [how(number=number, prompt_id=name) for number in range(20) for name in ("a", "b", "c")]
    pairs = [tuple(some[i : i + 2]) for some in every for i in range(0, 8, 2)]
    kinds = {pair: pairs.count(pair) / len(pairs) for pair in set(pairs)}
    assert set(kinds) == {(Arm(1.5, -0.5), Arm(0.5, 0.5)), (Arm(1.0), Arm(1.0))}
    assert 0.35 < kinds[Arm(1.0), Arm(1.0)] < 0.65


def test_rows_are_the_drawn_tokens_and_the_reference_s_view_of_them(policy: Policy) -> None:
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    players = Players(policy, other)
    drawn = players.draw(ROWS, IDS, 0, max_new_tokens=6)
    prefs = preferences(players, drawn, [Pair(3, 2, 0.7)], frozenset({"ref"}))
    tokens = drawn.tokens()
    assert prefs.responses.tokens() == [tokens[3], tokens[2]] and prefs.groups == [[0, 1]]
    assert each(prefs.responses)[0].prompt == IDS[1]
    assert prefs.strength is not None and prefs.ref is not None
    assert prefs.strength.tolist() == pytest.approx([0.7])
    torch.testing.assert_close(prefs.ref.sum, read_rows(other, prefs.responses).sum)
    assert preferences(players, drawn, [Pair(0, 1, 1.0)], frozenset()).ref is None


def test_without_its_adapters_the_policy_is_its_reference(tiny: Path) -> None:
    policy = Policy.load(tiny, lora=Lora(r=4))
    assert policy.reversible
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    players = Players(policy, policy)
    drawn = players.draw(ROWS, IDS, 0, max_new_tokens=6)
    prefs = preferences(players, drawn, [Pair(0, 1, 1.0)], frozenset({"ref"}))
    assert prefs.ref is not None
    torch.testing.assert_close(prefs.ref.sum, read_rows(Policy.load(tiny), prefs.responses).sum, atol=1e-4, rtol=1e-4)
    assert (read_rows(policy, prefs.responses).sum - prefs.ref.sum).abs().max() > 1e-2


def read_logps(read: Logps) -> torch.Tensor:
    assert read.tokens is not None and read.mask is not None
    return read.tokens[read.mask]


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("sampler", [samplers.on_policy(), samplers.mixed(on_policy=0.5)])
def test_bfloat16_draws_and_scores_are_a_forward_s_under_autocast(
    tiny: Path, sampler: Sampler, lora: Lora | None
) -> None:
    policy = Policy.load(tiny, lora=lora)
    ref = policy if lora else copy.deepcopy(policy).requires_grad_(False)
    for precision in ("float32", "bfloat16"):
        players = Players(policy, ref, precision)
        rows = players.draw(ROWS, IDS, 0, sampler=sampler, k=8, max_new_tokens=12)
        drawn = rows.logps
        assert drawn is not None
        exact = read_rows(policy, rows)
        with torch.autocast("cpu", torch.bfloat16):
            half = read_rows(policy, rows)
        noise = (read_logps(half) - read_logps(exact)).abs().mean()
        assert noise > 1e-3
        if precision == "float32":
            torch.testing.assert_close(drawn, read_logps(exact), atol=1e-4, rtol=0)
            assert torch.equal(players.ref_logps(rows, singles(rows)).sum, exact.sum)
        else:
            assert (drawn - read_logps(half)).abs().mean() < 2 * noise
            assert (drawn - read_logps(exact)).abs().mean() > noise / 4  # not float32 after all
            assert torch.equal(players.ref_logps(rows, singles(rows)).sum, half.sum)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_margin_is_zero_where_learning_and_reference_are_rounded_alike(
    policy: Policy, precision: Dtype
) -> None:
    """Policy = reference; with one in float32 and one in bfloat16 the loss would begin off ln 2."""
    start = copy.deepcopy(policy).requires_grad_(False)
    margins, first = {}, {}
    for ref in ("float32", "bfloat16"):
        players = Players(copy.deepcopy(policy), start, ref)
        drawn = players.draw(ROWS, IDS, 0, max_new_tokens=12)
        prefs = preferences(players, drawn, [Pair(0, 1, 1.0), Pair(3, 2, 1.0)], frozenset({"ref"}))
        learner = RoundLearner(
            players.policy,
            losses.dpo,
            Training(lr_scheduler_type="cosine(warmup_steps=0)", precision=precision),
            rounds=1,
        )
        found = learner.learn(prefs, 0)
        margins[ref], first[ref] = abs(found["margin"]), abs(found["loss"] - math.log(2))
    assert margins.pop(precision) < 1e-4 < min(margins.values())
    assert first.pop(precision) < 1e-5 < min(first.values())


@pytest.mark.parametrize("restart", [True, False])
def test_moments_and_schedule_restart_or_last(policy: Policy, restart: bool) -> None:
    players = Players(policy, copy.deepcopy(policy))
    drawn = players.draw(ROWS, IDS, 0, max_new_tokens=6)
    prefs = preferences(players, drawn, [Pair(0, 1, 1.0), Pair(2, 3, 1.0)], frozenset({"ref"}))
    training = Training(lr=1e-3, batch_size=1, lr_scheduler_type="cosine(warmup_steps=0)")
    learner = RoundLearner(policy, losses.dpo, training, rounds=2, restart=restart)
    before = {name: value.clone() for name, value in players.ref.state_dict().items()}
    for number in range(2):
        learner.learn(prefs, number)
    assert all(torch.equal(before[name], value) for name, value in players.ref.state_dict().items())
    assert int(learner.step) == (2 if restart else 4)
    steps = {int(state["step"]) for state in learner.learner.optimizer.state.values()}
    assert steps == {2 if restart else 4}


def test_an_empty_round_changes_nothing(policy: Policy) -> None:
    players = Players(policy, copy.deepcopy(policy))
    drawn = players.draw(ROWS, IDS, 0, max_new_tokens=6)
    before = copy.deepcopy(policy.state_dict())
    learner = RoundLearner(policy, losses.dpo, Training(), rounds=1)
    assert learner.learn(preferences(players, drawn, [], frozenset({"ref"})), 0) == {}
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
