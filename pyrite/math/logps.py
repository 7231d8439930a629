"""Log-probabilities of responses and of pairs: what every loss reads, and the bounds that losses put on values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Records --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Logps:
    """Log-probabilities of N responses under one model.

    sum    (N,)   log π(y | x), nats, float32 or better
    length (N,)   tokens
    tokens (N, T) log π(y_t | x, y_<t), 0 off the mask; None if only the sums are known
    mask   (N, T) bool, True at the response's tokens; None together with `tokens`
    kl     (N,)   Σ_t KL(π_ref ‖ π) at the response's positions, nats; None if it was not computed
    collision (N,) Σ_t log Σ_v π(v | x, y_<t)² at the response's positions; None likewise
    aligned       False where the tokenizer is another: sums compare with the policy's, lengths and tokens do not
    """

    sum: Tensor
    length: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    kl: Tensor | None = None
    collision: Tensor | None = None
    aligned: bool = True

    def __post_init__(self) -> None:
        if self.sum.ndim != 1 or self.sum.shape != self.length.shape:
            raise ValueError(
                f"Logps: sum has shape {tuple(self.sum.shape)} and length {tuple(self.length.shape)}; "
                "both must be (N,), one value a response"
            )
        if self.sum.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Logps: sums are {self.sum.dtype}; use float32 or float64 (bfloat16 rounds -345.678 to -346)"
            )
        for name, value in (("kl", self.kl), ("collision", self.collision)):
            if value is not None and value.shape != self.sum.shape:
                raise ValueError(f"Logps: {name} has shape {tuple(value.shape)}, not ({len(self.sum)},)")
        if (self.tokens is None) != (self.mask is None):
            raise ValueError("Logps: tokens and mask come together; build both with Logps.from_tokens")
        if self.tokens is not None and self.mask is not None:
            _check_token_shapes(self.tokens, self.mask, len(self.sum))

    @classmethod
    def from_tokens(cls, rows: Sequence[Tensor]) -> Logps:
        """N responses from their tokens' log-probabilities, one (T_i,) tensor each.

        Sums are accumulated in float64 and returned in the rows' dtype, at least float32.
        Raises ValueError for no rows, a row that is not 1-D and floating, an empty row, or mixed dtypes.

        >>> Logps.from_tokens([torch.tensor([-1.0, -0.5]), torch.tensor([-2.0])]).sum
        tensor([-1.5000, -2.0000])
        """
        _check_rows(rows)
        tokens = pad_sequence(list(rows), batch_first=True)
        length = torch.tensor([len(row) for row in rows], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
        total = tokens.sum(1, dtype=torch.float64)
        return cls(total.to(torch.promote_types(tokens.dtype, torch.float32)), length, tokens, mask)

    @classmethod
    def from_sums(cls, sum: Tensor, length: Tensor, *, aligned: bool = True) -> Logps:
        """N responses known only by log π(y | x), (N,) nats, and their lengths, (N,) tokens of their tokenizer."""
        return cls(sum, length, aligned=aligned)

    @property
    def mean(self) -> Tensor:
        """log π(y | x) / |y|, (N,), nats a token."""
        return self.sum / self.length

    def __len__(self) -> int:
        return len(self.sum)

    def at(self, index: Tensor | slice) -> Logps:
        """Some of the responses."""
        return replace(self, **{name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)})

    def to(self, device: torch.device) -> Logps:
        """The same on a device."""
        return replace(
            self, **{name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        )

    def checked(self, name: str = "log-probabilities") -> Logps:
        """Return these log-probabilities unchanged. Raises ValueError for the first row that cannot be one.

        This reads values, so it waits for the device. Call it when data come in, not in every step.
        """
        good = torch.isfinite(self.sum) & (self.sum <= 1e-3) & (self.length > 0)
        if not good.all():
            row = int((~good).nonzero()[0])
            raise ValueError(
                f"{name}: row {row} has sum {self.sum[row].item():g} over {int(self.length[row])} tokens; "
                "a sum must be finite and at most 0, over at least one token; recompute or drop the row"
            )
        return self


@dataclass(frozen=True, eq=False)
class Running:
    """Statistics over all batches so far that some losses read, 0-dim float64 each. Trainers update and save them.

    ratio: mean over the batches so far of the batch mean of log π/π_ref over both responses, nats;
    margin: exponential average (0.9, from 0) of the batch mean of Δ, nats; count: batches so far.
    """

    ratio: Tensor
    margin: Tensor
    count: Tensor

    @classmethod
    def zero(cls, *, device: torch.device | str = "cpu") -> Running:
        """Before the first batch."""
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))


@dataclass(frozen=True, eq=False)
class PairLogps:
    """B preference pairs under the policy and, if there is one, under the reference.

    strength (B,): how strongly chosen is preferred, a reward difference or log-odds; None if unknown.
    running: statistics over all batches, this one included; None if they are not kept.
    """

    chosen: Logps
    rejected: Logps
    ref_chosen: Logps | None = None
    ref_rejected: Logps | None = None
    strength: Tensor | None = None
    running: Running | None = None

    def __post_init__(self) -> None:
        if (self.ref_chosen is None) != (self.ref_rejected is None):
            missing = "ref_chosen" if self.ref_chosen is None else "ref_rejected"
            raise ValueError(f"PairLogps: {missing} is missing; give both reference sides, or neither")
        sides = {"rejected": self.rejected, "ref_chosen": self.ref_chosen, "ref_rejected": self.ref_rejected}
        for name, side in sides.items():
            if side is not None and len(side) != len(self.chosen):
                raise ValueError(f"PairLogps: {len(self.chosen)} chosen responses but {len(side)} in {name}")
        if self.strength is not None and self.strength.shape != self.chosen.sum.shape:
            raise ValueError(f"PairLogps: strength has shape {tuple(self.strength.shape)}, not ({len(self.chosen)},)")

    def __len__(self) -> int:
        return len(self.chosen)


def _check_rows(rows: Sequence[Tensor]) -> None:
    if not len(rows):
        raise ValueError("Logps.from_tokens: no responses; give one tensor of token log-probabilities each")
    for index, row in enumerate(rows):
        if row.ndim != 1 or not row.is_floating_point():
            raise ValueError(
                f"Logps.from_tokens: response {index} is {row.dtype} of shape {tuple(row.shape)}; "
                "give a 1-D float tensor, one log-probability a token"
            )
        if not len(row):
            raise ValueError(
                f"Logps.from_tokens: response {index} has no tokens, so there is nothing to learn; drop its row"
            )
        if row.dtype != rows[0].dtype:
            raise ValueError(
                f"Logps.from_tokens: response {index} is {row.dtype} and response 0 {rows[0].dtype}; "
                "give all responses in one dtype"
            )


def _check_token_shapes(tokens: Tensor, mask: Tensor, rows: int) -> None:
    if tokens.ndim != 2 or tokens.shape != mask.shape or len(tokens) != rows or mask.dtype != torch.bool:
        raise ValueError(
            f"Logps: tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) "
            f"must both be ({rows}, T), the mask of bools"
        )


# What losses read of a pair ----------------------------------------------------------------------------------------


def references(pair: PairLogps, *, aligned: bool = False) -> tuple[Logps, Logps]:
    """Log-probabilities of the chosen and of the rejected responses under the reference.

    Raises ValueError if the pairs have none or, with `aligned`, if the reference has another tokenizer.
    """
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise ValueError(
            "this loss compares the policy with a reference, and these pairs have none: "
            "fill ref_chosen and ref_rejected of PairLogps, or choose a loss that needs no reference"
        )
    if aligned and not (pair.ref_chosen.aligned and pair.ref_rejected.aligned):
        raise ValueError(
            "this loss reads lengths or tokens of the reference, which another tokenizer counted: "
            "choose a loss of sums, such as dpo, or a reference with the policy's tokenizer"
        )
    return pair.ref_chosen, pair.ref_rejected


def log_ratios(pair: PairLogps, *, length_norm: bool = False) -> tuple[Tensor, Tensor]:
    """u, v = log π(y)/π_ref(y) of the chosen and of the rejected responses, (B,) each, in nats.

    With `length_norm`, each is divided by the response's own length: nats a token.
    Raises ValueError if the pairs have no reference or, with `length_norm`, one with another tokenizer.
    """
    ref_chosen, ref_rejected = references(pair, aligned=length_norm)
    chosen, rejected = pair.chosen.sum - ref_chosen.sum, pair.rejected.sum - ref_rejected.sum
    if length_norm:
        return chosen / pair.chosen.length, rejected / pair.rejected.length
    return chosen, rejected


def margin(pair: PairLogps, *, length_norm: bool = False) -> Tensor:
    """Δ = u − v = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l), (B,), in nats; 0 at policy = reference."""
    chosen, rejected = log_ratios(pair, length_norm=length_norm)
    return chosen - rejected


def strength(pair: PairLogps) -> Tensor:
    """How strongly chosen is preferred, (B,). Raises ValueError if the pairs do not say."""
    if pair.strength is None:
        raise ValueError(
            "this loss reads how strongly chosen is preferred, and these pairs do not say: "
            "fill strength of PairLogps (a strength column of the data), or choose a loss that does not read it"
        )
    return pair.strength


def running(pair: PairLogps) -> Running:
    """Statistics over all batches. Raises ValueError if the pairs have none."""
    if pair.running is None:
        raise ValueError(
            "this loss reads statistics over the batches, and these pairs carry none: "
            "fill running of PairLogps (pyrite.math.logps.update_running), or choose a loss without them"
        )
    return pair.running


# Bounds ---------------------------------------------------------------------------------------------------------------

# Losses bound some values so that they stay finite. A value beyond its bound has no gradient; such pairs are counted.


_beyond: ContextVar[list[Tensor] | None] = ContextVar("beyond", default=None)


def at_most(values: Tensor, bound: float) -> Tensor:
    """min(values, bound); `counting` sees where the bound held."""
    _note(values > bound)
    return values.clamp(max=bound)


def at_least(values: Tensor, bound: float) -> Tensor:
    """max(values, bound); `counting` sees where the bound held."""
    _note(values < bound)
    return values.clamp(min=bound)


@contextmanager
def counting() -> Iterator[list[Tensor]]:
    """Collect, within this block, where each bound inside a loss holds: bool tensors, (B,) or 0-dim."""
    found: list[Tensor] = []
    token = _beyond.set(found)
    try:
        yield found
    finally:
        _beyond.reset(token)


def _note(where: Tensor) -> None:
    found = _beyond.get()
    if found is not None:
        found.append(where.detach())


def pairs(found: list[Tensor], count: int) -> Tensor:
    """How many of B pairs have a value beyond a bound, 0-dim float32."""
    return torch.stack([where.expand(count) for where in found]).any(0).sum().float()


MOMENTUM = 0.9


@torch.no_grad()
def update_running(running: Running, pair: PairLogps) -> Running:
    """Add this batch to the statistics, in place: a checkpoint that holds the tensors stays up to date.

    ratio ← mean over the batches of ½ mean(u + v),   margin ← 0.9 margin + 0.1 mean(u − v),   count ← count + 1

    u, v: log π/π_ref of the chosen and of the rejected responses, nats, without β. Returns the same object. Keep
    it on the device of the log-probabilities, so that no step waits for a copy. Raises ValueError without a reference.

    Jung et al. 2024, arXiv:2404.04656, section 4 (ratio); Wu et al. 2024, arXiv:2407.08639, M₀ (margin).
    """
    chosen, rejected = (ratio.double().mean().to(running.ratio.device) for ratio in log_ratios(pair))
    running.count.add_(1)
    running.ratio.add_(((chosen + rejected) / 2 - running.ratio) / running.count)
    running.margin.mul_(MOMENTUM).add_(chosen - rejected, alpha=1 - MOMENTUM)
    return running


def toy_pairs(*, learning: bool = False) -> PairLogps:
    """Six pairs with every input a loss can read. learning: the policy's log-probabilities require gradients."""
    g = torch.Generator().manual_seed(0)

    def side(lengths: tuple[int, ...], *, learning: bool = False) -> Logps:
        rows = [-torch.rand(n, generator=g, dtype=torch.float64) - 0.1 for n in lengths]
        rows = [row.requires_grad_(learning) for row in rows]
        drawn = torch.rand(2, len(lengths), generator=g, dtype=torch.float64)
        return replace(Logps.from_tokens(rows), kl=drawn[0], collision=-drawn[1])

    first, second = (3, 5, 4, 2, 6, 1), (4, 2, 6, 5, 3, 2)
    running = Running(*torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64))
    policy = side(first, learning=learning), side(second, learning=learning)
    return PairLogps(*policy, side(first), side(second), torch.arange(1, 7).double() / 3, running)
