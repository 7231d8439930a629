"""Preference pairs as tokens, with reference log-probabilities, and the loss of a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyrite.data import rows, text
from pyrite.data.responses import Responses
from pyrite.math import logps, seeds, statistics
from pyrite.math.logps import Logps, PairLogps, Running, update_running
from pyrite.math.losses.needs import needs
from pyrite.models.forward import Packed, by_response, packed_batches, token_logps
from pyrite.models.loading import Dtype
from pyrite.models.policy import Policy
from pyrite.training.loop import BatchLoss, Training

Loss = Callable[[PairLogps], Tensor]
OnCut = Literal["drop", "keep"]
WHOLE = 1 << 40  # tokens; no batch is larger


@dataclass(frozen=True, eq=False)
class Preferences:
    """B preference pairs, as columns of indices into N responses.

    strength (B,): how strongly chosen is preferred, nats; None if it is not known of all. ref: log-probabilities of
    the N responses, None without a reference. dropped: rows that were left out, with the reason.
    """

    responses: Responses
    chosen: Tensor
    rejected: Tensor
    strength: Tensor | None = None
    ref: Logps | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, responses: Responses, pairs: Tensor, strength: Tensor | None = None) -> Preferences:
        """Pairs (B, 2) of indices, chosen first, with a table of the responses that are in one."""
        places = torch.arange(2 * len(pairs))
        return cls(responses.take(pairs.flatten()), places[::2], places[1::2], strength)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """The row of each pair."""
        return [self.responses.rows[p] for p in self.responses.prompt[self.chosen].tolist()]

    @property
    def groups(self) -> list[list[int]]:
        """Chosen and rejected of each pair, which are packed behind one prompt."""
        return torch.stack([self.chosen, self.rejected], 1).tolist()

    def at(self, pairs: Sequence[int]) -> Preferences:
        """Some of the pairs, of the same table of responses."""
        index = torch.as_tensor(pairs, dtype=torch.int64)
        strength = None if self.strength is None else self.strength[index]
        return replace(self, chosen=self.chosen[index], rejected=self.rejected[index], strength=strength)

    def without(self, reasons: Sequence[str | None]) -> Preferences:
        """The pairs that have no reason (B,) to be dropped."""
        kept = self.at([i for i, reason in enumerate(reasons) if reason is None])
        lost = [{"prompt_id": p["prompt_id"], "reason": r} for p, r in zip(self.pairs, reasons, strict=True) if r]
        made = Preferences.of(self.responses, torch.stack([kept.chosen, kept.rejected], 1), kept.strength)
        answers = torch.stack([kept.chosen, kept.rejected], 1).flatten()
        ref = None if self.ref is None else self.ref.at(answers)
        return replace(made, ref=ref, dropped=self.dropped + lost)

    def batches(self, size: int, *, epochs: int = 1, seed: int = 0) -> Iterator[Preferences]:
        """Batches of `size` pairs, the last of an epoch possibly smaller, in a new order each epoch."""
        for epoch in range(epochs):
            g = seeds.generator(seed, "batches", epoch)
            for some in torch.randperm(len(self), generator=g).split(size):
                yield self.at(some.tolist())

    def zeros(self, *, tokens: bool) -> Logps:
        """The reference that gives every response the same log-probability, 0."""
        full = Logps.from_tokens(self.responses.split(torch.zeros(len(self.responses.ids))))
        return full if tokens else Logps.from_sums(full.sum, full.length)


def paired_texts(pairs: Sequence[dict[str, Any]]) -> Responses:
    """Chosen and rejected of each pair {prompt, chosen, rejected}, in turn."""
    texts = [rows.answer(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    return Responses.said(pairs, texts, prompt=torch.arange(len(pairs)).repeat_interleave(2))


def in_pairs(responses: Responses) -> list[list[int]]:
    """The groups of pairs whose chosen and rejected response follow each other."""
    return torch.arange(len(responses)).view(-1, 2).tolist()


def encode_pairs(
    tokenizer: Any,
    pairs: Sequence[dict[str, Any]],
    *,
    max_length: int,
    max_prompt: int | None = None,
    on_cut: OnCut = "drop",
    source: str = "pairs",
) -> Preferences:
    """Token ids of pairs {prompt, chosen, rejected}, without those that cannot teach.

    Dropped are pairs with a response that has no tokens, answers equal after truncation and, by `on_cut`, pairs of
    which truncation cut one answer only (the loss would learn from the end token alone). Limits in tokens; a prompt
    keeps its last three quarters of `max_length` by default. Errors name the pair's place in its file; `source` where
    that is not known.
    """
    read = text.encode(
        tokenizer,
        paired_texts(pairs),
        max_length=max_length,
        max_prompt=max_prompt if max_prompt is not None else max_length * 3 // 4,
        where=lambda i: rows.place(pairs[i // 2], f"{source}: pair {i // 2 + 1}"),
    )
    strengths = [pair.get("strength") for pair in pairs]
    strength = None if any(value is None for value in strengths) else torch.tensor(strengths, dtype=torch.float32)
    chosen, rejected = torch.arange(len(read)).view(-1, 2).unbind(1)
    return Preferences(read, chosen, rejected, strength).without(_faults(read, on_cut=on_cut))


def preferences(
    policy: Policy, pairs: Sequence[dict[str, Any]], *, ref: Policy | None = None, max_length: int | None = None
) -> Preferences:
    """Pairs {prompt, chosen, rejected} as tokens of a policy, with log-probabilities under a reference if there is one.

    ref: a policy with the same tokenizer; `policy` itself is the reference as it is now. max_length: longest prompt +
    response in tokens, the model's context by default. Pairs that cannot teach are left out; `dropped` says why.
    """
    made = encode_pairs(policy.tokenizer, pairs, max_length=max_length or policy.context)
    return made if ref is None else replace(made, ref=token_logps(ref, made.responses, made.groups))


def pair_logps(policy: Policy, prefs: Preferences) -> PairLogps:
    """Log-probabilities of pairs under the policy, token by token and with gradients, beside those of the reference."""
    batch = policy.pack(prefs.responses, prefs.groups)
    ours = by_response(policy(batch), batch, tokens=True)
    strength = None if prefs.strength is None else prefs.strength.to(policy.device)
    return PairLogps(*_sides(ours), *_ref_sides(prefs, policy.device), strength)


def batch_loss(
    policy: Policy,
    loss: Loss,
    prefs: Preferences,
    *,
    wanted: frozenset[str] = frozenset(),
    live: Policy | None = None,
    running: Running | None = None,
) -> BatchLoss:
    """What `loop.fit` minimizes: the sum of `loss` over some of the pairs, with accuracies and margins to log.

    A loss with bounds inside (f_dpo, alphapo, orpo, beta_dpo) also logs `clamped`, the pairs it holds at one.

    wanted: what the loss needs (`losses.needs`): log-probabilities token by token, or what tdpo and wpo read of the
    whole distribution. live: a reference that runs along (one that moves, or whose distribution is needed) instead of
    `prefs.ref`. running: statistics some losses keep over the batches, updated in place while training.
    """
    tokens, details = bool(wanted & {"tokens", "ref_tokens"}), bool(wanted & {"kl", "collision"})

    def of(model: nn.Module, batch: Packed, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        if details:
            ours = _detailed(model(batch, details=True, ref=live), batch)
        else:
            ours = by_response(model(batch), batch, tokens=tokens)
        if prefs.ref is None and live:
            with torch.no_grad():
                ref = _sides(by_response(live(batch), batch, tokens=tokens))
        else:
            ref = _ref_sides(prefs.at(indices), policy.device)
        strength = None if prefs.strength is None else prefs.strength[indices].to(policy.device)
        pair = PairLogps(*_sides(ours), *ref, strength)
        if running is not None:
            pair = replace(pair, running=update_running(running, pair) if model.training else running)
        with logps.counting() as beyond:
            values = loss(pair)
        held = {"clamped": logps.pairs(beyond, len(pair))} if beyond else {}
        return values.sum(), {**metrics(pair), **held}

    return of


def pair_loss(
    loss: Callable[..., Tensor], model: nn.Module, batch: Packed, _: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a reward model over pairs of a chosen and a rejected answer, with accuracy and margin."""
    chosen, rejected = model(batch).view(-1, 2).unbind(1)
    return loss(chosen, rejected).sum(), {
        "accuracy": statistics.wins(chosen.detach(), rejected.detach()).sum().float(),
        "margin": (chosen - rejected).sum(),
    }


