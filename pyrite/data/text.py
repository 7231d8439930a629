"""Text to token ids: one way to render prompts and responses, for training, scoring and generation alike."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pyrite.core import checkpoints
from pyrite.data.responses import Answer, Prompt, Responses

# Tokens ---------------------------------------------------------------------------------------------------------------

MARK = "▁"  # how sentencepiece writes a space


def to_ids(
    tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool = False, inside: bool = False
) -> list[list[int]]:
    """The ids of N texts, from one tokenizer call, without start and end tokens.

    split_special_tokens: read special tokens that a text spells out as ordinary text. inside: the texts continue other
    texts, so a tokenizer that would write a space before every text writes none.
    """
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    with _inside(tokenizer) if inside else nullcontext():
        return tokenizer(list(texts), **options)["input_ids"]


def to_texts(tokenizer: Any, rows: Sequence[Sequence[int]], *, inside: bool = False) -> list[str]:
    """The texts of N rows of ids, without special tokens: the inverse of `to_ids`.

    inside: the rows continue other rows, so a space at the beginning of a sentencepiece token is part of the text.
    """
    ids = [[int(token) for token in row] for row in rows]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not inside:
        return texts
    special = set(tokenizer.all_special_ids)
    return [_spaces(tokenizer, row, special, text) for row, text in zip(ids, texts, strict=True)]


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
    """Within this block, the tokenizer adds no space before a text."""
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


def _edited(tokenizer: Any) -> dict[str, Any] | None:
    """The normalizer and pre-tokenizer changed so that they add no space, if they differ from the tokenizer's; else
    None."""
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
    """The settings of a normalizer or pre-tokenizer, without those that add a space."""
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


# Chat templates -------------------------------------------------------------------------------------------------------

ChatTurn = Mapping[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")  # one field under three names
CALLS = ("tool_calls", "function_call")
SHOWN = (*REASONING, *CALLS)  # a template must write them, or they would be lost
OF_TOOLS = ("tool_call_id", "name")  # of a tool's turn
RECORD = "pyrite"  # where tokenizer_config.json keeps what this module must remember

_QUESTION, _ANSWER = "Which one is it?", "It is this one."
_OPEN = re.compile(r"(<(\w[\w|]*)>|\[([A-Z_]+)\])\s*\Z")  # a tag at the end of a prompt, such as <think>
_TAG = re.compile(r"<.+>|\[.+\]")
_STANDARD = {"messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now"}


@dataclass(frozen=True)
class Template:
    """What the tokenizer's chat template is told beside the messages."""

    template_args: tuple[str, ...] = ()
    """Variables of the chat template, as in enable_thinking=false; saved with the model, so that whoever loads it
    reads as it was trained."""


PLAIN = Template()


@dataclass(frozen=True)
class AnswerForm:
    """How a model's answers begin and end.

    end: the token that ends an answer; stops: all tokens that end drawing, `end` first. opening: what the template
    writes between the prompt and a plain answer, None where it does not go on from the prompt; closing: between the
    answer and its end; behind: closing, end and what follows. visible: `opening` holds tags that decoding keeps.
    inside: answers go on from their prompt, so that a tokenizer adds no space before them. blind: the template writes
    all turns alike, so it knows prompts only, and an answer goes on from them as it is.
    """

    end: int
    stops: tuple[int, ...]
    opening: str | None = ""
    closing: str = ""
    behind: str = ""
    visible: bool = False
    inside: bool = True
    opening_ids: tuple[int, ...] = ()
    blind: bool = False


@dataclass(frozen=True)
class Body:
    """An answer as a model reads it: its texts, each with whether special tokens in it are read as such, and its end
    token, if any."""

    parts: list[tuple[str, bool]]
    end: int | None


class Unreadable(ValueError):  # noqa: N818, there is a TemplateError already
    """A conversation that a chat template cannot show. The message says why; the caller adds the row."""


def arguments(given: Sequence[str]) -> dict[str, Any]:
    """Template variables from NAME=VALUE. A value is read as JSON if possible (false, 3, "3"), otherwise as text.

    >>> arguments(["enable_thinking=false", "reasoning_effort=low"])
    {'enable_thinking': False, 'reasoning_effort': 'low'}
    """
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"--template-args {one!r}: write NAME=VALUE, as in enable_thinking=false")
        text = value.strip().lower() if value.strip() in ("True", "False") else value.strip()
        try:
            found[name.strip()] = json.loads(text)
        except ValueError:
            found[name.strip()] = value
    return found


