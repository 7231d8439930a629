"""Texts to token ids as they stand in a longer text: no space is added before them, none is lost on the way back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MARK = "▁"  # how sentencepiece writes a space


def to_ids(
    tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool = False, inside: bool = False
) -> list[list[int]]:
    """Ids of N texts in one tokenizer call, without start and end tokens.

    split_special_tokens: special tokens spelled out in a text are ordinary text. inside: the texts go on from others,
    so a tokenizer that writes a space before every text does not.
    """
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    with _inside(tokenizer) if inside else _as_it_is():
        return tokenizer(list(texts), **options)["input_ids"]


def to_texts(tokenizer: Any, rows: Sequence[Sequence[int]], *, inside: bool = False) -> list[str]:
    """Texts of N rows of ids, special tokens left out: the way back from `to_ids`.

    inside: the rows go on from others, so the space that a sentencepiece token begins with is a part of its text.
    """
    ids = [[int(token) for token in row] for row in rows]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not inside:
        return texts
    special = set(tokenizer.all_special_ids)
    return [_spaces(tokenizer, row, special, text) for row, text in zip(ids, texts, strict=True)]


def adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a space before a text that has none."""
    return _edited(tokenizer) is not None


def _spaces(tokenizer: Any, row: Sequence[int], special: set[int], text: str) -> str:
    """The text with all the spaces that its first tokens stand for."""
    count = 0
    for token in row:
        if token in special:
            continue
        piece = str(tokenizer.convert_ids_to_tokens(token))
        rest = piece.lstrip(MARK)
        count += len(piece) - len(rest)
        if rest:
            break
    return " " * count + text.lstrip(" ") if count else text


@contextmanager
def _inside(tokenizer: Any) -> Iterator[None]:
    """Within this block the tokenizer writes no space of its own before a text."""
    edited = _edited(tokenizer)
    if edited is None:
        yield
        return
    backend = tokenizer.backend_tokenizer
    before = {name: getattr(backend, name) for name in edited}
    try:
        for name, part in edited.items():
            setattr(backend, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(backend, name, part)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _edited(tokenizer: Any) -> dict[str, Any] | None:
    """Normalizer and pre-tokenizer that add no space, those that differ; None where none does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = {}
    for name in ("normalizer", "pre_tokenizer"):
        part = getattr(backend, name, None)
        state = json.loads(part.__getstate__()) if part is not None else None
        bare = _bare(state)
        if bare != state:
            found[name] = _made(name, bare)
    return found or None


def _bare(state: Any) -> Any:
    """The settings of a normalizer or pre-tokenizer without what adds a space."""
    if isinstance(state, dict):
        changed = {key: _bare(value) for key, value in state.items()}
        if state.get("type") == "Metaspace":
            changed["prepend_scheme"] = "never"
        if state.get("type") == "ByteLevel":
            changed["add_prefix_space"] = False
        return {"type": "Sequence", "normalizers": []} if state.get("type") == "Prepend" else changed
    return [_bare(value) for value in state] if isinstance(state, list) else state


def _made(name: str, state: Any) -> Any:
    """A normalizer or pre-tokenizer from its settings."""
    from tokenizers import normalizers, pre_tokenizers

    made: Any = normalizers.Sequence([]) if name == "normalizer" else pre_tokenizers.Sequence([])
    one = "normalizers" if name == "normalizer" else "pretokenizers"
    whole = state if state["type"] == "Sequence" else {"type": "Sequence", one: [state]}
    made.__setstate__(json.dumps(whole).encode())
    return made
