"""HTML from Python values: everything is escaped unless it is already markup."""

import html
import json
import math
import re
from collections.abc import Mapping


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
