"""One self-contained page: it opens offline, and its own policy forbids any request."""

import html
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, singledispatch
from importlib.resources import files
from typing import Any

import altair as alt
import vl_convert

from pyrite import __version__
from pyrite.report.charts import NAMES, specification, vega_lite

# markup: HTML from Python values: everything is escaped unless it is already markup.


class Html(str):
    """Text that is already markup and is not escaped again."""

    __slots__ = ()


VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})


def escape(value: object) -> Html:
    """Markup of one value: itself if it is `Html`, its escaped text otherwise."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(children: object) -> Html:
    """A value, or values in lists of any depth, one after the other, each escaped where it must be."""
    if isinstance(children, list | tuple):
        return Html("".join(join(child) for child in children))
    return escape(children)


def el(tag: str, attributes: Mapping[str, object] | None = None, *children: object) -> Html:
    """One element. An attribute that is True stands alone; None and False leave it out.

    >>> el("p", {"class": "note", "hidden": True}, "1 < 2")
    '<p class="note" hidden>1 &lt; 2</p>'
    """
    shown = {name: value for name, value in (attributes or {}).items() if value is not None and value is not False}
    head = "".join(
        f" {name}" if value is True else f' {name}="{html.escape(str(value))}"' for name, value in shown.items()
    )
    if tag in VOID:
        return Html(f"<{tag}{head}>")
    return Html(f"<{tag}{head}>{''.join(join(child) for child in children)}</{tag}>")


def data(value: object) -> Html:
    """A JSON island inside an element; nothing in it can close the script."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Html(f'<script type="application/json">{text}</script>')


def slug(title: str) -> str:
    """An id for a heading."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def number(value: object, digits: int = 3, *, sign: bool = False) -> str:
    """A value as a reader wants it: `digits` significant digits, a real minus, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        text = f"{value:,}"
    elif value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        text = f"{value:.{digits - 1}e}"
    else:
        places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if abs(value) >= 1 else 0))
        text = f"{value:,.{places}f}"
    if sign and value > 0:
        text = "+" + text
    return text.replace("-", "−")


def percent(share: float | None) -> str:
    """A share in three digits, its sign held to it.

    >>> percent(0.25)
    '25\\xa0%'
    """
    return "–" if share is None else f"{100 * share:.3g}\u00a0%"


def prose(body: str) -> Html:
    """Paragraphs (blank line between), **bold**, `code`, "$ " before a command; all else is literal text.

    >>> prose("one **two** `x < y`")
    '<p>one <strong>two</strong> <code>x &lt; y</code></p>'
    """
    return join([_block(block) for block in re.split(r"\n\s*\n", body.strip()) if block])


def _block(block: str) -> Html:
    if block.startswith("$ "):
        return el("pre", {"tabindex": 0}, el("code", None, block))
    return el("p", None, inline(block))


def inline(text: str) -> Html:
    """**bold** and `code` in one line of text."""
    pieces = re.split(r"(\*\*.+?\*\*|`[^`]+`)", text)
    return join([_piece(piece) for piece in pieces])


def _piece(piece: str) -> Html:
    if piece.startswith("`") and piece.endswith("`") and len(piece) > 2:
        return el("code", None, piece[1:-1])
    if piece.startswith("**") and piece.endswith("**") and len(piece) > 4:
        return el("strong", None, piece[2:-2])
    return escape(piece)


# sections: What a page is made of. A part with a `title` opens a new section; a part without one goes on in it.


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


# render: Each part of a page as HTML.


VERDICTS = {True: ("holds", "✓ holds"), False: ("fails", "✗ does not hold"), None: ("open", "? undecided")}
COLD, MIDDLE, WARM = (150, 198, 234), (238, 236, 230), (246, 178, 130)  # chips: good, neutral, bad


@singledispatch
def render(part: object) -> Html:
    """One part as HTML, everything escaped."""
    raise TypeError(f"a page has no way to show a {type(part).__name__}; use the parts of pyrite.report.page")


@render.register
def _(part: Text) -> Html:
    return el("div", {"class": "prose"}, prose(part.body))


