"""Whose turn it is; prompts to learn from and to measure on never meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyrite.data import rows as data
from pyrite.data.conditioning import Variants
from pyrite.models.policy import Policy
from pyrite.training import rounds
from pyrite.training.evaluation import Evaluation
from pyrite.training.rounds import turn


def split(path: str, evaluation: Evaluation | None = None, held_out: float = 0.2) -> tuple[list, list]:
    return rounds.split(path, evaluation or Evaluation(), columns=None, held_out=held_out, seed=0)


def test_rounds_go_through_the_prompts_and_start_again_in_a_new_order() -> None:
    found = [turn(48, 16, 0, number) for number in range(4)]
    assert sorted(found[0] + found[1] + found[2]) == list(range(48))
    assert sorted(found[3]) != sorted(found[0])  # a new order after all have been asked
    assert turn(48, 16, 1, 0) != found[0]


@pytest.mark.parametrize(("n", "size"), [(10, 4), (7, 5), (5, 4), (3, 3), (9, 1), (11, 10)])
def test_a_round_may_reach_into_the_next_order(n: int, size: int) -> None:
    """Every prompt once before any twice, none twice in a round; a round does not depend on those asked for before."""
    found = [turn(n, size, 3, number) for number in range(4 * n)]
    flat = [i for places in found for i in places]
    assert all(sorted(flat[at : at + n]) == list(range(n)) for at in range(0, len(flat), n))
    assert all(len(set(places)) == size for places in found)
    for number in reversed(range(4 * n)):
        rounds._order.cache_clear()
        assert turn(n, size, 3, number) == found[number]


def test_none_is_learned_from_and_measured_on(demos: Path, tmp_path: Path) -> None:
    asked = {row["prompt_id"] for row in data.load(demos, "prompts")}
    learned, test = split(str(demos))
    names = [{row["prompt_id"] for row in some} for some in (learned, test)]
    assert names[0] | names[1] == asked
    assert not names[0] & names[1]
    data.write(test[:3], tmp_path / "test.jsonl")
    named = Evaluation(eval_prompts=str(tmp_path / "test.jsonl"))
    others, kept = split(str(demos), named, held_out=0.0)
    assert len(kept) == 3
    assert not {row["prompt_id"] for row in others} & {row["prompt_id"] for row in kept}
    with pytest.raises(ValueError, match="0 to measure on"):
        split(str(demos), held_out=0.0)


def test_no_raw_prompt_is_learned_from_and_measured_on(tmp_path: Path) -> None:
    """Under whatever preferences, by a share or by a file of its own, conditioned or raw."""
    raw = [{"prompt_id": f"r{i}", "prompt": f"tell me {i}"} for i in range(20)]
    rows = Variants("soups", ("P1A", "neutral", "P2B+P3A")).of(raw)
    data.write(rows, tmp_path / "rows.parquet")
    data.write(raw[:4], tmp_path / "raw.jsonl")
    data.write(rows[:12], tmp_path / "test.parquet")
    nameless = [{"prompt": row["prompt"]} for row in raw[:4]]
    data.write(nameless, tmp_path / "nameless.jsonl")
    for file in (None, "raw.jsonl", "test.parquet", "nameless.jsonl"):
        how = Evaluation(eval_prompts=str(tmp_path / file) if file else None)
        learned, test = split(str(tmp_path / "rows.parquet"), how)
        both = [{data.origin(row)[1] for row in some} for some in (learned, test)]
        assert not both[0] & both[1] and len(both[0]) == 16 and len(both[1]) == 4
        assert len(learned) == 48 and all("preferences" in row for row in learned)


def test_room_for_the_answer(tiny: Path) -> None:
    policy = Policy.load(tiny)
    rows = [{"prompt_id": "a", "prompt": "tell me " * 20}, {"prompt_id": "b", "prompt": "tell me"}]
    whole = rounds.encoded(policy, rows, new=8).ids
    assert len(whole[0]) >= 40
    cut = rounds.encoded(policy, rows, new=60)
    assert cut.counts() == {"prompts_cut": 1} and cut.ids[0] == whole[0][:1] + whole[0][-3:]
    with pytest.raises(ValueError, match="the row of prompt 'a': the prompt has 41 tokens"):
        rounds.encoded(policy, rows[:1], new=60)