def remembering(tokenizer: Any, *, template_args: Sequence[str] = (), ends: Sequence[int] = ()) -> Any:
    """The tokenizer with template arguments and more tokens that end drawing, both kept in its config. It is a copy if
    anything is new. Raises ValueError for arguments that the chat template does not read."""
    record = _record(tokenizer)
    asked = {**record.get("template_args", {}), **arguments(template_args)}
    _check_arguments(tokenizer, asked)
    size, known = len(tokenizer), [*record.get("ends", ()), tokenizer.eos_token_id]
    more = [int(token) for token in ends if token not in known and 0 <= token < size]
    new = {"template_args": asked, "ends": [*record.get("ends", ()), *dict.fromkeys(more)]}
    new = {name: value for name, value in new.items() if value}
    if new == record:
        return tokenizer
    made = copy.copy(tokenizer)
    made.init_kwargs = {**tokenizer.init_kwargs, RECORD: new}
    return made


def template_arguments(tokenizer: Any) -> dict[str, Any]:
    """The variables that the tokenizer's chat template is given beside the messages."""
    return dict(_record(tokenizer).get("template_args", {}))


def render(tokenizer: Any, messages: Sequence[ChatTurn], *, ask: bool) -> str:
    """The text of a conversation. ask: with what the template writes before the next answer. Raises Unreadable if the
    template refuses the conversation."""
    from jinja2 import TemplateError

    told = template_arguments(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False, **told)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unreadable(f"the tokenizer's chat template refuses this prompt: {error}") from error


def _tried(tokenizer: Any, messages: Sequence[ChatTurn], *, ask: bool = False) -> str | None:
    """What `render` returns, or None if the template refuses."""
    try:
        return render(tokenizer, messages, ask=ask)
    except Unreadable:
        return None


def rendered_prompt(tokenizer: Any, messages: Sequence[ChatTurn]) -> str:
    """A prompt as the model is asked it. Raises Unreadable if the template leaves out what a user or the system says,
    or the reasoning or tool calls of a turn."""
    shown = render(tokenizer, messages, ask=True)
    for i, turn in enumerate(messages):
        if turn["role"] in ("user", "system") and str(turn["content"]).strip() not in shown:
            raise Unreadable(
                f"the tokenizer's chat template leaves out what the {turn['role']} says: take that turn out of the "
                "prompt, or give the model a template that shows it"
            )
        for names in (REASONING, CALLS):
            there = [name for name in names if turn.get(name)]
            if not there or _shows(tokenizer, messages, i, names, shown, ask=True):
                continue
            if names is CALLS or not _knows(tokenizer, there[0]):  # reasoning may be shown in the last answer only
                raise Unreadable(_left_out(there[0], "a turn of the prompt"))
    return shown


def rendered_answer(
    tokenizer: Any,
    messages: Sequence[ChatTurn],
    prompt: str,
    answer: str | ChatTurn,
    *,
    finished: bool,
    as_drawn: bool = False,
) -> Body:
    """What the template makes of an answer behind a prompt (the text of `rendered_prompt`).

    An answer that is not finished was cut while it was drawn, so it continues the prompt as it is. as_drawn: an answer
    that the template cannot show continues the prompt as it is, too. Raises Unreadable if it is unclear which part of
    the conversation is the answer, if a think block that the prompt opens stays open, or if the template leaves out a
    part of the answer.
    """
    turn: ChatTurn = {"content": answer} if isinstance(answer, str) else answer
    said, how = str(turn["content"]), answers(tokenizer)
    if how.blind and not any(turn.get(name) for name in SHOWN):
        return Body([(said, False)], how.end if finished else None)
    opened = _opened(tokenizer, prompt)
    if not finished and (how.visible or how.opening is None or opened):
        return Body([(said, False)], None)
    if not finished:
        return Body(_parts(tokenizer, f"{how.opening}{said}", said), None)
    turns = [*messages, {**turn, "role": "assistant"}]
    try:
        return _behind_prompt(tokenizer, turns, prompt, said, opened)
    except Unreadable:
        closed = opened is not None and _closing(opened) in said
        if (closed or as_drawn) and isinstance(answer, str):
            return Body([(_without_opener(said, opened), False)], how.end)
        raise


