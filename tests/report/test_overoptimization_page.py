import html
import re

import pytest

from pyrite.recipes.overoptimization.page import overoptimization_page

OPTIONAL = ("mechanism", "samples", "fits", "claims", "reward_models", "stages", "config", "manifest", "seconds")


def without(results: dict, *keys: str) -> dict:
    return {key: value for key, value in results.items() if key not in keys}


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
    page = overoptimization_page({**without(results, *OPTIONAL), "curves": curves})
    return html.unescape(page)


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
    assert overoptimization_page(results) == whole_page


@pytest.mark.parametrize(
    "missing", [*[(key,) for key in OPTIONAL], OPTIONAL], ids=lambda m: m[0] if len(m) == 1 else "all"
)
def test_optional_parts_may_be_absent(results, missing, read_page):
    curves = [row for row in results["curves"] if row["objective"] == "single" and row["noise"] == 0.25]
    read = read_page(overoptimization_page({**without(results, *missing), "curves": curves}))
    assert read.errors == [] and "None" not in read.text and "What ensembles change" not in read.text


def test_one_noise_level_needs_no_switch(results, read_page):
    noisy = [row for row in results["curves"] if row["noise"] == 0.25]
    read = read_page(overoptimization_page({**without(results, *OPTIONAL), "curves": noisy}))
    assert read.errors == [] and "label noise" not in read.text and "against" in read.text


def test_without_single_models_there_is_no_story(results):
    curves = [row for row in results["curves"] if row["objective"] == "wco"]
    with pytest.raises(ValueError, match=r"no curve of single reward models at noise 0\.25"):
        overoptimization_page({**results, "curves": curves})
