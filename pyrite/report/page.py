"""Pages that open offline. A page is the template page.html, filled with parts: text, numbers, figures, tables, tabs.

>>> page("A title", [text("One **bold** word.", title="Start")]).startswith("<!doctype html>")
True
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup, escape

from pyrite import __version__
from pyrite.report.charts import NAMES, Chart, Row, specification, vega_lite

COLD, MIDDLE, WARM = (150, 198, 234), (238, 236, 230), (246, 178, 130)  # of rewards: good, neutral, bad


@dataclass(frozen=True)
class Part:
    """One thing on a page: the macro of page.html that shows it, and its content. A title opens a new section."""

    kind: str
    content: Mapping[str, Any]
    title: str = ""


def text(body: str, title: str = "") -> Part:
    """Paragraphs, a blank line between them; **bold**, `code`, and "$ " before a command."""
    return Part("text", {"body": body}, title)


def numbers(groups: Sequence[tuple[str, Sequence[tuple[str, str]]]], title: str = "") -> Part:
    """A few big numbers, in groups: [(group, [(label, value), ...]), ...]."""
    return Part("numbers", {"groups": groups}, title)


def figure(
    charts: Chart | Sequence[Chart], caption: str, names: Sequence[str] = (), alt: str = "", title: str = ""
) -> Part:
    """One chart or several side by side, with `names` above them. `alt` defaults to each chart's description."""
    specs = [specification(chart) for chart in (charts if isinstance(charts, Sequence) else [charts])]
    if names and len(names) != len(specs):
        raise ValueError(f"figure {caption!r}: {len(names)} names for {len(specs)} charts; give one each")
    drawn = [
        (name, alt or spec.get("description", ""), spec)
        for name, spec in zip(names or [""] * len(specs), specs, strict=True)
    ]
    return Part("figure", {"charts": drawn, "caption": caption}, title)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", title: str = "") -> Part:
    """A table. Numbers are formatted, and columns of numbers set to the right."""
    shown = [[number(cell) for cell in row] for row in rows]
    right = [all(re.match(r"[+−]?[\d.]|–$|\[", row[i]) for row in shown) for i in range(len(columns))]
    return Part("table", {"columns": columns, "rows": shown, "right": right, "caption": caption}, title)


def claims(rows: Sequence[Row], title: str = "") -> Part:
    """Published claims and their verdicts: rows of {id, source, statement, measured, interval, holds}."""
    return Part("claims", {"rows": rows}, title)


def details(values: Mapping[str, Any], label: str, title: str = "") -> Part:
    """A nested mapping, folded away under `label`."""
    return Part("details", {"rows": list(_flat(values)), "label": label}, title)


def tabs(by: Sequence[str], views: Mapping[tuple[str, ...], Part], title: str = "") -> Part:
    """Several parts, one shown at a time: `by` names the choices, `views` maps a value of each to a part."""
    options = [list(dict.fromkeys(key[i] for key in views)) for i in range(len(by))]
    places = itertools.product(*(range(len(some)) for some in options))
    panels = [
        (" ".join(map(str, place)), views.get(key))
        for place, key in zip(places, itertools.product(*options), strict=True)
    ]
    return Part("tabs", {"choices": list(zip(by, options, strict=True)), "panels": panels}, title)


def answers(rows: Sequence[Row], words: Mapping[str, Sequence[str]] | None = None, title: str = "") -> Part:
    """Real answers by scorer and n: rows of {prompt, noise, picks: [{objective, n, response, gold, proxy, tags}]}.

    words: what a tag looks like in a text, {tag: [word or phrase, ...]}; in answers with that tag it is highlighted.
    """
    several = len({row["noise"] for row in rows}) > 1
    views = {
        (row["prompt"], *([percent(row["noise"])] if several else [])): _answers_to(row, words or {}) for row in rows
    }
    return tabs(("prompt", "label noise")[: 1 + several], views, title)


def _answers_to(row: Row, words: Mapping[str, Sequence[str]]) -> Part:
    def shown(pick: Row) -> Row:
        return {
            **pick,
            "pieces": _highlighted(pick["response"], {tag: words.get(tag, ()) for tag in pick.get("tags", ())}),
        }

    counts = sorted({pick["n"] for pick in row["picks"]})
    picks = {(pick["objective"], pick["n"]): shown(pick) for pick in row["picks"]}
    found = [
        (f"{NAMES.get(name.split()[0], name.split()[0])} {name.partition(' ')[2]}".strip(), name)
        for name in dict.fromkeys(pick["objective"] for pick in row["picks"])
    ]
    cells = [(name, [picks.get((scorer, n)) for n in counts]) for name, scorer in found]
    return Part("answers", {"prompt": row["prompt"], "counts": counts, "rows": cells})


