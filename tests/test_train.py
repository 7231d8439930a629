"""The inner loop: what must not change a step, exact resumption, and a stop at the first number that is none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import Row, random_rows
from safetensors.torch import load_file
from torch import Tensor, nn

from pyrite.core import runs
from pyrite.core.runs import Run
from pyrite.data.responses import Responses
from pyrite.models.forward import Packed
from pyrite.models.policy import Policy
from pyrite.training import loop
from pyrite.training.loop import Logging, Training, TrainingError, learning_rate, order

SHAPES = [(2 + i % 5, [1 + (3 * i) % 7]) for i in range(22)]
ROWS = [Row([t % 24 for t in r.prompt], [[t % 24 for t in r.responses[0]]]) for r in random_rows(SHAPES)]
SMALL = Training(lr=1e-2, epochs=2, batch_size=6, lr_scheduler_type="cosine(warmup_steps=2)")


class KilledError(Exception):
    pass


def new_run(folder: Path) -> Run:
    run = Run(folder, {"job": "test"}, {})
    run.open()
    return run


def batches(training: Training) -> list[set[int]]:
    """The rows of every step."""
    size = training.batch_size
    orders = [order(len(ROWS), epoch, seed=0) for epoch in range(training.epochs)]
    return [set(o[begin : begin + size]) for o in orders for begin in range(0, len(o), size)]


def fit(
    tiny: Path,
    folder: Path,
    training: Training = SMALL,
    *,
    logging_steps: int = 1,
    save_steps: int = 3,
    stop_at: int = -1,
    nan_at: int = -1,
    dropout: float = 0.0,
) -> dict[str, Tensor]:
    """Parameters after training, which raises, or computes NaN, where the loss of that step is asked for."""
    policy = Policy.load(tiny)
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = dropout

    def at(step: int, indices: list[int]) -> bool:
        return step >= 0 and set(indices) <= batches(training)[step]

    def loss(model: nn.Module, batch: Packed, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        if at(stop_at, indices):
            raise KilledError
        total = -model(batch).sum()
        return total * float("nan") if at(nan_at, indices) else total, {"rows": torch.tensor(float(batch.n))}

    weights = [float(len(row.responses[0])) for row in ROWS]
    run, read, logging = new_run(folder), Responses.of(ROWS), Logging(logging_steps, save_steps)
    options = {"weights": weights, "training": training, "logging": logging, "seed": 0, "run": run, "label": "test"}
    loop.fit(policy, read, read.groups(), loss, **options)
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tol: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=tol, rtol=0, msg=name)


def test_the_token_budget_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    whole = fit(tiny, tmp_path / "whole")
    pieces = fit(tiny, tmp_path / "pieces", replace(SMALL, micro_batch_tokens=1))
    assert_equal(pieces, whole, 1e-5)  # a thousandth of a step: Adam divides rounding by itself where g is near 0
    rows = [[r["loss"] for r in runs.read_metrics(tmp_path / name)] for name in ("whole", "pieces")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)


def test_a_step_is_adamw_on_the_mean_over_tokens(tiny: Path, tmp_path: Path) -> None:
    """One step against torch's own optimizer on the plain formula."""
    training = replace(SMALL, epochs=1, batch_size=len(ROWS), max_grad_norm=0.05, optim="adamw(weight_decay=0.3)")
    got = fit(tiny, tmp_path, training)
    policy = Policy.load(tiny)
    total = sum(-policy(policy.pack(Responses.of([row]))).sum() for row in ROWS)
    (total / sum(len(row.responses[0]) for row in ROWS)).backward()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), 0.05)
    decayed = [p for p in policy.parameters() if p.dim() >= 2]
    rest = [p for p in policy.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=learning_rate(0, 1, training), betas=(0.9, 0.98)).step()
    assert_equal(got, dict(policy.named_parameters()), 1e-4)  # Adam divides rounding by itself where g is near 0
    (row,) = runs.read_metrics(tmp_path)
    assert row["step"] == 1
    assert row["part"] == "test"
    assert row["lr"] == learning_rate(0, 1, training)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["rows"] == pytest.approx(len(ROWS) / sum(len(row.responses[0]) for row in ROWS))


def test_learning_rate() -> None:
    plain = Training(lr=2.0, lr_scheduler_type="cosine(warmup_steps=4, min_lr_ratio=0.1)")
    assert learning_rate(0, 100, plain) == pytest.approx(2 * 1 / 4)
    assert learning_rate(3, 10**9, plain) == pytest.approx(2.0)
    assert learning_rate(50, 100, plain) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate(25, 100, plain) == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))))
    assert learning_rate(100, 100, plain) == pytest.approx(0.2)
    linear = replace(plain, lr_scheduler_type="linear(min_lr_ratio=0.0)")
    assert learning_rate(25, 100, linear) == pytest.approx(1.5)
    assert learning_rate(100, 100, linear) == 0
    constant = replace(plain, lr_scheduler_type="constant(warmup_steps=0)")
    assert [learning_rate(step, 100, constant) for step in (0, 99)] == [2.0, 2.0]


