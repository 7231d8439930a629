"""Soups as mathematics: worked numbers, identities, what each reading of an average is and is not invariant to."""

from __future__ import annotations

import doctest
import hashlib
import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from pyrite.math import merging
from pyrite.math.merging import LowRank

E1, E2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
APART = [LowRank(E1, E1.T, 2.0), LowRank(E2, E2.T, 2.0)]
COMBINE = {"delta": merging.deltas, "factor": merging.factors}


def random(seed: int, *, rank: int = 4, out: int = 24, inside: int = 16, scale: float = 2.0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inside, generator=g), torch.randn(out, rank, generator=g), scale)


def sum_of(parts: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """Σ w_i Δ_i the long way."""
    return torch.stack([w * part.matrix() for w, part in zip(weights, parts, strict=True)]).sum(0)


def close(a: Tensor, b: Tensor, *, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=within * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("weights", "factor", "delta"),
    [
        ((0.5, 0.5), [[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]),
        ((0.75, 0.25), [[1.125, 0.375], [0.375, 0.125]], [[1.5, 0.0], [0.0, 0.5]]),
    ],
)
def test_worked_numbers(weights, factor, delta) -> None:
    assert merging.factors(APART, weights).matrix().tolist() == factor
    assert merging.deltas(APART, weights).matrix().tolist() == delta


@pytest.mark.parametrize("combine", COMBINE.values(), ids=COMBINE)
def test_equal_ingredients_make_themselves(combine) -> None:
    part = random(0)
    close(combine([part] * 3, [0.2, 0.3, 0.5]).matrix(), part.matrix())
    alone = combine([part], [1.0])
    assert torch.equal(alone.down, part.down)
    assert torch.equal(alone.up, part.up)
    assert alone.scale == part.scale


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0), (1.5, -0.7, 0.1)])
def test_deltas_are_the_weighted_mean_of_the_matrices(weights) -> None:
    parts = [random(i, rank=rank, scale=s) for i, (rank, s) in enumerate([(4, 2.0), (2, 0.3), (7, 5.0)])]
    soup = merging.deltas(parts, weights)
    close(soup.matrix(), sum_of(parts, weights))
    assert soup.rank == sum(part.rank for part, weight in zip(parts, weights, strict=True) if weight)


def test_factors_carry_cross_terms() -> None:
    parts, weights = [random(i) for i in range(3)], (0.5, 0.3, 0.2)
    pairs = [(wi * wj) * pi.up.double() @ pj.down.double() * 2.0
             for wi, pi in zip(weights, parts, strict=True) for wj, pj in zip(weights, parts, strict=True)]  # fmt: skip
    close(merging.factors(parts, weights).matrix(), torch.stack(pairs).sum(0))


def test_a_shared_a_makes_both_one() -> None:
    shared = random(0).down
    parts = [LowRank(shared, random(i).up, 2.0) for i in range(3)]
    weights = (0.5, 0.3, 0.2)
    close(merging.factors(parts, weights).matrix(), merging.deltas(parts, weights).matrix())


def test_the_gauge_of_an_ingredient_matters_to_factors_only() -> None:
    """A → cA, B → B/c is the same adapter."""
    parts, weights = [random(i) for i in range(3)], (0.5, 0.3, 0.2)
    other = [LowRank(parts[0].down * 10, parts[0].up / 10, 2.0), *parts[1:]]
    close(merging.deltas(other, weights).matrix(), merging.deltas(parts, weights).matrix())
    assert merging.distance(merging.factors(other, weights), merging.factors(parts, weights)) > 1


@pytest.mark.parametrize("combine", COMBINE.values(), ids=COMBINE)
def test_the_order_of_ingredients_does_not_matter(combine) -> None:
    parts, weights = [random(i) for i in range(3)], (0.6, 0.3, 0.1)
    wanted = combine(parts, weights).matrix()
    for order in permutations(range(3)):
        close(combine([parts[i] for i in order], [weights[i] for i in order]).matrix(), wanted)


def test_one_ingredient_of_weight_1_is_that_ingredient() -> None:
    parts = [random(0, scale=0.3), random(1), random(2)]
    for index in range(3):
        weights = [float(i == index) for i in range(3)]
        soup = merging.deltas(parts, weights)
        assert torch.equal(soup.down, parts[index].down)
        assert torch.equal(soup.up, parts[index].up)
        assert soup.scale == parts[index].scale
    alike = [LowRank(part.down, part.up, 2.0) for part in parts]
    assert torch.equal(merging.factors(alike, [0.0, 1.0, 0.0]).up, alike[1].up)


