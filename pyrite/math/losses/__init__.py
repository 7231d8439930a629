"""Direct preference losses: loss(pair: PairLogps, *, options) -> (B,), one value a pair.

A loss called with options alone returns itself with these options: `simpo(beta=2.5)`. `needs` finds out which inputs
a loss reads beyond the sums of log-probabilities.
"""

from pyrite.math.losses.divergences import exo, f_dpo, tdpo
from pyrite.math.losses.dpo import (
    aot,
    beta_dpo,
    discopop,
    dpo,
    ld_dpo,
    ln_dpo,
    odpo,
    posterior,
    r_dpo,
    robust,
    soft_dpo,
    wpo,
    xpo,
)
from pyrite.math.losses.margins import hinge, ipo, rebel, slic
from pyrite.math.losses.pointwise import apo_down, apo_zero, bco, kto_pair, nca, sppo
from pyrite.math.losses.reference_free import alphapo, cpo, orpo, simper, simpo
from pyrite.math.losses.regularized import cal_dpo, dpo_nll, dpop, mpo

__all__ = [
    "alphapo",
    "aot",
    "apo_down",
    "apo_zero",
    "bco",
    "beta_dpo",
    "cal_dpo",
    "cpo",
    "discopop",
    "dpo",
    "dpo_nll",
    "dpop",
    "exo",
    "f_dpo",
    "hinge",
    "ipo",
    "kto_pair",
    "ld_dpo",
    "ln_dpo",
    "mpo",
    "nca",
    "odpo",
    "orpo",
    "posterior",
    "r_dpo",
    "rebel",
    "robust",
    "simper",
    "simpo",
    "slic",
    "soft_dpo",
    "sppo",
    "tdpo",
    "wpo",
    "xpo",
]
