"""Give a trainer its reference: computed or found, checked, and mixed.

log π_ref(y | x) = Σ_k weight_k · log π_k(y | x)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyrite.loading import Dtype
from pyrite.logps import Logps
from pyrite.models import Policy
from pyrite.progress import say
from pyrite.references import identity, imports, readings, rules, tables
from pyrite.references.cache import Trainer, model_table, place
from pyrite.references.sources import Source
from pyrite.references.tables import BadReference, Table, Text, row_id
from pyrite.text import Encoded

COLUMNS = (imports.NAMES, ("ref_chosen_logps", "ref_rejected_logps"))  # RefDPO's, TRL's


@dataclass(frozen=True)
class Piece:
    """One source's log-probabilities of N texts: sums (N,) float64, tokens by text where they are the trainer's."""

    sums: np.ndarray
    tokens: list[np.ndarray] | None
    aligned: bool
    reasons: list[str | None]
    notes: list[str]


def obtain(
    sources: Sequence[Source],
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    *,
    policy: Policy,
    policy_path: str,
    cache: Path,
    tokens: bool = False,
    max_length: int | None = None,
    max_prompt: int | None = None,
    columns: Sequence[dict[str, Any]] | None = None,
    precision: Dtype = "float32",
    budget: int = 16384,
) -> tuple[Logps | None, list[str | None], list[str]]:
    """Log-probabilities of 2B texts under a reference; why each of B pairs must be dropped, or None; notes.

    texts: chosen and rejected alternately, `encoded` as the trainer reads them, by the policy's tokenizer and these
    limits. The policy must be as it was before training. A model is scored once, into cache/<fingerprint>, and found
    there by every later run with the same scorer, data and reading, whatever its loss, beta and seed. columns: the
    rows of the pairs, for the source "column". tokens: token log-probabilities are needed. The result is None for
    "none"; it is not `aligned` where a part of it is known by sums alone. What it returns for pairs that must be
    dropped means nothing.

    Raises BadReference, naming the rule, for a reference that cannot be used, also (R8) for "ema", which has none.
    """
    if any(source.kind == "none" for source in sources):
        return None, [None] * (len(texts) // 2), []
    if any(source.kind == "ema" for source in sources):
        raise BadReference("R8: a reference that moves with the policy has no stored log-probabilities; run it along")
    if len(texts) != len(encoded) or not texts or len(texts) % 2:
        raise ValueError(f"{len(texts)} texts and {len(encoded)} encodings; give chosen and rejected of every pair")
    limits = readings.limits(policy.context, max_length, max_prompt)
    trainer = Trainer(
        policy, policy_path, limits, tokens=tokens, precision=precision, cache=cache, budget=budget, rows=columns
    )
    pieces = [_piece(source, texts, encoded, trainer, columns) for source in sources]
    weights = [source.weight for source in sources]
    reasons = [next((piece.reasons[i] for piece in pieces if piece.reasons[i]), None) for i in range(len(texts))]
    dropped = [chosen or rejected for chosen, rejected in zip(reasons[::2], reasons[1::2], strict=True)]
    logps = _mixed(pieces, weights, encoded, tokens=tokens)
    notes = [note for piece in pieces for note in piece.notes]
    if not math.isclose(sum(weights), 1):
        notes.append(f"the weights of the reference add up to {sum(weights):g}, not 1: it is no distribution")
    return logps, dropped, [*notes, describe(logps, dropped)]


def describe(logps: Logps, dropped: Sequence[str | None]) -> str:
    """R9: the margins of the pairs that are kept, in a line."""
    kept = torch.tensor([reason is None for reason in dropped]).repeat_interleave(2)
    if not kept.any():
        return "reference margins: no pair is left"
    seen = tables.margins(logps.sum[kept].double().numpy())
    quantiles = ", ".join(f"{seen[name]:.3g}" for name in ("q05", "q25", "q50", "q75", "q95"))
    spread = f"mean {seen['mean']:.4g}, sd {seen['sd']:.4g} nats, quantiles 5 25 50 75 95 %: {quantiles}"
    return f"reference margins: {spread}; it ranks chosen first in {seen['accuracy']:.1%} of the pairs"


def _piece(
    source: Source,
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    trainer: Trainer,
    columns: Sequence[dict[str, Any]] | None,
) -> Piece:
    if source.kind == "column":
        return _column(source, texts, encoded, columns, tokens=trainer.tokens)
    if source.kind == "table":
        table, own = _given(source, texts, trainer), bool(source.options.get("own_template"))
    else:
        table, own = model_table(source, texts, trainer, encoded=encoded)
    tokenizer = trainer.policy.tokenizer
    reasons = rules.verify(
        table, texts, encoded, tokenizer=tokenizer, tokens=trainer.tokens, own_template=own, where=place(texts, columns)
    )
    rows = [table.places[row_id(one)] for one in texts]
    aligned = rules.same_tokenizer(table, tokenizer)
    values = None
    if trainer.tokens:  # a text that is dropped may have been cut elsewhere: its tokens are not compared
        found = [table.tokens(row) for row in rows]
        lengths = [len(one.response) for one in encoded]
        values = [v if len(v) == n else np.zeros(n, np.float32) for v, n in zip(found, lengths, strict=True)]
    return Piece(table.sum_logp[rows], values, aligned, reasons, _remarks(source, table, trainer, aligned=aligned))


def _column(
    source: Source,
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    columns: Sequence[dict[str, Any]] | None,
    *,
    tokens: bool,
) -> Piece:
    """Log-probabilities the user's data bring along: sums, of unknown tokens."""
    if tokens:
        raise BadReference("R3: a column holds sums only and the loss reads tokens; use a loss of sums, such as dpo")
    if not columns:
        raise ValueError('ref "column" reads the log-probabilities from the pairs; give their rows')
    given = [(source.options.get("chosen", c), source.options.get("rejected", r)) for c, r in COLUMNS]
    names = next((pair for pair in given if all(name in columns[0] for name in pair)), given[0])
    sums = np.empty(len(texts))
    for i, (row, name) in enumerate((row, name) for row in columns for name in names):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadReference(
                f"R1: column {name!r} of {place(texts, columns)(i)} holds {value!r:.40}; a number is needed"
            )
        if not (math.isfinite(value) and value <= rules.POSITIVE):
            fault = "which is no log-probability: it must be finite and at most 0"
            raise BadReference(f"R1: column {name!r} of {place(texts, columns)(i)} holds {value}, {fault}")
        sums[i] = value
    cut = "R3: truncation cut the answer for the policy"
    return Piece(sums, None, False, [cut if one.truncated else None for one in encoded], [])