def answers(tokenizer: Any) -> AnswerForm:
    """How answers begin and end under this tokenizer and its chat template. It is found once, from a probe
    conversation.

    Without a chat template, the end token ends an answer (for encoders, the separator). With one, it is the token that
    the template writes behind an assistant turn, or the end token if it writes none. Raises ValueError, with both
    names, if there is no such token.
    """
    state = json.dumps([tokenizer.chat_template, tokenizer.eos_token_id, _record(tokenizer)], default=str)
    kept = _KNOWN.get(tokenizer)
    if kept is None or kept[0] != state:
        found = _templated(tokenizer) if tokenizer.chat_template else _plain(tokenizer)
        kept = _KNOWN[tokenizer] = (state, found)
    return kept[1]


_KNOWN: WeakKeyDictionary[Any, tuple[str, AnswerForm]] = WeakKeyDictionary()


def spoken(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The tokens of a drawn answer without its end token, and without what the template writes before an answer."""
    how = answers(tokenizer)
    row = [int(token) for token in ids]
    ended = bool(row) and row[-1] in how.stops
    row = row[:-1] if ended else row
    opening = list(how.opening_ids)
    if not opening:
        return row
    if how.visible:
        return row[len(opening) :] if ended and row[: len(opening)] == opening else row
    starts = range(len(row) - len(opening), -1, -1)  # a channel may be opened after another one
    found = next((i for i in starts if row[i : i + len(opening)] == opening), None)
    tagged = found and set(opening) & set(tokenizer.all_special_ids)
    return row[found + len(opening) :] if found == 0 or (found is not None and tagged) else row


def trimmed(tokenizer: Any, text: str, *, ended: bool) -> str:
    """The text of a drawn answer without the spaces that the template writes around it."""
    how = answers(tokenizer)
    if how.opening and (ended or not how.visible) and text.startswith(how.opening):
        text = text[len(how.opening) :]
    return text.removesuffix(how.closing) if ended and how.closing else text


def _behind_prompt(
    tokenizer: Any, turns: Sequence[ChatTurn], prompt: str, said: str, opened: re.Match[str] | None
) -> Body:
    """The answer as the template shows it behind the prompt, which may have opened a think block for the answer."""
    shown = render(tokenizer, turns, ask=False)
    for names in (REASONING, CALLS):
        there = [name for name in names if turns[-1].get(name)]
        if there and not _shows(tokenizer, turns, len(turns) - 1, names, shown, ask=False):
            raise Unreadable(_left_out(there[0], "the answer"))
    if not shown.startswith(prompt):
        if opened:
            raise Unreadable(_stays_open(tokenizer, opened))
        at = len(_shared(shown, prompt))
        raise Unreadable(
            f"the chat template asks for an answer with {prompt[at:][:40]!r} and shows the answer after "
            f"{shown[at:][:40]!r}: it cannot be told which part is the answer; mend the template"
        )
    body, end = _until_end(tokenizer, shown[len(prompt) :], answers(tokenizer))
    if "".join(said.split()) not in "".join(body.split()):
        raise Unreadable("the chat template leaves out a part of the answer; give reasoning as reasoning_content")
    if opened and _closing(opened) not in body:
        raise Unreadable(_stays_open(tokenizer, opened))
    return Body(_parts(tokenizer, body, said), end)


def _until_end(tokenizer: Any, rest: str, how: AnswerForm) -> tuple[str, int]:
    """The text before the end token of the answer, and that token. A tool call may have an end token of its own."""
    if rest.endswith(how.behind):
        return rest[: len(rest) - len(how.behind)] + how.closing, how.end
    for token in how.stops:
        name = tokenizer.convert_ids_to_tokens(token)
        if rest.rstrip().endswith(name):
            return rest.rstrip().removesuffix(name), token
    name = tokenizer.convert_ids_to_tokens(how.end)
    before, found, _ = rest.rpartition(name)
    if not found:
        raise Unreadable(f"the chat template ends this answer with {rest[-20:]!r} and not with {name!r}")
    return before, how.end


def _parts(tokenizer: Any, body: str, said: str) -> list[tuple[str, bool]]:
    """The body in parts: special tokens that the template writes are read as such, those that the answer spells out as
    text."""
    if body == said:
        return [(said, False)]
    spelled = next((tag for tag in tokenizer.all_special_tokens if tag in said), None)
    if spelled is None:
        return [(body, True)]
    for text in (said, said.strip()):
        before, found, after = body.rpartition(text)
        if found:
            return [part for part in ((before, True), (text, False), (after, True)) if part[0]]
    raise Unreadable(f"the answer spells out {spelled!r}, and the chat template rewrites it: take that out")


def _templated(tokenizer: Any) -> AnswerForm:
    user, assistant = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    shown = _tried(tokenizer, [user, assistant])
    if shown is not None and shown == _tried(tokenizer, [user, {**assistant, "role": "user"}]):
        end = _plain(tokenizer).end
        return AnswerForm(end, _stops(tokenizer, end), blind=True)
    end, closing, behind = _ending(tokenizer)
    stops = _stops(tokenizer, end)
    asked = _tried(tokenizer, [user], ask=True)
    if asked is None or shown is None:
        return AnswerForm(end, stops, "", closing, behind)
    before = shown.rpartition(_ANSWER)[0]
    opening = before[len(asked) :] if before.startswith(asked) else None
    inside = _goes_on(tokenizer, asked, shown)
    (ids,) = to_ids(tokenizer, [opening or ""], inside=inside)
    visible = bool(to_texts(tokenizer, [ids])[0].strip())
    return AnswerForm(end, stops, opening, closing, behind, visible, inside, tuple(ids))


def _goes_on(tokenizer: Any, asked: str, shown: str) -> bool:
    """Whether the tokenizer adds no space before the answer when it reads the whole conversation at once."""
    if _edited(tokenizer) is None or not shown.startswith(asked):
        return True
    whole, first = to_ids(tokenizer, [shown, asked])
    (rest,), (inside,) = (to_ids(tokenizer, [shown[len(asked) :]], inside=go) for go in (False, True))
    if inside == rest or whole == first + inside:
        return True
    return whole[len(whole) - len(rest) :] != rest


def _ending(tokenizer: Any) -> tuple[int, str, str]:
    """The token that ends an answer, what the template writes before this token, and everything it writes behind an
    answer."""
    last, between = _written_behind(tokenizer), _written_behind(tokenizer, goes_on=True)
    eos, ours = tokenizer.eos_token_id, {tokenizer.eos_token_id, *_record(tokenizer).get("ends", ())}
    if last is None:
        return _plain(tokenizer).end, "", ""
    shared = _shared(last, between) if between is not None else ""
    tags = _tags(tokenizer, shared) or _tags(tokenizer, last)
    if tags:
        end = next((token for token in tags if token in ours), tags[0])
        return end, last.partition(tokenizer.convert_ids_to_tokens(end))[0], last
    if last.strip():
        (ids,) = to_ids(tokenizer, [last.strip()])
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and _TAG.fullmatch(last.strip()):
            return ids[0], last[: len(last) - len(last.lstrip())], last
        raise ValueError(
            f"the chat template ends an answer with {last.strip()!r}, which the tokenizer reads as {len(ids)} tokens, "
            f"and not with one such as {tokenizer.eos_token!r}, its end token: add {last.strip()!r} to the tokenizer "
            "as a special token, or mend the template"
        )
    follows = _tags(tokenizer, between or "")[:1]  # as GLM-4.5: the next turn's tag ends an answer
    if follows and (follows[0] in ours or follows[0] not in _header(tokenizer)):
        before, found, _ = (between or "").partition(tokenizer.convert_ids_to_tokens(follows[0]))
        if found and not before.strip():
            return follows[0], before, last
    if eos is None:
        raise ValueError(
            f"no token ends an answer: the chat template writes {last!r} behind one, and tokenizer.eos_token is "
            f"{tokenizer.eos_token}; set an end-of-sequence token and save the tokenizer again"
        )
    return eos, "", last


def _plain(tokenizer: Any) -> AnswerForm:
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise ValueError(
            "no token ends an answer: the tokenizer has no end-of-sequence token and no chat template that writes "
            "one; set tokenizer.eos_token and save it again"
        )
    return AnswerForm(found, _stops(tokenizer, found))


def _stops(tokenizer: Any, end: int) -> tuple[int, ...]:
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(dict.fromkeys((end, *eos, *_record(tokenizer).get("ends", ()))))


def _written_behind(tokenizer: Any, *, goes_on: bool = False) -> str | None:
    """What the template writes behind an answer. goes_on: up to and with the next question."""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    turns += turns[:1] if goes_on else []
    for first in ([], [{"role": "system", "content": "Answer."}]):
        shown = _tried(tokenizer, [*first, *turns])
        if shown is not None:
            _, found, behind = shown.rpartition(_ANSWER)
            return behind if found else None
    return None


def _header(tokenizer: Any) -> list[int]:
    """The tag that the template writes before a user turn."""
    shown = _tried(tokenizer, [{"role": "user", "content": _QUESTION}]) or ""
    return _tags(tokenizer, shown.partition(_QUESTION)[0])[-1:]


def _shared(a: str, b: str) -> str:
    """The common beginning of two texts."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _tags(tokenizer: Any, text: str) -> list[int]:
    """The added tokens in a text."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return [token for token in to_ids(tokenizer, [text])[0] if token in added] if text else []


def _shows(tokenizer: Any, turns: Sequence[ChatTurn], i: int, names: Sequence[str], shown: str, *, ask: bool) -> bool:
    """Whether the rendering depends on these fields of a turn."""
    without = {name: value for name, value in turns[i].items() if name not in names}
    return _tried(tokenizer, [*turns[:i], without, *turns[i + 1 :]], ask=ask) != shown


def _knows(tokenizer: Any, name: str) -> bool:
    """Whether the template shows this field in the last answer."""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER, name: "So."}]
    return "So." in (_tried(tokenizer, turns) or "")


def _left_out(name: str, of: str) -> str:
    return f"the chat template leaves out {name} of {of}: take a template that shows it, or remove it from the data"


def _stays_open(tokenizer: Any, opened: re.Match[str]) -> str:
    known = sorted(_variables(tokenizer))
    args = f", or set --template-args (this template reads {', '.join(known)})" if known else ""
    return (
        f"the chat template opens {opened[1]} before an answer, and this answer does not close it: give its reasoning "
        f"as reasoning_content, or write it before {_closing(opened)} in the answer{args}"
    )


def _opened(tokenizer: Any, prompt: str) -> re.Match[str] | None:
    """The think block that a prompt leaves open: a tag at its end for which there is a closing tag."""
    found = _OPEN.search(prompt)
    if found is None or _closing(found) in answers(tokenizer).behind:  # the template closes it by itself
        return None
    closing, name = _closing(found), (found[2] or found[3]).lower()
    known = closing in tokenizer.get_chat_template() or closing in tokenizer.get_vocab()
    return found if known or name.startswith(("think", "thought", "reason")) else None


def _closing(opened: re.Match[str]) -> str:
    return f"</{opened[2]}>" if opened[2] else f"[/{opened[3]}]"


def _without_opener(said: str, opened: re.Match[str] | None) -> str:
    """The answer without a tag that the prompt has already opened for it."""
    if opened is None or not said.lstrip().startswith(opened[1]):
        return said
    said = said.lstrip()
    return said.removeprefix(opened[0] if said.startswith(opened[0]) else opened[1])


def _record(tokenizer: Any) -> dict[str, Any]:
    return dict((getattr(tokenizer, "init_kwargs", None) or {}).get(RECORD) or {})


def _check_arguments(tokenizer: Any, asked: Mapping[str, Any]) -> None:
    if not asked:
        return
    if not tokenizer.chat_template:
        raise ValueError(f"--template-args {next(iter(asked))}: this tokenizer has no chat template")
    known = _variables(tokenizer)
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it reads {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f"--template-args {name}: the chat template reads no variable of that name{hint}")


def _variables(tokenizer: Any) -> set[str]:
    """The variables that a template reads, without messages and the names of special tokens."""
    from jinja2 import TemplateError, meta
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.get_chat_template())
    try:
        found = meta.find_undeclared_variables(environment.parse(source))
    except TemplateError:
        return set()
    return {name for name in found if name not in _STANDARD and not name.endswith("_token")}


# Rendering ------------------------------------------------------------------------------------------------------------

_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_PADS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<|vision_pad|>",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


def plain(prompt: Prompt) -> str:
    """Text form of a prompt, for scorers, for ids and for tokenizers without a chat template.

    A str is itself, a single user turn its content; a longer conversation becomes a transcript
    "Human:\\n…\\n\\nAssistant:\\n…\\n\\nAssistant:\\n" that the response continues. Reasoning and tool
    calls of a turn stand behind its content, as JSON.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    turns = [f"{_SPEAKERS.get(turn['role'], turn['role'].title())}:\n{_content(turn)}" for turn in prompt]
    return "\n\n".join([*turns, "Assistant:\n"])


def _content(turn: Mapping[str, Any]) -> str:
    fields = {name: turn[name] for name in SHOWN if turn.get(name)}
    return turn["content"] + (f"\n{json.dumps(fields, ensure_ascii=False, sort_keys=True)}" if fields else "")


def end_id(tokenizer: Any) -> int:
    """The id of the token that ends an answer: the one that the chat template writes behind an answer, else the end-of-
    sequence token (for encoders, the separator). Raises ValueError, naming both, if there is none."""
    return answers(tokenizer).end


def stop_ids(tokenizer: Any) -> list[int]:
    """The ids of all tokens that end drawing: `end_id`, the end-of-sequence token, those of the generation config."""
    return list(answers(tokenizer).stops)


def encode(
    tokenizer: Any,
    said: Responses,
    *,
    max_length: int | None = None,
    max_prompt: int | None = None,
    where: Callable[[int], str] | None = None,
    as_drawn: bool = False,
) -> Responses:
    """Add tokens to texts, with a few tokenizer calls. All text reaches a model in this way.

    A response is everything that the chat template writes behind the prompt: a text, or a message with its other fields
    (reasoning_content, tool_calls). Lengths are in tokens. A prompt longer than `max_prompt` keeps its end (and its
    start token), whatever the response, so that all responses to a prompt share it. A response is cut if prompt and
    response exceed `max_length`: it keeps its start, is `truncated`, and has no end token. as_drawn: the responses were
    drawn by a model, so one that the template cannot show continues the prompt as it is. Raises ValueError, naming
    `where(response)`, if a prompt leaves no room for a response, or if the template would change a response or leave
    out a part of it.
    """
    name, asked = where or _row, said.prompt.tolist()
    first = {p: i for i, p in reversed(list(enumerate(asked)))}
    prompts = [row["prompt"] for row in said.rows]

    def of(p: int) -> str:
        return name(first.get(p, p))

    shown = _shown(tokenizer, prompts, of)
    fronts = _fronts(tokenizer, prompts, shown, of, max_length=max_length, max_prompt=max_prompt, answered=True)
    backs = _backs(tokenizer, said, [shown[p] for p in asked], name, as_drawn=as_drawn)
    room = [None if max_length is None else max_length - len(fronts[p]) for p in asked]
    kept = [back[:left] for back, left in zip(backs, room, strict=True)]
    cut = torch.tensor([len(a) < len(b) for a, b in zip(kept, backs, strict=True)], dtype=torch.bool)
    return replace(
        said,
        prompt_ids=fronts,
        ids=torch.tensor([token for back in kept for token in back], dtype=torch.int64),
        lengths=torch.tensor([len(back) for back in kept], dtype=torch.int64),
        finished=said.finished & ~cut,
        truncated=cut,
        logps=None,
    )


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_prompt: int | None = None,
    where: Callable[[int], str] | None = None,
) -> list[list[int]]:
    """The ids of N prompts; each distinct prompt is rendered once. Limits and errors are those of `encode`."""
    name = where or _row
    shown = _shown(tokenizer, prompts, name)
    return _fronts(tokenizer, prompts, shown, name, max_length=None, max_prompt=max_prompt)


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of N drawn responses, without what `encode` adds: the end token, special tokens, and what the chat
    template writes before an answer. Encoding such a text gives back the tokens it came from."""
    inside, stops = answers(tokenizer).inside, set(stop_ids(tokenizer))
    spoken_rows = [spoken(tokenizer, row) for row in rows]
    texts = to_texts(tokenizer, spoken_rows, inside=inside)
    ended = [bool(len(row)) and int(row[-1]) in stops for row in rows]
    return [trimmed(tokenizer, text, ended=done) for text, done in zip(texts, ended, strict=True)]


def prepare_tokenizer(tokenizer: Any) -> tuple[Any, str | None]:
    """A copy of the tokenizer whose pad token differs from its end token, and a note for the user (None if nothing
    changed).

    The pad token is one that the vocabulary has, so that no embedding is resized. If there is none, pad stays as it is:
    packed batches hold no pad, and masks, never pad ids, mark where a response ends.
    """
    ends = set(stop_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer, None
    problem = "has no pad token" if tokenizer.pad_token_id is None else "pads with its end token"
    vocabulary = tokenizer.get_vocab()
    candidates = [*_PADS, tokenizer.unk_token, tokenizer.bos_token]
    spare = next((token for token in candidates if token in vocabulary and vocabulary[token] not in ends), None)
    if spare is None:
        return (
            tokenizer,
            f"the tokenizer {problem} and has no spare one; batches are packed, so none is needed",
        )
    prepared = copy.deepcopy(tokenizer)
    prepared.pad_token = spare
    return (
        prepared,
        f"the tokenizer {problem}; {spare} pads instead, so that models see where a response ends",
    )


def load_tokenizer(path: str | Path, *, template_args: Sequence[str] = ()) -> tuple[Any, str | None]:
    """The tokenizer of a model folder or Hub name, prepared, with its note.

    It knows how the model ends an answer (`end_id`, `stop_ids`) and which variables its chat template is given: those
    it was saved with, and `template_args`. Raises ValueError if there is no tokenizer, or for variables that its
    template does not read.
    """
    from transformers import AutoTokenizer

    folder = checkpoints.place(path)
    if not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
        hint = checkpoints.inside(folder) or f"; save one there with tokenizer.save_pretrained({str(path)!r})"
        raise ValueError(f"{path} holds no tokenizer{hint}")
    for file in sorted(folder.glob("*token*.json")):
        checkpoints.read_json(file)
    if (folder / "config.json").exists():
        checkpoints.config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("a")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: its tokenizer cannot be loaded ({reason}); copy or save it again") from error
    known = remembering(tokenizer, template_args=template_args, ends=_generation_ends(folder))
    return prepare_tokenizer(known)


def _generation_ends(folder: Path) -> list[int]:
    """The tokens that end an answer by the generation config of a model, or of its base; none without such a file."""
    file = folder / "generation_config.json"
    base = None if file.exists() else checkpoints.base_name(folder)
    if base is not None:
        return _generation_ends(checkpoints.place(base))
    found = checkpoints.read_json(file).get("eos_token_id") if file.exists() else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _row(i: int) -> str:
    return f"row {i + 1}"


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _shown(tokenizer: Any, prompts: Sequence[Prompt], where: Callable[[int], str]) -> list[str]:
    """The prompts as the model is asked them; each distinct prompt is rendered once."""
    texts: dict[str, str] = {}
    keys = [repr(prompt) for prompt in prompts]
    for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        if key not in texts:
            try:
                texts[key] = _rendered(tokenizer, prompt)
            except Unreadable as error:
                raise ValueError(f"{where(row)}: {error}") from error
    return [texts[key] for key in keys]


def _rendered(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt as the model is asked it. Raises Unreadable."""
    if not prompt:
        return ""  # the response is a text without a prompt, which no chat template shows
    if tokenizer.chat_template:
        return rendered_prompt(tokenizer, _messages(prompt))
    _refuse_fields([] if isinstance(prompt, str) else prompt)
    return plain(prompt)


