"""Text to token ids: one way to render prompts and responses, for training, scoring and generation alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrite import checkpoints, templates
from pyrite.templates import Body
from pyrite.tokens import to_ids, to_texts

Prompt = str | list[dict[str, Any]]
Answer = str | Mapping[str, Any]  # a text, or a message of which the content is the text

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


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt and one response. `truncated`: the response was cut here, so no end token."""

    prompt: list[int]
    response: list[int]
    truncated: bool

    @property
    def ids(self) -> list[int]:
        """Prompt, then response: what a model reads."""
        return self.prompt + self.response


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
    fields = {name: turn[name] for name in templates.SHOWN if turn.get(name)}
    return turn["content"] + (f"\n{json.dumps(fields, ensure_ascii=False, sort_keys=True)}" if fields else "")


def end_id(tokenizer: Any) -> int:
    """Id of the token that ends an answer: what the chat template writes behind one, else the end-of-sequence token
    (the separator, for encoders). Raises ValueError, naming both, where there is none."""
    return templates.answers(tokenizer).end


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids of all tokens that end drawing: `end_id`, the end-of-sequence token and those of the generation config."""
    return list(templates.answers(tokenizer).stops)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of one prompt: the chat template with its generation prompt, or plain text after a start token."""
    return encode_prompts(tokenizer, [prompt])[0]


def response_ids(tokenizer: Any, response: str, *, finished: bool = True) -> list[int]:
    """Ids of one response to a plain question, with all that the chat template writes around it; the end token is
    there iff `finished`.

    Special tokens spelled out in the text are read as ordinary text, so exactly one end token can occur.
    """
    return encode_responses(tokenizer, [response], finished=finished)[0]


def encode(
    tokenizer: Any,
    prompt: Prompt,
    response: Answer,
    *,
    finished: bool = True,
    max_length: int | None = None,
    max_prompt: int | None = None,
    where: str = "prompt",
) -> Encoded:
    """Ids of one prompt and response, as `encode_all` makes them; `where` names the text in an error."""
    return encode_all(
        tokenizer,
        [prompt],
        [response],
        finished=finished,
        max_length=max_length,
        max_prompt=max_prompt,
        where=lambda _: where,
    )[0]


def encode_all(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    responses: Sequence[Answer],
    *,
    finished: bool | Sequence[bool] = True,
    max_length: int | None = None,
    max_prompt: int | None = None,
    where: Callable[[int], str] | None = None,
    as_drawn: bool = False,
) -> list[Encoded]:
    """Ids of N prompts and responses in a few tokenizer calls, the only way from text to a model.

    A response is all that the chat template writes behind the prompt: a text, or a message with its other fields
    (reasoning_content, tool_calls). Lengths in tokens. A prompt longer than `max_prompt` keeps its end (and its start
    token), whatever the response, so that the responses to a prompt share it. A response keeps its start up to
    `max_length` in all and is then marked `truncated`, without end token. as_drawn: the responses were drawn by a
    model, so one that the template cannot show goes on from the prompt as it is. Raises ValueError, naming
    `where(row)`, where a prompt leaves no room for a response, or the template would show it otherwise or in part.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    name = where or _row
    shown = _shown(tokenizer, prompts, name)
    fronts = _fronts(tokenizer, prompts, shown, name, max_length=max_length, max_prompt=max_prompt, answered=True)
    backs = _backs(tokenizer, prompts, shown, responses, name, finished=finished, as_drawn=as_drawn)
    room = [None if max_length is None else max_length - len(front) for front in fronts]
    return [
        Encoded(front, back[:left], left is not None and len(back) > left)
        for front, back, left in zip(fronts, backs, room, strict=True)
    ]


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_length: int | None = None,
    max_prompt: int | None = None,
    where: Callable[[int], str] | None = None,
) -> list[list[int]]:
    """Ids of N prompts, each distinct one rendered once; limits and errors as in `encode_all`."""
    name = where or _row
    shown = _shown(tokenizer, prompts, name)
    return _fronts(tokenizer, prompts, shown, name, max_length=max_length, max_prompt=max_prompt)


def encode_responses(
    tokenizer: Any, responses: Sequence[str], *, finished: bool | Sequence[bool] = True
) -> list[list[int]]:
    """Ids of N responses to one plain question, as `response_ids` makes them."""
    asked = ["?"] * len(responses)
    shown = _shown(tokenizer, asked, _row)
    return _backs(tokenizer, asked, shown, responses, _row, finished=finished, as_drawn=True)


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of N drawn responses, without what `encode_responses` adds: end token, special tokens, and what the chat
    template opens an answer with. Encoded again, a text gives the tokens it came from."""
    inside, stops = templates.answers(tokenizer).inside, set(stop_ids(tokenizer))
    spoken_rows = [templates.spoken(tokenizer, row) for row in rows]
    texts = to_texts(tokenizer, spoken_rows, inside=inside)
    ended = [bool(len(row)) and int(row[-1]) in stops for row in rows]
    return [templates.trimmed(tokenizer, text, ended=done) for text, done in zip(texts, ended, strict=True)]


