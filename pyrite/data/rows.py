"""Rows of data: read in many layouts, checked, split by prompt, written, and fitted to a context length."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import math
import os
import os.path
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyrite.data import text as text_
from pyrite.data.files import TEXTS, DataError, Placed, Row, Source, read
from pyrite.data.text import OF_TOOLS, SHOWN, Answer, plain

Message = dict[str, Any]


class Skip(Exception):  # noqa: N818, a signal and not an error
    """Raised for a valid row that is left out. Its message is the reason; rows are counted by reason."""


@dataclass(frozen=True)
class Layout:
    """A layout of files: the columns it is recognized by, others that it reads, and how a row becomes one of ours.

    gather: for layouts with one answer a row, finds the pairs: the numbers (from 0) of their chosen and rejected rows,
    and how many rows are left out by reason.
    """

    needs: tuple[str, ...]
    convert: Callable[[Row], Row]
    reads: tuple[str, ...] = ()
    gather: Callable[[Source], tuple[list[tuple[int, int]], dict[str, int]]] | None = None


def messages(value: Any, name: str) -> list[Message]:
    """The value as messages: role, content, and the other fields that a chat template may write (`text.SHOWN`).

    A turn of tool calls needs no content. Raises ValueError if the value is something else.
    """
    shaped = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    turns = [_message(turn) for turn in value] if shaped else []
    if not turns or not all(isinstance(turn[key], str) for turn in turns for key in ("role", "content")):
        raise ValueError(f"{name} must be a list of messages, each with a role and a content that are text")
    return turns


def _message(turn: Row) -> Message:
    names = SHOWN if turn.get("role") in ("user", "assistant", "system") else (*SHOWN, *OF_TOOLS)
    fields = {name: _known(turn[name]) for name in names if turn.get(name)}
    content = turn.get("content")
    return {"role": turn.get("role"), "content": "" if content is None and fields else content, **fields}


def _known(value: Any) -> Any:
    """A value without the empty fields that Parquet gives every struct."""
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items() if one is not None}
    return [_known(one) for one in value] if isinstance(value, list) else value


def said(turn: Message, name: str) -> Row:
    """The columns of an answer: NAME holds its text, NAME_fields the other fields of its message."""
    fields = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return {name: turn["content"]} | ({f"{name}_fields": fields} if fields else {})


def transcript(text: str) -> list[Message]:
    """The messages of a transcript in Anthropic's HH format ("\\n\\nHuman: …\\n\\nAssistant: …")."""
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def merged(turns: list[Message]) -> list[Message]:
    """Join turns that the same speaker takes one after another, since chat templates want speakers to alternate.

    Turns with fields such as reasoning or tool calls are not joined.
    """
    result: list[Message] = []
    for turn in turns:
        if result and result[-1]["role"] == turn["role"] and len(result[-1]) == len(turn) == 2:
            joined = "\n\n".join(said for said in (result[-1]["content"], turn["content"]) if said)
            result[-1] = {"role": turn["role"], "content": joined}
        else:
            result.append(turn)
    return result


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Row:
    """A pair from two conversations that differ only in their last answer: the turns before it are the prompt.

    If they differ earlier, the pair is skipped. The preference is then about several turns, some of them the user's;
    giving it to one answer would invent a label.
    """
    first, second = merged(chosen), merged(rejected)
    for name, turns in (("chosen", first), ("rejected", second)):
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with an assistant turn")
    if len(first) == 1 or len(second) == 1:
        raise ValueError("chosen and rejected hold only an answer; a prompt column is needed")
    if first[:-1] != second[:-1]:
        raise Skip("the conversations part before the last answer")
    return {"prompt": first[:-1], **said(first[-1], "chosen"), **said(second[-1], "rejected")}


def pair_with_prompt(row: Row) -> Row:
    """TRL preference, standard (texts) or conversational (answers or whole conversations as messages)."""
    prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
    if not any(isinstance(side, list) for side in sides):
        return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages(prompt, "prompt")
    whole = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        turns = messages(side, name)
        whole.append(opening + turns if turns[0]["role"] == "assistant" else turns)
    return split_conversations(whole[0], whole[1])


