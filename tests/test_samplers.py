"""Samplers: worked numbers, the closed form of the theory, properties of every member, mixed logits."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrite.core import specs
from pyrite.math import samplers
from pyrite.math.samplers import Arm, ArmPair, Sampler, check_decodable, exact, exponents, mixed_logits, pick

F64 = torch.float64
LN2 = math.log(2)
ZOO = [spec.name for spec in specs.members(samplers) if spec.name != "mixture"] + [
    "mixed(kappa=0.3, on_policy=0.3)",
    "mix_r(share=0.5)",
    "mix_p(share=1.0)",
    "mix_p(cap=0.5)",
    "mix_p(beta=0.7, cap='range')",
    "mixture(arms=[(2, (1, 0, 0), (0, 1, 0)), (1, (0, 0, 1), (0.5, 0.5, -1))])",
    "mixture(arms=[(1, (0.5, 0, 0), (0, 0, 1))], weigh='mass')",
]
MODELS = ("reference", "on_policy", "hybrid", "mixed", "mixed(kappa=0.3, on_policy=0.3)")  # drawn by language models

every_sampler = pytest.mark.parametrize("spec", ZOO)


def named(spec: str) -> Sampler:
    return specs.part(spec, samplers).function  # pyright: ignore[reportReturnType]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual: torch.Tensor, expected: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def triple(n: int, seed: int, rows: int = 3) -> list[torch.Tensor]:
    """log π, log π_ref and r of a few instances."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref, reward = torch.randn(3, rows, n, dtype=F64, generator=generator)
    return [policy.log_softmax(-1), ref.log_softmax(-1), reward]


def test_worked_numbers_of_two_responses() -> None:
    flat = torch.full((2,), -LN2, dtype=F64)
    joint, weights, mass = exact(samplers.mix_r(), flat, flat, tensor(0, LN2))
    close(joint, [[4 / 17, 4.5 / 17], [4.5 / 17, 4 / 17]])
    close(weights, [8 / 17, 9 / 17])
    assert mass is not None
    close(mass, 17.0)
    only = exact(samplers.mixture(arms=[(1, (0, 0, 1), (0, 0, -1))]), flat, flat, tensor(0, LN2)).joint
    s1, s2 = tensor(1 / 3, 2 / 3), tensor(2 / 3, 1 / 3)
    close(only, (s1[:, None] * s2 + s2[:, None] * s1) / 2)


def test_worked_numbers_of_three_responses() -> None:
    flat = torch.full((3,), -math.log(3), dtype=F64)
    joint, weights, mass = exact(samplers.mix_r(), flat, flat, tensor(0, LN2, 2 * LN2))
    close(joint * 42.5, [[4, 4.5, 6.25], [4.5, 4, 4.5], [6.25, 4.5, 4]])
    close(weights, [18 / 42.5, 24.5 / 42.5])
    assert mass is not None
    close(mass, 42.5)


