from dataclasses import replace

import pytest
import torch

from pyrite.math.logps import Logps, PairLogps
from pyrite.math.losses import dpo, ipo, ld_dpo, ln_dpo, r_dpo

from .fixtures import pair_of, pair_with, random_rows


def test_ld_dpo_at_0_cuts_both_to_the_shorter():
    sides = random_rows(6, seed=5)
    cut = [[row[: min(len(a), len(b))] for row, a, b in zip(rows, *sides[:2], strict=True)] for rows in sides]
    torch.testing.assert_close(ld_dpo(pair_of(sides), alpha=0.0), dpo(pair_of(cut)))


def test_ld_dpo_finds_the_tokens_wherever_the_padding_is():
    pair = pair_of(random_rows(6, seed=5))

    def turned(side: Logps | None) -> Logps | None:
        """The same responses with their padding on the left."""
        if side is None or side.tokens is None or side.mask is None:
            return side
        rows = [row[mask] for row, mask in zip(side.tokens, side.mask, strict=True)]
        width = side.mask.shape[1] + 2
        left = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
        mask = torch.arange(width) >= width - side.length[:, None]
        return replace(side, tokens=left, mask=mask)

    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    moved = replace(pair, **{name: turned(getattr(pair, name)) for name in names})
    torch.testing.assert_close(ld_dpo(moved, alpha=0.3), ld_dpo(pair, alpha=0.3))


def without_tokens(side: Logps | None, *, aligned: bool = True) -> Logps:
    assert side is not None
    return Logps.from_sums(side.sum, side.length, aligned=aligned)


@pytest.mark.parametrize("name", ["chosen", "rejected", "ref_chosen", "ref_rejected"])
def test_ld_dpo_explains_missing_tokens(name):
    pair = pair_of(random_rows(2, seed=0))
    with pytest.raises(ValueError, match="token by token"):
        ld_dpo(replace(pair, **{name: without_tokens(getattr(pair, name))}))


@pytest.mark.parametrize("loss", [ln_dpo, ld_dpo, lambda pair: ipo(pair, length_norm=True)])
@pytest.mark.parametrize("name", ["ref_chosen", "ref_rejected"])
def test_another_tokenizer_is_refused_where_lengths_or_tokens_are_read(loss, name):
    pair = pair_of(random_rows(2, seed=0))
    foreign = replace(pair, **{name: without_tokens(getattr(pair, name), aligned=False)})
    with pytest.raises(ValueError, match="which another tokenizer counted"):
        loss(foreign)
    assert torch.equal(dpo(foreign), dpo(pair))


def test_ln_dpo_of_equal_lengths_is_dpo_of_a_smaller_beta():
    pair = pair_with(ratios=([2.0, -1.0], [0.5, 1.0]), lengths=([4, 4], [4, 4]))
    torch.testing.assert_close(ln_dpo(pair, beta=2.0), dpo(pair, beta=0.5))


def test_r_dpo_asks_less_of_a_longer_chosen_response():
    def value(lengths: tuple[list[int], list[int]]) -> float:
        return r_dpo(pair_with(ratios=([0.0], [0.0]), lengths=lengths), alpha=0.1).item()

    assert value(([9], [3])) < value(([5], [5])) < value(([3], [9]))


def test_r_dpo_reads_the_policy_s_lengths_only():
    pair = pair_of(random_rows(3, seed=0))
    refs = [without_tokens(side, aligned=False) for side in (pair.ref_chosen, pair.ref_rejected)]
    longer = [replace(side, length=side.length + 7) for side in refs]
    assert torch.equal(r_dpo(PairLogps(pair.chosen, pair.rejected, *longer)), r_dpo(pair))
