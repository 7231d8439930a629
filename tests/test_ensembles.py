import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrite.math.ensembles
from pyrite.core.specs import members
from pyrite.math.ensembles import mean, standardize, uwo, wco
from pyrite.math.statistics import best_of_n

ENSEMBLES = [getattr(pyrite.math.ensembles, member.name) for member in members(pyrite.math.ensembles)]
every_ensemble = pytest.mark.parametrize("ensemble", ENSEMBLES, ids=lambda f: f.__name__)


@st.composite
def score_matrices(draw):
    members_, texts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    row = st.lists(st.floats(-10, 10), min_size=texts, max_size=texts)
    return torch.tensor(draw(st.lists(row, min_size=members_, max_size=members_)), dtype=torch.float64)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_examples():
    result = doctest.testmod(pyrite.math.ensembles, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_members():
    assert [member.name for member in members(pyrite.math.ensembles)] == ["mean", "uwo", "wco"]


@pytest.mark.parametrize(
    "scores, average, lowest, by_weight",
    [
        ((1.0, 2.0, 3.0, 4.0, 10.0), 4.0, 1.0, {0.1: 3.0, 0.5: -1.0, 1.0: -6.0, 0.0: 4.0}),
        ((0.5, 0.7, 0.6, 0.4, 0.8), 0.6, 0.4, {0.1: 0.598, 0.5: 0.59, 1.0: 0.58, 0.0: 0.6}),
    ],
)
def test_worked_values(scores, average, lowest, by_weight):
    assert mean(column(*scores)).item() == pytest.approx(average)
    assert wco(column(*scores)).item() == pytest.approx(lowest)
    for weight, value in by_weight.items():
        assert uwo(column(*scores), weight=weight).item() == pytest.approx(value)


def test_uwo_weight_is_one_half_by_default():
    assert uwo(column(1, 2, 3, 4, 10)).item() == pytest.approx(-1.0)


@every_ensemble
@given(scores=score_matrices(), shift=st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_properties(ensemble, scores, shift):
    combined = ensemble(scores)
    assert combined.shape == scores.shape[1:]
    torch.testing.assert_close(ensemble(scores.flip(0)), combined)
    torch.testing.assert_close(ensemble(scores + shift), combined + shift)
    assert (combined <= scores.mean(0) + 1e-9).all()
    torch.testing.assert_close(ensemble(scores[:1].expand(4, -1)), scores[0])
    torch.testing.assert_close(ensemble(scores[:1]), scores[0])


@given(scores=score_matrices(), scale=st.floats(0.1, 4))
@settings(max_examples=40, deadline=None)
def test_scale(scores, scale):
    assert (wco(scores) <= scores).all()
    torch.testing.assert_close(wco(scale * scores), scale * wco(scores))
    penalty = mean(scores) - uwo(scores)
    torch.testing.assert_close(mean(scale * scores) - uwo(scale * scores), scale**2 * penalty)


def test_gold_stays_with_its_answer():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [9.0, 8.0, 1.0, 0.0]]).double()  # answers a, b, c, d
    gold = torch.tensor([4.0, 0.0, 2.0, 1.0]).double()
    assert uwo(scores).tolist() == [-5.625, -1.625, 1.375, 0.375]
    assert gold[uwo(scores).argsort()].tolist() == [4.0, 0.0, 1.0, 2.0]
    assert best_of_n(uwo(scores), gold, 4).item() == 2.0
    assert best_of_n(wco(scores), gold, 4).item() == 1.0  # b and c tie


def test_standardize():
    scores = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    centered = standardize(scores, scores.mean(1), scores.std(1, correction=0))
    assert centered.tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    with pytest.raises(ValueError, match="reward model 1 has standard deviation 0"):
        standardize(scores, torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_independent_flaws_are_outvoted():
    """Each member overrates a rare flaw of its own: alone it peaks and falls, the cautious ensembles rise."""
    rng = np.random.default_rng(1234)
    size = (300, 4096)
    gold, scores = rng.standard_normal(size), np.empty((5, *size))
    flaws = rng.random((5, *size)) < 0.005
    for member in range(5):
        scores[member] = gold + 0.7 * rng.standard_normal(size) + 6 * flaws[member]
    gold = torch.from_numpy(gold - 3 * flaws.sum(0))
    proxies, ns = torch.from_numpy(scores), [1, 4, 16, 64, 256, 1024, 4000]

    def curve(proxy: torch.Tensor) -> torch.Tensor:
        return best_of_n(proxy, gold, ns).mean(-1)

    single = torch.stack([curve(proxy) for proxy in proxies]).mean(0)
    average, worst, cautious = curve(mean(proxies)), curve(wco(proxies)), curve(uwo(proxies))
    assert single.argmax() == 2 and single[-1] < single[0]
    assert 2 <= int(average.argmax()) <= 5 and average[-1] < average.max() - 0.1
    assert (worst.diff() > 0).all() and (cautious.diff() > 0).all()
    assert min(worst[-1], cautious[-1]) > average[-1] > single[-1]
