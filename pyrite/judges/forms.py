"""The form in which a judge is asked: messages of a case, the reply it should give, demonstrations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from pyrite.judges.verdicts import WINS, Label, Reply
from pyrite.sources import DataError, read
from pyrite.text import plain

Message = dict[str, str]


class Case(NamedTuple):
    """A prompt and two answers, in the order they are shown."""

    prompt: str
    first: str
    second: str


class Demonstration(NamedTuple):
    """A case with its verdict, and why."""

    case: Case
    label: Label
    reason: str = ""


@dataclass(frozen=True)
class Form:
    """How a judge is asked which of two answers is better by one criterion.

    reply: label wants the label on the first line, reasons the label after its reasons, json an object that fits
    `response_format`. ties: whether TIE is offered. Raises ValueError for an empty criterion, or a demonstration that
    the form could not ask for.
    """

    criterion: str
    reply: Reply = "label"
    ties: bool = True
    demonstrations: tuple[Demonstration, ...] = ()

    def __post_init__(self) -> None:
        if not self.criterion.strip():
            raise ValueError("the judge's criterion is empty; say in a sentence what makes an answer better")
        if self.reply not in ("label", "reasons", "json"):
            raise ValueError(f"the judge's reply is {self.reply!r}; choose label, reasons or json")
        if not self.ties and any(one.label == "TIE" for one in self.demonstrations):
            raise ValueError("a demonstration is labelled TIE, but ties are not offered; leave it out or allow ties")

    @property
    def labels(self) -> tuple[Label, ...]:
        """What the judge may say."""
        return tuple(label for label in WINS if self.ties or label != "TIE")

    def messages(self, cases: Sequence[Case]) -> list[Message]:
        """A system turn, two turns a demonstration, and the cases in one user turn, every text as it is."""
        shown = [turn for one in self.demonstrations for turn in self._shown(one)]
        bodies = [_case(case) for case in cases]
        if len(bodies) > 1:
            bodies = [f"Case {number}\n{body}" for number, body in enumerate(bodies, 1)]
        return [_turn("system", self._rules(len(cases))), *shown, _turn("user", "\n\n".join(bodies))]

    def response_format(self) -> dict[str, Any]:
        """The JSON schema of a reply, as chat completions take it."""
        verdict = {"type": "string", "enum": list(self.labels)}
        schema = {"type": "object", "properties": {"verdict": verdict}, "required": ["verdict"]}
        named = {"name": "verdict", "strict": True, "schema": {**schema, "additionalProperties": False}}
        return {"type": "json_schema", "json_schema": named}

    def _rules(self, cases: int) -> str:
        what = "Two answers to a request are compared by one criterion, and by nothing else."
        if cases > 1:
            what = (
                f"In each of {cases} cases, two answers to a request are compared by one criterion, and nothing else."
            )
        labels = "A if answer A is better, B if answer B is better" + (", TIE if neither is" if self.ties else "")
        what = f"{what} are compared by one criterion, and by nothing else."
        return f"{what}\nCriterion: {self.criterion}\n{self._wanted(cases, labels)}"

    def _wanted(self, cases: int, labels: str) -> str:
        if cases > 1:
            return f"Reply with {cases} lines, one for each case in its order. Each line is one label: {labels}."
        if self.reply == "label":
            return f"Begin your reply with one label alone on the first line: {labels}."
        if self.reply == "reasons":
            return f'Reason briefly, then end your reply with the line "Verdict: " and one label: {labels}.'
        return f'Reply with a JSON object {{"verdict": LABEL}}, its label one of: {labels}.'

    def _shown(self, one: Demonstration) -> list[Message]:
        reply = {
            "label": f"{one.label}\n{one.reason}".strip(),
            "reasons": f"{one.reason}\nVerdict: {one.label}".strip(),
            "json": json.dumps({"verdict": one.label}),
        }[self.reply]
        return [_turn("user", _case(one.case)), _turn("assistant", reply)]


def demonstrations(path: str) -> tuple[Demonstration, ...]:
    """Demonstrations of a file: prompt, a, b, label (A, B or TIE), and optionally reason. Raises DataError."""
    source = read(path)
    return tuple(_demonstration(row, source.at(i)) for i, row in enumerate(source.rows))


def _demonstration(row: dict[str, Any], place: str) -> Demonstration:
    missing = [name for name in ("prompt", "a", "b", "label") if name not in row]
    if missing:
        raise DataError(f"{place}: a demonstration needs prompt, a, b and label; missing {', '.join(missing)}")
    label = str(row["label"]).strip().upper()
    if label not in WINS:
        raise DataError(f"{place}: label is {row['label']!r:.40}; it must be A, B or TIE")
    if not (isinstance(row["prompt"], str | list) and isinstance(row["a"], str) and isinstance(row["b"], str)):
        raise DataError(f"{place}: prompt, a and b of a demonstration must be texts")
    case = Case(plain(row["prompt"]), row["a"], row["b"])
    return Demonstration(case, cast(Label, label), str(row.get("reason") or ""))


def _case(case: Case) -> str:
    tagged = zip(("request", "answer_A", "answer_B"), case, strict=True)
    return "\n".join(f"<{tag}>\n{text}\n</{tag}>" for tag, text in tagged) + "\nWhich answer is better?"


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}
