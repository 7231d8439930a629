"""Direct preference losses: loss(pair: PairLogps, *, options) -> (B,), one value a pair.

One family a file. What a loss must be given, beyond the log-probabilities' sums, `pyrite.math.losses.needs` finds out.
"""

from pyrite.math.losses.divergences import exo, f_dpo, tdpo
from pyrite.math.losses.dpo import aot, beta_dpo, discopop, dpo, odpo, posterior, robust, soft_dpo, wpo, xpo
from pyrite.math.losses.hinge import hinge, slic
from pyrite.math.losses.lengths import ld_dpo, ln_dpo, r_dpo
from pyrite.math.losses.reference_free import alphapo, cpo, orpo, simper, simpo
from pyrite.math.losses.regularized import cal_dpo, dpo_nll, dpop, mpo
from pyrite.math.losses.squared import ipo, rebel, sppo
from pyrite.math.losses.unpaired import apo_down, apo_zero, bco, kto_pair, nca

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