def test_inputs_stay_as_they_were() -> None:
    parts, weights = [random(i) for i in range(3)], (0.5, 0.3, 0.2)

    def digest() -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for p in parts for t in (p.down, p.up))).hexdigest()

    before = digest()
    made = [merging.deltas(parts, weights), merging.factors(parts, weights), merging.truncated(parts[0], 2)]
    made += [merging.deltas(parts[:1], [1.0]), merging.factors(parts[:1], [1.0]), merging.padded(parts[0], 9)]
    for soup in made:
        soup.down.zero_()
        soup.up.zero_()
    merging.weighted([part.up for part in parts], weights).zero_()
    merging.weighted([part.up for part in parts], (1.0, 0.0, 0.0)).zero_()
    merging.similarity(*parts[:2])
    assert digest() == before


@pytest.mark.parametrize(("k", "wanted"), [(3, 3**-0.5), (4, 0.5)])
def test_independent_adapters_average_badly_by_factors(k: int, wanted: float) -> None:
    """Own terms are k of k² equal ones: cosine and norm ratio 1/√k."""
    parts = [random(i, rank=16, out=4000, inside=3000) for i in range(k)]
    weights = merging.shares(None, k)
    cosine, ratio = merging.similarity(merging.factors(parts, weights), merging.deltas(parts, weights))
    assert cosine == pytest.approx(wanted, abs=0.01)
    assert ratio == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(("eps", "gap"), [(0.01, 0.008), (0.1, 0.082), (0.5, 0.363)])
def test_factors_part_from_deltas_as_a_parts_from_its_start(eps: float, gap: float) -> None:
    start = random(9, rank=16, out=400, inside=300).down
    parts = [random(i, rank=16, out=400, inside=300) for i in range(3)]
    parts = [LowRank(start + eps * part.down, part.up, 2.0) for part in parts]
    weights = merging.shares(None, 3)
    assert merging.distance(merging.factors(parts, weights), merging.deltas(parts, weights)) == pytest.approx(
        gap, rel=0.05
    )


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_truncation_is_the_best_and_its_distance_what_was_cut(rank: int) -> None:
    whole = merging.deltas([random(0), random(1, rank=3), random(2, rank=5)], [0.5, 0.3, 0.2])
    cut = merging.truncated(whole, rank)
    u, s, vt = torch.linalg.svd(whole.matrix(), full_matrices=False)
    close(cut.matrix(), (u[:, :rank] * s[:rank]) @ vt[:rank])
    assert cut.rank == rank
    assert merging.distance(cut, whole) == pytest.approx((s[rank:].norm() / s.norm()).item(), abs=1e-6)


@pytest.mark.parametrize("rank", [12, 30])
def test_truncation_at_full_rank_or_above_is_exact(rank: int) -> None:
    whole = merging.deltas([random(i) for i in range(3)], [0.5, 0.3, 0.2])
    cut = merging.truncated(whole, rank)
    assert (cut.rank, cut.scale) == (rank, whole.scale)
    assert merging.distance(cut, whole) < 1e-6
    wide = merging.deltas([random(i, rank=10, out=6, inside=7) for i in range(3)], [0.5, 0.3, 0.2])  # rank 30 in 6 × 7
    assert merging.distance(merging.truncated(wide, rank), wide) < 1e-6


def test_similarity_and_distance_are_those_of_the_matrices() -> None:
    x, y = random(0, scale=-0.7), random(1, rank=6)
    a, b = x.matrix(), y.matrix()
    cosine, ratio = merging.similarity(x, y)
    assert cosine == pytest.approx(((a * b).sum() / (a.norm() * b.norm())).item(), abs=1e-9)
    assert ratio == pytest.approx((a.norm() / b.norm()).item())
    assert merging.distance(x, y) == pytest.approx(((a - b).norm() / b.norm()).item())
    assert merging.distance(x, x) < 1e-14
    assert merging.similarity(x, x) == pytest.approx((1.0, 1.0))