def prepare_tokenizer(tokenizer: Any) -> tuple[Any, str | None]:
    """A copy whose pad differs from the end token, and a note for the user (None where nothing changed).

    The pad is a token the vocabulary already has, so that no embedding is resized. Without one, pad stays:
    packed batches hold no pad, and masks, never pad ids, say where a response ends.
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
    """Tokenizer of a model folder or Hub name, prepared, with its note.

    It knows how the model ends an answer (`end_id`, `stop_ids`) and what its chat template is told: `template_args`
    over those it was saved with. Raises ValueError without a tokenizer, or for arguments that its template lacks.
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
    known = templates.remembering(tokenizer, template_args=template_args, ends=_generation_ends(folder))
    return prepare_tokenizer(known)


def _generation_ends(folder: Path) -> list[int]:
    """The tokens at which a model's own generation config ends an answer, or its base's; none without such a file."""
    file = folder / "generation_config.json"
    base = None if file.exists() else checkpoints.base_name(folder)
    if base is not None:
        return _generation_ends(checkpoints.place(base))
    found = checkpoints.read_json(file).get("eos_token_id") if file.exists() else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@dataclass(frozen=True)
class _Shown:
    """Distinct prompts as their model is asked them, and the one of each row."""

    texts: list[str]
    slot_of: list[int]


def _row(i: int) -> str:
    return f"row {i + 1}"


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _shown(tokenizer: Any, prompts: Sequence[Prompt], where: Callable[[int], str]) -> _Shown:
    slots: dict[str, int] = {}
    texts: list[str] = []
    slot_of = []
    for row, prompt in enumerate(prompts):
        key = repr(prompt)
        if key not in slots:
            slots[key] = len(texts)
            texts.append(_rendered(tokenizer, prompt, where, row))
        slot_of.append(slots[key])
    return _Shown(texts, slot_of)


def _rendered(tokenizer: Any, prompt: Prompt, where: Callable[[int], str], row: int) -> str:
    if not prompt:
        return ""  # the response is a text without a prompt, which no chat template shows
    if not tokenizer.chat_template:
        turns = [] if isinstance(prompt, str) else prompt
        _refuse_fields(where(row), [name for turn in turns for name in templates.SHOWN if turn.get(name)])
        return plain(prompt)
    try:
        return templates.rendered_prompt(tokenizer, _messages(prompt))
    except templates.Unreadable as error:
        raise ValueError(f"{where(row)}: {error}") from error


def _refuse_fields(where: str, fields: Sequence[str]) -> None:
    if fields:
        raise ValueError(f"{where}: this tokenizer has no chat template, so {fields[0]} of a message cannot be shown")


def _fronts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    shown: _Shown,
    where: Callable[[int], str],
    *,
    max_length: int | None,
    max_prompt: int | None,
    answered: bool = False,
) -> list[list[int]]:
    """Ids of the prompts, cut where they are too long. answered: a text may stand without a prompt."""
    whole = _with_start(tokenizer, to_ids(tokenizer, shown.texts))
    if answered:
        whole = [ids or [_text_end(tokenizer)] for ids in whole]
    of = {slot: prompt for slot, prompt in zip(shown.slot_of, prompts, strict=True)}
    unique = [_cut(tokenizer, of[slot], ids, max_prompt) for slot, ids in enumerate(whole)]
    _check_room(unique, shown.slot_of, max_length, where)
    return [list(unique[slot]) for slot in shown.slot_of]


