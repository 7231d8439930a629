import doctest
import json

import pytest

from pyrite.report import page
from pyrite.report.page import Html, data, el, number, percent, prose, slug

NASTY = """<script>alert("x & 'y'")</script>"""


def test_examples_in_the_docstrings():
    assert doctest.testmod(page).failed == 0


def test_text_is_escaped_and_markup_is_not():
    inner = el("b", None, NASTY)
    assert "<script>" not in inner
    assert el("p", {"title": NASTY}, inner) == (
        '<p title="&lt;script&gt;alert(&quot;x &amp; &#x27;y&#x27;&quot;)&lt;/script&gt;">' + inner + "</p>"
    )


def test_children_may_be_nested_lists_and_other_values():
    assert el("p", None, ["a<", [Html("<br>"), 3]]) == "<p>a&lt;<br>3</p>"


def test_attributes():
    assert el("input", {"checked": True, "disabled": False, "name": None, "value": 0}) == '<input checked value="0">'


def test_an_island_of_data_cannot_close_its_script():
    island = data({"text": NASTY, "é": [1, None]})
    body = island.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in body
    assert json.loads(body) == {"text": NASTY, "é": [1, None]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"), (1.234, "1.23"), (-12.34, "−12.3"), (1234.5, "1,234"), (0.00012, "1.20e−04"),
        (3, "3"), (-4096, "−4,096"), (None, "–"), (float("nan"), "–"), (True, "True"), ("text", "text"),
    ],
)  # fmt: skip
def test_numbers_as_a_reader_wants_them(value, shown):
    assert number(value) == shown


def test_signed_numbers():
    assert [number(v, sign=True) for v in (1.0, 0.0, -1.0)] == ["+1.00", "0.00", "−1.00"]


def test_percent_of_nothing():
    assert percent(None) == "–"


def test_prose_knows_paragraphs_emphasis_code_and_commands_and_nothing_else():
    html = prose(f"one **two** `three`\n\n$ pyrite recipe x\n\n{NASTY} [a](b) * _")
    assert "<strong>two</strong> <code>three</code>" in html
    assert '<pre tabindex="0"><code>$ pyrite recipe x</code></pre>' in html
    assert "<script>" not in html and "[a](b) * _" in html
    assert html.count("<p>") == 2


def test_slug():
    assert slug("What ensembles change?") == "what-ensembles-change"