def test_zero_matrices_have_no_direction() -> None:
    zero, part = LowRank(torch.zeros(4, 16), torch.zeros(24, 4)), random(0)
    assert all(map(math.isnan, merging.similarity(part, zero)))
    assert merging.similarity(zero, part) == pytest.approx((math.nan, 0.0), nan_ok=True)
    assert math.isnan(merging.distance(part, zero))
    assert merging.distance(zero, zero) == 0
    assert merging.truncated(zero, 2).matrix().abs().max() == 0


def test_padding_changes_nothing() -> None:
    part = random(0)
    assert torch.equal(merging.padded(part, 7).matrix(), part.matrix())
    assert merging.padded(part, 7).rank == 7
    assert merging.padded(part, 4) is part


def test_weighted_tensors() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 3, 2, generator=g) for _ in range(3)]
    weights = (0.5, 0.3, 0.2)
    close(merging.weighted(tensors, weights), 0.5 * tensors[0] + 0.3 * tensors[1] + 0.2 * tensors[2])
    assert torch.equal(merging.weighted(tensors, (0, 1, 0)), tensors[1])
    close(merging.weighted(tensors, (1.5, -0.5, 0.0)), 1.5 * tensors[0] - 0.5 * tensors[1])


def test_sums_do_not_lose_what_the_type_would() -> None:
    """In bfloat16 256 + 1 is 256, and 1 + 1/256 is 1."""
    halves = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, -256.0)]
    assert merging.weighted(halves, [1, 1, 1, 1]).item() == 2
    assert merging.weighted(halves, [1, 1, 1, 1]).dtype == torch.bfloat16
    parts = [LowRank(E1.bfloat16(), E1.T.bfloat16()), LowRank(E2.bfloat16(), E2.T.bfloat16())]
    for combine in COMBINE.values():
        assert combine(parts, [1 + 1 / 256, 1.0]).matrix()[0, 0] >= 1 + 1 / 256
        assert combine(parts, [0.5, 0.5]).up.dtype == torch.float32


def test_integers_stay_or_are_refused() -> None:
    ids = torch.arange(3)
    assert torch.equal(merging.weighted([ids, ids.clone()], [0.5, 0.5]), ids)
    with pytest.raises(ValueError, match="cannot be averaged"):
        merging.weighted([ids, ids + 1], [0.5, 0.5])


def test_shares() -> None:
    assert merging.shares(None, 4) == [0.25] * 4
    assert merging.shares([0.5, 0.25, 0.25], 3) == [0.5, 0.25, 0.25]
    assert merging.shares([0.33, 0.33, 0.33], 3) == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert merging.shares([0.3, -0.7], 2, normalize=False) == [0.3, -0.7]


@pytest.mark.parametrize(
    ("weights", "normalize", "message"),
    [
        ([0.5, 0.5], True, "2 weights for 3 ingredients"),
        ([0.5, 0.5], False, "2 weights for 3 ingredients"),
        ([0.5, 0.5, 0.5], True, "0.5 0.5 0.5 sum to 1.5"),
        ([1.5, -0.25, -0.25], True, "at least 0"),
        ([0.0, 0.0, 0.0], False, "not all 0"),
        ([math.nan, 0.5, 0.5], False, "finite"),
        ([math.inf, 0.5, 0.5], True, "finite"),
    ],
)
def test_weights_that_are_refused(weights, normalize: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merging.shares(weights, 3, normalize=normalize)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merging.deltas([random(0), random(1, inside=15)], [0.5, 0.5]), "shapes differ"),
        (lambda: merging.factors([random(0), random(1, out=25)], [0.5, 0.5]), "shapes differ"),
        (lambda: merging.factors([random(0), random(1, rank=5)], [0.5, 0.5]), "ranks differ: 5 of ingredient 2, 4 of"),
        (lambda: merging.factors([random(0), random(1, scale=1.0)], [0.5, 0.5]), "scales differ"),
        (lambda: merging.weighted([E1, E1.T], [0.5, 0.5]), "shapes differ"),
        (lambda: merging.deltas([random(0), random(1)], [1.0]), "1 weights for 2"),
        (lambda: merging.deltas([random(0), random(1)], [0.0, 0.0]), "nothing is left"),
        (lambda: merging.truncated(random(0), 0), "rank 0"),
        (lambda: LowRank(torch.zeros(3, 4), torch.zeros(5, 2)), "needs A"),
        (lambda: LowRank(torch.zeros(3, 4, 1), torch.zeros(5, 3)), "needs A"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_examples() -> None:
    result = doctest.testmod(merging)
    assert result.attempted >= 1
    assert result.failed == 0
