"""What a page is made of. A part with a `title` opens a new section; a part without one goes on in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

Chart = alt.Chart | alt.LayerChart
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """Paragraphs: a blank line between them, **bold**, `code`."""

    body: str
    title: str = ""


@dataclass(frozen=True)
class Numbers:
    """A few big numbers, in groups: [(group, [(label, value), ...]), ...]."""

    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """One chart or several side by side (`names` above them); `alt` defaults to each chart's description."""

    charts: Chart | Sequence[Chart]
    caption: str
    names: Sequence[str] = ()
    alt: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table; numbers are formatted and set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    title: str = ""


@dataclass(frozen=True)
class Claims:
    """Published claims: rows of {id, source, statement, measured, interval, holds}."""

    rows: Sequence[Row]
    title: str = ""


@dataclass(frozen=True)
class Samples:
    """Real answers by scorer and n.

    rows: {prompt, noise, picks: [{objective, n, response, gold, proxy, tags}]}.
    `words` says what a tag looks like in a text, {tag: [word or phrase, ...]}: those are highlighted.
    """

    rows: Sequence[Row]
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    title: str = ""


@dataclass(frozen=True)
class Keys:
    """A nested mapping, folded away under `label`."""

    values: Mapping[str, Any]
    label: str
    title: str = ""


@dataclass(frozen=True)
class Views:
    """Several parts, one shown at a time: `by` names the choices, `views` maps a value of each to a part."""

    by: Sequence[str]
    views: Mapping[tuple[str, ...], "Part"]
    title: str = ""


Part = Text | Numbers | Figure | Table | Claims | Samples | Keys | Views