def pair_without_prompt(row: Row) -> Row:
    """TRL preference with an implicit prompt: conversations, HH transcripts, texts that begin alike."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) or isinstance(rejected, list):
        return split_conversations(messages(chosen, "chosen"), messages(rejected, "rejected"))
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if all(re.match(r"\s*Human:", side) for side in (chosen, rejected)):
        pair = split_conversations(transcript(chosen), transcript(rejected))
        if not pair["chosen"]:
            raise Skip("the preferred answer of the transcript is empty")
        return pair
    common = re.match(r"(.*\S)\s", os.path.commonprefix([chosen, rejected]), re.DOTALL)  # noqa: RUF071
    if common is None:
        raise ValueError("chosen and rejected share no beginning that could be the prompt; add a prompt column")
    prompt = common.group(1)
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def pair_from_outputs(row: Row) -> Row:
    """AlpacaFarm: instruction, input, output_1, output_2, preference = number of the better, 1 or 2.

    AlpacaEval's weighted judges give a preference between 1 and 2, which is 1 + P(the second is better).
    """
    value = row["preference"]
    if not isinstance(value, float) or not 1 < value < 2:
        return _better(row, instruction(row), "output_1", "output_2", first=_is_first(value, (1, 2)))
    if value == 1.5:
        raise Skip("neither answer is better (preference 1.5)")
    pair = _better(row, instruction(row), "output_1", "output_2", first=value < 1.5)
    return pair | {"probability": max(value - 1, 2 - value)}


def pair_from_answers(row: Row) -> Row:
    """Gold-labelled AlpacaFarm: instruction, input, two answers, preference = index of the better, 0 or 1."""
    answers = row["answers"]
    if not isinstance(answers, list) or len(answers) != 2 or not all(isinstance(one, str) for one in answers):
        raise ValueError("answers must be a list of two texts")
    named = {"first": answers[0], "second": answers[1]}
    return _better(named, instruction(row), "first", "second", first=_is_first(row["preference"], (0, 1)))


def pair_from_strength(row: Row) -> Row:
    """HelpSteer2 and 3: two responses and a preference from -3, the first is much better, to 3, the second is."""
    new = "overall_preference" in row
    name, first, second = (
        ("overall_preference", "response1", "response2") if new else ("preference_strength", "response_1", "response_2")
    )
    value = row[name]
    if value is None:
        raise Skip("it has no preference")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -3 <= value <= 3:
        raise ValueError(f"{name} must be a number from -3 to 3, not {value!r:.60}")
    if value == 0:
        raise Skip(f"neither answer is better ({name} 0)")
    return _better(row, row["context"] if "context" in row else row["prompt"], first, second, first=value < 0)


def pair_from_turns(row: Row) -> Row:
    """ShareGPT with two endings: conversations, and chosen and rejected as {from, value} or text."""
    turns = sharegpt(row["conversations"])
    ends = [row[name] if isinstance(row[name], list) else [row[name]] for name in ("chosen", "rejected")]
    whole = [
        turns + ([{"role": "assistant", "content": end[0]}] if isinstance(end[0], str) else sharegpt(end))
        for end in ends
        if end
    ]
    if len(whole) < 2:
        raise ValueError("chosen and rejected must each hold an answer")
    return split_conversations(whole[0], whole[1])


def pairs_of_labels(source: Source) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Unpaired rows (prompt, completion, label): the first good answer to a prompt and its first bad one, and so on."""
    pairs: list[tuple[int, int]] = []
    for group in _by_prompt(source, lambda row: _label(row.get("label"), "label")):
        good, bad = ([i for i, label in group if label == wanted] for wanted in (True, False))
        pairs += zip(good, bad, strict=False)
    if not pairs:
        raise DataError(
            f"{source.name}: no prompt has both an answer with label true and one with label false, and pairs are "
            "learned from here; have a judge compare answers (`pyrite generate`, `pyrite label --judge`), or give the "
            "file to `pyrite sft`"
        )
    return pairs, {"no answer with the other label is left for their prompt": len(source.rows) - 2 * len(pairs)}


def pairs_of_scores(source: Source) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """HelpSteer's rows (prompt, response, helpfulness, ...): answers 0 and 1, 2 and 3, ... to a prompt are compared,
    and the more helpful one is chosen."""
    groups = _by_prompt(source, lambda row: _score(row.get("helpfulness"), "helpfulness"))
    couples = [couple for group in groups for couple in zip(group[::2], group[1::2], strict=False)]
    pairs = [(i, k) if one > other else (k, i) for (i, one), (k, other) in couples if one != other]
    if not pairs:
        raise DataError(
            f"{source.name}: no prompt has two answers of which one is more helpful, and pairs are learned from here"
        )
    return pairs, {
        "two answers to a prompt are equally helpful": 2 * (len(couples) - len(pairs)),
        "the only answer left to its prompt": len(source.rows) - 2 * len(couples),
    }


def _by_prompt(source: Source, read: Callable[[Row], Any]) -> list[list[tuple[int, Any]]]:
    """The rows of each prompt: their numbers from 0, and what is read in them."""
    groups: dict[str, list[tuple[int, Any]]] = {}
    for i, row in enumerate(source.rows):
        try:
            groups.setdefault(repr(row.get("prompt")), []).append((i, read(row)))
        except ValueError as error:
            raise DataError(f"{source.at(i)}: {error}") from error
    return list(groups.values())


def sharegpt(value: Any) -> list[dict[str, str]]:
    """Messages of ShareGPT's turns {from, value}; turns {role, content} pass as they are."""
    turns = value if isinstance(value, list) else [value]
    if turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return messages(turns, "conversations")
    found = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError("conversations must be a list of turns, each with from and value that are text")
        role = SPEAKERS.get(str(turn.get("from")).lower())
        if role is None:
            raise ValueError(
                f"conversations hold a turn from {turn.get('from')!r:.40}; known are {', '.join(SPEAKERS)}"
            )
        found.append({"role": role, "content": turn["value"]})
    if not found:
        raise ValueError("conversations are empty")
    return found


