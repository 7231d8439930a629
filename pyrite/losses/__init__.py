"""Direct preference losses: loss(pair: PairLogps, *, options) -> (B,), one value a pair.

One family a file. What a loss must be given, beyond the log-probabilities' sums, `pyrite.losses.needs` finds out.
"""

from pyrite.losses.aot import aot
from pyrite.losses.apo import apo_down, apo_zero
from pyrite.losses.bco import bco
from pyrite.losses.beta_dpo import beta_dpo
from pyrite.losses.cal_dpo import cal_dpo
from pyrite.losses.cpo import cpo
from pyrite.losses.discopop import discopop
from pyrite.losses.dpo import dpo, posterior, robust, soft_dpo
from pyrite.losses.dpo_nll import dpo_nll, mpo
from pyrite.losses.dpop import dpop
from pyrite.losses.exo import exo
from pyrite.losses.f_dpo import f_dpo
from pyrite.losses.ipo import ipo
from pyrite.losses.kto import kto_pair
from pyrite.losses.lengths import ld_dpo, ln_dpo, r_dpo
from pyrite.losses.nca import nca
from pyrite.losses.odpo import odpo
from pyrite.losses.orpo import orpo
from pyrite.losses.rebel import rebel
from pyrite.losses.simper import simper
from pyrite.losses.simpo import alphapo, simpo
from pyrite.losses.slic import hinge, slic
from pyrite.losses.sppo import sppo
from pyrite.losses.tdpo import tdpo
from pyrite.losses.wpo import wpo
from pyrite.losses.xpo import xpo

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
