import json
import re

import pytest
import vl_convert

from pyrite.recipes.overoptimization import mark_chart
from pyrite.report.charts import bars, lines, overoptimization, peak, reach, save, specification, vega_lite


def svg_of(chart, capfd) -> str:
    """The chart drawn, with whatever Vega-Lite has to say about it."""
    spec = specification(chart) | {"width": 480}
    svg = vl_convert.vegalite_to_svg(spec, vl_version=vega_lite(), show_warnings=True, allowed_base_urls=[])
    said = capfd.readouterr()
    assert said.out + said.err == ""
    return svg


def every_chart(results):
    curves = results["curves"]
    yield overoptimization(curves, noise=0.25)
    yield overoptimization(curves, noise=0.25, x="n", quantities=("gold",))
    yield overoptimization(curves, noise=0.0, objectives=("single",), members=True)
    yield mark_chart([row for row in results["mechanism"]["shares"] if row["noise"] == 0.25])
    yield bars([{"label": "sft", "value": 2.0, "text": "2.0 s", "color": "red", "lo": 1.0, "hi": 3.0}])
    yield bars([{"label": "a", "value": -0.5, "text": "−.5", "color": "red"}], "gold")
    yield lines([{"step": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(5)], "step", ["loss", "lr"])


def test_every_chart_draws_without_a_warning(results, capfd):
    for chart in every_chart(results):
        assert svg_of(chart, capfd).startswith("<svg")


def test_that_check_can_fail(capfd):
    spec = {"data": {"values": [{"a": 1}]}, "mark": "line", "encoding": {"x": {"field": "a"}, "detail": {}}}
    vl_convert.vegalite_to_svg(spec, vl_version=vega_lite(), show_warnings=True)
    assert "WARN" in capfd.readouterr().err


def test_lines_are_labeled_gold_is_solid_proxy_dashed_and_bands_are_drawn(results, capfd):
    svg = svg_of(overoptimization(results["curves"], noise=0.25), capfd)
    for name in ("single", "mean", "WCO", "UWO"):
        assert f">{name} gold<" in svg and f">{name} proxy<" in svg
    assert len(re.findall(r'stroke-dasharray="5,4"', svg)) == 4
    assert len(re.findall(r'<path[^>]*fill-opacity="0.13"|<path[^>]*opacity="0.13"', svg)) == 8
    assert "√KL" in svg and "√nats" in svg


def test_the_peak_of_gold_is_marked_where_it_is(results, capfd):
    single = [r for r in results["curves"] if r["objective"] == "single" and r["noise"] == 0.25]
    top = max(single, key=lambda row: row["gold"])
    assert top["n"] not in (1, 1024), "the simulated world must over-optimize"
    assert f">peak, n = {top['n']:,}<" in svg_of(overoptimization(single, objectives=("single",)), capfd)


def test_no_peak_on_a_curve_that_still_rises(results, capfd):
    rising = [{**r, "gold": r["n"], "gold_lo": None, "gold_hi": None} for r in results["curves"]]
    assert "peak, n" not in svg_of(overoptimization(rising, noise=0.25, objectives=("wco",)), capfd)
    assert peak([{"value": 1}, {"value": 2}]) is None
    assert peak([{"value": 1}, {"value": 2}, {"value": 0}]) == {"value": 2}


def test_curves_without_intervals_members_or_counts(capfd):
    rows = [
        {"noise": 0.0, "objective": "single", "n": n, "kl": 0.5 * i, "sqrt_kl": (0.5 * i) ** 0.5, "gold": i, "proxy": i}
        for i, n in enumerate((1, 4, 16))
    ]
    svg = svg_of(overoptimization(rows, objectives=("single",), members=True), capfd)
    assert 'opacity="0.13"' not in svg


def test_a_shared_range_is_used_as_it_is(results):
    domain = reach(results["curves"])
    spec = specification(overoptimization(results["curves"], noise=0.0, domain=domain))
    assert spec["encoding"]["y"]["scale"]["domain"] == list(domain)
    lowest = min(row["gold_lo"] for row in results["curves"])
    assert domain[0] < lowest


def test_the_description_says_what_the_chart_shows(results):
    single = [r for r in results["curves"] if r["objective"] == "single" and r["noise"] == 0.25]
    text = specification(overoptimization(single, x="n", quantities=("gold",)))["description"]
    top = max(single, key=lambda row: row["gold"])
    assert f"highest {top['gold']:.2f} at {top['n']}" in text and f"{single[-1]['gold']:.2f} at 1024" in text


def test_the_share_of_the_mark_and_its_base_rate_are_labeled(results, capfd):
    svg = svg_of(mark_chart([row for row in results["mechanism"]["shares"] if row["noise"] == 0.25]), capfd)
    assert ">all answers<" in svg and ">single<" in svg and "%<" in svg


def test_lines_skip_what_is_not_finite(capfd):
    rows = [{"step": i, "loss": v} for i, v in enumerate((1.0, float("nan"), None, "x", True, 0.5))]
    points = specification(lines(rows, "step", "loss"))["datasets"]["points"]
    assert [(p["step"], p["value"]) for p in points] == [(0, 1.0), (5, 0.5)]


def test_saved_files_are_svg_and_png_of_twice_the_size_and_equal_each_time(results, tmp_path):
    svg, png = save(overoptimization(results["curves"], noise=0.25), tmp_path / "figures", "curves", width=400)
    assert (svg.name, png.name) == ("curves.svg", "curves.png")
    head = png.read_bytes()
    assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 800
    before = svg.read_bytes()
    save(overoptimization(results["curves"], noise=0.25), tmp_path / "figures", "curves", width=400)
    assert svg.read_bytes() == before


def test_a_definition_names_no_address_and_does_not_change(results):
    for first, second in zip(every_chart(results), every_chart(results), strict=True):
        text = json.dumps(specification(first))
        assert "http" not in text
        assert text == json.dumps(specification(second))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: overoptimization(r["curves"], x="kl"), "choose sqrt_kl or n"),
        (lambda r: overoptimization(r["curves"], noise=0.5), "at noise 0.5"),
        (lambda r: mark_chart([{"objective": "single", "n": None, "share": 0.1, "base": 0.1}]), "both n and share"),
        (lambda r: lines([{"step": 1}], "step", "loss"), "finite step and loss"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(results, call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call(results)
    assert "\n" not in str(caught.value)
