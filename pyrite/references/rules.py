"""The rules a reference must keep before a run may use it; each refusal names the rule and the first row.

R1 every answer there, finite, at most 0       R2 same tokenizer: the very ids the trainer reads
R3 another tokenizer: sums of whole texts only R4 answers without tokens teach nothing and are dropped
R5 float32 or better                           R6 random rows, computed again, come out the same
R7 files whole and unchanged                   R8 a reference that moves has no file
R9 the margins are described
R5 and R7 are kept by `tables.load`, R8 by `supply.obtain`, R9 by `tables.margins`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyrite import seeds
from pyrite.models import Policy
from pyrite.references import identity, readings, scoring
from pyrite.references.tables import BadReference, Table, Text, row_id
from pyrite.text import Encoded, plain

POSITIVE = 1e-3  # nats; a sum of float32 log-probabilities may round to slightly above 0
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats a token between two computations of one row

Where = Callable[[int], str]


def same_tokenizer(table: Table, tokenizer: Any) -> bool:
    """Whether a reference was made with this tokenizer, so that its tokens are the trainer's."""
    return not table.imported and table.recipe["tokenizer"] == identity.tokenizer_hash(tokenizer)


def verify(
    table: Table,
    texts: Sequence[Text],
    encoded: Sequence[Encoded] | None = None,
    *,
    tokenizer: Any = None,
    tokens: bool = False,
    own_template: bool = False,
    where: Where | None = None,
) -> list[str | None]:
    """Why each of N texts must be dropped, None for those to keep.

    encoded: the texts as the trainer reads them, with its tokenizer; a reference of that tokenizer must have read the
    same ids (R2), one of another must have scored the same whole text (R3, otherwise the text is dropped).
    Without `tokenizer`, `encoded` is taken to be of the reference's own. tokens: token log-probabilities are needed.
    own_template: prompts may have been read in another chat template (as those of a prior are).
    Raises BadReference, naming the rule and the first row, where the reference cannot be used.
    """
    name = where or (lambda i: f"text {i + 1} ({plain(texts[i].prompt)[:40]!r})")
    rows = _found(table, texts, name)
    reasons: list[str | None] = [None] * len(texts)
    same = not table.imported and (tokenizer is None or same_tokenizer(table, tokenizer))
    _check_tokens(table, same, tokens)
    if encoded is not None:
        prior = not table.imported and table.recipe["conditioning"]["kind"] == "prior"
        exact = same and not own_template
        if not exact:
            cut = (
                [False] * len(texts) if prior or tokenizer is None else readings.cut_prompts(tokenizer, texts, encoded)
            )
            reasons = [_cut(table, *sides, lossless=same) for sides in zip(rows, texts, encoded, cut, strict=True)]
        if same:
            _check_ids(table, rows, encoded, reasons, name, prompts=exact and not prior)
    none = "R4: the answer has no tokens"
    return [none if table.n_resp_tokens[row] == 0 else why for row, why in zip(rows, reasons, strict=True)]


def spot_check(table: Table, policy: Policy, texts: Sequence[Text], *, rows: int = 32, seed: int = 0) -> float:
    """R6: random rows computed again by the scorer; the largest difference, nats.

    Raises BadReference where a row differs by more than 1e-3 · max(1, T) nats over T tokens in float32 (2e-2 in
    bfloat16): another model, template or arithmetic, or a changed file.
    """
    pick = torch.randperm(len(texts), generator=seeds.generator(seed, "spot check"))[:rows].tolist()
    some, numerics, limits = [texts[i] for i in pick], table.recipe["numerics"], table.recipe["truncation"]
    reading = readings.read(
        policy.tokenizer,
        some,
        conditioning=table.recipe["conditioning"]["kind"],
        max_length=limits["max_length"],
        max_prompt=limits["max_prompt"],
    )
    values = scoring.token_logps(policy, reading.encoded, 16384, numerics["compute"])
    coarse = "bfloat16" if "bfloat16" in (numerics["weights"], numerics["compute"]) else "float32"
    worst = 0.0
    for one, name, value in zip(reading.texts, reading.ids, values, strict=True):
        stored, now = float(table.sum_logp[table.places[name]]), float(value.sum(dtype=np.float64))
        allowed = TOLERANCE[coarse] * max(1, len(value))
        if not abs(stored - now) <= allowed:
            raise BadReference(
                f"R6: {table.folder}: the answer {one.response[:40]!r} to {plain(one.prompt)[:40]!r} has {stored:.4f} "
                f"nats there and {now:.4f} now (allowed: {allowed:.3f}); another model, template or precision made it"
            )
        worst = max(worst, abs(stored - now))
    return worst


def _found(table: Table, texts: Sequence[Text], name: Where) -> list[int]:
    """R1: the row of every text."""
    rows = []
    for i, one in enumerate(texts):
        row = table.places.get(row_id(one))
        if row is None:
            raise BadReference(
                f"R1: {table.folder}: {name(i)} is not there; it was made from other data: compute it again"
            )
        value = table.sum_logp[row]
        if not (np.isfinite(value) and value <= POSITIVE):
            fault = "is no log-probability; it must be finite and at most 0"
            raise BadReference(f"R1: {table.folder}: {name(i)} has {value:g}, which {fault}: compute it again")
        rows.append(row)
    return rows


def _check_tokens(table: Table, same: bool, tokens: bool) -> None:
    if tokens and not same:
        raise BadReference(
            f"R3: {table.folder} was made with another tokenizer, so its tokens are not the policy's; "
            "use a loss of summed log-probabilities, such as dpo"
        )
    if tokens and table.token_logp is None:
        raise BadReference(f"R3: {table.folder} holds sums only and the loss reads tokens; compute it with tokens")


def _check_ids(
    table: Table,
    rows: Sequence[int],
    encoded: Sequence[Encoded],
    reasons: Sequence[str | None],
    name: Where,
    *,
    prompts: bool,
) -> None:
    """R2: the ids of every answer that is kept, and of its prompt where that was read in the same way."""
    for i, (row, ours) in enumerate(zip(rows, encoded, strict=True)):
        other = identity.ids_hash(ours.response) != table.resp_ids_sha[row]
        if reasons[i] is None and (other or (prompts and identity.ids_hash(ours.prompt) != table.prompt_ids_sha[row])):
            counts, mine = (table.n_resp_tokens, ours.response) if other else (table.n_prompt_tokens, ours.prompt)
            raise BadReference(
                f"R2: {table.folder}: {'' if other else 'the prompt of '}{name(i)} was read as other tokens "
                f"({counts[row]}) than the policy's ({len(mine)}): another truncation or chat template; compute it "
                "again with the policy's, or name it PATH(own_template=True) if that is meant"
            )


def _cut(table: Table, row: int, one: Text, ours: Encoded, cut: bool, *, lossless: bool) -> str | None:
    """R3: both models must have scored the whole text; row_id already says that it is the same one."""
    if ours.truncated or table.truncated[row]:
        return "R3: truncation cut the answer for the policy or the reference"
    if cut or table.prompt_truncated[row]:
        return "R3: truncation cut the prompt for the policy or the reference"
    if not lossless and table.n_unknown[row]:
        return "R3: the tokenizer of the reference does not know part of the answer"
    if table.resp_utf8_bytes[row] != len(one.response.encode("utf-8", "surrogatepass")):
        return "R3: policy and reference scored other texts"
    return None
