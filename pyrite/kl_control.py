"""How strongly the KL from the reference is priced in policy optimization: fixed, or led by the KL measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["KLControl", "controlled"]


@dataclass(frozen=True)
class KLControl:
    """How β follows the KL from the reference, nats an answer.

    fixed: not at all. adaptive: slowly, in proportion to the clipped error, `horizon` answers the time it takes.
    target: at once, by factors of 2 outside of target/1.5 .. 1.5 target. Raises ValueError for options out of range.
    """

    beta: float
    kind: Literal["fixed", "adaptive", "target"] = "fixed"
    target: float | None = None
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "adaptive", "target"):
            raise ValueError(f"KLControl: unknown kind {self.kind!r}; choose fixed, adaptive or target")
        if not 0 <= self.beta < math.inf or not self.horizon > 0:
            raise ValueError(f"KLControl: beta = {self.beta}, horizon = {self.horizon}; give beta >= 0, horizon > 0")
        if (self.kind == "fixed") != (self.target is None):
            raise ValueError(f"KLControl: {self.kind}, target = {self.target}; adaptive and target need one, in nats")
        if self.target is not None and not (0 < self.target < math.inf and self.beta > 0):
            raise ValueError(f"KLControl: beta = {self.beta}, target = {self.target}; both must be above 0 to move")


def controlled(control: KLControl, kl: float, *, answers: int) -> KLControl:
    """The control after a batch of `answers` new answers with mean KL(π ‖ π_ref) `kl`, nats an answer.

    adaptive: β ← β (1 + clip(kl/target − 1, ±0.2) · answers/horizon);   target: β ← 2β or β/2

    Once for each drawn batch, not for each epoch over it. Negative estimates count as they are. Raises ValueError for a
    KL that is not finite.

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2 and its code; target: Schulman et al. 2017, arXiv:1707.06347,
    section 4.

    >>> controlled(KLControl(0.1, "adaptive", target=6.0), 9.0, answers=32).beta
    0.100064
    """
    if not math.isfinite(kl):
        raise ValueError(f"controlled: the KL is {kl}; look at the log-probabilities of policy and reference")
    if control.target is None:
        return control
    if control.kind == "adaptive":
        error = min(max(kl / control.target - 1, -0.2), 0.2)
        return replace(control, beta=control.beta * (1 + error * answers / control.horizon))
    factor = 2.0 if kl > 1.5 * control.target else 0.5 if kl < control.target / 1.5 else 1.0
    return replace(control, beta=control.beta * factor)
