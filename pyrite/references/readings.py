"""Texts as one model reads them: its own tokens, its own chat template, its own limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pyrite import text
from pyrite.references import identity, tables
from pyrite.references.identity import Conditioning
from pyrite.references.tables import Text, row_id
from pyrite.text import Encoded


@dataclass(frozen=True)
class Reading:
    """N distinct texts as a scorer reads them, and the part of the recipe that says how.

    cut: whether its prompt lost its beginning; where: its name in an error; unknown: the id that stands for text the
    tokenizer does not know, None where there is none.
    """

    texts: list[Text]
    ids: list[str]
    encoded: list[Encoded]
    cut: list[bool]
    where: list[str]
    unknown: int | None
    recipe: dict[str, Any]

    @cached_property
    def hashes(self) -> list[tuple[str, str]]:
        """Of the prompt and answer ids of each text."""
        return [(identity.ids_hash(one.prompt), identity.ids_hash(one.response)) for one in self.encoded]

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is scored, whatever its order: the texts, and the ids they became."""
        rows = sorted(zip(self.ids, self.hashes, strict=True))
        return {"rows": len(rows), "sha256": tables.digest([row for row, _ in rows]), "ids": tables.digest(rows)}


def limits(context: int, max_length: int | None, max_prompt: int | None) -> tuple[int, int]:
    """Longest text and longest prompt in tokens; by default, as in training, the context and three quarters of it."""
    whole = context if max_length is None else max_length
    return whole, whole * 3 // 4 if max_prompt is None else max_prompt


def read(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    conditioning: Conditioning,
    max_length: int,
    max_prompt: int,
    where: Callable[[int], str] | None = None,
    encoded: Sequence[Encoded] | None = None,
) -> Reading:
    """Texts as ids, each distinct one once, answers to one prompt side by side.

    encoded: the texts with their prompts as this tokenizer and these limits give them, where that was done before.
    Raises ValueError naming `where(text)` for a text that leaves no room.
    """
    recipe = identity.reading(tokenizer, conditioning=conditioning, max_length=max_length, max_prompt=max_prompt)
    first = _distinct(texts)
    some, names = [texts[i] for i in first.values()], [(where or _place)(i) for i in first.values()]
    known = None if encoded is None else [encoded[i] for i in first.values()]
    made = known or _encoded(tokenizer, some, names, max_length=max_length, max_prompt=max_prompt)
    if conditioning == "prior":
        made, cut = _without_prompts(tokenizer, made, max_prompt=max_prompt), [False] * len(some)
    else:
        cut = cut_prompts(tokenizer, some, made)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != text.end_id(tokenizer) else None
    return Reading(some, list(first), made, cut, names, unknown, recipe)


def cut_prompts(tokenizer: Any, texts: Sequence[Text], encoded: Sequence[Encoded]) -> list[bool]:
    """Whether each prompt lost its beginning to a limit."""
    whole = text.encode_prompts(tokenizer, [one.prompt for one in texts])
    return [len(one.prompt) < len(ids) for one, ids in zip(encoded, whole, strict=True)]


def _distinct(texts: Sequence[Text]) -> dict[str, int]:
    """First place of each distinct text by its id, answers to one prompt side by side."""
    first: dict[str, int] = {}
    asked: dict[str, int] = {}
    for i, one in enumerate(texts):
        first.setdefault(row_id(one), i)
        asked.setdefault(repr(one.prompt), i)
    return dict(sorted(first.items(), key=lambda item: asked[repr(texts[item[1]].prompt)]))


def _encoded(
    tokenizer: Any, texts: Sequence[Text], names: Sequence[str], *, max_length: int, max_prompt: int
) -> list[Encoded]:
    return text.encode_all(
        tokenizer,
        [one.prompt for one in texts],
        [one.answer for one in texts],
        finished=[one.finished for one in texts],
        max_length=max_length,
        max_prompt=max_prompt,
        where=names.__getitem__,
    )


def _without_prompts(tokenizer: Any, encoded: Sequence[Encoded], *, max_prompt: int) -> list[Encoded]:
    """The same tokens of the answers, cut where they were with their prompts, after what a prior begins with."""
    _, opening = identity.prior_prompt(tokenizer)
    if len(opening) > max_prompt:
        raise ValueError(f"max_prompt {max_prompt} leaves no room for the {len(opening)} tokens a prior begins with")
    return [replace(one, prompt=opening) for one in encoded]


def _place(i: int) -> str:
    return f"text {i + 1}"
