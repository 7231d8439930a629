"""Selectors: worked orders, properties over every member, frequencies of the random share."""

from __future__ import annotations

import pytest
import torch

from pyrite.core import specs
from pyrite.feedback import selection
from pyrite.feedback.selection import pick

EVERY = [member.name for member in specs.members(selection)]
MARGINS = torch.tensor([[0.9, 0.1, -0.5, 0.3], [0.7, -0.3, -0.1, 0.5]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chosen(spec: str, margins: torch.Tensor, n: int, seed: int = 0) -> list[int]:
    return pick(specs.part(spec, selection), margins, n, generator=generator(seed))


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        ("confidence()", [1, 2, 3, 0]),  # means .8, -.1, -.3, .4
        ("margin_top()", [0, 3, 2, 1]),
        ("disagreement()", [1, 2, 0, 3]),  # half differences .1, .2, .2, .1; equal ones in their order
        ("with_random(share=0.0)", [1, 2, 3, 0]),
    ],
)
def test_worked_orders(spec: str, order: list[int]) -> None:
    assert chosen(spec, MARGINS, 4) == order
    assert chosen(spec, MARGINS, 2) == order[:2]


def test_published_example() -> None:
    """Margins .9, .1, .5, .3 and a budget of 2: pairs 1 and 3."""
    assert chosen("confidence()", torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 2) == [1, 3]


@pytest.mark.parametrize("name", EVERY)
def test_every_selector(name: str) -> None:
    margins = torch.randn(3, 40, generator=generator(1))
    once, again = (chosen(f"{name}()", margins, 40) for _ in range(2))
    assert once == again
    assert sorted(once) == list(range(40))
    swapped = chosen(f"{name}()", -margins, 40)
    assert swapped == once  # which answer was named first does not matter
    assert chosen(f"{name}()", margins, 0) == []
    assert chosen(f"{name}()", margins, 99) == once


@pytest.mark.parametrize("name", ["random", "with_random"])
def test_random_ones_change_with_the_seed(name: str) -> None:
    margins = torch.randn(1, 60, generator=generator(1))
    assert chosen(f"{name}()", margins, 60, seed=0) != chosen(f"{name}()", margins, 60, seed=1)


def test_random_does_not_look_at_margins() -> None:
    assert chosen("random()", torch.zeros(1, 9), 9) == chosen("random()", torch.randn(1, 9), 9)


def test_the_random_share_is_that_share() -> None:
    """Of the first 20 of 2,000, those not among the best 20; without a random share there are none."""
    margins = torch.arange(2000.0)[None] + 1

    def others(share: float) -> float:
        found = [chosen(f"with_random(share={share})", margins, 20, seed=seed) for seed in range(60)]
        return sum(i >= 20 for some in found for i in some) / (60 * 20)

    assert others(0.0) == 0
    assert others(0.3) == pytest.approx(0.3, abs=0.05)
    assert others(1.0) > 0.95


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 2 members"):
        chosen("disagreement()", MARGINS[:1], 1)
    with pytest.raises(ValueError, match=r"share=1\.5: give 0 to 1"):
        chosen("with_random(share=1.5)", MARGINS, 1)
    with pytest.raises(ValueError, match="unknown name 'confident'"):
        chosen("with_random(of='confident()')", MARGINS, 1)
    with pytest.raises(ValueError, match="finite number"):
        pick(lambda margins, generator: margins.mean(0).log(), -MARGINS.abs(), 1, generator=generator())
