import re

import pytest

from pyrite.report import Claims, Figure, Keys, Numbers, Samples, Table, Text, Views, lines, page
from pyrite.report.page import chip, flatten, highlight, render

NASTY = "<img src=x onerror=alert(1)> & \"q\" 'p' </script><script>alert(2)</script>"
CHART = lines([{"step": 0, NASTY: 1.0}, {"step": 1, NASTY: 2.0}], "step", NASTY)
PICK = {"objective": NASTY, "n": 4, "response": NASTY, "gold": 1.0, "proxy": None, "tags": [NASTY]}
PARTS = [
    Text(NASTY, title=NASTY),
    Numbers([(NASTY, [(NASTY, NASTY)])]),
    Figure(CHART, NASTY, names=[NASTY], alt=NASTY),
    Table((NASTY, "n"), [(NASTY, 1)], caption=NASTY),
    Claims([{"id": NASTY, "source": NASTY, "statement": NASTY, "measured": NASTY, "interval": None, "holds": None}]),
    Samples([{"prompt": NASTY, "noise": 0.0, "picks": [PICK]}], {NASTY: [NASTY]}),
    Keys({NASTY: {"a": NASTY}}, NASTY),
    Views((NASTY,), {(NASTY,): Text(NASTY), ("b",): Text("b")}),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_every_part_escapes_what_it_is_given(part, read_page):
    read = read_page(render(part))
    assert read.errors == []
    assert read.all("img") == []
    assert all(attributes.get("type") == "application/json" for attributes in read.all("script"))
    assert "<img src=x" in read.text or isinstance(part, Figure | Views)


def test_a_whole_page_of_them(read_page):
    read = read_page(page(NASTY, PARTS, lead=NASTY, eyebrow=NASTY))
    assert read.errors == []
    assert read.all("img") == []
    assert any((a.get("content") or "").startswith("default-src 'none'") for a in read.all("meta"))


def test_titles_open_sections_and_a_menu():
    parts = [Text("a"), Text("b", title="One"), Text("c"), Text("d", title="Two"), Text("e", title="Three")]
    html = page("T", parts)
    assert re.findall(r'<section(?: id="(\w+)")?>', html) == ["", "one", "two", "three"]
    assert re.findall(r'<a href="#(\w+)">', html) == ["one", "two", "three"]
    assert html.index("<p>b</p>") < html.index("<p>c</p>") < html.index('id="two"')


def test_the_charting_library_is_there_once_and_only_where_a_chart_is():
    without = page("T", [Text("a")])
    one = page("T", [Figure(CHART, "c")])
    two = page("T", [Figure([CHART, CHART], "c", names=["a", "b"]), Figure(CHART, "d")])
    assert "window.vegaEmbed" not in without and len(without) < 40_000
    assert one.count("window.vegaEmbed") == two.count("window.vegaEmbed") == 1


def test_only_the_first_view_is_shown_and_every_combination_has_one(read_page):
    views = {(a, b): Text(f"{a} {b}") for a in ("x", "y") for b in ("1", "2") if (a, b) != ("y", "2")}
    read = read_page(render(Views(("letter", "digit"), views)))
    shown = {a["data-view"]: "hidden" not in a for a in read.all("div") if "data-view" in a}
    assert shown == {"0 0": True, "0 1": False, "1 0": False, "1 1": False}
    assert "Nothing was recorded" in read.text


def test_many_or_long_choices_become_a_select():
    few = render(Views(("n",), {(str(i),): Text("t") for i in range(3)}))
    many = render(Views(("n",), {(str(i),): Text("t") for i in range(9)}))
    only = render(Views(("n",), {("1",): Text("t")}))
    assert few.count('type="radio"') == 3 and "<select" not in few
    assert many.count("<option") == 9 and 'type="radio"' not in many
    assert "<form" not in only


def test_verdicts():
    row = {"id": "a", "source": "s", "statement": "t", "measured": 0.5, "interval": [0.1, 0.9]}
    html = render(Claims([{**row, "holds": h} for h in (True, False, None)]))
    assert [html.index(word) for word in ("✓ holds", "✗ does not hold", "? undecided")] == sorted(
        html.index(word) for word in ("✓ holds", "✗ does not hold", "? undecided")
    )
    assert html.count("[0.10, 0.90]") == 3


def test_only_whole_words_of_a_tag_are_marked_the_longest_first():
    html = highlight(
        "Hereby the undersigned; thereby under-signed hereby.", {"legal": ["hereby", "the undersigned", "the"]}
    )
    assert re.findall(r'<mark title="legal">([^<]*)</mark>', html) == ["Hereby", "the undersigned", "hereby"]
    assert highlight("a & b", {}) == "a &amp; b"


def test_words_are_marked_only_under_the_tag_of_that_answer():
    pick = {"objective": "wco", "n": 1, "response": "hereby now", "gold": 0, "proxy": 0, "tags": ["advert"]}
    html = render(Samples([{"prompt": "p", "noise": 0, "picks": [pick]}], {"legal": ["hereby"], "advert": ["now"]}))
    assert "<mark" in html and ">now</mark>" in html and ">hereby</mark>" not in html


def _light(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("value", [-9.0, -2.5, -1.0, 0.0, 1.0, 2.5, 9.0, None])
def test_chips_can_be_read(value):
    color = re.search(r"background:#(\w{6})", chip("gold", value))
    assert color and (_light(color[1]) + 0.05) / (_light("1f2328") + 0.05) > 7


def test_chips_run_from_orange_to_blue():
    red, blue = (
        [int(c[i : i + 2], 16) for c in re.findall(r"#(\w{6})", chip("g", -3.0) + chip("g", 3.0))] for i in (0, 4)
    )
    assert red[0] > red[1] and blue[0] < blue[1]
    assert chip("g", 3.0) == chip("g", 3.0) and "+3.00" in chip("g", 3.0)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": None}) == [
        ("a.b", "1"), ("a.c", "{}"), ("d", "1, 2"), ("e", "None"),
    ]  # fmt: skip


def test_a_figure_with_too_few_names_and_a_part_nobody_knows():
    with pytest.raises(ValueError, match="1 names for 2 charts"):
        render(Figure([CHART, CHART], "c", names=["a"]))
    with pytest.raises(TypeError, match="no way to show a int"):
        render(3)