def whole_batches(training: Training, wanted: frozenset[str]) -> Training:
    """How a loss that needs `wanted` is trained: one that compares the pairs of a batch reads the batch at once."""
    return replace(training, micro_batch_tokens=WHOLE) if wanted & {"batch", "running"} else training


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
    wins = statistics.wins(chosen, rejected)
    return wins if pair.strength is None else torch.where(pair.strength == 0, 0.5, wins)


@torch.no_grad()
def measure(policy: Policy, loss: BatchLoss, prefs: Preferences, *, size: int, budget: int = 16384) -> dict[str, float]:
    """Means of a batch loss and its metrics over pairs, `size` at a time and in their order."""
    policy.eval()
    sums: dict[str, float] = {}
    groups = prefs.groups
    for begin in range(0, len(groups), size):
        part = groups[begin : begin + size]
        for indices, batch in packed_batches(policy, prefs.responses, part, budget=budget):
            value, seen = loss(policy, batch, [begin + i for i in indices])
            for name, amount in {"loss": value, **seen}.items():
                sums[name] = sums.get(name, 0.0) + amount.item()
    return {name: total / len(groups) for name, total in sums.items()}


def gaps(policy: Policy, prefs: Preferences, precision: Dtype) -> Tensor:
    """log π(chosen) − log π(rejected) of each pair, (B,) nats."""
    some = prefs.without([None] * len(prefs))
    with policy.reading(precision):
        chosen, rejected = token_logps(policy, some.responses, some.groups).sum.view(-1, 2).unbind(1)
    return chosen - rejected