def demo_from_turns(row: Row) -> Row:
    """ShareGPT: conversations of turns {from, value}, and optionally a system text; the last answer is the response."""
    turns = _opened(row)
    if turns[-1]["role"] != "assistant":
        raise Skip("the conversation does not end with an answer")
    return demo_from_messages({"messages": turns})


def demo_from_text(row: Row) -> Row:
    """TRL language modeling: a text without a prompt, learned whole; an HH transcript is a conversation."""
    whole = text(row, "text")
    if re.match(r"\s*Human:", whole):
        return demo_from_messages({"messages": transcript(whole)})
    return {"prompt": "", "response": whole}


def demo_from_label(row: Row) -> Row:
    """An unpaired row (prompt, completion, label): to be imitated if its label is true."""
    if not _label(row["label"], "label"):
        raise Skip("their label says that the answer is bad")
    return demo_from_completion(row)


def demo_from_completion(row: Row) -> Row:
    """TRL prompt-completion, standard or conversational."""
    if isinstance(row["completion"], str):
        return {"prompt": row["prompt"], "response": row["completion"]}
    prompt = row["prompt"]
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages(prompt, "prompt")
    return demo_from_messages({"messages": opening + messages(row["completion"], "completion")})


def demo_from_messages(row: Row) -> Row:
    """TRL conversational language modeling: the last assistant turn is the response."""
    turns = merged(messages(row["messages"], "messages"))
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError("messages must hold a prompt and end with an assistant turn")
    return {"prompt": turns[:-1], **said(turns[-1], "response")}


def prompt_from_messages(row: Row) -> Row:
    """A conversation without its closing assistant turn."""
    turns = merged(messages(row["messages"], "messages"))
    return {"prompt": turns[:-1] if turns[-1]["role"] == "assistant" else turns}


def instruction(row: Row) -> str:
    """Alpaca prompt: the instruction as it is, and the input, if any, on the next line."""
    extra = text(row, "input") if row.get("input") is not None else ""
    return text(row, "instruction") + (f"\n{extra}" if extra.strip() else "")


def text(row: Row, name: str) -> str:
    """The text in a column. Raises ValueError if it is something else."""
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be text, not {row[name]!r:.60}")
    return row[name]


def _opened(row: Row) -> list[dict[str, str]]:
    """ShareGPT's turns, after the system text if there is one."""
    turns = merged(sharegpt(row["conversations"]))
    if isinstance(row.get("system"), str) and row["system"].strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row["system"]}, *turns]
    begun = turns[1:] if turns[0]["role"] == "system" else turns
    if not begun or begun[0]["role"] != "user":
        raise Skip("the conversation does not begin with the user")
    return turns


def _label(value: Any, name: str) -> bool:
    """A label true or false, or 1 or 0."""
    if value not in (True, False) or not isinstance(value, (bool, int, float)):
        raise ValueError(f"{name} must be true or false (or 1 or 0), not {value!r:.60}")
    return bool(value)