def _backs(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    shown: _Shown,
    responses: Sequence[Answer],
    where: Callable[[int], str],
    *,
    finished: bool | Sequence[bool],
    as_drawn: bool,
) -> list[list[int]]:
    """Ids of what stands behind each prompt, each distinct conversation rendered once."""
    how = templates.answers(tokenizer)
    flags = [finished] * len(responses) if isinstance(finished, bool) else finished
    bodies: dict[tuple[int, str, bool], Body] = {}
    keys = []
    for row, (slot, response, flag) in enumerate(zip(shown.slot_of, responses, flags, strict=True)):
        key = (slot, response if isinstance(response, str) else repr(response), bool(flag))
        keys.append(key)
        if key not in bodies:
            try:
                bodies[key] = _body(tokenizer, prompts[row], shown.texts[slot], response, finished=flag, drawn=as_drawn)
            except templates.Unreadable as error:
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
        return templates.rendered_answer(
            tokenizer, _messages(prompt), shown, response, finished=finished, as_drawn=drawn
        )
    if not isinstance(response, str):
        fields = [name for name in templates.SHOWN if response.get(name)]
        if fields:
            raise templates.Unreadable(f"this tokenizer has no chat template, so {fields[0]} cannot be shown")
        response = str(response["content"])
    end = templates.answers(tokenizer).end if prompt else _text_end(tokenizer)
    return Body([(response, False)], end if finished else None)


def _text_end(tokenizer: Any) -> int:
    """Id of the token that ends a text without a prompt, and after which models without a start token begin one."""
    return end_id(tokenizer) if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _start_id(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def _with_start(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    """A chat template writes its own start token or wants none; plain text gets one unless it has it."""
    start = _start_id(tokenizer)
    if tokenizer.chat_template or start is None:
        return [row if row or start is None else [start] for row in rows]
    return [row if row[:1] == [start] else [start, *row] for row in rows]


def _cut(tokenizer: Any, prompt: Prompt, ids: list[int], most: int | None) -> list[int]:
    """At most so many ids of a prompt: its end, behind its start token or inside all that a chat template writes."""
    if most is None or len(ids) <= most:
        return ids
    if most < 1:
        raise ValueError(f"max_prompt is {most}; it must be at least 1 token")
    if tokenizer.chat_template and (shown := _shortened(tokenizer, prompt, most)):
        return shown
    kept = ids[:1] if most > 1 and ids[0] == _start_id(tokenizer) else []
    return kept + ids[len(ids) - most + len(kept) :]


def _shortened(tokenizer: Any, prompt: Prompt, most: int) -> list[int] | None:
    """The ids of the longest end of a conversation that fits: without its oldest turns, its first turn then cut.

    System turns stay, and some of the last user turn. None if they are too long even so.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    opening = turns[: asked[0]] if asked and asked[0] and turns[0]["role"] != "assistant" else []

    def ids(at: int, kept: int) -> list[int] | None:
        first = {**turns[at], "content": turns[at]["content"][len(turns[at]["content"]) - kept :]}
        try:
            shown = _rendered(tokenizer, [*opening, first, *turns[at + 1 :]], lambda _: "", 0)
        except ValueError:  # the template refuses what is left
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


def _check_room(unique: list[list[int]], slot_of: list[int], most: int | None, where: Callable[[int], str]) -> None:
    for row, slot in enumerate(slot_of):
        length = len(unique[slot])
        if length == 0:
            raise ValueError(f"{where(row)}: the prompt is empty and the tokenizer has no start token")
        if most is not None and length >= most:
            raise ValueError(
                f"{where(row)}: the prompt has {length} tokens and leaves no room for a response "
                f"in a context of {most}; shorten the prompt, or use a model that reads more"
            )