@render.register
def _(part: Numbers) -> Html:
    def group(name: str, items: Sequence[tuple[str, str]]) -> Html:
        pairs = [el("div", None, el("dt", None, label), el("dd", None, value)) for label, value in items]
        return el("section", {"class": "card"}, el("h3", None, name), el("dl", None, pairs))

    return el("div", {"class": "numbers"}, [group(*item) for item in part.groups])


@render.register
def _(part: Figure) -> Html:
    charts = list(part.charts) if isinstance(part.charts, Sequence) else [part.charts]
    names = list(part.names) or [""] * len(charts)
    if len(names) != len(charts):
        raise ValueError(f"figure {part.caption!r}: {len(names)} names for {len(charts)} charts; give one each")
    cells = []
    for name, chart in zip(names, charts, strict=True):
        spec = specification(chart)
        label = part.alt or spec.get("description", "")
        drawing = el("div", {"class": "chart", "role": "img", "aria-label": label}, data(spec))
        cells.append(el("div", {"class": "plot"}, el("p", {"class": "name"}, name) if name else "", drawing))
    grid = el("div", {"class": {1: "plots", 2: "plots pairs", 4: "plots pairs"}.get(len(charts), "plots many")}, cells)
    return el("figure", None, grid, el("figcaption", None, inline(part.caption)))


@render.register
def _(part: Table) -> Html:
    shown = [[number(cell) for cell in row] for row in part.rows]
    right = [_numeric([row[i] for row in shown]) for i in range(len(part.columns))]
    head = [
        el("th", {"scope": "col", "class": "right" if r else None}, c) for c, r in zip(part.columns, right, strict=True)
    ]
    body = [
        el(
            "tr",
            None,
            [el("td", {"class": "right" if r else None}, c) for c, r in zip(row, right, strict=True)],
        )
        for row in shown
    ]
    caption = el("caption", None, inline(part.caption)) if part.caption else ""
    table = el("table", None, caption, el("thead", None, el("tr", None, head)), el("tbody", None, body))
    return el("div", {"class": "scroll card", "tabindex": 0, "role": "group"}, table)


def _numeric(cells: Iterable[str]) -> bool:
    return all(re.match(r"[+−]?[\d.]|–$|\[", cell) for cell in cells)


@render.register
def _(part: Claims) -> Html:
    columns = ("verdict", "claim", "measured", "interval")
    head = el("tr", None, [el("th", {"scope": "col"}, column) for column in columns])
    table = el(
        "table",
        {"class": "claims"},
        el("thead", None, head),
        el("tbody", None, [_claim(r) for r in part.rows]),
    )
    return el("div", {"class": "card"}, table)


def _claim(row: Row) -> Html:
    kind, verdict = VERDICTS[row["holds"]]
    low, high = row.get("interval") or (None, None)
    band = "–" if low is None or high is None else f"[{number(low)}, {number(high)}]"
    small = el("small", None, el("code", None, row["id"]), " · ", row["source"])
    return el(
        "tr",
        {"id": f"claim-{row['id']}"},
        el("td", None, el("span", {"class": f"verdict {kind}"}, verdict)),
        el("td", None, el("p", None, row["statement"]), small),
        el("td", {"data-label": "measured", "class": "figures"}, number(row["measured"])),
        el("td", {"data-label": "interval", "class": "figures"}, band),
    )


