"""Chat templates: what a template makes of a conversation, which part of that is the answer, and where an answer ends.

The answer to a prompt is what the template writes behind the prompt's own rendering, which is what a model is asked
with when it draws: an empty think block, a channel and the end of the turn belong to it. A template that opens a think
block in that rendering needs an answer that closes it. What a template knows beside the messages (`Template`), and the
tokens by which a model's generation config ends an answer, are kept in the tokenizer's own config, so that they are
saved with every model and adapter.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from pyrite.tokens import adds_space, to_ids, to_texts

Message = Mapping[str, Any]
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
class Answers:
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
    """An answer as a model reads it: texts, each with whether the tags in it are tags, and its end token, if any."""

    parts: list[tuple[str, bool]]
    end: int | None


class Unreadable(ValueError):  # noqa: N818, there is a TemplateError already
    """A conversation that a template cannot show; the message says why, the caller knows the row."""


def arguments(given: Sequence[str]) -> dict[str, Any]:
    """Template variables from NAME=VALUE; a value is JSON where it can be (false, 3, "3"), else text.

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
    """The tokenizer with template arguments and further tokens that end drawing, kept in its config; a copy where
    there is something new. Raises ValueError for arguments that its chat template does not read."""
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
    """What its chat template is told beside the messages."""
    return dict(_record(tokenizer).get("template_args", {}))


def render(tokenizer: Any, messages: Sequence[Message], *, ask: bool) -> str:
    """Text of a conversation; `ask`: with what the template writes for the next answer to follow.

    Raises Unreadable where the template refuses it.
    """
    from jinja2 import TemplateError

    told = template_arguments(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False, **told)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unreadable(f"the tokenizer's chat template refuses this prompt: {error}") from error


def rendered_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A prompt as a model is asked it. Raises Unreadable where what a user or the system says, or a turn's reasoning or
    tool calls, would be left out."""
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
    messages: Sequence[Message],
    prompt: str,
    answer: str | Message,
    *,
    finished: bool,
    as_drawn: bool = False,
) -> Body:
    """What the template makes of an answer behind a prompt (`rendered_prompt` of the messages).

    An answer that is not finished was cut while it was drawn: it goes on from the prompt as it is. as_drawn: so does
    one that the template cannot show there. Raises Unreadable where it cannot be told which part is the answer, where
    a think block that the prompt opens stays open, or where the template leaves out a part of the answer.
    """
    turn: Message = {"content": answer} if isinstance(answer, str) else answer
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


def answers(tokenizer: Any) -> Answers:
    """How answers begin and end under this tokenizer and its chat template: found once, from a probe conversation.

    Without a chat template the end token ends an answer (the separator, for encoders). With one it is the token that
    the template writes behind an assistant turn; the end token where it writes none.
    Raises ValueError, with both names, where there is no such token.
    """
    state = json.dumps([tokenizer.chat_template, tokenizer.eos_token_id, _record(tokenizer)], default=str)
    kept = _KNOWN.get(tokenizer)
    if kept is None or kept[0] != state:
        found = _templated(tokenizer) if tokenizer.chat_template else _plain(tokenizer)
        kept = _KNOWN[tokenizer] = (state, found)
    return kept[1]


_KNOWN: WeakKeyDictionary[Any, tuple[str, Answers]] = WeakKeyDictionary()


def spoken(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The tokens of a drawn answer without its end, and without what the template opens it with."""
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
    tokenizer: Any, turns: Sequence[Message], prompt: str, said: str, opened: re.Match[str] | None
) -> Body:
    """The answer as the template shows it behind the prompt, which may have opened a think block for it."""
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


def _until_end(tokenizer: Any, rest: str, how: Answers) -> tuple[str, int]:
    """What stands before the end token of the answer, and that token: a tool call may have one of its own."""
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
    """The body with the tags of the template as tags, and those that the answer spells out as text."""
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


def _templated(tokenizer: Any) -> Answers:
    user, assistant = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    if _alike(tokenizer, [user, assistant], [user, {**assistant, "role": "user"}]):
        end = _plain(tokenizer).end
        return Answers(end, _stops(tokenizer, end), blind=True)
    end, closing, behind = _ending(tokenizer)
    stops = _stops(tokenizer, end)
    try:
        asked, shown = render(tokenizer, [user], ask=True), render(tokenizer, [user, assistant], ask=False)
    except Unreadable:
        return Answers(end, stops, "", closing, behind)
    before = shown.rpartition(_ANSWER)[0]
    opening = before[len(asked) :] if before.startswith(asked) else None
    inside = _goes_on(tokenizer, asked, shown)
    (ids,) = to_ids(tokenizer, [opening or ""], inside=inside)
    visible = bool(to_texts(tokenizer, [ids])[0].strip())
    return Answers(end, stops, opening, closing, behind, visible, inside, tuple(ids))


