"""What every loss needs, found by probing, against a table written by hand."""

from __future__ import annotations

import pytest

from pyrite.core import specs
from pyrite.math import losses
from pyrite.math.losses.needs import needs

NOTHING, REF, STRONG = frozenset(), frozenset({"ref"}), frozenset({"ref", "strength"})
LENGTHS, KEPT, OF_BATCH = frozenset({"ref", "aligned"}), frozenset({"ref", "running"}), frozenset({"ref", "batch"})
NEEDS: dict[str, frozenset[str]] = {
    **dict.fromkeys(["posterior", "slic", "cpo", "simpo", "alphapo", "orpo", "simper"], NOTHING),
    **dict.fromkeys(["dpo", "ipo", "hinge", "robust", "exo", "nca", "sppo", "apo_zero", "apo_down", "discopop"], REF),
    **dict.fromkeys(["bco", "kto_pair", "r_dpo", "dpop", "dpo_nll", "mpo", "f_dpo", "xpo", "cal_dpo"], REF),
    **dict.fromkeys(["soft_dpo", "odpo", "rebel", "sppo(soft=True)"], STRONG),
    **dict.fromkeys(["ln_dpo", "ipo(length_norm=True)"], LENGTHS),
    **dict.fromkeys(["bco(delta=None)", "mpo(delta=None)"], KEPT),
    **dict.fromkeys(["aot", "aot(paired=False)"], OF_BATCH),
    **dict.fromkeys(["beta_dpo", "beta_dpo(rho=0.5)"], KEPT | OF_BATCH),
    **dict.fromkeys(["tdpo", "tdpo(version=1)"], frozenset({"ref", "kl"})),
    "ld_dpo": LENGTHS | {"tokens", "ref_tokens"},
    "wpo": REF | {"collision"},
}


@pytest.mark.parametrize("spec", NEEDS)
def test_needs(spec: str) -> None:
    assert needs(specs.part(spec, losses)) == NEEDS[spec]


def test_every_loss_is_in_the_table() -> None:
    assert {spec.split("(")[0] for spec in NEEDS} == set(losses.__all__)


def test_a_loss_of_the_user() -> None:
    assert needs(lambda pair: pair.chosen.sum * 0) == frozenset()
    assert needs(lambda pair: pair.chosen.sum - pair.chosen.sum.mean()) == {"batch"}


def test_an_error_of_the_loss_itself_is_not_swallowed() -> None:
    with pytest.raises(ValueError, match=r"below 0\.5"):
        needs(specs.part("robust(label_smoothing=0.7)", losses))