def test_every_epoch_has_its_own_order() -> None:
    orders = [order(50, epoch, seed=seed) for epoch in (0, 1) for seed in (0, 1)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert order(50, 1, seed=1) == orders[3]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_at", [1, 3, 5, 7])
def test_resuming_equals_never_stopping(tiny: Path, tmp_path: Path, stop_at: int, dropout: float) -> None:
    want = fit(tiny, tmp_path / "whole", dropout=dropout)
    with pytest.raises(KilledError):
        fit(tiny, tmp_path / "cut", stop_at=stop_at, dropout=dropout)
    torch.rand(3)  # whatever else happened in between
    got = fit(tiny, tmp_path / "cut", dropout=dropout)
    assert_equal(got, want)
    metrics = [runs.read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    assert [row["step"] for row in metrics[1]] == list(range(1, 9))


def test_dropout_matters_in_that_test(tiny: Path, tmp_path: Path) -> None:
    quiet, noisy = (fit(tiny, tmp_path / str(d), dropout=d) for d in (0.0, 0.3))
    assert any(not torch.equal(quiet[name], noisy[name]) for name in quiet)


def test_nan_stops_with_the_step_and_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite at step 5 .* last good checkpoint is step 3") as error:
        fit(tiny, tmp_path, logging_steps=100, nan_at=4)
    assert "\n" not in str(error.value)
    saved = list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-3.safetensors"]
    state = load_file(saved[0])
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    again, whole = (fit(tiny, folder, logging_steps=100) for folder in (tmp_path, tmp_path / "whole"))
    assert_equal(again, whole)


def test_nan_before_any_checkpoint_says_so(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 1 .*there is no earlier checkpoint"):
        fit(tiny, tmp_path, nan_at=0)


def test_the_last_two_checkpoints_stay_until_discarded(tiny: Path, tmp_path: Path) -> None:
    fit(tiny, tmp_path, save_steps=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4.safetensors", "step-6.safetensors"]
    loop.discard_checkpoints(new_run(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_half_precision_follows_single_in_one_process(tiny: Path, tmp_path: Path) -> None:
    single = fit(tiny, tmp_path / "single")
    half = fit(tiny, tmp_path / "half", replace(SMALL, precision="bfloat16"))
    assert all(p.dtype == torch.float32 for p in half.values())
    losses = [runs.read_metrics(tmp_path / name)[-1]["loss"] for name in ("single", "half")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert_equal(fit(tiny, tmp_path / "again"), single)


def test_frozen_parameters_are_neither_trained_nor_stored(tiny: Path, tmp_path: Path) -> None:
    policy = Policy.load(tiny)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("norm" in name)
    before = {name: p.clone() for name, p in policy.named_parameters()}

    def loss(model: nn.Module, batch: Packed, _: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return -model(batch).sum(), {}

    run, read = new_run(tmp_path), Responses.of(ROWS)
    loop.fit(policy, read, read.groups(), loss, training=SMALL, logging=Logging(1, 3), seed=0, run=run, label="x")
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("norm" in name for name in changed)
    state = load_file(tmp_path / "checkpoints" / "step-6.safetensors")
    assert {name.removeprefix("model.") for name in state if name.startswith("model.")} == changed


BAD = [(name, 0) for name in ("epochs", "batch_size", "micro_batch_tokens", "lr")]
BAD += [("lr", math.nan), ("max_grad_norm", -1.0), ("optim", "adamw(weight_decay=-1)")]
BAD += [("lr_scheduler_type", f"cosine({option})") for option in ("min_lr_ratio=2.0", "warmup_steps=-1")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
        Training(**{name: value})


def test_recomputed_layers_change_nothing(tiny: Path, tmp_path: Path) -> None:
    plain = fit(tiny, tmp_path / "plain")
    again = fit(tiny, tmp_path / "again", replace(SMALL, gradient_checkpointing=True))
    assert_equal(again, plain)


def test_the_state_of_a_loss_resumes_with_the_model(tiny: Path, tmp_path: Path) -> None:
    """A running count, killed between two checkpoints, ends where the uninterrupted one does; watch sees each step."""

    def count(folder: Path, *, stop_at: int = -1) -> tuple[float, list[int]]:
        policy, run, seen = Policy.load(tiny), new_run(folder), []
        state = {"count": torch.zeros(())}

        def loss(model: nn.Module, batch: Packed, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
            state["count"] += batch.n
            return -model(batch).sum(), {}

        def watch(step: int) -> None:
            assert not policy.training
            seen.append(step)
            if step == stop_at:
                raise KilledError

        kind = {"training": SMALL, "logging": Logging(1, 3), "seed": 0, "run": run, "label": "test"}
        read = Responses.of(ROWS)
        loop.fit(policy, read, read.groups(), loss, state=state, watch=watch, **kind)
        return state["count"].item(), seen

    assert count(tmp_path / "whole") == (44.0, [1, 2, 3, 4, 5, 6, 7, 8])
    with pytest.raises(KilledError):
        count(tmp_path / "killed", stop_at=5)
    assert count(tmp_path / "killed") == (44.0, [4, 5, 6, 7, 8])
