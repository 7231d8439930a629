"""Preference pairs as a policy learns from them: token rows, reference log-probabilities, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.text import Encoded
from pyrite.math import logps as clamps
from pyrite.math import statistics as estimators
from pyrite.math.logps import Logps, PairLogps, Running, update_running
from pyrite.math.losses.needs import needs
from pyrite.models.forward import by_response
from pyrite.models.packing import Packed, Row, micro_batches
from pyrite.models.policy import Policy
from pyrite.models.references import Text, texts_of
from pyrite.training.evaluation import response_logps
from pyrite.training.loop import BatchLoss, Precision

Loss = Callable[[PairLogps], Tensor]
OnCut = Literal["drop", "keep"]


@dataclass(frozen=True)
class Preferences:
    """B pairs for one policy.

    rows: a prompt, then its chosen and its rejected answer; ref: log-probabilities of the 2B answers, chosen and
    rejected alternately, None without a reference; strength (B,): how strongly chosen is preferred, nats.
    """

    rows: list[Row]
    ref: Logps | None = None
    strength: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, pairs: list[int]) -> Preferences:
        """Some of the pairs."""
        strength = None if self.strength is None else self.strength[pairs]
        return Preferences([self.rows[i] for i in pairs], _of_rows(self.ref, pairs), strength)


@dataclass(frozen=True)
class EncodedPairs:
    """B pairs as token ids; their 2B answers, chosen and rejected alternately; what was left out, with the reason."""

    pairs: list[dict[str, Any]]
    texts: list[Text]
    encoded: list[Encoded]
    dropped: list[dict[str, Any]]

    def without(self, reasons: Sequence[str | None]) -> EncodedPairs:
        """The pairs that have no reason (B,) to be dropped."""
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        lost = [{"prompt_id": p["prompt_id"], "reason": r} for p, r in zip(self.pairs, reasons, strict=True) if r]
        answers = _answers(kept)
        texts, encoded = [self.texts[i] for i in answers], [self.encoded[i] for i in answers]
        return EncodedPairs([self.pairs[i] for i in kept], texts, encoded, self.dropped + lost)

    def zeros(self, *, tokens: bool) -> Logps:
        """The reference that gives every answer the same log-probability, 0."""
        flat = [torch.zeros(len(one.response)) for one in self.encoded]
        full = Logps.from_tokens(flat)
        return full if tokens else Logps.from_sums(full.sum, full.length)

    def preferences(self, ref: Logps | None = None) -> Preferences:
        """Rows ready to learn from."""
        both = zip(self.encoded[::2], self.encoded[1::2], strict=True)
        rows = [Row(chosen.prompt, [chosen.response, rejected.response]) for chosen, rejected in both]
        strengths = [pair.get("strength") for pair in self.pairs]
        unknown = any(value is None for value in strengths)
        return Preferences(rows, ref, None if unknown else torch.tensor(strengths, dtype=torch.float32))


def encode_pairs(
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    *,
    max_length: int,
    max_prompt: int | None = None,
    on_cut: OnCut = "drop",
    source: str = "pairs",
) -> EncodedPairs:
    """Token ids of pairs {prompt, chosen, rejected}, without those that cannot teach.

    Dropped are pairs with a response that has no tokens, answers equal after truncation and, by `on_cut`, pairs of
    which truncation cut one answer only (the loss would learn from the end token alone). Limits in tokens; a prompt
    keeps its last three quarters of `max_length` by default. Errors name the pair's place in its file; `source` where
    that is not known.
    """
    texts = texts_of(pairs)
    encoded = text.encode_all(
        tokenizer,
        [one.prompt for one in texts],
        [one.answer for one in texts],
        max_length=max_length,
        max_prompt=max_prompt if max_prompt is not None else max_length * 3 // 4,
        where=lambda i: data.place(pairs[i // 2], f"{source}: pair {i // 2 + 1}"),
    )
    both = zip(encoded[::2], encoded[1::2], strict=True)
    return EncodedPairs(pairs, texts, encoded, []).without([_fault(*sides, on_cut=on_cut) for sides in both])


def batch_loss(
    policy: Policy,
    loss: Loss,
    prefs: Preferences,
    *,
    tokens: bool = False,
    details: bool = False,
    live: Policy | None = None,
    running: Running | None = None,
) -> BatchLoss:
    """What `train.fit` minimizes: the sum of `loss` over some of the pairs, with accuracies and margins to log.

    A loss with bounds inside (f_dpo, alphapo, orpo, beta_dpo) also logs `clamped`, the pairs it holds at one.

    tokens: keep token log-probabilities. details: also what tdpo and wpo read of the whole distribution. live: a
    reference that runs along (one that moves, or whose distribution is needed) instead of `prefs.ref`. running:
    statistics some losses keep over the batches, updated in place while training.
    """

    def of(model: nn.Module, rows: list[Row], indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = policy.pack(rows)
        if details:
            ours = _detailed(model(batch, details=True, ref=live), batch)
        else:
            ours = by_response(model(batch), batch, tokens=tokens)
        if prefs.ref is None and live:
            ref = _live(live, batch, tokens=tokens)
        else:
            ref = _of_rows(prefs.ref, indices, policy.device)
        strength = None if prefs.strength is None else prefs.strength[indices].to(policy.device)
        pair = paired(ours, ref, strength)
        if running is not None:
            pair = replace(pair, running=update_running(running, pair) if model.training else running)
        with clamps.counting() as beyond:
            values = loss(pair)
        held = {"clamped": clamps.pairs(beyond, len(pair))} if beyond else {}
        return values.sum(), {**metrics(pair), **held}

    return of


def paired(ours: Logps, ref: Logps | None, strength: Tensor | None = None) -> PairLogps:
    """2B answers, chosen and rejected alternately, as B pairs."""
    chosen, rejected = (None, None) if ref is None else (_side(ref, 0), _side(ref, 1))
    return PairLogps(_side(ours, 0), _side(ours, 1), chosen, rejected, strength)


def metrics(pair: PairLogps) -> dict[str, Tensor]:
    """Sums over the pairs: how often the policy, and its reward log π/π_ref, rank chosen first (ties ½); margins."""
    chosen, rejected = pair.chosen.sum.detach(), pair.rejected.sum.detach()
    seen = {"logp_chosen": chosen, "logp_rejected": rejected, "policy_accuracy": _wins(chosen, rejected, pair)}
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        chosen, rejected = chosen - pair.ref_chosen.sum, rejected - pair.ref_rejected.sum
        seen |= {"accuracy": _wins(chosen, rejected, pair), "margin": chosen - rejected}
    return {name: value.float().sum() for name, value in seen.items()}


def _wins(chosen: Tensor, rejected: Tensor, pair: PairLogps) -> Tensor:
    """1 where chosen ranks first, ½ where the two are equal, and in a pair of strength 0, in which none is better."""
    wins = estimators.wins(chosen, rejected)
    return wins if pair.strength is None else torch.where(pair.strength == 0, 0.5, wins)


@torch.no_grad()
def measure(
    policy: Policy, loss: BatchLoss, rows: Sequence[Row], *, size: int, budget: int = 16384
) -> dict[str, float]:
    """Means of a batch loss and its metrics over pairs, `size` at a time and in their order."""
    policy.eval()
    sums: dict[str, float] = {}
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        for group in micro_batches(part, budget=budget):
            value, seen = loss(policy, [part[i] for i in group], [begin + i for i in group])
            for name, amount in {"loss": value, **seen}.items():
                sums[name] = sums.get(name, 0.0) + amount.item()
    return {name: total / len(rows) for name, total in sums.items()}


def gaps(policy: Policy, rows: Sequence[Row], precision: Precision) -> Tensor:
    """log π(chosen) − log π(rejected) of each pair, (B,) nats."""
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        chosen, rejected = response_logps(policy, rows).sum.view(-1, 2).unbind(1)
    return chosen - rejected


def value_at_ref(prefs: Preferences, loss: Loss) -> float | None:
    """Mean loss where the policy is the reference, no model run; None for a loss of whole distributions."""
    if prefs.ref is None:
        return None
    at_ref = replace(paired(prefs.ref, prefs.ref, prefs.strength), running=Running.zero())
    return None if needs(loss) & {"kl", "collision"} else loss(at_ref).mean().item()


def _fault(chosen: Encoded, rejected: Encoded, *, on_cut: OnCut) -> str | None:
    if not (chosen.response and rejected.response):
        return "a response has no tokens"
    if chosen.response == rejected.response:
        return "both answers are the same tokens"
    if on_cut == "drop" and chosen.truncated != rejected.truncated:
        return "truncation cut one answer only"
    return None


def _answers(pairs: Sequence[int]) -> list[int]:
    """Indices of both answers of these pairs."""
    return [answer for pair in pairs for answer in (2 * pair, 2 * pair + 1)]


def _side(logps: Logps, at: int) -> Logps:
    return _mapped(logps, lambda value: value[at::2])


def _of_rows(ref: Logps | None, pairs: list[int], device: torch.device | str = "cpu") -> Logps | None:
    index = torch.tensor(_answers(pairs), dtype=torch.long)
    return None if ref is None else _mapped(ref, lambda value: value[index].to(device))


def _mapped(logps: Logps, change: Callable[[Tensor], Tensor]) -> Logps:
    values = {name: change(value) for name, value in vars(logps).items() if isinstance(value, Tensor)}
    return replace(logps, **values)


@torch.no_grad()
def _live(ref: Policy, batch: Packed, *, tokens: bool) -> Logps:
    return by_response(ref(batch), batch, tokens=tokens)


def _detailed(flat: Tensor, batch: Packed) -> Logps:
    """Token log-probabilities with the responses' summed KL(ref || policy) and summed log collision."""
    logps = by_response(flat[0], batch, tokens=True)
    kl, collision = (
        row.new_zeros(batch.n, dtype=torch.float64).index_add(0, batch.owner, row.double()).float() for row in flat[1:]
    )
    return replace(logps, kl=kl, collision=collision)