@given(n=st.integers(2, 50), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_closed_form_of_the_theory(n: int, seed: int) -> None:
    """J = C/Z with C_ab = 2 + e^{x_a−x_b} + e^{x_b−x_a}, whatever is added to x."""
    policy, ref, reward = triple(n, seed)
    beta = 0.7
    for sampler, x in ((samplers.mix_r(), reward), (samplers.mix_p(beta=beta), beta * (policy - ref))):
        apart = (x[:, :, None] - x[:, None, :]).exp()
        pairs = 2 + apart + apart.mT
        joint, _, mass = exact(sampler, policy, ref, reward)
        assert mass is not None
        torch.testing.assert_close(mass, pairs.sum((1, 2)), rtol=1e-12, atol=0)
        close(joint, pairs / mass[:, None, None])
        close(exact(sampler, policy, ref, reward + 3.0).joint, joint)


def test_mix_p_goes_from_uniform_to_mix_r() -> None:
    _, ref, reward = triple(6, 0)
    at_ref = exact(samplers.mix_p(beta=2.0), ref, ref, reward).joint
    close(at_ref, torch.full_like(at_ref, 1 / 36))
    there = (ref + reward / 2.0 + 0.4).log_softmax(-1)
    close(exact(samplers.mix_p(beta=2.0), there, ref, reward).joint, exact(samplers.mix_r(), ref, ref, reward).joint)


@every_sampler
@pytest.mark.parametrize("n", [2, 7])
def test_every_sampler_is_a_symmetric_distribution(spec: str, n: int) -> None:
    sampler = named(spec).at(0.7)
    policy, ref, reward = triple(n, 1)
    joint, weights, mass = exact(sampler, policy, ref, reward)
    close(joint, joint.mT)
    close(joint.sum((1, 2)), [1.0, 1.0, 1.0])
    close(weights.sum(-1), [1.0, 1.0, 1.0])
    assert (joint >= 0).all() and weights.shape == (3, len(sampler.pairs))
    assert (mass is None) == (sampler.weigh == "share")
    one_by_one = torch.stack([exact(sampler, *(x[i] for x in (policy, ref, reward))).joint for i in range(3)])
    close(joint, one_by_one)


@every_sampler
def test_every_sampler_against_its_definition(spec: str) -> None:
    """Term by term, response by response."""
    sampler = named(spec).at(0.7)
    (policy,), (ref,), (reward,) = triple(4, 2, rows=1)

    def raw(arm: Arm) -> list[float]:
        return [math.exp(arm.policy * policy[a] + arm.ref * ref[a] + arm.reward * reward[a]) for a in range(4)]

    c = [[0.0] * 4 for _ in range(4)]
    for pair in sampler.pairs:
        u, v = raw(pair.first), raw(pair.second)
        mass = 1.0 if sampler.weigh == "mass" else 1 / (sum(u) * sum(v))
        for a in range(4):
            for b in range(4):
                c[a][b] += pair.weight * mass * (u[a] * v[b] + v[a] * u[b])
    if sampler.cap is not None:
        most = float(reward.max() - reward.min()) if sampler.cap == "range" else float(sampler.cap)
        c = [[min(x, 2 + math.exp(most) + math.exp(-most)) for x in row] for row in c]
    total = sum(map(sum, c))
    joint, _, z = exact(sampler, policy, ref, reward)
    close(joint, [[x / total for x in row] for row in c])
    if z is not None:
        assert z.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("spec", MODELS)
def test_at_the_reference_all_that_models_draw_is_the_same(spec: str) -> None:
    _, ref, reward = triple(5, 3)
    close(exact(named(spec), ref, ref, reward).joint, exact(samplers.reference(), ref, ref, reward).joint)


@every_sampler
def test_adaptive_is_what_changes_with_the_policy(spec: str) -> None:
    sampler = named(spec).at(0.7)
    policy, ref, reward = triple(5, 4)
    moved = not torch.equal(exact(sampler, policy, ref, reward).joint, exact(sampler, ref, ref, reward).joint)
    assert moved == sampler.adaptive == named(spec).adaptive


def test_a_cap_binds_where_rewards_are_believed_too_far_apart() -> None:
    policy, ref, reward = triple(8, 5)
    capped = exact(samplers.mix_p(beta=3.0, cap="range"), 4 * policy, ref, reward)
    free = exact(samplers.mix_p(beta=3.0), 4 * policy, ref, reward)
    assert capped.mass is not None and free.mass is not None
    assert (capped.mass < free.mass).all()
    most = reward.amax(-1) - reward.amin(-1)
    assert (capped.joint.amax((1, 2)) * capped.mass <= (2 + 2 * most.cosh()) * (1 + 1e-12)).all()
    there = (ref + reward / 3.0).log_softmax(-1)
    at_optimum = exact(samplers.mix_p(beta=3.0, cap="range"), there, ref, reward)
    close(at_optimum.joint, exact(samplers.mix_p(beta=3.0), there, ref, reward).joint)


def test_large_tilts_stay_finite() -> None:
    flat = torch.zeros(3, dtype=F64).log_softmax(-1)
    joint, weights, _ = exact(samplers.mix_r(), flat, flat, tensor(0, 300, -400))
    assert joint.isfinite().all() and weights.isfinite().all()
    close(joint[1, 2], 0.5)


def test_the_zoo_as_data() -> None:
    assert samplers.mixed().pairs == (ArmPair(Arm(1.5, -0.5), Arm(0.5, 0.5)),)
    assert samplers.mixed(kappa=0.0) == samplers.on_policy()
    assert samplers.mixed(on_policy=1.0) == samplers.on_policy()
    assert [pair.weight for pair in samplers.mixed(on_policy=0.3).pairs] == [0.7, 0.3]
    assert samplers.mix_p().at(3.0) == samplers.mix_p(beta=3.0)
    assert samplers.mix_r(share=0.0).pairs[0].first == samplers.uniform().pairs[0].first
    assert len(samplers.mix_p(share=1.0).pairs) == 1
    assert all(inspect.getdoc(getattr(samplers, name)) for name in samplers.__all__)


@pytest.mark.parametrize(
    "spec, said",
    [
        ("mixed(on_policy=1.2)", "on_policy=1.2: give 0 to 1"),
        ("mix_r(share=-0.1)", "share=-0.1: give 0 to 1"),
        ("mix_p(cap=-1.0)", "cap=-1.0: give at least 0"),
        ("mix_p(cap='most')", "cap='most'"),
        ("mix_p(share=0.5, cap=1.0)", "a cap bounds pair weights by mass"),
        ("mixture(arms=[])", "at least one pair"),
        ("mixture(arms=[(1, (0, 0, 1))])", "row 0 is .* write .weight, first, second."),
        ("mixture(arms=[(1, (0, 0), (0, 0)), (1, 'ab', (0, 0))])", "row 1"),
        ("mixture(arms=[(0, (0, 0), (0, 0))])", "arm pair 0 has weight 0.0"),
        ("mixture(arms=[(1, (0, 0), (0, 0))], weigh='size')", "weigh='size'"),
    ],
)
def test_refusals(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        named(spec)
    assert "\n" not in str(error.value)


def test_a_sampler_made_by_hand_is_checked() -> None:
    with pytest.raises(ValueError, match="weigh='size'; choose 'share' or 'mass'"):
        Sampler((ArmPair(Arm(), Arm()),), "size")  # pyright: ignore[reportArgumentType]


def test_exponents_must_be_finite_and_beta_known() -> None:
    with pytest.raises(ValueError, match="an exponent is not finite"):
        Arm(policy=math.inf)
    with pytest.raises(ValueError, match=r"sampler\.at\(beta\)"):
        exact(samplers.mix_p(), *triple(3, 6))


@pytest.mark.parametrize("spec", [spec for spec in ZOO if spec not in MODELS])
def test_what_a_language_model_cannot_draw_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="needs a finite set of responses"):
        check_decodable(named(spec))


def test_what_a_language_model_can_draw() -> None:
    for spec in MODELS:
        check_decodable(named(spec))
    with pytest.warns(UserWarning, match=r"exponents sum to 1\.5, not 1"):
        check_decodable(samplers.mixture(arms=[(1, (1.5, 0.0), (0.5, 0.5))]))


def test_pick_by_weight() -> None:
    sampler = samplers.mixed(on_policy=0.3)
    assert pick(sampler, tensor(0, 0.5, 0.69999, 0.7, 0.99999)).tolist() == [0, 0, 0, 1, 1]
    assert pick(samplers.hybrid(), tensor(0, 0.999)).tolist() == [0, 0]
    drawn = pick(sampler, torch.rand(100_000, dtype=F64, generator=torch.Generator().manual_seed(0)))
    assert drawn.double().mean().item() == pytest.approx(0.3, abs=0.006)  # four standard errors


LOGITS = torch.tensor([[2.0, 1.0, 0.0]])
WORKED = [
    (Arm(1.0), 1.0, [0.665241, 0.244728, 0.090031]),
    (Arm(1.5, -0.5), 1.0, [0.785597, 0.175290, 0.039113]),
    (Arm(0.5, 0.5), 1.0, [0.506480, 0.307196, 0.186324]),
    (Arm(1.5, -0.5), 0.7, [0.884108, 0.103723, 0.012169]),
    (Arm(0.5, 0.5), 0.7, [0.578305, 0.283104, 0.138591]),
]


@pytest.mark.parametrize("arm, temperature, expected", WORKED)
def test_worked_mixed_logits(arm: Arm, temperature: float, expected: list[float]) -> None:
    mixed = mixed_logits(LOGITS, torch.full((1, 3), 0.7), exponents([arm]))
    close((mixed / temperature).softmax(-1), [expected], atol=1e-6)


def logits(rows: int = 4, tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    policy, ref = 5 * torch.randn(2, rows, tokens, generator=generator)
    return policy, ref


def test_mixed_logits_row_by_row() -> None:
    policy, ref = logits()
    arms = [Arm(1.5, -0.5), Arm(0.5, 0.5), Arm(1.0), Arm(ref=1.0)]
    together = mixed_logits(policy, ref, exponents(arms))
    for row, arm in enumerate(arms):
        alone = mixed_logits(policy[row : row + 1], ref[row : row + 1], exponents([arm]))
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together[2], policy[2]) and torch.equal(together[3], ref[3])


def test_mixed_logits_are_exact_arms() -> None:
    """Token by token, an arm is what `exact` makes of the two distributions."""
    policy, ref = (x.double().log_softmax(-1) for x in logits())
    for arm in (Arm(1.5, -0.5), Arm(0.5, 0.5), Arm(1.2, -0.7)):
        joint = exact(Sampler((ArmPair(arm, arm),)), policy, ref, torch.zeros_like(ref)).joint
        found = mixed_logits(policy, ref, exponents([arm])).softmax(-1)
        close(found, joint.sum(-1).float(), atol=1e-6)


def test_mixing_a_model_with_itself_or_with_shifted_logits_changes_nothing() -> None:
    policy, ref = logits()
    weights = exponents([Arm(1.5, -0.5)])
    close(mixed_logits(policy, policy, weights).softmax(-1), policy.softmax(-1), atol=1e-6)
    base = mixed_logits(policy, ref, weights).softmax(-1)
    close(mixed_logits(policy + 8.0, ref - 3.0, weights).softmax(-1), base, atol=1e-5)


def test_mixed_logits_are_float32_and_leave_their_inputs_alone() -> None:
    policy, ref = (x.bfloat16() for x in logits())
    before = policy.clone(), ref.clone()
    mixed = mixed_logits(policy, ref, exponents([Arm(1.5, -0.5)]))
    assert mixed.dtype == torch.float32
    close(mixed, 1.5 * policy.float() - 0.5 * ref.float(), atol=1e-5)
    assert torch.equal(policy, before[0]) and torch.equal(ref, before[1])


def test_tokens_ruled_out_stay_out_and_nan_is_not_hidden() -> None:
    out = -math.inf
    policy = torch.tensor([[1.0, out, 1.0, out], [1.0, 2.0, math.nan, out]])
    ref = torch.tensor([[1.0, 1.0, out, out], [1.0, out, 0.0, 0.0]])
    mixed = mixed_logits(policy, ref, exponents([Arm(1.5, -0.5)]))
    assert mixed[0].tolist() == [1.0, out, out, out]
    assert mixed[1, 2].isnan() and mixed[1, 1] == out
    plain = mixed_logits(policy, ref, exponents([Arm(1.0), Arm(1.0)]))
    torch.testing.assert_close(plain, policy, rtol=0, atol=0, equal_nan=True)
