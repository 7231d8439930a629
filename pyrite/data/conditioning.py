"""Prompts as preferences change them: one renderer for rollouts, reward models, policies and judges.

A conditioned row is {prompt, what models read; prompt_id, of that; asked, the raw prompt; asked_id, its id;
preferences, ids of options, [] where it is neutral}. Splits go by asked_id.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from pyrite.core.processes import say
from pyrite.core.runs import named
from pyrite.data import rows as data
from pyrite.data.files import Placed
from pyrite.data.text import Prompt, plain

_SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Option:
    """One way in which an answer can be wanted. Options of the same dimension exclude each other."""

    id: str
    dimension: str
    sentence: str
    criterion: str
    gold: str | None = None
    later: bool = False


@dataclass(frozen=True)
class Dimensions:
    """All options, dimension by dimension. Raises ValueError if two options have the same id or the same wording."""

    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        ids, texts = set(), {}
        for number, option in enumerate(self.options, 1):
            where = f"option {number} ({option.id})"
            if not re.fullmatch(r"[\w.-]+", option.id) or option.id == "neutral":
                raise ValueError(f"{where}: an id is letters, digits, '_', '.', '-', and not 'neutral'")
            if option.id in ids:
                raise ValueError(f"{where}: this id is taken; give every option its own")
            ids.add(option.id)
            if texts.setdefault(_plain(option.sentence), option.id) != option.id:
                first = texts[_plain(option.sentence)]
                raise ValueError(f"{where}: {option.sentence!r} is what {first} says; word them differently")

    @classmethod
    def load(cls, source: str | Path) -> Dimensions:
        """The options of a YAML file, or of a shipped name ("soups"). Raises ValueError, naming file and entry."""
        path = located(source)
        try:
            given = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, list) or not given:
            raise ValueError(f"{path}: give a list of options, each with {', '.join(_required())}")
        try:
            return cls(tuple(_option(entry, number) for number, entry in enumerate(given, 1)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(option.id for option in self.options)

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions, in order."""
        return tuple(dict.fromkeys(option.dimension for option in self.options))

    def option(self, id: str) -> Option:
        """The option with this id. Raises ValueError, naming the nearest id, if there is none."""
        found = next((option for option in self.options if option.id == id), None)
        if found is None:
            near = difflib.get_close_matches(str(id), self.ids, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown preference {id!r}: {guess}known: {', '.join(self.ids)}")
        return found

    def chosen(self, ids: Iterable[str]) -> tuple[Option, ...]:
        """The options with these ids, in the order of their dimensions. Raises ValueError for two of one dimension."""
        options = sorted(map(self.option, ids), key=lambda option: self.names.index(option.dimension))
        for one, other in itertools.pairwise(options):
            if one.dimension == other.dimension:
                raise ValueError(f"preferences {one.id} and {other.id} are both of {one.dimension}: name one of them")
        return tuple(options)

    def opposites(self, id: str) -> tuple[Option, ...]:
        """The other options of an option's dimension."""
        mine = self.option(id)
        return tuple(option for option in self.options if option.dimension == mine.dimension and option.id != id)

    def combinations(self, among: Iterable[str] | None = None) -> list[tuple[str, ...]]:
        """All combinations of one option of each dimension, as ids: AAA, AAB, ABA, ...

        among: the options to combine; by default all that were not added later. A dimension without any of them is left
        out.

        >>> len(Dimensions.load("soups").combinations())
        8
        """
        named = None if among is None else {self.option(id).id for id in among}
        take = [o for o in self.options if (not o.later if named is None else o.id in named)]
        sides = [[o.id for o in take if o.dimension == name] for name in self.names]
        return list(itertools.product(*(side for side in sides if side))) if take else []


def filled(template: str, option: Option) -> str:
    """A spec string in which {id}, {sentence}, {criterion} and {gold} are replaced by those of an option, quoted.

    Raises ValueError if the option lacks what the template wants, or if the template wants nothing.

    >>> filled("llm(model='m', criterion={criterion})", Option("X", "d", "Be short.", "Which is shorter?"))
    "llm(model='m', criterion='Which is shorter?')"
    """

    def own(match: re.Match[str]) -> str:
        value = getattr(option, match[1])
        if value is None:
            raise ValueError(f"{template!r}: preference {option.id} has no {match[1]}; give it one, or leave it out")
        return repr(value)

    spec, count = re.subn(r"\{(id|sentence|criterion|gold)\}", own, template)
    if not count:
        raise ValueError(f"{template!r} says the same of every preference: write criterion={{criterion}} in it")
    return spec


def files(source: str | Path) -> dict[str, Path]:
    """The files that these options read, by name: their own, and your files that their golds name."""
    path = located(source)
    golds = [option.gold or "" for option in Dimensions.load(path).options]
    return {"dimensions": path, **{name: Path(name) for gold in golds for name in named(gold)}}


def located(source: str | Path) -> Path:
    """The file of a shipped name or a path. Raises ValueError if there is none."""
    shipped = sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
    path = _SHIPPED / f"{source}.yaml" if source in shipped else Path(source)
    if not path.is_file():
        raise ValueError(f"no preference dimensions {str(source)!r}: give a YAML file, or one of {', '.join(shipped)}")
    return path


def _option(entry: Any, number: int) -> Option:
    """One entry of a file, checked."""
    where = f"option {number}"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: give {', '.join(_required())}, not {entry!r:.60}")
    where += f" ({entry['id']})" if "id" in entry else ""
    known = [field.name for field in fields(Option)]
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{where}: unknown {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    missing = [name for name in _required() if name not in entry]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if not isinstance(entry.get("later", False), bool):
        raise ValueError(f"{where}: later is true or false")
    texts = {name: _text(value, f"{where}: {name}") for name, value in entry.items() if name != "later"}
    return Option(**texts, later=entry.get("later", False))


def _required() -> list[str]:
    return [field.name for field in fields(Option) if field.default is MISSING]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text, not {value!r:.60}")
    return " ".join(value.split())


def _plain(sentence: str) -> str:
    return " ".join(sentence.replace(",", " ").casefold().split()).rstrip(" .")


Turn = Literal["user", "system"]
NEUTRAL = "neutral"


@dataclass(frozen=True)
class Variants:
    """The preferences under which every prompt is asked."""

    dimensions: str | None = None
    """Preference dimensions: a YAML file, or the built-in soups."""
    preferences: tuple[str, ...] = ()
    """What each prompt is asked under: an option such as P1A, several as in P1A+P2B, or neutral. "all" is every
    combination of one option of each dimension, but for options added later; "all:P1A,P2A,P2B" takes these options."""
    preference_turn: Turn = "user"
    """Where to write the preferences: at the end of the last user turn, or in the system turn."""

    def inputs(self) -> dict[str, str | Path]:
        """What is read."""
        return {"dimensions": located(self.dimensions)} if self.dimensions else {}

    def of(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every prompt under every variant, prompt by prompt. Without dimensions, the rows are unchanged.

        If a prompt has two ids, the first is taken. Raises ValueError for variants without dimensions, dimensions
        without variants, unknown options, prompts that carry preferences already, and two prompts that become the same.
        """
        if not self.dimensions:
            if self.preferences:
                raise ValueError("--preferences needs --dimensions, a YAML file or soups")
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
        """The options of each variant; a variant named twice counts once. Raises ValueError if there is none."""
        if not self.preferences:
            raise ValueError("--dimensions: say under which --preferences prompts are asked")
        named: list[tuple[Option, ...]] = []
        for name in self.preferences:
            every, _, some = name.partition(":")
            if every == "all":
                named += map(dimensions.chosen, dimensions.combinations(some.split(",") if some else None))
            else:
                named.append(() if name == NEUTRAL else dimensions.chosen(name.split("+")))
        return list(dict.fromkeys(named))


def render(prompt: Prompt, options: Iterable[Option], *, turn: Turn = "user") -> Prompt:
    """A prompt followed by the sentences of options, joined by one space. `Dimensions.chosen` puts options in order.

    turn: the sentences stand at the end of the last user turn, or of the system turn; then a text becomes messages.
    Without options, the prompt is unchanged. Raises ValueError for messages without a user turn.

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
    """The row of a raw prompt {prompt_id, prompt} under some options. A neutral row keeps its id."""
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
