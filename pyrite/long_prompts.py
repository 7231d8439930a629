"""Prompts longer than a job can take: cut, left out, or an error; always counted, and named by file and line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyrite import data, text
from pyrite.sources import DataError, Row

__all__ = ["Fitted", "OnLong", "fit", "room"]

OnLong = Literal["truncate", "drop", "error"]
NAMED = 3  # prompts that a message names


@dataclass(frozen=True)
class Fitted:
    """Rows whose prompts fit, the token ids of those prompts, how many were cut, and what was left out and why."""

    rows: list[Row]
    ids: list[list[int]]
    cut: int
    dropped: list[dict[str, Any]]

    def counts(self) -> dict[str, int]:
        """For the results of a job; empty if every prompt fitted."""
        found = {"prompts_cut": self.cut, "prompts_dropped": len(self.dropped)}
        return {name: count for name, count in found.items() if count}


def room(context: int, new: int, max_prompt: int | None) -> int:
    """Longest prompt in tokens where `new` tokens are drawn behind it. Raises ValueError if options leave no room."""
    most = context - new
    if most < 1:
        raise ValueError(
            f"--max-new-tokens {new}: the model reads {context} tokens at most, prompt and answer together"
        )
    if max_prompt is not None and max_prompt > most:
        raise ValueError(
            f"--max-prompt {max_prompt}: the model reads {context} tokens at most, and --max-new-tokens takes {new}; "
            f"give at most {most}"
        )
    return most if max_prompt is None else max_prompt


def fit(
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    most: int,
    context: int,
    on_long: OnLong | None,
    note: Callable[[str], object],
) -> Fitted:
    """The rows with prompts of at most `most` tokens, in a model that reads `context`.

    A longer prompt is cut (it keeps its end, and what the chat template writes around it), its row is left out, or it
    is an error. Without on_long it is cut, but if all prompts are too long, an option is wrong and not the data: that
    is an error. Raises DataError for these, and if no prompt is left, ValueError if `most` leaves no room at all.
    """
    if most >= context:
        raise ValueError(
            f"--max-prompt {most}: leaves no room for an answer in the {context} tokens that are read; give at most "
            f"{context - 1}, or raise --max-length"
        )
    ids = text.encode_prompts(tokenizer, [row["prompt"] for row in rows], where=lambda i: data.place(rows[i]))
    long = [i for i, one in enumerate(ids) if len(one) > most]
    if not long:
        return Fitted(list(rows), ids, 0, [])
    places = ", ".join(f"{data.place(rows[i])} ({len(ids[i])} tokens)" for i in long[:NAMED])
    named = f"{places}{', ...' if len(long) > NAMED else ''}"
    counted = f"{len(long)} of {len(rows)} prompts have more than {most} tokens"
    if on_long == "error" or (on_long is None and len(long) == len(rows)):
        length = len(ids[long[0]])
        raise DataError(
            f"{data.place(rows[long[0]])}: the prompt has {length} tokens and leaves no room for an answer in a "
            f"context of {context}: {counted}; --on-long truncate cuts them, drop leaves them out"
        )
    if on_long == "drop":
        note(f"{counted} and are left out: {named}")
        kept = [i for i in range(len(rows)) if len(ids[i]) <= most]
        if not kept:
            raise DataError(f"{data.place(rows[0])}: no prompt is left: {counted}; raise --max-prompt, or cut them")
        lost = [_lost(rows[i], len(ids[i]), most) for i in long]
        return Fitted([rows[i] for i in kept], [ids[i] for i in kept], 0, lost)
    note(f"{counted} and are cut, keeping their ends: {named}")
    short = text.encode_prompts(
        tokenizer, [rows[i]["prompt"] for i in long], max_prompt=most, where=lambda k: data.place(rows[long[k]])
    )
    for i, one in zip(long, short, strict=True):
        ids[i] = one
    return Fitted(list(rows), ids, len(long), [])


def _lost(row: Row, length: int, most: int) -> dict[str, Any]:
    reason = f"the prompt has {length} tokens, more than {most}"
    return {"prompt_id": row["prompt_id"], "place": data.place(row), "reason": reason}