def _refuse_fields(turns: Sequence[ChatTurn]) -> None:
    fields = [name for turn in turns for name in SHOWN if turn.get(name)]
    if fields:
        raise Unreadable(f"this tokenizer has no chat template, so {fields[0]} of a message cannot be shown")


def _fronts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    shown: Sequence[str],
    where: Callable[[int], str],
    *,
    max_length: int | None,
    max_prompt: int | None,
    answered: bool = False,
) -> list[list[int]]:
    """The ids of the prompts, cut if they are too long. answered: a response may stand without a prompt."""
    of = dict(zip(shown, prompts, strict=True))
    whole = _with_start(tokenizer, to_ids(tokenizer, list(of)))
    if answered:
        whole = [ids or [_text_end(tokenizer)] for ids in whole]
    cut = {text: _cut(tokenizer, of[text], ids, max_prompt) for text, ids in zip(of, whole, strict=True)}
    for row, text in enumerate(shown):
        length = len(cut[text])
        if length == 0:
            raise ValueError(f"{where(row)}: the prompt is empty and the tokenizer has no start token")
        if max_length is not None and length >= max_length:
            raise ValueError(
                f"{where(row)}: the prompt has {length} tokens and leaves no room for a response "
                f"in a context of {max_length}; shorten the prompt, or use a model that reads more"
            )
    return [list(cut[text]) for text in shown]