def _score(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, not {value!r:.60}")
    return value


def _better(row: Row, prompt: Any, one: str, other: str, *, first: bool) -> Row:
    chosen, rejected = (one, other) if first else (other, one)
    return {"prompt": prompt, "chosen": text(row, chosen), "rejected": text(row, rejected)}


def _is_first(preference: Any, numbers: tuple[int, int]) -> bool:
    """Whether a preference, one of two numbers, is for the first answer."""
    if preference is None:
        raise Skip("it has no preference")
    if isinstance(preference, bool) or preference not in numbers:
        raise ValueError(f"preference must be {numbers[0]} or {numbers[1]}, not {preference!r:.60}")
    return preference == numbers[0]


def _alpaca(row: Row) -> Row:
    return {"prompt": instruction(row), "response": text(row, "output")}


def _same(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
SPEAKERS |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}
CANDIDATE = ("prompt", "response", "sample", "finished", "length", "logp")
# The first layout of a kind whose columns are all there is taken; the first of all is our own.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "prompts": (
        Layout(("prompt",), _same("prompt")),
        Layout(("messages",), prompt_from_messages),
        Layout(("instruction",), lambda row: {"prompt": instruction(row)}, reads=("input",)),
        Layout(("question",), lambda row: {"prompt": text(row, "question")}),
        Layout(
            ("conversations",),
            lambda row: prompt_from_messages({"messages": _opened(row)}),
            reads=("system", "chosen", "rejected"),
        ),
        Layout(("history",), lambda row: {"prompt": text(row, "history")}),
        Layout(("context",), lambda row: {"prompt": row["context"]}),
        Layout(("chosen", "rejected"), lambda row: {"prompt": pair_without_prompt(row)["prompt"]}),
    ),
    "demos": (
        Layout(("prompt", "response"), _same("prompt", "response")),
        Layout(("prompt", "completion", "label"), demo_from_label),
        Layout(("prompt", "completion"), demo_from_completion),
        Layout(("messages",), demo_from_messages, reads=("prompt",)),
        Layout(("instruction", "output"), _alpaca, reads=("input",)),
        Layout(("conversations",), demo_from_turns, reads=("system",)),
        Layout(("text",), demo_from_text),
    ),
    "pairs": (
        Layout(("prompt", "chosen", "rejected"), pair_with_prompt),
        Layout(("conversations", "chosen", "rejected"), pair_from_turns, reads=("system",)),
        Layout(("chosen", "rejected"), pair_without_prompt),
        Layout(("instruction", "output_1", "output_2", "preference"), pair_from_outputs, reads=("input",)),
        Layout(("instruction", "answers", "preference"), pair_from_answers, reads=("input",)),
        Layout(  # Stack Exchange
            ("question", "response_j", "response_k"),
            lambda row: _better(row, text(row, "question"), "response_j", "response_k", first=True),
        ),
        Layout(  # SHP: labels is 1 if A has more votes, else 0
            ("history", "human_ref_A", "human_ref_B", "labels"),
            lambda row: _better(
                row, row["history"], "human_ref_A", "human_ref_B", first=_label(row["labels"], "labels")
            ),
        ),
        Layout(("prompt", "response_1", "response_2", "preference_strength"), pair_from_strength),
        Layout(("context", "response1", "response2", "overall_preference"), pair_from_strength),
        Layout(("prompt", "response1", "response2", "overall_preference"), pair_from_strength),
        Layout(
            ("prompt", "completion", "label"), pair_with_prompt, reads=("chosen", "rejected"), gather=pairs_of_labels
        ),
        Layout(("prompt", "response", "helpfulness"), pair_with_prompt, gather=pairs_of_scores),
    ),
    "answers": (
        Layout(("prompt", "response"), _same("prompt", "response")),
        Layout(("prompt", "completion"), demo_from_completion),
        Layout(("messages",), demo_from_messages, reads=("prompt",)),
        Layout(("instruction", "output"), _alpaca, reads=("input",)),
        Layout(("prompt", "output"), lambda row: {"prompt": row["prompt"], "response": text(row, "output")}),
        Layout(("conversations",), demo_from_turns, reads=("system",)),
    ),
    "candidates": (Layout(CANDIDATE, _same(*CANDIDATE)),),
}


Kind = Literal["prompts", "demos", "pairs", "candidates", "answers"]