def _alike(tokenizer: Any, a: Sequence[Message], b: Sequence[Message]) -> bool:
    """Whether the template writes two conversations alike."""
    try:
        return render(tokenizer, a, ask=False) == render(tokenizer, b, ask=False)
    except Unreadable:
        return False


def _goes_on(tokenizer: Any, asked: str, shown: str) -> bool:
    """Whether the tokenizer adds no space where the answer begins, reading the whole conversation at once."""
    if not adds_space(tokenizer) or not shown.startswith(asked):
        return True
    whole, first = to_ids(tokenizer, [shown, asked])
    (rest,), (inside,) = (to_ids(tokenizer, [shown[len(asked) :]], inside=go) for go in (False, True))
    if inside == rest or whole == first + inside:
        return True
    return whole[len(whole) - len(rest) :] != rest


def _ending(tokenizer: Any) -> tuple[int, str, str]:
    """The token that ends an answer, what the template writes before it, and all it writes behind an answer."""
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


def _plain(tokenizer: Any) -> Answers:
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise ValueError(
            "no token ends an answer: the tokenizer has no end-of-sequence token and no chat template that writes "
            "one; set tokenizer.eos_token and save it again"
        )
    return Answers(found, _stops(tokenizer, found))


def _stops(tokenizer: Any, end: int) -> tuple[int, ...]:
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(dict.fromkeys((end, *eos, *_record(tokenizer).get("ends", ()))))


def _written_behind(tokenizer: Any, *, goes_on: bool = False) -> str | None:
    """What the template writes behind an answer; `goes_on`: before the next question, this included."""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    turns += turns[:1] if goes_on else []
    for first in ([], [{"role": "system", "content": "Answer."}]):
        try:
            _, found, behind = render(tokenizer, [*first, *turns], ask=False).rpartition(_ANSWER)
        except Unreadable:
            continue
        return behind if found else None
    return None


def _header(tokenizer: Any) -> list[int]:
    """The tag that the template writes before a user turn."""
    try:
        shown = render(tokenizer, [{"role": "user", "content": _QUESTION}], ask=False)
    except Unreadable:
        return []
    return _tags(tokenizer, shown.partition(_QUESTION)[0])[-1:]


def _shared(a: str, b: str) -> str:
    """What two texts begin with alike."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _tags(tokenizer: Any, text: str) -> list[int]:
    """The added tokens in a text."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return [token for token in to_ids(tokenizer, [text])[0] if token in added] if text else []


def _shows(tokenizer: Any, turns: Sequence[Message], i: int, names: Sequence[str], shown: str, *, ask: bool) -> bool:
    """Whether the rendering depends on these fields of a turn."""
    without = {name: value for name, value in turns[i].items() if name not in names}
    try:
        return render(tokenizer, [*turns[:i], without, *turns[i + 1 :]], ask=ask) != shown
    except Unreadable:
        return True


def _knows(tokenizer: Any, name: str) -> bool:
    """Whether the template shows this field of a last answer."""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER, name: "So."}]
    try:
        return "So." in render(tokenizer, turns, ask=False)
    except Unreadable:
        return False


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
    """The think block that a prompt leaves open: a tag at its end that something closes, unlike a turn's."""
    found = _OPEN.search(prompt)
    if found is None or _closing(found) in answers(tokenizer).behind:  # the template closes it by itself
        return None
    closing, name = _closing(found), (found[2] or found[3]).lower()
    known = closing in tokenizer.get_chat_template() or closing in tokenizer.get_vocab()
    return found if known or name.startswith(("think", "thought", "reason")) else None


def _closing(opened: re.Match[str]) -> str:
    return f"</{opened[2]}>" if opened[2] else f"[/{opened[3]}]"


def _without_opener(said: str, opened: re.Match[str] | None) -> str:
    """The answer without a tag that the prompt has opened for it already."""
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
    """What a template reads beside messages and the names of special tokens."""
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
