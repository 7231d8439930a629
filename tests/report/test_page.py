import doctest
import importlib
import json
import re

import pytest

from pyrite.report import answers, claims, details, figure, lines, numbers, page, table, tabs, text
from pyrite.report.page import number, percent

NASTY = "<img src=x onerror=alert(1)> & \"q\" 'p' </script><script>alert(2)</script>"
CHART = lines([{"step": 0, NASTY: 1.0}, {"step": 1, NASTY: 2.0}], "step", NASTY)
PICK = {"objective": NASTY, "n": 4, "response": NASTY, "gold": 1.0, "proxy": None, "tags": [NASTY]}
PARTS = [
    text(NASTY, title=NASTY),
    numbers([(NASTY, [(NASTY, NASTY)])]),
    figure(CHART, NASTY, names=[NASTY], alt=NASTY),
    table((NASTY, "n"), [(NASTY, 1)], caption=NASTY),
    claims([{"id": NASTY, "source": NASTY, "statement": NASTY, "measured": NASTY, "interval": None, "holds": None}]),
    answers([{"prompt": NASTY, "noise": 0.0, "picks": [PICK]}], {NASTY: [NASTY]}),
    details({NASTY: {"a": NASTY}}, NASTY),
    tabs((NASTY,), {(NASTY,): text(NASTY), ("b",): text("b")}),
]


def body(*parts) -> str:
    """What a page of these parts shows below its head."""
    html = page("T", parts)
    return html[html.index("</header>") : html.index("</main>")]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.kind)
def test_every_part_escapes_what_it_is_given(part, read_page):
    html = page(NASTY, [part], lead=NASTY, eyebrow=NASTY)
    read = read_page(html)
    assert read.errors == []
    assert read.all("img") == []
    assert read.text.count("<img src=x") > 3
    islands = re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)
    assert len(read.all("script")) == len(islands) * 2 + 1  # the data, the library that draws them, the page's own
    assert all(json.loads(island) for island in islands)
    assert any((a.get("content") or "").startswith("default-src 'none'") for a in read.all("meta"))


def test_titles_open_sections_and_a_menu():
    parts = [text("a"), text("b", title="One"), text("c"), text("d", title="Two"), text("e", title="Three?")]
    html = page("T", parts)
    assert re.findall(r'<section(?: id="(\w+)")?>', html) == ["", "one", "two", "three"]
    assert re.findall(r'<a href="#(\w+)">', html) == ["one", "two", "three"]
    assert html.index("<p>b</p>") < html.index("<p>c</p>") < html.index('id="two"')


def test_the_charting_library_is_there_once_and_only_where_a_chart_is():
    without = page("T", [text("a")])
    one = page("T", [figure(CHART, "c")])
    two = page("T", [figure([CHART, CHART], "c", names=["a", "b"]), figure(CHART, "d")])
    assert "window.vegaEmbed" not in without and len(without) < 40_000
    assert one.count("window.vegaEmbed") == two.count("window.vegaEmbed") == 1


def test_only_the_first_view_is_shown_and_every_combination_has_one(read_page):
    views = {(a, b): text(f"{a} {b}") for a in ("x", "y") for b in ("1", "2") if (a, b) != ("y", "2")}
    read = read_page(body(tabs(("letter", "digit"), views)))
    shown = {a["data-view"]: "hidden" not in a for a in read.all("div") if "data-view" in a}
    assert shown == {"0 0": True, "0 1": False, "1 0": False, "1 1": False}
    assert "Nothing was recorded" in read.text


def test_many_or_long_choices_become_a_select():
    few, many, only = (body(tabs(("n",), {(str(i),): text("t") for i in range(n)})) for n in (3, 9, 1))
    assert few.count('type="radio"') == 3 and "<select" not in few
    assert many.count("<option") == 9 and 'type="radio"' not in many
    assert "<form" not in only


def test_verdicts():
    row = {"id": "a", "source": "s", "statement": "t", "measured": 0.5, "interval": [0.1, 0.9]}
    html = body(claims([{**row, "holds": holds} for holds in (True, False, None)]))
    places = [html.index(word) for word in ("✓ holds", "✗ does not hold", "? undecided")]
    assert places == sorted(places)
    assert html.count("[0.10, 0.90]") == 3


def picked(response: str, *tags: str, **rewards: float) -> str:
    words = {"legal": ["hereby", "the undersigned", "the"], "advert": ["now"]}
    pick = {"objective": "wco", "n": 1, "response": response, "gold": 0, "proxy": 0, "tags": tags, **rewards}
    return body(answers([{"prompt": "p", "noise": 0, "picks": [pick]}], words))


def test_only_whole_words_of_an_answers_own_tags_are_marked_the_longest_first():
    html = picked("Hereby the undersigned; thereby under-signed hereby, now.", "legal")
    assert re.findall(r'<mark title="legal">([^<]*)</mark>', html) == ["Hereby", "the undersigned", "hereby"]
    assert html.count("<mark") == 3
    assert "<mark" not in picked("hereby now")


def light(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_rewards_can_be_read_on_colors_from_orange_to_blue():
    found = []
    for value in (-9.0, -1.0, 0.0, 1.0, 2.5, None):
        color, _ = re.findall(r"background:#(\w{6})", picked("a", gold=value))
        assert (light(color) + 0.05) / (light("1f2328") + 0.05) > 7
        found.append(color)
    assert found[0][:2] > found[0][4:] and found[4][:2] < found[4][4:] and found[2] == found[5]
    assert "+3.00" in picked("a", gold=3.0)


def test_nested_values_have_dotted_names(read_page):
    read = read_page(body(details({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": None}, "All")))
    assert all(shown in read.text for shown in ("a.b1", "a.c{}", "d1, 2", "eNone"))


def test_a_figure_with_too_few_names():
    with pytest.raises(ValueError, match="1 names for 2 charts"):
        figure([CHART, CHART], "c", names=["a"])


def test_examples_in_the_docstrings():
    assert doctest.testmod(importlib.import_module("pyrite.report.page")).failed == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"), (1.234, "1.23"), (-12.34, "−12.3"), (1234.5, "1,234"), (0.00012, "1.20e−04"),
        (3, "3"), (-4096, "−4,096"), (None, "–"), (float("nan"), "–"), (True, "True"), ("text", "text"),
    ],
)  # fmt: skip
def test_numbers_as_a_reader_wants_them(value, shown):
    assert number(value) == shown


def test_signed_numbers_and_percentages():
    assert [number(v, sign=True) for v in (1.0, 0.0, -1.0)] == ["+1.00", "0.00", "−1.00"]
    assert (percent(0.25), percent(None)) == ("25\u00a0%", "–")


def test_prose_knows_paragraphs_emphasis_code_and_commands_and_nothing_else():
    html = body(text("one **two** `three`\n\n$ pyrite recipe x\n\n[a](b) * _ `x < y`"))
    assert "<strong>two</strong> <code>three</code>" in html
    assert '<pre tabindex="0"><code>$ pyrite recipe x</code></pre>' in html
    assert "[a](b) * _ <code>x &lt; y</code>" in html
    assert html.count("<p>") == 2
