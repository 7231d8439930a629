"""Texts as tests give them and look at them: one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pyrite.data import text
from pyrite.data.responses import Answer, Prompt, Responses


class Read(NamedTuple):
    """One prompt and response as tokens."""

    prompt: list[int]
    response: list[int]
    truncated: bool

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.response]


def asked(prompts: Sequence[Prompt], texts: Sequence[Answer], *, finished: bool | Sequence[bool] = True) -> Responses:
    """Responses to prompts, one each."""
    return Responses.said([{"prompt": prompt} for prompt in prompts], texts, finished=finished)


def drawn(rows: Sequence[dict[str, Any]], texts: Sequence[str], *, finished: bool = True, k: int = 1) -> Responses:
    """k answers to each prompt, as if a model of one token had drawn them."""
    made = Responses.of([([1], [[2]] * k) for _ in rows])
    return replace(made, rows=rows, texts=texts, finished=made.finished & finished)


def each(responses: Responses) -> list[Read]:
    """One by one."""
    cut = [False] * len(responses) if responses.truncated is None else responses.truncated.tolist()
    prompts = [list(responses.prompt_ids[p]) for p in responses.prompt.tolist()]
    return [Read(*one) for one in zip(prompts, responses.tokens(), cut, strict=True)]


def encode_all(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    texts: Sequence[Answer],
    *,
    finished: bool | Sequence[bool] = True,
    **options: Any,
) -> list[Read]:
    """Texts as this tokenizer reads them."""
    return each(text.encode(tokenizer, asked(prompts, texts, finished=finished), **options))


def encode(tokenizer: Any, prompt: Prompt, said: Answer, *, finished: bool = True, **options: Any) -> Read:
    """One text as this tokenizer reads it."""
    return encode_all(tokenizer, [prompt], [said], finished=finished, **options)[0]


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of one prompt."""
    return text.encode_prompts(tokenizer, [prompt])[0]


def response_ids(tokenizer: Any, response: str, *, finished: bool = True) -> list[int]:
    """The tokens of one response to a plain question."""
    return encode(tokenizer, "?", response, finished=finished, as_drawn=True).response