def _backs(
    tokenizer: Any, said: Responses, shown: Sequence[str], where: Callable[[int], str], *, as_drawn: bool
) -> list[list[int]]:
    """The ids of what stands behind the prompt of each response; each distinct conversation is rendered once."""
    how = answers(tokenizer)
    bodies: dict[tuple[str, str, bool], Body] = {}
    keys = []
    for row, (front, prompt, response, flag) in enumerate(
        zip(shown, said.prompts, said.texts, said.finished.tolist(), strict=True)
    ):
        key = (front, response if isinstance(response, str) else repr(response), flag)
        keys.append(key)
        if key not in bodies:
            try:
                bodies[key] = _body(tokenizer, prompt, front, response, finished=flag, drawn=as_drawn)
            except Unreadable as error:
                raise ValueError(f"{where(row)}: {error}") from error
    texts = [part for body in bodies.values() for part in body.parts]
    made = {}
    for tags in (True, False):
        some = [text for text, parsed in texts if parsed == tags]
        ids = to_ids(tokenizer, some, split_special_tokens=not tags, inside=how.inside)
        made |= {(text, tags): row for text, row in zip(some, ids, strict=True)}
    rows = {
        key: [token for part in body.parts for token in made[part]] + ([] if body.end is None else [body.end])
        for key, body in bodies.items()
    }
    return [list(rows[key]) for key in keys]


