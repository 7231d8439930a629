"""A pair of answers and the verdict on it: in which order they are shown, and what two orders say together."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pyrite import seeds
from pyrite.judges.verdicts import PREFERENCES, WINS, Label, other
from pyrite.sources import Row
from pyrite.text import plain

Shown = Literal["ab", "ba"]  # which answer came first
SHOWN: tuple[Shown, Shown] = ("ab", "ba")
Order = Literal["ab", "ba", "both", "equal"]


class Said(NamedTuple):
    """What a judge said of two answers as they were shown: the label, P(first beats second)."""

    label: Label
    p: float


class Verdict(NamedTuple):
    """What came of a pair: P(a beats b), NaN without a verdict; the label, seen from a; P(a beats b) by the order in
    which the answers were shown, None where that order was not asked or gave no verdict; the judge's texts."""

    p: float
    label: Label | None
    order: Order
    p_ab: float | None = None
    p_ba: float | None = None
    raw: tuple[str, ...] = ()

    @property
    def preference(self) -> int | None:
        """1: a is better, 2: b is better, 0: a tie; None without a verdict."""
        return None if self.label is None else PREFERENCES[self.label]


EQUAL = Verdict(WINS["TIE"], "TIE", "equal")


def combined(said: Mapping[Shown, Said | None], *, raw: tuple[str, ...] = (), mean: bool = False) -> Verdict:
    """The verdict of one order or of both: what they agree on, else a tie, and none where one of them has none.

    mean: P(a beats b) is the mean of both orders' also where their labels differ; for probabilities.

    >>> combined({"ab": Said("A", 1.0), "ba": Said("A", 1.0)}).preference
    0
    """
    order: Order = "both" if len(said) == 2 else next(iter(said))
    seen = {shown: _from_a(one, shown) for shown, one in said.items() if one is not None}
    p_ab, p_ba = (seen[shown].p if shown in seen else None for shown in SHOWN)
    if len(seen) < len(said):
        return Verdict(math.nan, None, order, p_ab, p_ba, raw)
    first, *rest = seen.values()
    agree = all(one.label == first.label for one in rest)
    p = sum(one.p for one in seen.values()) / len(seen)
    label: Label = first.label if agree else "TIE"
    return Verdict(p if agree or mean else WINS["TIE"], label, order, p_ab, p_ba, raw)


def request(row: Row) -> str:
    """What a judge reads as the prompt of a row: the raw one, where preferences were written into the prompt."""
    return plain(row.get("asked") or row["prompt"])


def pair_id(prompt: Any, a: str, b: str) -> str:
    """Id of a pair, from its texts alone, whichever answer is called a; a spreadsheet takes it for no number."""
    texts = [plain(prompt), *sorted((a, b))]
    return f"p{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:15]}"


def shown(prompt: str, a: str, b: str, *, seed: int) -> Shown:
    """The order in which a pair is shown once: a coin of the seed and the texts, the same for (a, b) and (b, a)."""
    low, high = sorted((a, b))
    low_first = seeds.derive(seed, "shown first", prompt, low, high) % 2 == 0
    return "ab" if low_first == (a == low) else "ba"


def verdict_row(row: Row, verdict: Verdict, *, criterion: str, model: str) -> Row:
    """A row of verdicts.parquet: the row {prompt, a, b, ...} it is about, and the verdict."""
    named = {"pair_id": pair_id(row["prompt"], row["a"], row["b"]), "criterion": criterion, "model": model}
    p = None if math.isnan(verdict.p) else verdict.p
    found = {"preference": verdict.preference, "p": p, "order": verdict.order}
    return {**row, **named, **found, "p_ab": verdict.p_ab, "p_ba": verdict.p_ba, "raw": list(verdict.raw)}


def _from_a(said: Said, shown: Shown) -> Said:
    return said if shown == "ab" else Said(other(said.label), 1 - said.p)
