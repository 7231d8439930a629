"""What a judge wrote -> the answer it prefers: A, B or TIE, and nothing where it does not say.

A label counts only where a verdict belongs: alone on its line ("B", "Output (b)", "**Tie**"), after a heading
("Result: Output (b)", or on the line below it), or in the `verdict` of a JSON object. Label words inside a sentence are
reasoning. What is not certain is no verdict.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal, NamedTuple, cast

Label = Literal["A", "B", "TIE"]
Reply = Literal["label", "reasons", "json"]

WINS: dict[Label, float] = {"A": 1.0, "B": 0.0, "TIE": 0.5}
PREFERENCES: dict[Label, int] = {"A": 1, "B": 2, "TIE": 0}
_OTHER: dict[Label, Label] = {"A": "B", "B": "A", "TIE": "TIE"}
_MARKS = r"[\s*_#>`\"'“”()\[\]{}]*"
_HEAD = r"(?:(?:final|overall|the|my)\s+)*(?:verdict|result|winner|label|decision|preference|answer)"
_OF = r"(?:\s+(?:for|of)\s+(?:the\s+)?(?:example|case|pair)?\s*\d*)?"
_LABEL = r"(?:(?:answer|output|response|option)\s*)?[(\[*\"'`_]*(?P<label>A|B|(?:an?\s+)?TIE)[)\]*\"'`_]*"
_REST = r"(?:\s*$|\s*(?:is\s+better|wins)?[.!]?\s*$|\s*(?::|\.\s|\s[-–—]\s)(?!\s*\d).*$)"
_LINE = re.compile(
    rf"^{_MARKS}(?:(?:example|case)?\s*\d+\s*[.):]\s*)?(?:{_HEAD}{_OF}{_MARKS}(?:is\b|[:=–—-])?{_MARKS})?{_LABEL}{_REST}",
    re.IGNORECASE,
)
_BARE = re.compile(rf"^{_MARKS}{_LABEL}{_MARKS}[.!]?\s*$", re.IGNORECASE)
_HEADED = re.compile(rf"^{_MARKS}{_HEAD}{_OF}{_MARKS}(?:is\b|[:=–—-])", re.IGNORECASE)
_HEADING = re.compile(rf"^{_MARKS}{_HEAD}{_OF}{_MARKS}[:=–—-]?{_MARKS}$", re.IGNORECASE)
_THOUGHT = re.compile(r"^\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


class Found(NamedTuple):
    """A label, and the place in the text where it begins."""

    label: Label
    at: int


def other(label: Label) -> Label:
    """The verdict on the same two answers shown in the other order.

    >>> [other(label) for label in ("A", "B", "TIE")]
    ['B', 'A', 'TIE']
    """
    return _OTHER[label]


def read_verdict(text: str, *, reply: Reply = "label", ties: bool = True) -> Found | None:
    """The one verdict of a judge's answer; None without one, and for a tie where ties were not offered.

    reply: label reads the first line, and a headed result where that is none; reasons reads the last headed result, or
    the last line; json the `verdict` of an object, or else a label. Text in <think> tags is no part of the answer.
    """
    thought = _THOUGHT.match(text)
    start = thought.end() if thought else 0
    found = _in_json(text, start) if reply == "json" else None
    found = found or _in_lines(text, start, last=reply == "reasons")
    return found if found and (ties or found.label != "TIE") else None


def several(text: str, count: int, *, ties: bool = True) -> list[Label] | None:
    """The labels of `count` cases, one a line; None where their number differs: whose they are would be a guess.

    >>> several("Output (a)\\nOutput (b)\\nOutput (b)", 3)
    ['A', 'B', 'B']
    >>> several("Output (a)\\nOutput (b)", 3)
    """
    found = [label for _, line in _lines(text, 0) if (label := _label(line, 0))]
    sound = len(found) == count and (ties or all(one.label != "TIE" for one in found))
    return [one.label for one in found] if sound else None


def probability(tokens: list[dict[str, Any]], text: str, found: Found) -> float | None:
    """(P(A) + ½ P(TIE)) / (P(A) + P(B) + P(TIE)) at the token where the label begins, from its likeliest alternatives.

    tokens: as chat completions have them, {token, logprob in nats, top_logprobs}. None where they are not this text's.
    """
    whole = "".join(token["token"] for token in tokens)
    shift = whole.find(text)
    place = 0
    for token in tokens:
        place += len(token["token"])
        if shift >= 0 and place > shift + found.at:
            break
    else:
        return None
    mass: dict[Label, float] = dict.fromkeys(WINS, 0.0)
    alternatives = {one["token"]: one["logprob"] for one in [*(token.get("top_logprobs") or ()), token]}
    for word, logprob in alternatives.items():
        if (label := _begins(word)) is not None:
            mass[label] += math.exp(logprob)
    total = sum(mass.values())
    if _begins(token["token"]) != found.label or not total > 0:
        return None
    return (mass["A"] + 0.5 * mass["TIE"]) / total


def _in_json(text: str, start: int) -> Found | None:
    begin, end = text.find("{", start), text.rfind("}")
    try:
        verdict = json.loads(text[begin : end + 1])["verdict"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    place = list(re.finditer(r'"verdict"\s*:\s*"\s*', text))
    if not isinstance(verdict, str) or verdict.strip().upper() not in WINS or not place:
        return None
    return Found(cast(Label, verdict.strip().upper()), place[-1].end())


def _in_lines(text: str, start: int, *, last: bool) -> Found | None:
    lines = _lines(text, start)
    if not lines:
        return None
    labels = [_label(line, place) for place, line in lines]
    first, sure = labels[0], _BARE.match(lines[0][1])
    if not last and first and (sure or all(one is None or one.label == first.label for one in labels)):
        return first
    for i in reversed(range(len(lines))):
        if _HEADING.match(lines[i][1]):  # the verdict is below it, or there is none
            return labels[i + 1] if i + 1 < len(lines) else None
        if _HEADED.match(lines[i][1]):
            return labels[i]
    return labels[-1] if last and _BARE.match(lines[-1][1]) else None


def _lines(text: str, start: int) -> list[tuple[int, str]]:
    """Lines that hold something, with their places."""
    return [(match.start(), match[0]) for match in re.compile(r"[^\n]*\S[^\n]*").finditer(text, start)]


def _label(line: str, place: int) -> Found | None:
    match = _LINE.match(line)
    if match is None:
        return None
    label = match["label"].upper().split()[-1]
    return Found(cast(Label, label), place + match.end("label") - len(label))


def _begins(word: str) -> Label | None:
    """The label that a token says, or begins."""
    bare = re.sub(r"[^A-Z]", "", word.upper())
    if bare in ("A", "B"):
        return cast(Label, bare)
    return "TIE" if bare and "TIE".startswith(bare) else None