def _body(tokenizer: Any, prompt: Prompt, shown: str, response: Answer, *, finished: bool, drawn: bool) -> Body:
    if tokenizer.chat_template and prompt:
        return rendered_answer(tokenizer, _messages(prompt), shown, response, finished=finished, as_drawn=drawn)
    if not isinstance(response, str):
        _refuse_fields([response])
        response = str(response["content"])
    end = answers(tokenizer).end if prompt else _text_end(tokenizer)
    return Body([(response, False)], end if finished else None)


def _text_end(tokenizer: Any) -> int:
    """The id of the token that ends a text without a prompt. Models without a start token begin such a text with it."""
    return end_id(tokenizer) if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _start_id(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def _with_start(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    """Add the start token to plain text that lacks it. A chat template writes its own start token, or wants none."""
    start = _start_id(tokenizer)
    if tokenizer.chat_template or start is None:
        return [row if row or start is None else [start] for row in rows]
    return [row if row[:1] == [start] else [start, *row] for row in rows]


def _cut(tokenizer: Any, prompt: Prompt, ids: list[int], most: int | None) -> list[int]:
    """At most `most` ids of a prompt: its end, behind its start token or inside what a chat template writes."""
    if most is None or len(ids) <= most:
        return ids
    if most < 1:
        raise ValueError(f"max_prompt is {most}; it must be at least 1 token")
    if tokenizer.chat_template and (shown := _shortened(tokenizer, prompt, most)):
        return shown
    kept = ids[:1] if most > 1 and ids[0] == _start_id(tokenizer) else []
    return kept + ids[len(ids) - most + len(kept) :]


def _shortened(tokenizer: Any, prompt: Prompt, most: int) -> list[int] | None:
    """The ids of the longest end of a conversation that fits. The oldest turns are left out, then the first one left is
    cut.

    System turns stay, and at least some of the last user turn. None if these alone are too long.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    opening = turns[: asked[0]] if asked and asked[0] and turns[0]["role"] != "assistant" else []

    def ids(at: int, kept: int) -> list[int] | None:
        first = {**turns[at], "content": turns[at]["content"][len(turns[at]["content"]) - kept :]}
        try:
            shown = _rendered(tokenizer, [*opening, first, *turns[at + 1 :]])
        except Unreadable:  # the template refuses what is left
            return None
        (row,) = _with_start(tokenizer, to_ids(tokenizer, [shown]))
        return row if len(row) <= most else None

    for at in asked:
        low, high, found = 1, len(turns[at]["content"]), ids(at, 1)
        if found is None:
            continue
        while low < high:
            middle = (low + high + 1) // 2
            more = ids(at, middle)
            low, high, found = (middle, high, more) if more else (low, middle - 1, found)
        return found
    return None