def _given(source: Source, texts: Sequence[Text], trainer: Trainer) -> Table:
    """A finished reference the user names; one that claims to be of this very policy is computed again in part (R6)."""
    table = tables.load(str(source.path), tokens=trainer.tokens)
    say(f"reference: reused {table.folder}, {len(table)} rows, no model needed")
    if not table.imported and table.recipe["weights"] == identity.weights_hash(trainer.policy.model):
        made = table.recipe["numerics"]["compute"]
        if made != trainer.precision:
            raise BadReference(
                f"R6: {table.folder} holds this policy's log-probabilities in {made}, and the policy is read in "
                f"{trainer.precision}, so margins would not begin at 0: use --ref self, or compute the reference again "
                f"with --precision {trainer.precision}"
            )
        known = [one for one in texts if row_id(one) in table.places]
        worst = rules.spot_check(table, trainer.policy, known)
        say(f"reference: {min(32, len(known))} rows computed again, they differ by {worst:.2g} nats at most (R6)")
    return table


def _mixed(pieces: Sequence[Piece], weights: Sequence[float], encoded: Sequence[Encoded], *, tokens: bool) -> Logps:
    """The weighted sum of the pieces, float32 as the policy's own."""
    total = sum(weight * piece.sums for weight, piece in zip(weights, pieces, strict=True))
    length = torch.tensor([len(one.response) for one in encoded])
    if not tokens:
        aligned = all(piece.aligned for piece in pieces)
        return Logps.from_sums(torch.as_tensor(total).float(), length, aligned=aligned)
    by_text = zip(*(piece.tokens or [] for piece in pieces), strict=True)
    summed = (sum(weight * row for weight, row in zip(weights, rows, strict=True)) for rows in by_text)
    return Logps.from_tokens([torch.as_tensor(row, dtype=torch.float32) for row in summed])


def _remarks(source: Source, table: Table, trainer: Trainer, *, aligned: bool) -> list[str]:
    """What a user should know about one source."""
    remarks, conditioning = [], {} if table.imported else table.recipe["conditioning"]
    if table.imported:
        remarks.append(f"{source} was imported: what was read is not known, only that its sums belong to these texts")
    elif not aligned:
        remarks.append(f"{source} has another tokenizer: sums are compared, on answers that both read whole")
    elif table.recipe["template"]["sha256"] != identity.template_hash(trainer.policy.tokenizer):
        remarks.append(f"{source} reads prompts in its own chat template, which is not the policy's")
    if conditioning.get("kind") == "prior":
        remarks.append(f"{source} scores answers without their prompts, after {conditioning['header']!r}")
    return remarks
