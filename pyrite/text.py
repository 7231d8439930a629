"""Text to token ids: one way to render prompts and responses, for training, scoring and generation alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrite import checkpoints

Prompt = str | list[dict[str, str]]

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
    "Human:\\n…\\n\\nAssistant:\\n…\\n\\nAssistant:\\n" that the response continues.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    turns = [f"{_SPEAKERS.get(turn['role'], turn['role'].title())}:\n{turn['content']}" for turn in prompt]
    return "\n\n".join([*turns, "Assistant:\n"])


def end_id(tokenizer: Any) -> int:
    """Id of the end-of-sequence token (of the separator, for encoders). Raises ValueError without one."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise ValueError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token and save it again")
    return found


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of one prompt: the chat template with its generation prompt, or plain text after a start token."""
    return encode_prompts(tokenizer, [prompt])[0]


def response_ids(tokenizer: Any, response: str, *, finished: bool = True) -> list[int]:
    """Ids of one response without special tokens, the end token appended iff `finished`.

    Special tokens spelled out in the text are read as ordinary text, so exactly one end token can occur.
    """
    return encode_responses(tokenizer, [response], finished=finished)[0]


def encode(
    tokenizer: Any,
    prompt: Prompt,
    response: str,
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
    responses: Sequence[str],
    *,
    finished: bool | Sequence[bool] = True,
    max_length: int | None = None,
    max_prompt: int | None = None,
    where: Callable[[int], str] | None = None,
) -> list[Encoded]:
    """Ids of N prompts and responses in two tokenizer calls, the only way from text to a model.

    Lengths in tokens. A prompt longer than `max_prompt` keeps its end (and its start token), whatever the
    response, so that the responses to a prompt share it. A response keeps its start up to `max_length` in
    all and is then marked `truncated`, without end token. Raises ValueError where a prompt leaves no room
    for a response, naming `where(row)`.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    fronts = encode_prompts(tokenizer, prompts, max_length=max_length, max_prompt=max_prompt, where=where)
    backs = encode_responses(tokenizer, responses, finished=finished)
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
    name = where or (lambda row: f"row {row + 1}")
    slots: dict[str, int] = {}
    texts: list[str] = []
    slot_of = []
    for row, prompt in enumerate(prompts):
        key = repr(prompt)
        if key not in slots:
            slots[key] = len(texts)
            texts.append(_rendered(tokenizer, prompt, name, row))
        slot_of.append(slots[key])
    whole = _with_start(tokenizer, _tokenize(tokenizer, texts))
    of = {slot: prompt for slot, prompt in zip(slot_of, prompts, strict=True)}
    unique = [_cut(tokenizer, of[slot], ids, max_prompt) for slot, ids in enumerate(whole)]
    _check_room(unique, slot_of, max_length, name)
    return [list(unique[slot]) for slot in slot_of]


def encode_responses(
    tokenizer: Any, responses: Sequence[str], *, finished: bool | Sequence[bool] = True
) -> list[list[int]]:
    """Ids of N responses in one tokenizer call, as `response_ids` makes them."""
    end = end_id(tokenizer)
    flags = [finished] * len(responses) if isinstance(finished, bool) else finished
    ids = _tokenize(tokenizer, responses, split_special_tokens=True)
    return [[*row, end] if flag else row for row, flag in zip(ids, flags, strict=True)]


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of N responses, special tokens left out: the way back from `encode_responses`."""
    ids = [[int(token) for token in row] for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def prepare_tokenizer(tokenizer: Any) -> tuple[Any, str | None]:
    """A copy whose pad differs from the end token, and a note for the user (None where nothing changed).

    The pad is a token the vocabulary already has, so that no embedding is resized. Without one, pad stays:
    packed batches hold no pad, and masks, never pad ids, say where a response ends.
    """
    end = end_id(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return tokenizer, None
    problem = "has no pad token" if tokenizer.pad_token_id is None else "pads with its end token"
    vocabulary = tokenizer.get_vocab()
    candidates = [*_PADS, tokenizer.unk_token, tokenizer.bos_token]
    spare = next((token for token in candidates if vocabulary.get(token, end) != end), None)
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


def load_tokenizer(path: str | Path) -> tuple[Any, str | None]:
    """Tokenizer of a model folder or Hub name, prepared, with its note. Raises ValueError without one."""
    from transformers import AutoTokenizer

    folder = checkpoints.place(path)
    if not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
        raise ValueError(f"{path} holds no tokenizer; save one there with tokenizer.save_pretrained({str(path)!r})")
    for file in folder.glob("*token*.json"):
        checkpoints.read_json(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("a")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: its tokenizer cannot be loaded ({reason}); copy or save it again") from error
    return prepare_tokenizer(tokenizer)


def _rendered(tokenizer: Any, prompt: Prompt, where: Callable[[int], str], row: int) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return plain(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{where(row)}: the tokenizer's chat template refuses this prompt: {error}") from error


def _tokenize(tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool = False) -> list[list[int]]:
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return batch["input_ids"]


def _start_id(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def _with_start(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    """A chat template writes its own start token or wants none; plain text gets one unless it has it."""
    start = _start_id(tokenizer)
    if tokenizer.chat_template or start is None:
        return rows
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
        (row,) = _with_start(tokenizer, _tokenize(tokenizer, [shown]))
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