def value_at_ref(prefs: Preferences, loss: Loss) -> float | None:
    """Mean loss if the policy were the reference, without running a model; None for a loss of whole distributions."""
    chosen, rejected = _ref_sides(prefs)
    if chosen is None or rejected is None or needs(loss) & {"kl", "collision"}:
        return None
    return loss(PairLogps(chosen, rejected, chosen, rejected, prefs.strength, Running.zero())).mean().item()


def _faults(read: Responses, *, on_cut: OnCut) -> list[str | None]:
    """Why each pair cannot teach, None for those that can; chosen and rejected in turn."""
    assert read.truncated is not None  # they have been encoded
    cut, said = read.truncated.tolist(), read.tokens()

    def fault(i: int) -> str | None:
        if not (said[i] and said[i + 1]):
            return "a response has no tokens"
        if said[i] == said[i + 1]:
            return "both answers are the same tokens"
        return "truncation cut one answer only" if on_cut == "drop" and cut[i] != cut[i + 1] else None

    return [fault(i) for i in range(0, len(read), 2)]


def _sides(logps: Logps) -> tuple[Logps, Logps]:
    """Chosen and rejected of pairs, which a batch holds in turn."""
    return logps.at(slice(0, None, 2)), logps.at(slice(1, None, 2))


def _ref_sides(prefs: Preferences, device: torch.device | None = None) -> tuple[Logps, Logps] | tuple[None, None]:
    """Log-probabilities of chosen and rejected under the stored reference."""
    if prefs.ref is None:
        return None, None
    sides = prefs.ref.at(prefs.chosen), prefs.ref.at(prefs.rejected)
    return sides if device is None else (sides[0].to(device), sides[1].to(device))


def _detailed(flat: Tensor, batch: Packed) -> Logps:
    """Token log-probabilities with the responses' summed KL(ref || policy) and summed log collision."""
    logps = by_response(flat[0], batch, tokens=True)
    kl, collision = (
        row.new_zeros(batch.n, dtype=torch.float64).index_add(0, batch.owner, row.double()).float() for row in flat[1:]
    )
    return replace(logps, kl=kl, collision=collision)
