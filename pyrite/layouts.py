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
from pyrite.templates import OF_TOOLS, SHOWN

Message = dict[str, Any]


class Skip(Exception):  # noqa: N818, a signal and not an error
    """A sound row that is left out; its message is the reason, counted by the loader."""


@dataclass(frozen=True)
class Layout:
    """Columns a layout is recognized by, others it reads, and the function that turns a row into ours.

    gather: of layouts with one answer a row, what makes pairs of the rows before they are converted: the pairs, each
    with the number of the row it begins with, and how many rows are left out by reason.
    """

    needs: tuple[str, ...]
    convert: Callable[[Row], Row]
    reads: tuple[str, ...] = ()
    gather: Callable[[list[Row]], tuple[list[tuple[int, Row]], dict[str, int]]] | None = None


def messages(value: Any, name: str) -> list[Message]:
    """The value as messages: role, content, and the further fields a chat template may write (`templates.SHOWN`).

    A turn of tool calls needs no content. Raises ValueError for anything else.
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
    """The columns of an answer: its text, and as NAME_fields what else its message holds."""
    fields = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return {name: turn["content"]} | ({f"{name}_fields": fields} if fields else {})


def transcript(text: str) -> list[Message]:
    """Messages of a transcript in Anthropic's HH format ("\\n\\nHuman: …\\n\\nAssistant: …")."""
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def merged(turns: list[Message]) -> list[Message]:
    """Turns of one speaker in a row joined to one: chat templates want speakers to alternate; not those with fields."""
    result: list[Message] = []
    for turn in turns:
        if result and result[-1]["role"] == turn["role"] and len(result[-1]) == len(turn) == 2:
            joined = "\n\n".join(said for said in (result[-1]["content"], turn["content"]) if said)
            result[-1] = {"role": turn["role"], "content": joined}
        else:
            result.append(turn)
    return result


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Row:
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
    answers, value = [text(row, "output_1"), text(row, "output_2")], row["preference"]
    if not isinstance(value, float) or not 1 < value < 2:
        return _preferred(row, answers, first=1)
    if value == 1.5:
        raise Skip("neither answer is better (preference 1.5)")
    pair = _preferred({**row, "preference": round(value)}, answers, first=1)
    return pair | {"probability": max(value - 1, 2 - value)}


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


def pair_from_votes(row: Row) -> Row:
    """SHP: history (of the post), human_ref_A, human_ref_B, labels = 1 where A has more votes, else 0."""
    return _better(row, row["history"], "human_ref_A", "human_ref_B", first=_label(row["labels"], "labels"))


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


def pairs_of_labels(rows: list[Row]) -> tuple[list[tuple[int, Row]], dict[str, int]]:
    """Unpaired rows (prompt, completion, label): the first good answer to a prompt and its first bad one, and so on."""
    groups: dict[str, tuple[list[int], list[int]]] = {}
    for i, row in enumerate(rows):
        good = _label(row.get("label"), "label", where=i)
        groups.setdefault(repr(row.get("prompt")), ([], []))[not good].append(i)
    pairs = [(rows[a], rows[b], min(a, b)) for good, bad in groups.values() for a, b in zip(good, bad, strict=False)]
    if not pairs:
        raise ValueError(
            "no prompt has both an answer with label true and one with label false, and pairs are learned from here; "
            "have a judge compare answers (`pyrite generate`, `pyrite label --judge`), or give the file to `pyrite sft`"
        )
    kept = [
        (i, {**good, "chosen": good.get("completion"), "rejected": bad.get("completion")}) for good, bad, i in pairs
    ]
    alone = len(rows) - 2 * len(pairs)
    reason = "no answer with the other label is left for their prompt"
    return sorted(kept, key=lambda pair: pair[0]), {reason: alone} if alone else {}