@render.register
def _(part: Keys) -> Html:
    rows = [el("tr", None, el("th", {"scope": "row"}, key), el("td", None, text)) for key, text in flatten(part.values)]
    table = el("table", {"class": "keys"}, el("tbody", None, rows))
    return el("details", {"class": "card"}, el("summary", None, part.label), el("div", {"class": "scroll"}, table))


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and their values as text, in the order given."""
    pairs = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            pairs.append((f"{prefix}{key}", text))
    return pairs


@render.register
def _(part: Samples) -> Html:
    prompts = list(dict.fromkeys(row["prompt"] for row in part.rows))
    noises = list(dict.fromkeys(row["noise"] for row in part.rows))
    tables = {(row["prompt"], row["noise"]): _answers(row, part.words) for row in part.rows}
    choices = [("prompt", prompts)] + ([("label noise", [percent(noise) for noise in noises])] if noises[1:] else [])
    panels = [[tables.get((prompt, noise)) for noise in noises] for prompt in prompts]
    return _chooser(choices, [panel for row in panels for panel in row])


def _answers(row: Row, words: Mapping[str, Sequence[str]]) -> Html:
    counts = sorted({pick["n"] for pick in row["picks"]})
    scorers = list(dict.fromkeys(pick["objective"] for pick in row["picks"]))
    picks = {(pick["objective"], pick["n"]): pick for pick in row["picks"]}
    corner = el("th", {"scope": "col", "role": "columnheader"}, "picked by")
    head = [corner] + [el("th", {"scope": "col", "role": "columnheader"}, f"best of {n:,}") for n in counts]
    body = []
    for scorer in scorers:
        cells = [_answer(picks.get((scorer, n)), n, words) for n in counts]
        name = el("th", {"scope": "row", "role": "rowheader"}, scorer_name(scorer))
        body.append(el("tr", {"role": "row"}, name, cells))
    roles = {"class": "answers", "role": "table", "aria-label": f"Answers to: {row['prompt']}"}
    roles["style"] = f"--columns:{len(counts)}"
    rows = (
        el("thead", {"role": "rowgroup"}, el("tr", {"role": "row"}, head)),
        el("tbody", {"role": "rowgroup"}, body),
    )
    return el("div", {"class": "scroll card", "tabindex": 0, "role": "group"}, el("table", roles, *rows))


def scorer_name(objective: str) -> str:
    """ "single 0" or "wco" as a reader sees it."""
    first, _, rest = objective.partition(" ")
    return f"{NAMES.get(first, first)} {rest}".strip()


def _answer(pick: Row | None, n: int, words: Mapping[str, Sequence[str]]) -> Html:
    attributes = {"role": "cell", "data-label": f"best of {n:,}"}
    if pick is None:
        return el("td", attributes, "–")
    chips = el("p", {"class": "chips"}, chip("gold", pick["gold"]), chip("proxy", pick["proxy"]))
    tags = [el("span", {"class": "tag"}, tag) for tag in pick.get("tags", ())]
    text = highlight(pick["response"], {tag: words.get(tag, ()) for tag in pick.get("tags", ())})
    return el("td", attributes, chips, el("p", {"class": "answer"}, text), el("p", None, tags) if tags else "")


def chip(name: str, value: float | None) -> Html:
    """A value on a scale from orange (−2.5 and less) over grey to blue (2.5 and more)."""
    share = max(-1.0, min(1.0, (value or 0.0) / 2.5))
    end = COLD if share > 0 else WARM
    mixed = [round(a + (b - a) * abs(share)) for a, b in zip(MIDDLE, end, strict=True)]
    style = f"background:#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
    return el("span", {"class": "chip", "style": style}, f"{name} ", el("b", None, number(value, sign=True)))


def highlight(text: str, words: Mapping[str, Sequence[str]]) -> Html:
    """The text with every word or phrase of a tag marked, longest first, whole words only, in any case."""
    named = {word.lower(): tag for tag, group in words.items() for word in group}
    if not named:
        return join([text])
    longest_first = sorted(named, key=lambda word: (-len(word), word))
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)"
    pieces = re.split(pattern, text, flags=re.IGNORECASE)
    return join(
        [el("mark", {"title": named[piece.lower()]}, piece) if i % 2 else piece for i, piece in enumerate(pieces)]
    )


@render.register
def _(part: Views) -> Html:
    values = [list(dict.fromkeys(key[i] for key in part.views)) for i in range(len(part.by))]
    panels = [part.views.get(key) for key in itertools.product(*values)]
    choices = [(name, options) for name, options in zip(part.by, values, strict=True)]
    return _chooser(choices, [None if panel is None else render(panel) for panel in panels])


def _chooser(choices: Sequence[tuple[str, Sequence[str]]], panels: Sequence[Html | None]) -> Html:
    """Controls and one panel for each combination of their values, the last choice running fastest."""
    keys = list(itertools.product(*[range(len(options)) for _, options in choices]))
    nothing = el("p", {"class": "prose"}, "Nothing was recorded for this choice.")
    shown = [
        el("div", {"class": "view", "data-view": " ".join(map(str, key)), "hidden": i > 0}, panel or nothing)
        for i, (key, panel) in enumerate(zip(keys, panels, strict=True))
    ]
    controls = [_control(i, name, options) for i, (name, options) in enumerate(choices) if len(options) > 1]
    fixed = [el("input", {"type": "hidden", "name": i, "value": 0}) for i, (_, o) in enumerate(choices) if len(o) == 1]
    form = el("form", {"class": "choices", "autocomplete": "off"}, controls, fixed)
    return el("div", {"class": "views"}, form if controls else "", shown)


def _control(index: int, name: str, options: Sequence[str]) -> Html:
    if len(options) <= 4 and sum(map(len, options)) <= 40:
        radios = [
            el(
                "label",
                None,
                el("input", {"type": "radio", "name": index, "value": i, "checked": i == 0}),
                el("span", None, o),
            )
            for i, o in enumerate(options)
        ]
        return el("fieldset", {"class": "segments"}, el("legend", None, name), radios)
    items = [el("option", {"value": i}, option) for i, option in enumerate(options)]
    return el("label", {"class": "pick"}, el("span", None, name), el("select", {"name": index}, items))


# page: One self-contained page: it opens offline, and its own policy forbids any request.


# the charting code compiles expressions, hence unsafe-eval; no source from outside is allowed for anything
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def page(title: str, sections: Sequence[Part], *, lead: str = "", eyebrow: str = "") -> str:
    """A whole HTML page from parts in order; a part with a title opens a new section.

    `eyebrow` is a small line above the title, `lead` the paragraph below it (**bold**, `code`).
    """
    groups = _grouped(sections)
    links = [el("a", {"href": f"#{slug(name)}"}, name) for name, _ in groups if name]
    top = el(
        "header",
        None,
        el(
            "p",
            {"class": "eyebrow"},
            el("span", {"class": "mark", "aria-hidden": "true"}),
            eyebrow or "pyrite",
        ),
        el("h1", None, title),
        el("div", {"class": "lead"}, prose(lead)) if lead else "",
    )
    menu = el("nav", {"aria-label": "Sections"}, links) if len(links) > 2 else ""
    main = el("main", {"id": "main"}, top, [_section(*group) for group in groups])
    foot = el("footer", None, f"Made by pyrite {__version__}. This page is one file and works offline.")
    skip = el("a", {"class": "skip", "href": "#main"}, "Skip to the content")
    body = el("body", None, skip, menu, main, foot, _scripts('class="chart"' in main))
    return f'<!doctype html>\n<html lang="en">{_head(title)}{body}</html>\n'


def _grouped(sections: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    groups: list[tuple[str, list[Part]]] = []
    for part in sections:
        if part.title or not groups:
            groups.append((part.title, []))
        groups[-1][1].append(part)
    return groups


def _section(name: str, parts: Sequence[Part]) -> Html:
    heading = el("h2", None, name) if name else ""
    return el("section", {"id": slug(name) or None}, heading, [render(part) for part in parts])


def _head(title: str) -> Html:
    return el(
        "head",
        None,
        el("meta", {"charset": "utf-8"}),
        el("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", {"name": "color-scheme", "content": "light dark"}),
        el("link", {"rel": "icon", "href": "data:,"}),
        el("title", None, title),
        el("style", None, Html(_file("page.css"))),
    )


def _scripts(charts: bool) -> Html:
    library = el("script", None, _library()) if charts else ""
    return Html(escape(library) + el("script", None, Html(_file("page.js"))))


@cache
def _library() -> Html:
    """The charting library, about 0.9 MB."""
    return Html(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite()))


def _file(name: str) -> str:
    return files("pyrite.report").joinpath(name).read_text(encoding="utf-8")
