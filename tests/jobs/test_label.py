"""Labels: who is chosen, exact flips, clean held-out pairs, ties and cut answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pyrite.data import rows as data
from pyrite.jobs import label


def candidate(prompt: int, sample: int, response: str, *, finished: bool = True) -> dict:
    return {
        "prompt_id": str(prompt),
        "prompt": f"tell me {prompt}",
        "sample": sample,
        "response": response,
        "finished": finished,
        "length": 3,
        "logp": -1.0,
    }


def run(rows: list[dict], folder: Path, **options) -> tuple[dict, list[dict], list[dict]]:
    data.write(rows, folder / "candidates.jsonl")
    chosen = {"gold": "length()", "held_out": 0.0, "out": folder / "run", **options}
    config = label.Config(candidates=str(folder / "candidates.jsonl"), **chosen)
    found = label.run(config)
    sides = [found.folder / name for name in ("pairs.parquet", "held_out.parquet")]
    pairs, held = (data.load(path, "pairs") if path.exists() else [] for path in sides)
    assert found.results is not None
    return found.results, pairs, held


def simple(prompts: int) -> list[dict]:
    return [candidate(p, s, " ".join(["a"] * (1 + (p + s) % 3))) for p in range(prompts) for s in range(2)]


def test_the_higher_gold_is_chosen(tmp_path: Path) -> None:
    rows = [candidate(0, s, text) for s, text in enumerate(["a b", "a", "c", "a b c d"])]
    results, pairs, _ = run([*rows, candidate(1, 0, "alone")], tmp_path)
    assert [(p["chosen"], p["rejected"], p["strength"]) for p in pairs] == [("a b", "a", 1.0), ("a b c d", "c", 3.0)]
    assert results | {"seconds": 0} == {
        "answers": 5,
        "pairs": 2,
        "flipped": 0,
        "held_out": 0,
        "ties": 0,
        **{f"left_out_{reason}": 0 for reason in ("cut", "equal", "empty", "no_verdict")},
        "seconds": 0,
    }
    scored = data.load(tmp_path / "run" / "candidates.parquet", "candidates")
    assert [row["gold"] for row in scored] == [2, 1, 1, 4, 1]


def test_cut_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [candidate(0, 0, "a b", finished=False), candidate(0, 1, "a"), candidate(1, 0, "a"), candidate(1, 1, "a b")]
    results, pairs, _ = run(rows, tmp_path)
    assert (results["pairs"], results["left_out_cut"]) == (1, 1)
    assert pairs[0]["prompt_id"] == "1"
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no pair could be made \(0 ties; left out: 1 cut\)"):
        run(rows[:2], tmp_path / "none")


def test_ties_are_dropped_or_kept_without_a_winner_and_equal_answers_never_kept(tmp_path: Path) -> None:
    ties = [candidate(p, s, ("x", "y")[s]) for p in range(60) for s in range(2)]
    equal = [candidate(p, s, "same") for p in range(60, 63) for s in range(2)]
    clear = [candidate(99, s, "a " * (s + 1)) for s in range(2)]
    results, pairs, _ = run([*ties, *equal, *clear], tmp_path, ties="keep")
    assert (results["pairs"], results["ties"], results["left_out_equal"]) == (61, 60, 3)
    assert {pair["strength"] for pair in pairs[:60]} == {0.0}
    assert all((pair["chosen"], pair["rejected"]) == ("x", "y") for pair in pairs[:60])
    (tmp_path / "drop").mkdir()
    results, pairs, _ = run([*ties, *equal, *clear], tmp_path / "drop")
    assert (results["pairs"], results["ties"], len(pairs)) == (1, 60, 1)


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5])
def test_noise_is_exact_and_held_out_pairs_stay_clean(tmp_path: Path, noise: float) -> None:
    results, pairs, held = run(simple(50), tmp_path, noise=noise, held_out=0.2, gold="length(unit='chars')")
    assert (results["pairs"], results["held_out"]) == (40, 10)
    assert results["flipped"] == round(noise * 40) == sum(pair["flipped"] for pair in pairs)
    for pair in pairs:
        assert (len(pair["chosen"]) < len(pair["rejected"])) == pair["flipped"]
    assert all(len(pair["chosen"]) > len(pair["rejected"]) and not pair.get("flipped") for pair in held)
    assert not {pair["prompt_id"] for pair in held} & {pair["prompt_id"] for pair in pairs}


def test_one_noise_seed_one_mask(tmp_path: Path) -> None:
    masks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        _, pairs, _ = run(simple(40), tmp_path / name, noise=0.25, noise_seed=seed)
        masks.append([pair["flipped"] for pair in pairs])
    assert masks[0] == masks[1] != masks[2]
    assert sum(masks[2]) == 10


def test_scores_without_pairs(tmp_path: Path) -> None:
    data.write(simple(3), tmp_path / "c.jsonl")
    config = label.Config(str(tmp_path / "c.jsonl"), tmp_path / "run", gold="length()", pairs=False)
    assert label.run(config).results is not None
    assert not (tmp_path / "run" / "pairs.parquet").exists()
    assert label.run(config).done


def test_a_changed_scorer_file_is_another_run(tmp_path: Path) -> None:
    data.write(simple(3), tmp_path / "c.jsonl")
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [len(text) for text in responses]\n")
    config = label.Config(str(tmp_path / "c.jsonl"), tmp_path / "run", gold=f"{tmp_path / 'mine.py'}:score()")
    assert label.run(config).results == label.run(config).results
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [-len(text) for text in responses]\n")
    with pytest.raises(ValueError, match=r"the .*mine\.py file or model has changed"):
        label.run(config)


def test_a_scorer_without_scores_is_refused_before_work(tmp_path: Path) -> None:
    data.write(simple(3), tmp_path / "c.jsonl")
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef score(prompts, responses):\n    return torch.full((len(responses),), float('nan'))\n"
    )
    config = label.Config(str(tmp_path / "c.jsonl"), tmp_path / "run", gold=f"{tmp_path / 'mine.py'}:score()")
    with pytest.raises(ValueError, match="scores must be finite"):
        label.run(config)
    with pytest.raises(ValueError, match=r"--noise 0\.7: give 0 to 0\.5"):
        label.run(replace(config, gold="length()", noise=0.7))
    assert not (tmp_path / "run").exists()


def test_a_judge_decides_in_place_of_the_gold(tmp_path: Path) -> None:
    """The judge prefers the shorter answer, against the gold; without a verdict there is no pair."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\n"
        "def judge(prompts, a, b):\n"
        "    first = [len(x) < len(y) for x, y in zip(a, b)]\n"
        "    return torch.tensor([float('nan') if 'none' in x else 0.9 if f else 0.1 for x, f in zip(a, first)])\n"
    )
    rows = [candidate(0, 0, "a"), candidate(0, 1, "a b"), candidate(1, 0, "none"), candidate(1, 1, "a b c d e")]
    results, pairs, _ = run(rows, tmp_path, judge=f"{tmp_path / 'mine.py'}:judge()")
    assert (results["pairs"], results["left_out_no_verdict"]) == (1, 1)
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("a", "a b")
    assert pairs[0]["strength"] == pytest.approx(2.1972, abs=1e-3)  # ln(0.9 / 0.1)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="label needs --gold"):
        run(rows, tmp_path / "none", gold=None)


def test_a_judge_without_gold(tmp_path: Path) -> None:
    rows = [candidate(0, 0, "a"), candidate(0, 1, "a b")]
    _, pairs, _ = run(rows, tmp_path, gold=None, judge="bradley_terry(gold='length()')")
    assert pairs[0]["chosen"] == "a b" and pairs[0]["strength"] == pytest.approx(1.0, abs=1e-3)
