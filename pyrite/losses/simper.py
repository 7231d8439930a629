"""Simple alignment with perplexity."""

from __future__ import annotations

from torch import Tensor

from pyrite.logps import PairLogps

__all__ = ["simper"]


def simper(pair: PairLogps) -> Tensor:
    """Simple alignment with perplexity: no reference and no hyperparameter.

    loss = e^{b̄} − e^{ā},   ā = log π(y_w)/|y_w|,   b̄ = log π(y_l)/|y_l|

    PairLogps of B pairs -> (B,), in (−1, 1); what the policy makes of the pair, whatever the reference. e^{ā} is
    one over the response's perplexity.

    Xiao et al. 2025, arXiv:2502.00883.
    """
    return pair.rejected.mean.exp() - pair.chosen.mean.exp()
