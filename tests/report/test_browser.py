"""The page in a real browser, where there is one."""

import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900 "
    "--virtual-time-budget=8000 --dump-dom"
).split()
LISTEN = """<script>
window.heard = [];
for (const level of ["error", "warn"]) console[level] = (...words) => heard.push(words.join(" "));
window.addEventListener("error", (event) => heard.push(String(event.message)));
window.addEventListener("securitypolicyviolation", (event) => heard.push("policy " + event.violatedDirective));
</script>"""
ASK = """<script>
setTimeout(() => {
  const views = [...document.querySelectorAll(".views")].find((v) => v.querySelector(":scope > form select"));
  const select = views.querySelector("select");
  const shown = () => [...views.children].filter((v) => v.matches(".view:not([hidden])")).map((v) => v.innerText);
  const before = shown();
  select.value = "2";
  select.dispatchEvent(new Event("change", { bubbles: true }));
  const after = shown();
  const switcher = document.querySelector(".views");
  switcher.querySelectorAll("input")[1].click();
  setTimeout(() => {
    const seen = [...document.querySelectorAll(".chart")].filter((c) => c.offsetParent);
    const answer = {
      before, after, heard, seen: seen.length, drawn: seen.filter((c) => c.querySelector("svg path")).length,
      widths: seen.map((c) => c.querySelector("svg").getBoundingClientRect().width / c.clientWidth),
      requests: performance.getEntriesByType("resource").length, ASKED
    };
    document.body.textContent = "ANSWER" + JSON.stringify(answer) + "END";
  }, 2000);
}, 2000);
</script>"""


def visit(html: str, folder, ask: str) -> dict:
    file = folder / "page.html"
    head, body = html.replace("<style>", LISTEN + "<style>", 1), ask + "</body></html>"
    file.write_text(head.removesuffix("\n").removesuffix("</body></html>") + body, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<body>ANSWER(.*)END</body>", dom, re.S)
    assert found, "the page's own script did not run to its end"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_it_loads_without_a_word_draws_its_charts_and_the_choices_work(whole_page, tmp_path):
    answer = visit(whole_page, tmp_path, ASK.replace("ASKED", "wide: document.documentElement.scrollWidth"))
    assert answer["heard"] == []
    assert answer["requests"] == 0
    assert answer["seen"] == answer["drawn"] >= 8
    assert all(0.9 < width <= 1.001 for width in answer["widths"])
    assert len(answer["before"]) == len(answer["after"]) == 1
    assert "(0, 256)" in answer["before"][0] and "(2, 256)" in answer["after"][0]
    assert answer["wide"] <= 1280


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_listener_hears_an_error_and_the_policy_stops_a_request(whole_page, tmp_path):
    broken = whole_page.replace("</main>", '<img src="https://example.com/x.png"><script>nope()</script></main>', 1)
    heard = visit(broken, tmp_path, ASK.replace("ASKED", "wide: 0"))["heard"]
    assert any("nope" in word for word in heard) and "policy img-src" in heard
