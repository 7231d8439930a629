"""Prompts as preferences change them: one renderer for rollouts, reward models, policies and judges.

A conditioned row is {prompt, what models read; prompt_id, of that; asked, the raw prompt; asked_id, its id;
preferences, ids of options, [] where it is neutral}. Splits go by asked_id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite import data
from pyrite.dimensions.options import Dimensions, Option, located
from pyrite.progress import say
from pyrite.sources import Placed
from pyrite.text import Prompt, plain

Turn = Literal["user", "system"]
NEUTRAL = "neutral"


@dataclass(frozen=True)
class Variants:
    """Under which preferences every prompt is asked."""

    dimensions: str | None = None
    """Preference dimensions: a YAML file, or the shipped soups."""
    preferences: tuple[str, ...] = ()
    """What each prompt is asked under: an option such as P1A, several as in P1A+P2B, or neutral."""
    combinations: bool = False
    """Also under every combination of one option of each dimension."""
    combine: tuple[str, ...] = ()
    """The options that --combinations takes; by default all that were not added later."""
    preference_turn: Turn = "user"
    """Where preferences stand: at the end of the last user turn, or in the system turn."""

    def inputs(self) -> dict[str, str | Path]:
        """What is read."""
        return {"dimensions": located(self.dimensions)} if self.dimensions else {}

    def of(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every prompt under every variant, prompt by prompt; as they are without dimensions.

        Of the same prompt under two ids the first is taken. Raises ValueError for variants without dimensions or the
        other way round, unknown options, prompts that carry preferences already, and two that become the same.
        """
        if not self.dimensions:
            if self.preferences or self.combinations or self.combine:
                raise ValueError("--preferences, --combinations and --combine need --dimensions, a YAML file or soups")
            return list(rows)
        wanted = self.wanted(Dimensions.load(self.dimensions))
        raw = {plain(row["prompt"]): row for row in reversed(rows)}
        if len(raw) < len(rows):
            say(f"{len(rows) - len(raw)} of {len(rows)} prompts left out: asked under another id already")
        made: dict[str, dict[str, Any]] = {}
        for row in reversed(raw.values()):
            if row.get("preferences") is not None:
                raise ValueError(f"prompt {row['prompt_id']} carries preferences already: give raw prompts")
            for options in wanted:
                new = conditioned(row, options, turn=self.preference_turn)
                first = made.setdefault(new["prompt_id"], new)
                if first is not new:
                    raise ValueError(f"prompts {first['asked_id']} and {row['prompt_id']} become the same prompt")
        return list(made.values())

    def wanted(self, dimensions: Dimensions) -> list[tuple[Option, ...]]:
        """The options of each variant, each variant once. Raises ValueError where there is none."""
        named = [() if name == NEUTRAL else dimensions.chosen(name.split("+")) for name in self.preferences]
        if self.combinations:
            named += map(dimensions.chosen, dimensions.combinations(self.combine or None))
        elif self.combine:
            raise ValueError("--combine says which options --combinations takes: give both")
        if not named:
            raise ValueError("--dimensions: say under which --preferences prompts are asked, or --combinations")
        return list(dict.fromkeys(named))


def render(prompt: Prompt, options: Iterable[Option], *, turn: Turn = "user") -> Prompt:
    """A prompt with the sentences of options (`Dimensions.chosen` has them in order) behind it, joined by one space.

    turn: at the end of the last user turn; or of the system turn, where a text becomes messages. Without options the
    prompt stays as it is. Raises ValueError for messages without a user turn.

    >>> render("Why is the sky blue? ", Dimensions.load("soups").chosen(["P2A"]))
    'Why is the sky blue? Keep it short and to the point.'
    """
    said = " ".join(option.sentence for option in options)
    if turn == "system":
        return _with_system([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, said)
    if not said:
        return prompt
    if isinstance(prompt, str):
        return _joined(prompt, said)
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        raise ValueError("a prompt without a user turn cannot carry a preference; put preferences in the system turn")
    return [{**m, "content": _joined(m["content"], said)} if i == users[-1] else m for i, m in enumerate(prompt)]


def conditioned(row: dict[str, Any], options: Sequence[Option], *, turn: Turn = "user") -> dict[str, Any]:
    """The row of a raw prompt {prompt_id, prompt} under some options; a neutral one keeps its id."""
    prompt = render(row["prompt"], options, turn=turn)
    made = {
        "prompt_id": data.prompt_id(prompt) if options else str(row["prompt_id"]),
        "prompt": prompt,
        "asked": row["prompt"],
        "asked_id": row["prompt_id"],
        "preferences": [option.id for option in options],
    }
    return Placed.at(made, data.place(row))


def _with_system(messages: list[dict[str, str]], said: str) -> list[dict[str, str]]:
    if not said:
        return messages
    first, *rest = messages
    if first["role"] == "system":
        return [{**first, "content": _joined(first["content"], said)}, *rest]
    return [{"role": "system", "content": said}, *messages]


def _joined(text: str, said: str) -> str:
    return f"{text.rstrip()} {said}".lstrip()
