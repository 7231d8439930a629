"""What questions to a judge cost: by tokens a server counted or, before, by the prompts as they will be sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyrite.judges.forms import Message, folded
from pyrite.text import load_tokenizer

MILLION = 1_000_000
TURN = 16  # tokens a chat template adds to a turn, at most
Counter = Callable[[Sequence[Message]], int]


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens read and a million written."""

    read: float = 0.0
    written: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("price_in", self.read), ("price_out", self.written)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; give money for a million tokens, at least 0")

    @property
    def paid(self) -> bool:
        """Whether anything costs money."""
        return self.read > 0 or self.written > 0

    def of(self, read: int, written: int) -> float:
        """The price of so many tokens.

        >>> Prices(read=30.0).of(4_000_000, 0)
        120.0
        """
        return (read * self.read + written * self.written) / MILLION


def most(messages: Sequence[Message]) -> int:
    """Tokens that no tokenizer exceeds: one a byte, and those of the template."""
    return sum(len(turn["content"].encode()) + TURN for turn in messages)


def by_characters(messages: Sequence[Message]) -> int:
    """About as many tokens as English text has: characters / 4."""
    return round(sum(len(turn["content"]) for turn in messages) / 4)


def by_tokenizer(name: str) -> Counter:
    """Counts tokens with a tokenizer, a folder or a Hub name, by its chat template if any. Raises ValueError.

    Where the template takes no system turn, its text is counted as part of the first user turn, as it will be sent.
    """
    from jinja2 import TemplateError

    tokenizer, _ = load_tokenizer(name)

    def rendered(messages: Sequence[Message]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def count(messages: Sequence[Message]) -> int:
        if tokenizer.chat_template:
            try:
                text = rendered(messages)
            except TemplateError:
                if messages[0]["role"] != "system":
                    raise
                text = rendered(folded(messages))
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return sum(len(tokenizer(turn["content"])["input_ids"]) for turn in messages)

    return count
