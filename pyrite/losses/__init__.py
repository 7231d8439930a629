"""Direct preference losses: loss(pair: PairLogps, *, options) -> (B,), one value a pair."""

from pyrite.losses.dpo import dpo
from pyrite.losses.ipo import ipo

__all__ = ["dpo", "ipo"]
