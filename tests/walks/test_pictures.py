"""A user's own data ends in a picture: from a model and pairs to a page of gold and proxy, by the README's commands."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyrite import cli
from pyrite.core.runs import read_json
from pyrite.data import rows as data

Command = Callable[..., None]
FOLDERS = ("reward", "pool", "gold", "best_of_n")
QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 1e-3, "--held-out", 0.2)


@pytest.fixture(scope="module")
def walked(tiny: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The way of the README: reward models, answers, gold, best of n."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(
        "import torch\n\n\ndef score(*, word='cat'):\n"
        "    return lambda prompts, texts: torch.tensor([float(text.split().count(word)) for text in texts])\n"
    )
    data.write([{"prompt": row["prompt"]} for row in data.load(pairs, "pairs")[:12]], folder / "prompts.jsonl")
    commands = (
        ("reward", "--model", tiny, "--data", pairs, "--members", 2, "--out", "reward", *QUICK),
        ("generate", "--model", tiny, "--prompts", "prompts.jsonl", "--k", 16, "--max-new-tokens", 12, "--out", "pool"),
        (
            "label",
            "--candidates",
            "pool/candidates.parquet",
            "--gold",
            "mine.py:score()",
            "--no-pairs",
            "--out",
            "gold",
        ),
        (
            *("best_of_n", "--candidates", "gold/candidates.parquet", "--proxy", "reward", "--truncated", "keep"),
            *("--objectives", "mean()", "wco()", "uwo(weight=0.5)", "uwo(weight=2.0)", "--out", "best_of_n"),
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            run(patch, *command)
    return folder


def run(patch: pytest.MonkeyPatch, *arguments: object) -> None:
    patch.setattr(sys, "argv", ["pyrite", *map(str, arguments)])
    cli.main()


@pytest.fixture
def page(walked: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(walked)
    run(monkeypatch, "report", "best_of_n")
    return Path("best_of_n/report.html").read_text()


def points(text: str) -> list[dict[str, Any]]:
    """Every point that the page's charts draw."""
    found = re.findall(r'"points":(\[.*?\}\])', text)
    return [point for one in found for point in json.loads(one)]


def test_the_page_holds_the_curves_and_their_bands(page: str, walked: Path) -> None:
    """Gold and proxy of every objective at every n, against √KL and n, with both ends of the band."""
    curves = read_json(walked / "best_of_n/curves.json")
    assert {row["n"] for row in curves} == {1, 2, 4, 8, 16}
    drawn = {
        (point["n"], point["quantity"], *(round(point[key], 9) for key in ("sqrt_kl", "value", "lo", "hi")))
        for point in points(page)
        if point.get("quantity")
    }
    for row in curves:
        for name in ("gold", "proxy"):
            values = (row["sqrt_kl"], row[name], row[f"{name}_lo"], row[f"{name}_hi"])
            assert (row["n"], name, *(round(value, 9) for value in values)) in drawn
    assert any(row["gold_lo"] < row["gold"] < row["gold_hi"] for row in curves)
    for words in ("average single model", "member 0", "mean()", "wco()", "uwo(weight=0.5)", "uwo(weight=2.0)"):
        assert words in page
    assert "√KL from the reference" in page
    assert "n, answers to choose from" in page


def test_the_page_asks_nobody(page: str) -> None:
    assert "default-src 'none'" in html.unescape(page)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)


@pytest.mark.parametrize("folder", ["reward", "pool", "gold"])
def test_every_run_on_the_way_has_a_page(folder: str, walked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(walked)
    run(monkeypatch, "report", folder)
    text = Path(folder, "report.html").read_text()
    assert text.startswith("<!doctype html>")
    assert "Full configuration" in text


def test_a_policy_is_drawn_on_its_way(walked: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dpo measured of gold, proxy and KL is one chart with both, and their standard errors as bands."""
    monkeypatch.chdir(walked)
    measured = ("--eval-prompts", "prompts.jsonl", "--gold", "mine.py:score()", "--proxy", "reward")
    run(monkeypatch, "dpo", "--model", tiny, "--data", pairs, "--out", "dpo", *QUICK, *measured, "--max-new-tokens", 8)
    run(monkeypatch, "report", "dpo")
    text = Path("dpo/report.html").read_text()
    assert "Gold and proxy on the way from the reference" in text
    rows = [json.loads(line) for line in Path("dpo/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("gold") is not None and row.get("kl_k1") is not None]
    assert len(rows) > 1
    drawn = [(point["line"], round(point["value"], 9)) for point in points(text) if "sqrt_kl" in point]
    for row in rows:
        assert ("gold", round(row["gold"], 9)) in drawn
        assert ("proxy", round(row["proxy"], 9)) in drawn