OnContradiction = Literal["error", "swap", "drop", "keep"]
CONTRADICTION = "their strength or probability says that the rejected answer is the better one"
CONDITIONED = ("asked", "asked_id", "preferences")  # what a prompt under preferences was made from
PROBABILITY_FLOOR = 1e-4  # a judge's certainty becomes at most ln(9999) = 9.21 nats
_TEXTS = {"prompts": (), "pairs": ("chosen", "rejected")}  # of other kinds: response
_NONEMPTY = {"demos": "response", "pairs": "chosen"}
_NUMBERS: dict[str, dict[str, type]] = {
    "candidates": {"sample": int, "length": int, "logp": float, "finished": bool},
    "pairs": {"strength": float, "probability": float, "flipped": bool},
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def load(
    path: str | Path,
    kind: Kind | None = None,
    *,
    columns: str | Mapping[str, str] | None = None,
    on_contradiction: OnContradiction = "keep",
    on_tie: Literal["keep", "drop"] = "keep",
    note: Callable[[str], object] | None = None,
) -> list[Row]:
    """Checked rows of a kind from a file, a `datasets` folder (folder[:split]) or the Hub (org/name[:split]).

    Files: JSON, JSONL, CSV, TSV (each gzipped too), Parquet. The layouts are those of LAYOUTS; `columns` renames the
    columns of others ("prompt=question,chosen=good", ours first). A missing prompt_id is derived from the prompt. A
    judge's `probability` p becomes `strength` = ln(p / (1 − p)) nats, p clipped to [1e-4, 1 − 1e-4]. Left out, and told
    to `note` in one line for each reason: pairs with equal answers, conversations that differ before the last answer or
    prefer an empty one, rows without a verdict, and (kind "prompts") prompts seen before.

    on_contradiction: what to do with pairs whose strength is below 0, or probability below ½, so that the rejected
    answer is the better one. keep takes them as they stand, swap exchanges the answers and their columns, drop leaves
    them out, error refuses them. on_tie: what to do with pairs of strength 0, in which neither answer is better.

    Every row knows its file and line (`place(row)`), also after rows were left out, split or shuffled.
    Raises DataError, naming the file and the row.
    """
    if kind is None:
        raise DataError(f"{path}: say which kind of rows it holds, as in load(path, 'pairs'): {', '.join(LAYOUTS)}")
    if kind not in LAYOUTS:
        raise DataError(f"unknown kind of data {kind!r}; it is one of {', '.join(LAYOUTS)}")
    names = _names(columns)
    source = _renamed(read(str(path), texts=[theirs for ours, theirs in names.items() if ours in TEXTS]), names)
    total = len(source.rows)
    source, layout, alone = _gathered(source, _layout(source, kind))
    rows, dropped, swaps = _converted(source, kind, layout, on_contradiction, on_tie)
    dropped += alone
    notes = [f"in {swaps} of {total} rows chosen and rejected are exchanged: {CONTRADICTION}"] if swaps else []
    for words in [*notes, *(f"{count} of {total} rows left out: {reason}" for reason, count in dropped.items())]:
        if note is not None:
            note(f"{source.name}: {words}")
    if not rows:
        raise DataError(f"{source.name}: no row is left of {total}; {'; '.join(dropped)}")
    return rows


def place(row: Row, unknown: str = "") -> str:
    """The file and line of a row, as errors name it: "pairs.jsonl, line 7"; `unknown` if it is not known.

    It is known for rows from `load`, and for rows made from them by `row | {...}`.
    """
    return getattr(row, "place", "") or unknown or f"the row of prompt {row.get('prompt_id')!r}"


def answer(row: Row, name: str) -> Answer:
    """The answer in a column: its text, or the whole message if the message had more fields."""
    fields = row.get(f"{name}_fields")
    return {"content": row[name], **fields} if fields else row[name]


def prompt_id(prompt: Any) -> str:
    """The id of a prompt. It depends on the text alone, so the same prompt has the same id in every file."""
    return hashlib.sha256(plain(prompt).encode()).hexdigest()[:16]


def origin(row: Row) -> tuple[str, str]:
    """The id and text of a row's raw prompt, before preferences were written into it. Splits go by these.

    If a row has no prompt, its response stands for it.
    """
    raw = all(name in row for name in CONDITIONED)
    asked = plain(row["asked" if raw else "prompt"])
    return str(row["asked_id" if raw else "prompt_id"]), asked or str(row.get("response", ""))


def load_apart(
    path: str | Path,
    kind: Kind,
    held_out: float | str,
    *,
    seed: int,
    note: Callable[[str], object],
    columns: str | None = None,
    on_contradiction: OnContradiction = "keep",
    on_tie: Literal["keep", "drop"] = "keep",
) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows to measure on; no prompt is in both. Other options are those of `load`.

    held_out: a file to measure on, whose prompts are not learned from, or the share of the prompts to keep.
    """
    read = partial(load, kind=kind, columns=columns, on_contradiction=on_contradiction, on_tie=on_tie, note=note)
    every = read(path)
    if isinstance(held_out, str):
        held = read(held_out)
        return apart(every, held, note=note, source=str(path)), held
    return split(every, fraction=held_out, seed=seed)


def apart(rows: Sequence[Row], held: Sequence[Row], *, note: Callable[[str], object], source: str) -> list[Row]:
    """The rows whose raw prompt is not held out. `note` is told how many are left out.

    Prompts are compared by their texts, since each file may number its prompts in its own way. source: the file of
    `rows`, for messages. Raises DataError if no row is left.
    """
    kept = {_words(row) for row in held}
    left = [row for row in rows if _words(row) not in kept]
    if not left:
        raise DataError(f"{source}: all {len(rows)} rows are of prompts that are held out; hold out other ones")
    if len(left) < len(rows):
        first = place(next(row for row in rows if _words(row) in kept)) or source
        note(f"{source}: {len(rows) - len(left)} of {len(rows)} rows left out: their prompt is held out ({first}, ...)")
    return left


def seen(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """How many of the rows are about a raw prompt of the others."""
    known = {_words(row) for row in others}
    return sum(_words(row) in known for row in rows)


def _words(row: Row) -> tuple[str, ...]:
    return tuple(origin(row)[1].split())


def clusters(rows: Sequence[Row]) -> list[int]:
    """The number of each row's raw prompt, from 0 in order. Rows with the same number are not independent."""
    names = _groups(rows, None)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [number[name] for name in names]


def split(rows: Sequence[Row], *, fraction: float, seed: int, by: str | None = None) -> tuple[list[Row], list[Row]]:
    """(train, held): round(fraction · groups) groups of rows are held out, at least one; no prompt is in both.

    by: the column that makes groups; by default asked_id if a row has it, else prompt_id. Which groups are held out
    depends only on the seed and their ids, never on the order of rows. Rows with the same prompt under two ids stay
    together. Raises DataError if there are fewer than two groups.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"--held-out: the held-out fraction is {fraction}; it must be at least 0 and below 1")
    if fraction == 0:
        return list(rows), []
    groups = _groups(rows, by)
    distinct = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    if len(distinct) < 2:
        name = by or "prompt_id"
        where = f"{place(rows[0])}: " if rows else ""
        raise DataError(
            f"{where}cannot hold out rows by {name}: there are {len(distinct)} distinct ones, two are needed"
        )
    held = set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, group in zip(rows, groups, strict=True):
        sides[group in held].append(row)
    return sides


def write(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows to .parquet, .jsonl or .jsonl.gz; an interrupted write leaves no file. Raises DataError."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if not target.name.endswith((".parquet", ".jsonl", ".jsonl.gz")):
        raise DataError(f"cannot write {target}: the name must end in .parquet, .jsonl or .jsonl.gz")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".parquet":
            _write_parquet(rows, temporary)
        else:
            text = "".join(f"{_json(row)}\n" for row in rows).encode()
            temporary.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {target}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cut_hint(candidates: Sequence[Row]) -> str:
    """The end of a message that says what to do about answers that were cut; empty if none was."""
    cut = [row["length"] for row in candidates if not row["finished"]]
    if not cut:
        return ""
    counted = f"{len(cut)} of {len(candidates)} answers were cut, the longest at {max(cut)} tokens"
    return f"; {counted}: for more finished ones, generate again with a larger --max-new-tokens"


def flip_labels(rows: Sequence[Row], *, p: float, seed: int) -> tuple[list[Row], np.ndarray]:
    """Exact label noise: swap chosen and rejected in exactly round(p · N) pairs; returns the pairs and the mask (N,).

    Flip training pairs only. One seed gives one mask, which all members of an ensemble share. A pair keeps its
    strength, which is part of the label that is now wrong. Raises DataError unless 0 ≤ p ≤ 1.
    """
    if not 0 <= p <= 1:
        raise DataError(f"the share of flipped labels is {p}; it must be between 0 and 1")
    mask = np.zeros(len(rows), dtype=bool)
    stream = np.random.default_rng(np.random.SeedSequence([seed, *b"label noise"]))
    mask[stream.permutation(len(rows))[: round(p * len(rows))]] = True
    return apply_flips(rows, mask), mask


def apply_flips(rows: Sequence[Row], mask: np.ndarray) -> list[Row]:
    """Swap the pairs whose entry of `mask` (N,) is true, and note it in `flipped`; done twice, it changes nothing."""
    if len(mask) != len(rows):
        raise DataError(f"the flip mask has {len(mask)} entries for {len(rows)} pairs")
    result = []
    for row, flip in zip(rows, mask, strict=True):
        row = exchanged(row) if flip else row
        result.append(row | {"flipped": bool(row.get("flipped", False)) ^ bool(flip)})
    return result


def _names(columns: str | Mapping[str, str] | None) -> Mapping[str, str]:
    """The file's name of each of our columns, from "prompt=question,chosen=good" or a mapping."""
    if not isinstance(columns, str) or not columns:
        return columns or {}
    pairs = [entry.partition("=") for entry in columns.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise DataError(f"--columns {columns}: write ours=theirs, as in prompt=question,chosen=good")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _renamed(source: Source, columns: Mapping[str, str]) -> Source:
    if not columns:
        return source
    for theirs in columns.values():
        if theirs not in source.rows[0]:
            raise DataError(f"{source.name} has no column {theirs!r}{_nearest(theirs, source.rows[0])}")
    taken = set(columns.values())
    rows = [
        {k: v for k, v in row.items() if k not in taken}
        | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        for row in source.rows
    ]
    return Source(source.name, rows, source.unit, source.numbers)


def _layout(source: Source, kind: str) -> Layout:
    present = source.rows[0]
    for layout in LAYOUTS[kind]:
        if all(name in present for name in layout.needs):
            return layout
    needs = LAYOUTS[kind][0].needs
    missing = [name for name in needs if name not in present]
    raise DataError(
        f"{source.at(0)}: {kind} need {', '.join(needs)}; missing {', '.join(missing)}"
        f"{_nearest(missing[0], present)}; rename with columns {missing[0]}=NAME"
    )


def _gathered(source: Source, layout: Layout) -> tuple[Source, Layout, Counter[str]]:
    """Pairs made of rows with one answer each (other rows stay as they are), and how many rows are left out, by reason.

    A pair stands in the place of the first of its rows, and has the other columns of the chosen one."""
    if layout.gather is None:
        return source, layout, Counter()
    pairs, alone = layout.gather(source)
    pairs.sort(key=min)
    numbers = [source.numbers[min(pair)] if source.numbers else min(pair) + 1 for pair in pairs]
    answer = layout.needs[1]
    rows = [
        {**source.rows[good], "chosen": source.rows[good].get(answer), "rejected": source.rows[bad].get(answer)}
        for good, bad in pairs
    ]
    made = replace(layout, needs=("prompt", "chosen", "rejected"), reads=layout.needs, gather=None)
    return Source(source.name, rows, source.unit, numbers), made, +Counter(alone)


def _nearest(name: str, present: Row) -> str:
    near = difflib.get_close_matches(name, [str(column) for column in present], n=1)
    return f" (present: {', '.join(map(str, present))}{f'; nearest: {near[0]}' if near else ''})"


def _converted(
    source: Source, kind: Kind, layout: Layout, on_contradiction: OnContradiction, on_tie: str
) -> tuple[list[Row], Counter[str], int]:
    """The rows, how many were left out by reason, and in how many pairs the answers were exchanged."""
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    prompts: dict[Any, str] = {}
    against: list[tuple[int, str]] = []  # pairs of which the rejected answer is the better one
    for i, raw in enumerate(source.rows):
        try:
            row = _checked(raw, kind, layout)
            _check_id(row, kind, prompts)
            if kind == "pairs":
                preferred = _preferred(row)
                if preferred == 0 and on_tie == "drop":
                    raise Skip("neither answer is better (strength 0)")
                if preferred < 0:
                    name = "probability" if "probability" in row else "strength"
                    against.append((i, f"{name} is {row[name]:.4g}"))
                    row = _resolved(row, on_contradiction)
        except Skip as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            raise DataError(f"{source.at(i)}: {error}") from error
        else:
            rows.append(Placed.at(row, source.at(i)))
    if against and on_contradiction == "error":
        i, words = against[0]
        raise DataError(
            f"{source.at(i)}: {words}, so the rejected answer is the better one, as in {len(against)} of "
            f"{len(source.rows)} rows; --on-contradiction swap exchanges their answers, drop leaves them out, "
            "keep takes them as they stand"
        )
    return rows, dropped, len(against) * (on_contradiction == "swap")


def _preferred(row: Row) -> float:
    """Which answer a pair's own numbers prefer: above 0 chosen, below 0 rejected, 0 neither; 1 without numbers."""
    if answer(row, "chosen") == answer(row, "rejected"):
        raise Skip("chosen equals rejected")
    if "strength" not in row:
        return 1.0
    if row["strength"] * (row.get("probability", 0.5) - 0.5) < 0:
        raise ValueError(
            f"strength is {row['strength']:.4g} but probability is {row['probability']:.4g}: they disagree"
        )
    return row["strength"]


def _resolved(row: Row, on_contradiction: OnContradiction) -> Row:
    """A pair whose rejected answer is the better one, treated as `on_contradiction` says."""
    if on_contradiction == "drop":
        raise Skip(CONTRADICTION)
    if on_contradiction != "swap":
        return row
    turned = {"probability": 1 - row["probability"]} if "probability" in row else {}
    return exchanged(row) | {"strength": -row["strength"]} | turned


def exchanged(row: Row) -> Row:
    """Exchange the answers of a pair, and all columns that come in twos, such as chosen_logp and rejected_logp."""
    return row | {name: row[_twin(name)] for name in row if _twin(name) in row}


def twins(one: str, other: str) -> bool:
    """Whether `exchanged` sees that two columns belong to the two answers of a pair.

    >>> twins("chosen_logp", "rejected_logp"), twins("lw", "ll")
    (True, False)
    """
    return one != other and _twin(one) == other


def _twin(name: str) -> str:
    """The name of the column about the other answer."""
    return re.sub("chosen|rejected", lambda found: "rejected" if found[0] == "chosen" else "chosen", name)


def _check_id(row: Row, kind: Kind, prompts: dict[Any, str]) -> None:
    """Refuse an id that stands for two prompts: splits, counts and random streams go by ids."""
    text, seen = plain(row["prompt"]), row["prompt_id"] in prompts
    if prompts.setdefault(row["prompt_id"], text) != text:
        raise ValueError(f"prompt_id {row['prompt_id']!r} already belongs to another prompt")
    if seen and kind == "prompts":
        raise Skip("the prompt is there already")


def _checked(raw: Row, kind: Kind, layout: Layout) -> Row:
    """Our columns, then the file's others. Raises ValueError without the place, which the caller adds."""
    missing = [name for name in layout.needs if name not in raw]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    ours = layout.convert(raw)
    bare = kind == "demos" and ours["prompt"] == "" and "text" in layout.needs  # a text without a prompt
    prompt = ours["prompt"] = "" if bare else _checked_prompt(ours["prompt"])
    for name in _TEXTS.get(kind, ("response",)):
        if not isinstance(ours[name], str):
            raise ValueError(f"{name} must be text, not {ours[name]!r:.60}")
    if kind in _NONEMPTY and not ours[_NONEMPTY[kind]].strip() and not ours.get(f"{_NONEMPTY[kind]}_fields"):
        raise ValueError(f"{_NONEMPTY[kind]} is empty")
    named = _named(raw, "prompt_id", prompt or ours["response"])
    if kind == "prompts":
        return {"prompt_id": named, "prompt": prompt, **_asked(raw)}
    used = {"prompt_id", *ours, *layout.needs, *layout.reads}
    others = {name: value for name, value in raw.items() if name not in used and value is not None}
    row = {"prompt_id": named, **ours, **others, **_asked(raw)}
    _check_numbers(row, kind)
    if kind == "pairs" and "probability" in row and "strength" not in row:
        row["strength"] = _log_odds(row["probability"])
    return row


def _asked(raw: Row) -> Row:
    """The columns about the raw prompt; none unless the row has both the raw prompt and its preferences."""
    if raw.get("asked") is None or raw.get("preferences") is None:
        return {}
    asked, ids = _checked_prompt(raw["asked"], "asked"), raw["preferences"]
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"preferences must be a list of texts, not {ids!r:.60}")
    return {"asked": asked, "asked_id": _named(raw, "asked_id", asked), "preferences": ids}


def _named(raw: Row, name: str, prompt: Any) -> str | int:
    """The id in a column, or one derived from the prompt."""
    given = raw.get(name)
    if given is None:
        return prompt_id(prompt)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ValueError(f"{name} must be text or a whole number, not {given!r:.60}")
    return given


def _checked_prompt(prompt: Any, name: str = "prompt") -> Any:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{name} is empty")
        return prompt
    turns = messages(prompt, name) if isinstance(prompt, list) else None
    if turns is None:
        raise ValueError(f"{name} must be text or a list of messages, not {prompt!r:.60}")
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{name} ends with an assistant turn; it must end with what is to be answered")
    return turns


def _check_numbers(row: Row, kind: str) -> None:
    for name, wanted in _NUMBERS.get(kind, {}).items():
        if name in row and type(row[name]) not in ((int, float) if wanted is float else (wanted,)):
            raise ValueError(f"{name} must be {_WORDS[wanted]}, not {row[name]!r:.60}")
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; numbers must be finite")


def _log_odds(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"probability is {p}; it must be between 0 and 1")
    p = min(max(p, PROBABILITY_FLOOR), 1 - PROBABILITY_FLOOR)
    return math.log(p / (1 - p))


def _groups(rows: Sequence[Row], by: str | None) -> list[str]:
    """The group of each row: rows with the same `by` or the same raw prompt, named by the smallest `by` among them."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    owner: dict[str, str] = {}
    keys = []
    for i, row in enumerate(rows):
        if (by or "prompt_id") not in row:
            raise DataError(f"row {i + 1} has no column {by or 'prompt_id'!r} to split by")
        keys.append(key := str(row[by]) if by else origin(row)[0])
        other = owner.setdefault(origin(row)[1], key) if "prompt" in row else key
        low, high = sorted((root(key), root(other)))
        parent[high] = low
    return [root(key) for key in keys]


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, path)


def _json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# Prompts that are too long: cut, left out or an error, always counted, and named by file and line -------------------


OnLong = Literal["truncate", "drop", "error"]
NAMED = 3  # prompts that a message names


@dataclass(frozen=True)
class Fitted:
    """Rows whose prompts fit, the token ids of these prompts, how many were cut, and what was left out and why."""

    rows: list[Row]
    ids: list[list[int]]
    cut: int
    dropped: list[dict[str, Any]]

    def counts(self) -> dict[str, int]:
        """For the results of a job; empty if every prompt fitted."""
        found = {"prompts_cut": self.cut, "prompts_dropped": len(self.dropped)}
        return {name: count for name, count in found.items() if count}


def room(context: int, new: int, max_prompt: int | None) -> int:
    """The longest prompt, in tokens, that leaves room for `new` drawn tokens. Raises ValueError if there is no room."""
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
    """Rows whose prompts have at most `most` tokens, for a model that reads `context` tokens.

    on_long says what happens to a longer prompt: truncate keeps its end and what the chat template writes around it,
    drop leaves its row out, error refuses it. By default it is cut, unless all prompts are too long: then an option
    must be wrong, and that is an error. Raises DataError for these errors and if no prompt is left, ValueError if
    `most` leaves no room for an answer.
    """
    if most >= context:
        raise ValueError(
            f"--max-prompt {most}: leaves no room for an answer in the {context} tokens that are read; give at most "
            f"{context - 1}, or raise --max-length"
        )
    ids = text_.encode_prompts(tokenizer, [row["prompt"] for row in rows], where=lambda i: place(rows[i]))
    long = [i for i, one in enumerate(ids) if len(one) > most]
    if not long:
        return Fitted(list(rows), ids, 0, [])
    places = ", ".join(f"{place(rows[i])} ({len(ids[i])} tokens)" for i in long[:NAMED])
    named = f"{places}{', ...' if len(long) > NAMED else ''}"
    counted = f"{len(long)} of {len(rows)} prompts have more than {most} tokens"
    if on_long == "error" or (on_long is None and len(long) == len(rows)):
        length = len(ids[long[0]])
        raise DataError(
            f"{place(rows[long[0]])}: the prompt has {length} tokens and leaves no room for an answer in a "
            f"context of {context}: {counted}; --on-long truncate cuts them, drop leaves them out"
        )
    if on_long == "drop":
        note(f"{counted} and are left out: {named}")
        kept = [i for i in range(len(rows)) if len(ids[i]) <= most]
        if not kept:
            raise DataError(f"{place(rows[0])}: no prompt is left: {counted}; raise --max-prompt, or cut them")
        lost = [
            {"prompt_id": rows[i]["prompt_id"], "place": place(rows[i])}
            | {"reason": f"the prompt has {len(ids[i])} tokens, more than {most}"}
            for i in long
        ]
        return Fitted([rows[i] for i in kept], [ids[i] for i in kept], 0, lost)
    note(f"{counted} and are cut, keeping their ends: {named}")
    short = text_.encode_prompts(
        tokenizer, [rows[i]["prompt"] for i in long], max_prompt=most, where=lambda k: place(rows[long[k]])
    )
    for i, one in zip(long, short, strict=True):
        ids[i] = one
    return Fitted(list(rows), ids, len(long), [])
