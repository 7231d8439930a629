"""Agreement: worked tables, joined by texts, intervals that cover, judges that lean."""

from __future__ import annotations

import doctest
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrite.jobs.judge
from pyrite.data import rows as data
from pyrite.data.files import DataError
from pyrite.feedback.judges import Said, combined, verdict_row
from pyrite.jobs.judge import Opinion, agreed, kappa, leaning, opinions

SAID = {"A": Said("A", 1.0), "B": Said("B", 0.0), "T": Said("TIE", 0.5), "-": None}


def options(seed: int = 0) -> dict[str, Any]:
    return {"n_boot": 300, "level": 0.95, "generator": torch.Generator().manual_seed(seed)}


def judged(path: Path, labels: str, *, turned: bool = False, per_prompt: int = 1) -> list[Opinion]:
    """One-order verdicts, one letter a pair; turned: with a and b exchanged."""
    rows = []
    for i, letter in enumerate(labels):
        a, b = ("y", "x") if turned else ("x", "y")
        prompt = f"p{i // per_prompt}"
        row = {"prompt_id": prompt, "prompt": prompt, "a": f"{a}{i}", "b": f"{b}{i}"}
        rows.append(verdict_row(row, combined({"ba" if turned else "ab": SAID[letter]}), criterion="c", model="m"))
    data.write(rows, path)
    return opinions(str(path))


def test_worked_agreement(tmp_path: Path) -> None:
    """20, 5, 10, 15 of 50, in the four cells: agreement 0.7, chance 0.5, kappa 0.4 (Cohen)."""
    first = judged(tmp_path / "1.jsonl", "A" * 25 + "B" * 25)
    second = judged(tmp_path / "2.jsonl", "A" * 20 + "B" * 5 + "A" * 10 + "B" * 15)
    found = agreed(first, second, **options())
    assert found["agreement"]["value"] == pytest.approx(0.7)
    assert found["kappa"]["value"] == pytest.approx(0.4)
    assert found["confusion"] == [[0, 0, 0], [0, 20, 5], [0, 10, 15]]
    assert found["agreement"]["lo"] < 0.7 < found["agreement"]["hi"]
    assert 0.1 < found["kappa"]["lo"] < 0.4 < found["kappa"]["hi"] < 0.7


def test_kappa_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        table = torch.randint(1, 20, (3, 3), generator=generator).double()
        n = table.sum().item()
        seen = sum(table[i, i].item() for i in range(3)) / n
        chance = sum(table[i].sum().item() * table[:, i].sum().item() for i in range(3)) / n**2
        assert kappa(table).item() == pytest.approx((seen - chance) / (1 - chance))
    assert kappa(torch.ones(4, 3, 3)).abs().max() < 1e-6
    assert kappa(torch.eye(3)).item() == pytest.approx(1.0)
    assert kappa(torch.tensor([[5.0, 0], [0, 0]])).isnan()


def test_ties_and_missing_verdicts(tmp_path: Path) -> None:
    first = judged(tmp_path / "1.jsonl", "AABT-A")
    second = judged(tmp_path / "2.jsonl", "ATBTB")
    found = agreed(first, second, **options())
    assert (found["pairs"], found["only_first"], found["only_second"], found["without_a_verdict"]) == (4, 1, 0, 1)
    assert found["agreement"]["value"] == 0.75
    assert (found["decided"]["value"], found["decided"]["n"]) == (1.0, 2)
    with pytest.raises(ValueError, match="0 of 6 and 6 pairs"):
        agreed(first, [one._replace(pair=("z", "c")) for one in first], **options())


def test_joined_by_texts_not_by_place_or_side(tmp_path: Path) -> None:
    """The other file has the pairs backwards, with the answers named, and shown, the other way round."""
    labels = "AABBT" * 4
    first = judged(tmp_path / "1.jsonl", labels)
    same = judged(tmp_path / "2.jsonl", labels, turned=True)
    assert agreed(first, same[::-1], **options())["agreement"]["value"] == 1.0
    exchanged = judged(tmp_path / "3.jsonl", labels.translate(str.maketrans("AB", "BA")), turned=True)
    assert agreed(first, exchanged[::-1], **options())["decided"]["value"] == 0.0


def test_leaning_worked(tmp_path: Path) -> None:
    rows = []
    for i, (ab, ba) in enumerate(itertools.product("ABT-", repeat=2)):
        row = {"prompt_id": i, "prompt": f"p{i}", "a": "x", "b": "y"}
        rows.append(verdict_row(row, combined({"ab": SAID[ab], "ba": SAID[ba]}), criterion="c", model="m"))
    data.write(rows, tmp_path / "v.parquet")
    found = leaning(opinions(str(tmp_path / "v.parquet")), **options())
    assert (found["first_shown"]["value"], found["first_shown"]["n"]) == (0.5, 16)
    assert (found["consistency"]["value"], found["consistency"]["n"]) == (pytest.approx(3 / 9), 9)  # AB, BA, TT
    assert found["no_verdict"]["value"] == pytest.approx(7 / 16)
    assert (found["ties"]["value"], found["ties"]["n"]) == (pytest.approx(7 / 9), 9)


def test_a_judge_that_likes_the_first_is_seen(tmp_path: Path) -> None:
    found = leaning(judged(tmp_path / "1.jsonl", "A" * 40 + "B" * 10), **options())
    assert found["first_shown"]["value"] == 0.8
    assert found["first_shown"]["lo"] > 0.5
    assert found["consistency"]["value"] is None  # it was asked in one order


def test_intervals_are_over_prompts(tmp_path: Path) -> None:
    """Four copies of a pair tell no more than one."""
    alone = leaning(judged(tmp_path / "1.jsonl", "AB" * 20), **options())["first_shown"]
    copies = leaning(judged(tmp_path / "2.jsonl", "AAAABBBB" * 20, per_prompt=4), **options())["first_shown"]
    assert copies["n"] == 4 * alone["n"]
    assert (copies["lo"], copies["hi"]) == pytest.approx((alone["lo"], alone["hi"]))


def test_wrong_files(tmp_path: Path) -> None:
    row = {"prompt": "p", "a": "x", "b": "y", "preference": 1}
    for rows, words in (
        ([row, {**row, "a": "y", "b": "x"}], "line 2: the pair has a verdict already, in .*line 1"),
        ([{**row, "preference": 3}], "line 1: preference is 3"),
        ([{"prompt": "p"}], "missing a, b, preference"),
    ):
        (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match=words):
            opinions(str(tmp_path / "v.jsonl"))
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "criterion": "other"}))
    assert len(opinions(str(tmp_path / "v.jsonl"))) == 2


def test_examples() -> None:
    assert doctest.testmod(pyrite.jobs.judge).failed == 0
