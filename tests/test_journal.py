"""What a round leaves behind: rows, counts, accuracies of who ranks fresh answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyrite.data.responses import Responses
from pyrite.training.evaluation import Measurement
from pyrite.training.rounds import _accuracy


def answers(gold: list[float], owner: list[int]) -> Measurement:
    some = Responses.of([([1], [[2]] * owner.count(p)) for p in range(max(owner) + 1)])
    return Measurement(some, {"gold": torch.tensor(gold)})


def test_accuracy_over_what_gold_tells_apart() -> None:
    """Gold 1, 2, 3 for the first prompt; the second prompt's answers are equal; ties of the score count half."""
    some = answers([1, 2, 3, 5, 5], [0, 0, 0, 1, 1])
    assert _accuracy(some, torch.tensor([0.1, 0.2, 0.3, 9.0, 0.0])) == 1.0
    assert _accuracy(some, torch.tensor([0.3, 0.2, 0.1, 9.0, 0.0])) == 0.0
    assert _accuracy(some, torch.tensor([0.2, 0.1, 0.3, 9.0, 0.0])) == pytest.approx(2 / 3)
    assert _accuracy(some, torch.zeros(5)) == 0.5
    assert _accuracy(answers([1, 2], [0, 1]), torch.zeros(2)) is None  # one answer a prompt: nothing to compare
    partly = answers([float("nan"), 2, 3, 5, 5], [0, 0, 0, 1, 1])  # one not asked: only 2 against 3 is left
    assert _accuracy(partly, torch.tensor([9.0, 0.2, 0.3, 9.0, 0.0])) == 1.0


def test_a_row_a_round_of_a_real_run(tiny: Path, demos: Path, tmp_path: Path) -> None:
    from pyrite.core.runs import read_metrics
    from pyrite.jobs import online
    from pyrite.training.evaluation import Evaluation
    from pyrite.training.loop import Training

    config = online.Config(
        str(tiny),
        str(demos),
        "bradley_terry(gold='length()')",
        tmp_path / "run",
        rounds=2,
        prompts_per_round=8,
        annotator="implicit(lr=0.001)",
        evaluation=Evaluation(gold="length()", max_new_tokens=6, eval_k=2),
        training=Training(lr=1e-3, lr_scheduler_type="cosine(warmup_steps=0)"),
    )
    online.run(config)
    start, first, last = read_metrics(config.out)
    assert start["labels"] == 0 and start["win_rate"] == 0.5
    assert start["policy_accuracy"] == pytest.approx(0.5, abs=0.2)
    for row in (first, last):
        assert {"gold", "kl_k1", "length", "live_accuracy", "policy_accuracy", "agreement", "gold_pairs"} <= row.keys()
    assert last["labels"] > first["labels"] > 0


def test_a_run_that_goes_on_reads_its_books(tiny: Path, demos: Path, tmp_path: Path) -> None:
    """Rows, first and last, as the run that was stopped had them; those behind the checkpoint are forgotten."""
    from pyrite.core.runs import Run, read_metrics
    from pyrite.models.policy import Policy
    from pyrite.training.evaluation import Evaluation, Evaluator
    from pyrite.training.rounds import Journal

    policy = Policy.load(tiny)
    options = Evaluation(str(demos), gold="length()", eval_limit=4, eval_k=2, max_new_tokens=6)
    evaluator = Evaluator.load(options, policy, ref=str(tiny), seed=0)
    run = Run(tmp_path, {}, {})
    before = Journal(run, evaluator, policy, "x")
    before.begin(0)
    for number in range(3):
        before.log(number, 5, {"loss": 1.0 / (number + 1)}, measured=number != 1)
    assert [("gold" in row, row["answers"]) for row in before.rows] == [(True, 0), (True, 5), (False, 10), (True, 15)]
    assert before.start["win_rate"] == before.last["win_rate"] == 0.5  # the policy has not moved
    after = Journal(run, evaluator, policy, "x")
    after.begin(2)
    assert after.rows == before.rows[:3] and after.answers == 10 and len(read_metrics(tmp_path)) == 3
    after.log(2, 5, {"loss": 1.0 / 3}, measured=True)
    assert after.rows == before.rows and after.last == before.last