def pairs_of_scores(rows: list[Row]) -> tuple[list[tuple[int, Row]], dict[str, int]]:
    """HelpSteer's rows (prompt, response, helpfulness, ...): answers 0 and 1, 2 and 3, ... to a prompt are compared,
    and the more helpful one is chosen."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        value = row.get("helpfulness")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MisplacedError(f"helpfulness must be a number, not {value!r:.60}", i)
        groups.setdefault(repr(row.get("prompt")), []).append(i)
    pairs, ties, alone = [], 0, 0
    for group in groups.values():
        alone += len(group) % 2
        for a, b in zip(group[::2], group[1::2], strict=False):
            if rows[a]["helpfulness"] == rows[b]["helpfulness"]:
                ties += 2
                continue
            good, bad = (a, b) if rows[a]["helpfulness"] > rows[b]["helpfulness"] else (b, a)
            sides = {"chosen": rows[good].get("response"), "rejected": rows[bad].get("response")}
            pairs.append((a, {"prompt": rows[a].get("prompt"), **sides}))
    if not pairs:
        raise ValueError("no prompt has two answers of which one is more helpful, and pairs are learned from here")
    counts = {"two answers to a prompt are equally helpful": ties, "the only answer left to its prompt": alone}
    return pairs, {reason: count for reason, count in counts.items() if count}


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


def prompt_from_turns(row: Row) -> Row:
    """ShareGPT's conversation without its closing answer."""
    return prompt_from_messages({"messages": _opened(row)})


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


class MisplacedError(ValueError):
    """A broken row that is not the one at hand; `row` is its number from 0."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def _opened(row: Row) -> list[dict[str, str]]:
    """ShareGPT's turns, after the system text if there is one."""
    turns = merged(sharegpt(row["conversations"]))
    if isinstance(row.get("system"), str) and row["system"].strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row["system"]}, *turns]
    begun = turns[1:] if turns[0]["role"] == "system" else turns
    if not begun or begun[0]["role"] != "user":
        raise Skip("the conversation does not begin with the user")
    return turns


def _label(value: Any, name: str, *, where: int | None = None) -> bool:
    """A label true or false, or 1 or 0."""
    if value not in (True, False) or not isinstance(value, (bool, int, float)):
        message = f"{name} must be true or false (or 1 or 0), not {value!r:.60}"
        raise ValueError(message) if where is None else MisplacedError(message, where)
    return bool(value)


def _better(row: Row, prompt: Any, one: str, other: str, *, first: bool) -> Row:
    chosen, rejected = (one, other) if first else (other, one)
    return {"prompt": prompt, "chosen": text(row, chosen), "rejected": text(row, rejected)}


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


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
SPEAKERS |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}
VOTES = ("history", "human_ref_A", "human_ref_B", "labels")
CANDIDATE = ("prompt", "response", "sample", "finished", "length", "logp")
# The first layout of a kind whose columns are all there is taken; the first of all is our own.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "prompts": (
        Layout(("prompt",), _same("prompt")),
        Layout(("messages",), prompt_from_messages),
        Layout(("instruction",), lambda row: {"prompt": instruction(row)}, reads=("input",)),
        Layout(("question",), lambda row: {"prompt": text(row, "question")}),
        Layout(("conversations",), prompt_from_turns, reads=("system", "chosen", "rejected")),
        Layout(("history",), lambda row: {"prompt": text(row, "history")}),
        Layout(("context",), lambda row: {"prompt": row["context"]}),
        Layout(("chosen", "rejected"), lambda row: {"prompt": pair_without_prompt(row)["prompt"]}),
    ),
    "demos": (
        Layout(("prompt", "response"), _same("prompt", "response")),
        Layout(("prompt", "completion", "label"), demo_from_label),
        Layout(("prompt", "completion"), demo_from_completion),
        Layout(("messages",), demo_from_messages, reads=("prompt",)),
        Layout(("instruction", "output"), demo_from_instruction, reads=("input",)),
        Layout(("conversations",), demo_from_turns, reads=("system",)),
        Layout(("text",), demo_from_text),
    ),
    "pairs": (
        Layout(("prompt", "chosen", "rejected"), pair_with_prompt),
        Layout(("conversations", "chosen", "rejected"), pair_from_turns, reads=("system",)),
        Layout(("chosen", "rejected"), pair_without_prompt),
        Layout(("instruction", "output_1", "output_2", "preference"), pair_from_outputs, reads=("input",)),
        Layout(("instruction", "answers", "preference"), pair_from_answers, reads=("input",)),
        Layout(("question", "response_j", "response_k"), pair_from_question),
        Layout(VOTES, pair_from_votes),
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
        Layout(("instruction", "output"), demo_from_instruction, reads=("input",)),
        Layout(("prompt", "output"), lambda row: {"prompt": row["prompt"], "response": text(row, "output")}),
        Layout(("conversations",), demo_from_turns, reads=("system",)),
    ),
    "candidates": (Layout(CANDIDATE, _same(*CANDIDATE)),),
}
