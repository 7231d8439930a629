"""One self-contained page: it opens offline, and its own policy forbids any request."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import vl_convert

from pyrite import __version__
from pyrite.report.charts import vega_lite
from pyrite.report.markup import Html, el, escape, prose, slug
from pyrite.report.render import render
from pyrite.report.sections import Part

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
