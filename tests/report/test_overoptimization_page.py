import html
import re

import pytest
import vl_convert

from pyrite.recipes.overoptimization import RECIPE, STEP, bar_chart, policy_chart
from pyrite.report.charts import specification, vega_lite
from tests.report.conftest import policy_results, policy_rows

NOT_RUN = {"policies": [], "policy_fits": [], "bars": [], "claims": []}


def test_it_parses_and_asks_nothing_of_the_network(whole_page, read_page):
    read = read_page(whole_page)
    assert read.errors == []
    for _, attributes in read.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert re.match(r"#|data:,", attributes.get(name) or "#")
    styles = "".join(re.findall(r"<style>(.*?)</style>", whole_page, re.S))
    assert "url(" not in styles and "@import" not in styles
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy


def test_every_claim_is_there_with_its_numbers(whole_page, results, read_page):
    text = read_page(whole_page).text
    for claim in results["claims"]:
        assert claim["statement"] in text and claim["id"] in text and claim["source"] in text
    assert "[−1.02, −0.61]" in text and "0.12 below its peak" in text
    assert all(text.count(verdict) == 1 for verdict in ("✓ holds", "✗ does not hold", "? undecided"))


def test_every_sample_is_there_with_gold_proxy_and_the_words_that_fooled(whole_page, results, read_page):
    read = read_page(whole_page)
    for sample in results["samples"]:
        assert f"Answers to: {sample['prompt']}" in [a.get("aria-label") for a in read.all("table")]
        for pick in sample["picks"]:
            assert pick["response"] in read.text
    assert "gold −2.10" in read.text and "proxy +3.22" in read.text
    assert {a["title"] for a in read.all("mark")} == {"legal register"}


def test_the_headline_gives_gold_proxy_and_kl_at_the_peak_and_at_the_end(whole_page, results, read_page):
    line = [r for r in results["curves"] if r["objective"] == "single" and r["noise"] == 0.25]
    top, end = max(line, key=lambda r: r["gold"]), line[-1]
    text = read_page(whole_page).text
    for row in (top, end):
        for value in (f"{row['gold']:+.2f}", f"{row['proxy']:+.2f}", f"{row['kl']:.2f}"):
            assert value.replace("-", "−") in text
    assert "The proxy kept rising. The gold reward fell." in text


def _tell(results: dict, gold: list[float], half: float, proxy: list[float]) -> str:
    curves = [
        {"noise": 0.25, "objective": "single", "member": None, "n": 4**i, "kl": 1.0 * i, "sqrt_kl": i**0.5, "gold": g,
         "gold_lo": g - half, "gold_hi": g + half, "proxy": p}
        for i, (g, p) in enumerate(zip(gold, proxy, strict=True))
    ]  # fmt: skip
    return html.unescape(RECIPE.page({**results, "curves": curves, **NOT_RUN}))


def test_the_headline_says_no_more_than_the_numbers(results):
    up = [0.0, 1.0, 2.0]
    assert "The gold reward fell." in _tell(results, [0.0, 1.0, 0.5], 0.1, up)
    unclear = _tell(results, [0.0, 1.0, 0.5], 0.4, up)
    assert "The gold reward did not." in unclear and "within the intervals" in unclear
    assert "The gold reward rose to the end." in _tell(results, [0.0, 1.0, 1.5], 0.1, up)
    assert "The gold reward stopped rising." in _tell(results, [0.0, 1.0, 0.5], 0.1, [0.0, 1.0, 0.9])


def test_the_mechanism_is_named_shown_and_tested_by_exclusion(whole_page, read_page):
    text = read_page(whole_page).text
    assert "Unseen registers." in text
    assert "Answers cut off before they end are 1\u00a0% of all answers and 0\u00a0% of the chosen ones." in text
    assert "All answers" in text and "Without the fooling answers" in text


def test_every_figure_has_words_for_those_who_cannot_see_it(whole_page, read_page):
    read = read_page(whole_page)
    charts = [a for a in read.all("div") if a.get("class") == "chart"]
    assert len(charts) >= 15
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in charts)
    assert len(read.all("h1")) == 1 and len(read.all("main")) == 1 and read.all("html") == [{"lang": "en"}]


def test_configuration_and_how_to_repeat_the_run(whole_page, read_page):
    text = read_page(whole_page).text
    assert "$ pyrite recipe overoptimization --scale toy --seeds 1" in text
    assert "reward.lr0.0005" in text and "commit0123abc" in text


def test_the_same_results_give_the_same_page(whole_page, results):
    assert RECIPE.page(results) == whole_page


def test_what_was_not_run_is_not_told(results, read_page):
    curves = [row for row in results["curves"] if row["objective"] == "single" and row["noise"] == 0.25]
    read = read_page(RECIPE.page({**results, "curves": curves, **NOT_RUN}))
    assert read.errors == []
    for heading in ("What ensembles change", "What PPO makes", "What else could be turned", "The published claims"):
        assert heading not in read.text


def test_without_single_models_there_is_no_story(results):
    curves = [row for row in results["curves"] if row["objective"] == "wco"]
    with pytest.raises(ValueError, match=r"no curve of single reward models at noise 0\.25"):
        RECIPE.page({**results, "curves": curves})


def test_lines_follow_the_steps_not_the_kl() -> None:
    spec = specification(policy_chart(policy_rows()))
    (line,) = [layer for layer in spec["layer"] if layer["mark"].get("strokeJoin") == "round"]
    assert line["encoding"]["order"]["field"] == "step"
    assert [p["step"] for p in spec["datasets"]["points"] if p["line"] == "UWO"] == [0, 1, 2, 3]
    assert {(p["line"], p["value"]) for p in spec["datasets"]["peaks"]} == {("single", 1.0), ("UWO", 1.2)}


def test_a_negative_kl_is_told_with_its_error() -> None:
    first = specification(policy_chart(policy_rows()))["datasets"]["points"][0]
    assert first["KL"] == "-0.01 ± 0.02" and first["sqrt_kl"] == 0.0


def test_variance_only_where_it_is_known() -> None:
    drawn = specification(policy_chart(policy_rows(), "variance", STEP))["datasets"]["points"]
    assert {p["line"] for p in drawn} == {"UWO"} and len(drawn) == 3
    with pytest.raises(ValueError, match="no row has both sqrt_kl and variance"):
        policy_chart([row for row in policy_rows() if row["objective"] == "single"], "variance")


def test_bars_are_drawn_with_the_intervals_there_are() -> None:
    spec = specification(bar_chart(policy_results()["bars"]))
    assert [row["label"] for row in spec["datasets"]["bars"]] == ["3 members, WCO", "5 members, WCO"]
    assert "<svg" in vl_convert.vegalite_to_svg(spec | {"width": 300}, vl_version=vega_lite(), allowed_base_urls=[])


def test_policies_are_told_by_noise_and_penalty_with_their_peaks_and_ends(whole_page, read_page):
    text = read_page(whole_page).text
    assert "What PPO makes of the same reward models" in text and "Members of WCO" in text
    assert "25\u00a0%0single1.002.00−1.00 [−1.10, −0.90]" in text