def _highlighted(body: str, words: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """The text in pieces, each with the tag it shows or ""; longest words first, whole words only, in any case."""
    tags = {word.lower(): tag for tag, group in words.items() for word in group}
    if not tags:
        return [(body, "")]
    longest_first = sorted(tags, key=lambda word: (-len(word), word))
    pieces = re.split(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)", body, flags=re.IGNORECASE)
    return [(piece, tags[piece.lower()] if i % 2 else "") for i, piece in enumerate(pieces)]


def page(title: str, parts: Sequence[Part], *, lead: str = "", eyebrow: str = "") -> str:
    """A whole HTML page from parts in order; a part with a title opens a new section.

    `eyebrow` is a small line above the title, `lead` the paragraph below it (**bold**, `code`).
    """
    sections: list[tuple[str, list[Part]]] = []
    for part in parts:
        if part.title or not sections:
            sections.append((part.title, []))
        sections[-1][1].append(part)
    return _template().render(title=title, sections=sections, lead=lead, eyebrow=eyebrow or "pyrite").lstrip()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyrite", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"number": number, "prose": prose, "inline": inline, "slug": slug, "tint": tint}
    environment.globals |= {"version": __version__, "charting_library": _charting_library}
    return environment.get_template("page.html")


@cache
def _charting_library() -> Markup:
    """Vega and its companions, about 0.9 MB."""
    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite()))


def number(value: object, digits: int = 3, *, sign: bool = False) -> str:
    """A value as a reader wants it: `digits` significant digits, a real minus, a dash for nothing.

    >>> number(1234.5), number(-0.12345), number(None)
    ('1,234', '−0.12', '–')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        shown = f"{value:,}"
    elif value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        shown = f"{value:.{digits - 1}e}"
    else:
        places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if abs(value) >= 1 else 0))
        shown = f"{value:,.{places}f}"
    return f"{'+' if sign and value > 0 else ''}{shown}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share in three digits, its sign held to it.

    >>> percent(0.25)
    '25\\xa0%'
    """
    return "–" if share is None else f"{100 * share:.3g}\u00a0%"


def banded(row: Row, name: str, form: Callable[[Any], str] = number) -> str:
    """A value with its interval, NAME_lo to NAME_hi, if the row has one.

    >>> banded({"gold": 1.0, "gold_lo": 0.5, "gold_hi": 1.5}, "gold"), banded({"gold": 1.0}, "gold")
    ('1.00 [0.50, 1.50]', '1.00')
    """
    low, high = row.get(f"{name}_lo"), row.get(f"{name}_hi")
    return form(row[name]) + ("" if low is None or high is None else f" [{form(low)}, {form(high)}]")


def prose(body: str) -> Markup:
    """Paragraphs (blank line between), **bold**, `code`, "$ " before a command; all else is literal text.

    >>> prose("one **two** `x < y`")
    Markup('<p>one <strong>two</strong> <code>x &lt; y</code></p>')
    """
    blocks = [block for block in re.split(r"\n\s*\n", body.strip()) if block]
    shown = [
        Markup('<pre tabindex="0"><code>{}</code></pre>').format(block)
        if block.startswith("$ ")
        else Markup("<p>{}</p>").format(inline(block))
        for block in blocks
    ]
    return Markup("").join(shown)


def inline(body: str) -> Markup:
    """**bold** and `code` in one line of text."""
    return Markup(
        re.sub(
            r"\*\*(.+?)\*\*|`([^`]+)`",
            lambda found: f"<strong>{found[1]}</strong>" if found[1] else f"<code>{found[2]}</code>",
            str(escape(body)),
        )
    )


def slug(title: str) -> str:
    """An id for a heading."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def tint(value: float | None) -> str:
    """The color of a reward: from orange (−2.5 and less) over grey to blue (2.5 and more)."""
    share = max(-1.0, min(1.0, (value or 0.0) / 2.5))
    mixed = [round(a + (b - a) * abs(share)) for a, b in zip(MIDDLE, COLD if share > 0 else WARM, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted keys and their values as text, in the order given."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
