"""Column layouts of published data sets, each turned into this library's rows: one function a layout.

A converter takes one raw row and returns our columns. It raises ValueError where the row is broken and Skip
where the row is sound but holds nothing to learn from here; `data.load` adds the file and the line.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyrite.sources import Row


class Skip(Exception):  # noqa: N818, a signal and not an error
    """A sound row that is left out; its message is the reason, counted by the loader."""


@dataclass(frozen=True)
class Layout:
    """Columns a layout is recognized by, others it reads, and the function that turns a row into ours."""

    needs: tuple[str, ...]
    convert: Callable[[Row], Row]
    reads: tuple[str, ...] = ()


def messages(value: Any, name: str) -> list[dict[str, str]]:
    """The value as messages with only role and content. Raises ValueError for anything else."""
    shaped = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    if not shaped or not all(isinstance(turn.get(key), str) for turn in value for key in ("role", "content")):
        raise ValueError(f"{name} must be a list of messages, each with a role and a content that are text")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def transcript(text: str) -> list[dict[str, str]]:
    """Messages of a transcript in Anthropic's HH format ("\\n\\nHuman: …\\n\\nAssistant: …")."""
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def merged(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Turns of one speaker in a row joined to one: chat templates want speakers to alternate."""
    result: list[dict[str, str]] = []
    for turn in turns:
        if result and result[-1]["role"] == turn["role"]:
            joined = "\n\n".join(said for said in (result[-1]["content"], turn["content"]) if said)
            result[-1] = {"role": turn["role"], "content": joined}
        else:
            result.append(turn)
    return result


def split_conversations(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> Row:
    """Two conversations that differ in their last answer only: the common turns are the prompt.

    A pair that parts earlier is skipped: its preference is about several turns, some of them the user's,
    and giving it to one answer would invent a label.
    """
    first, second = merged(chosen), merged(rejected)
    for name, turns in (("chosen", first), ("rejected", second)):
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with an assistant turn")
    if len(first) == 1 or len(second) == 1:
        raise ValueError("chosen and rejected hold only an answer; a prompt column is needed")
    if first[:-1] != second[:-1]:
        raise Skip("the conversations part before the last answer")
    return {"prompt": first[:-1], "chosen": first[-1]["content"], "rejected": second[-1]["content"]}


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
    """AlpacaFarm: instruction, input, output_1, output_2, preference = number of the better, 1 or 2."""
    return _preferred(row, [text(row, "output_1"), text(row, "output_2")], first=1)


def pair_from_answers(row: Row) -> Row:
    """Gold-labelled AlpacaFarm: instruction, input, two answers, preference = index of the better, 0 or 1."""
    answers = row["answers"]
    if not isinstance(answers, list) or len(answers) != 2 or not all(isinstance(one, str) for one in answers):
        raise ValueError("answers must be a list of two texts")
    return _preferred(row, answers, first=0)


def pair_from_question(row: Row) -> Row:
    """Stack-exchange pairs: question, response_j (the better), response_k."""
    return {
        "prompt": text(row, "question"),
        "chosen": text(row, "response_j"),
        "rejected": text(row, "response_k"),
    }


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
    return {"prompt": turns[:-1], "response": turns[-1]["content"]}


def demo_from_instruction(row: Row) -> Row:
    """Alpaca: instruction, input, output."""
    return {"prompt": instruction(row), "response": text(row, "output")}


def prompt_from_messages(row: Row) -> Row:
    """A conversation without its closing assistant turn."""
    turns = merged(messages(row["messages"], "messages"))
    return {"prompt": turns[:-1] if turns[-1]["role"] == "assistant" else turns}


def instruction(row: Row) -> str:
    """Alpaca prompt: the instruction verbatim, and the input on the next line where there is one."""
    extra = text(row, "input") if row.get("input") is not None else ""
    return text(row, "instruction") + (f"\n{extra}" if extra.strip() else "")


def text(row: Row, name: str) -> str:
    """The text in a column. Raises ValueError where it is something else."""
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be text, not {row[name]!r:.60}")
    return row[name]


def _preferred(row: Row, answers: list[str], *, first: int) -> Row:
    preference = row.get("preference")
    if preference is None:
        raise Skip("it has no preference")
    if isinstance(preference, bool) or preference not in (first, first + 1):
        raise ValueError(f"preference must be {first} or {first + 1}, not {preference!r:.60}")
    better = int(preference) - first
    return {"prompt": instruction(row), "chosen": answers[better], "rejected": answers[1 - better]}


def _same(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


CANDIDATE = ("prompt", "response", "sample", "finished", "length", "logp")
# The first layout of a kind whose columns are all there is taken; the first of all is our own.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "prompts": (
        Layout(("prompt",), _same("prompt")),
        Layout(("messages",), prompt_from_messages),
        Layout(("instruction",), lambda row: {"prompt": instruction(row)}, reads=("input",)),
        Layout(("question",), lambda row: {"prompt": text(row, "question")}),
        Layout(("chosen", "rejected"), lambda row: {"prompt": pair_without_prompt(row)["prompt"]}),
    ),
    "demos": (
        Layout(("prompt", "response"), _same("prompt", "response")),
        Layout(("prompt", "completion"), demo_from_completion),
        Layout(("messages",), demo_from_messages, reads=("prompt",)),
        Layout(("instruction", "output"), demo_from_instruction, reads=("input",)),
    ),
    "pairs": (
        Layout(("prompt", "chosen", "rejected"), pair_with_prompt),
        Layout(("chosen", "rejected"), pair_without_prompt),
        Layout(("instruction", "output_1", "output_2", "preference"), pair_from_outputs, reads=("input",)),
        Layout(("instruction", "answers", "preference"), pair_from_answers, reads=("input",)),
        Layout(("question", "response_j", "response_k"), pair_from_question),
    ),
    "candidates": (Layout(CANDIDATE, _same(*CANDIDATE)),),
}
