"""The inner loop every training job shares: batches, micro-batches, optimizer, clipping, checkpoints.

A batch is `batch_size` rows over all processes. It is cut into micro-batches by a token budget, and each loss is
divided by the weight of the whole batch, so neither the budget nor the number of processes changes the step.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyrite.core import processes, specs
from pyrite.core.processes import progress, say, world
from pyrite.core.runs import Run, TrainingError
from pyrite.data.responses import Responses
from pyrite.math import lr_schedulers, seeds
from pyrite.math.ranges import Count, Positive, check
from pyrite.models.forward import Groups, Packed, micro_batches, sizes
from pyrite.models.loading import Dtype
from pyrite.models.policy import recompute
from pyrite.training import optimizers

# Dropout --------------------------------------------------------------------------------------------------------------


def set_dropout(model: nn.Module, dropout: float | None = 0.0, *, name: str | None = None) -> None:
    """Give every dropout of a model this probability; None leaves the model's own. A note says what that changes.

    Preferences are learned without dropout, as references are read without. name: of the model, for the note; None for
    no note.
    """
    places = list(_dropouts(model))
    own = max((getattr(module, attribute) for module, attribute in places), default=0.0)
    if dropout is None:
        if own and name:
            say(f"  note: {name} learns with its own dropout, {own:g}; --dropout 0 turns it off")
        return
    for module, attribute in places:
        setattr(module, attribute, dropout)
    if name and own not in (0, dropout):
        say(f"  note: {name} has a dropout of {own:g}; here it learns with {dropout:g}")


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and the names of their attributes that hold a probability of dropout; adapters have their own."""
    for path, module in model.named_modules():
        if "lora_" in path:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        else:
            held = [name for name, value in vars(module).items() if "drop" in name and type(value) is float]
            yield from ((module, name) for name in held)


# Did training move the model? ----------------------------------------------------------------------------------------


SAMPLE = 4096  # entries of each weight that are remembered
ROWS = 512  # held-out rows that are compared before and after
STILL = 1e-3  # of their size: weights that changed less have hardly moved


@dataclass(frozen=True)
class Shift:
    """The mean change of a measured value over a run and its standard error. least: a change below it is negligible."""

    name: str
    mean: float
    se: float
    least: float

    @property
    def seen(self) -> bool:
        """Whether the change is larger than its noise, and not negligible."""
        return abs(self.mean) > max(2 * self.se, self.least)


def shift(name: str, before: Tensor, after: Tensor, *, least: float) -> Shift:
    """Of values (N,) of the same rows before and after."""
    change = after.double() - before.double()
    se = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else 0.0
    return Shift(name, change.mean().item() if len(change) else 0.0, se, least)


@dataclass(frozen=True)
class Weights:
    """A sample of a model's trained weights before training, to tell later how far they have moved.

    Of each weight some entries, evenly spread; of adapters both factors, since their product is what changes.
    """

    entries: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """The weights as they are now."""
        entries = {name: _some(parameter).clone() for name, parameter in _whole(model)}
        return cls(entries, {name: (a.clone(), b.clone()) for name, a, b, _ in _factors(model)})

    @torch.no_grad()
    def change(self, model: nn.Module) -> float:
        """||now - then|| / ||then|| over the trained weights; of weights with adapters, that of their sum."""
        moved, size = 0.0, 0.0
        for name, parameter in _whole(model):
            then, each = self.entries[name].double(), parameter.numel() / len(self.entries[name])
            moved += each * (_some(parameter).double() - then).square().sum().item()
            size += each * then.square().sum().item()
        for name, a, b, layer in _factors(model):
            (a0, b0), scale = self.factors[name], layer.scaling[name.rpartition(" ")[2]]
            left, right = torch.cat([b, -b0], 1).double(), torch.cat([a, a0]).double()
            moved += scale**2 * ((left.T @ left) * (right @ right.T)).sum().item()
            base: Any = layer.get_base_layer()  # type: ignore[operator]
            size += base.weight.detach().double().square().sum().item()
        return math.sqrt(max(moved, 0.0) / size) if size else 0.0


def tell(job: str, weights: float, lr: float, *seen: Shift) -> dict[str, Any]:
    """Say so if training hardly moved the model; returns the numbers for the results of the run."""
    if weights < STILL and not any(one.seen for one in seen):
        shifts = ", ".join(f"{one.name} by {one.mean:+.2g} (standard error {one.se:.1g})" for one in seen)
        more = min(1000, 10 ** math.ceil(math.log10(5 * STILL / max(weights, 1e-12))))
        say(
            f"{job}: this run hardly moved the model: its weights by {weights:.1g} of their size"
            f"{', ' if shifts else ''}{shifts}; --lr was {lr:g}: give a larger one, such as --lr {more * lr:.0e}, "
            "or more steps"
        )
    return {"weights": weights} | {k: v for one in seen for k, v in ((one.name, one.mean), (f"{one.name}_se", one.se))}


def _whole(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trained parameters that are no factor of an adapter."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)


def _some(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _factors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, LoraLayer]]:
    """Trained adapters of linear layers: "layer adapter", both factors, the layer."""
    for path, layer in model.named_modules():
        for adapter in layer.lora_A if isinstance(layer, LoraLayer) else ():
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[union-attr]
            if a.requires_grad:  # type: ignore[union-attr]
                yield f"{path} {adapter}", a.detach(), b.detach(), layer  # type: ignore[operator,misc]


# The loop ------------------------------------------------------------------------------------------------------------


# (model, groups of responses as it reads them, their indices) -> (sum of the losses, sums of metrics)
BatchLoss = Callable[[nn.Module, Packed, list[int]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Training:
    """How a model is trained."""

    lr: Positive = 1e-5
    """Peak learning rate."""
    epochs: Count = 1
    """Passes over the data."""
    batch_size: Count = 32
    """Rows in one optimizer step, over all processes."""
    micro_batch_tokens: Count = 8192
    """Packed tokens in one forward pass. Changes memory and speed, not the result."""
    lr_scheduler_type: str = "cosine()"
    """How the learning rate rises and falls: "cosine(warmup_steps=10, min_lr_ratio=0.1)", or linear or constant."""
    optim: str = "adamw()"
    """The optimizer with its options: "adamw(weight_decay=0.01, betas=(0.9, 0.98))"."""
    max_grad_norm: Positive = 1.0
    """Largest gradient norm; larger gradients are scaled down."""
    precision: Dtype = "float32"
    """Precision of matrix products, in training and in everything a step learns from. Weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        check(self)
        for name, spec, known in (
            ("lr-scheduler-type", self.lr_scheduler_type, lr_schedulers),
            ("optim", self.optim, optimizers),
        ):
            try:
                specs.part(spec, known)
            except ValueError as error:
                raise ValueError(f"--{name} {spec}: {error}") from None


@dataclass(frozen=True)
class Logging:
    """How often a run writes."""

    logging_steps: Count = 10
    """Write a row of metrics every N steps."""
    save_steps: Count = 200
    """Save a checkpoint every N steps."""

    def __post_init__(self) -> None:
        check(self)


@cache
def _scheduler(spec: str) -> Callable[[float, int, int], float]:
    return specs.part(spec, lr_schedulers)


def learning_rate(step: int, total: int, training: Training) -> float:
    """The learning rate of step `step` (from 0) of `total`."""
    return _scheduler(training.lr_scheduler_type)(training.lr, step, total)


def order(n: int, epoch: int, *, seed: int) -> list[int]:
    """The order in which epoch `epoch` visits n rows."""
    return torch.randperm(n, generator=seeds.generator(seed, "order", epoch)).tolist()


def steps(rows: int, training: Training) -> int:
    """Optimizer steps over `rows` rows."""
    return math.ceil(rows / training.batch_size) * training.epochs


def fit(
    model: nn.Module,
    responses: Responses,
    groups: Groups,
    loss: BatchLoss,
    *,
    weights: Sequence[float] | None = None,
    training: Training,
    logging: Logging,
    seed: int,
    run: Run,
    label: str,
    folder: str = "checkpoints",
    state: Mapping[str, Tensor] | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Minimize sum(loss) / sum(weights) over batches of groups, resuming from the last checkpoint if there is one.

    groups: responses that are learned from together: one, a pair, all to a prompt. weights: what each group counts in
    its batch, 1 by default (response tokens for sft). state: tensors of the loss that belong in a checkpoint (running
    means, a moving reference); they are restored in place. watch(step) is called after every step, before its
    checkpoint, with the model in evaluation mode.
    Raises TrainingError if the loss or a gradient is not finite.
    """
    learner = Learner(model, training)
    total = steps(len(groups), training)
    torch.manual_seed(seeds.derive(seed, "dropout"))
    checkpoints = run.folder / folder
    begin = resume(checkpoints, learner, state or {})
    run.rewind(begin, part=label)
    if begin:
        say(f"  {label}: going on from step {begin} of {total}")
    model.train()
    log = _Log(run, label, logging, checkpoints)
    order_of = batches(len(groups), training, seed=seed, begin=begin)
    with progress(label, total, unit="steps", done=begin) as advance, processes.after_steps("step") as asked:
        for step, batch in zip(range(begin, total), order_of, strict=True):
            lr = learning_rate(step, total, training)
            metrics = learner.update(batch, responses, groups, loss, weights=weights, lr=lr)
            saves = (step + 1) % logging.save_steps == 0 and step + 1 < total
            log.add(step + 1, metrics, lr=lr, line=saves or step + 1 == total)
            if watch:
                model.eval()
                watch(step + 1)
                model.train()
            stop = 0 if step + 1 == total else asked()
            if saves or stop:
                log.line(step + 1, lr=lr)
                save(checkpoints, step + 1, learner, state or {})
                run.pause()
            advance(1)
            if stop:
                raise processes.Stopped(stop, f"{label} has {step + 1} of {total} steps")
    model.eval()


class Learner:
    """A model and its optimizer, in all processes: one update at a time."""

    def __init__(self, model: nn.Module, training: Training) -> None:
        world()  # before the accelerator, which would not find siblings without a GPU
        self.accelerator = Accelerator(mixed_precision="no")  # one process may train in both precisions; we cast
        self.model, self.training = model.to(self.accelerator.device), training
        if training.gradient_checkpointing:
            recompute(model)  # type: ignore[arg-type]  # policies and reward models are all that is trained
        self.wrapped = self.accelerator.prepare(model) if self.accelerator.num_processes > 1 else model
        self.restart()

    def restart(self) -> None:
        """Forget the optimizer's moments."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = specs.part(self.training.optim, optimizers)(trained)

    def update(
        self,
        batch: list[int],
        responses: Responses,
        groups: Groups,
        loss: BatchLoss,
        *,
        weights: Sequence[float] | None = None,
        lr: float,
    ) -> dict[str, Tensor]:
        """One optimizer step on some of the groups; means of loss and metrics, and the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(len(batch)) if weights is None else sum(weights[i] for i in batch)
        metrics = self._backward(batch, responses, groups, loss, norm)
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**metrics, "grad_norm": clipped}

    def _backward(
        self, batch: list[int], responses: Responses, groups: Groups, loss: BatchLoss, norm: float
    ) -> dict[str, Tensor]:
        """Gradients of one optimizer batch; this process takes every num_processes-th group by length."""
        accelerator, model, training = self.accelerator, self.wrapped, self.training
        size = dict(zip(batch, sizes(responses, [groups[i] for i in batch]), strict=True))
        by_length = sorted(batch, key=lambda i: -size[i])
        mine = by_length[accelerator.process_index :: accelerator.num_processes]
        idle = not mine  # fewer groups than processes: take part in the gradient sum with weight 0
        mine = mine or by_length[:1]
        micro = list(micro_batches([size[i] for i in mine], budget=training.micro_batch_tokens))
        share = 0.0 if idle else accelerator.num_processes / norm  # DDP averages over processes
        sums: dict[str, Tensor] = {}
        # one cast of the weights serves all micro-batches: autocast keeps it until the outermost block ends
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            for number, part in enumerate(micro):
                indices = [mine[i] for i in part]
                packed = self.model.pack(responses, [groups[i] for i in indices])  # type: ignore[operator]
                with nullcontext() if number == len(micro) - 1 else accelerator.no_sync(model):
                    value, metrics = loss(model, packed, indices)
                    with torch.autocast(accelerator.device.type, enabled=False):
                        accelerator.backward(value * share)
                for name, amount in {"loss": value.detach(), **metrics}.items():
                    sums[name] = sums.get(name, 0) + amount.detach() * (0.0 if idle else 1.0)
        return {name: accelerator.reduce(amount) / norm for name, amount in sums.items()}  # type: ignore[operator]


def batches(rows: int, training: Training, *, seed: int, begin: int = 0) -> Iterator[list[int]]:
    """Row indices of every step from `begin` on."""
    places = range(0, rows, training.batch_size)
    first, skipped = divmod(begin, max(len(places), 1))
    for epoch in range(first, training.epochs):
        visit = order(rows, epoch, seed=seed)
        for place in places[skipped if epoch == first else 0 :]:
            yield visit[place : place + training.batch_size]


def means(updates: Sequence[Mapping[str, Tensor]], where: str, advice: str) -> dict[str, float]:
    """Means of the metrics of several updates. Raises TrainingError, with the advice, if one is not finite."""
    found = {name: torch.stack([row[name].float() for row in updates]).mean().item() for name in updates[0]}
    if not all(map(math.isfinite, found.values())):
        raise TrainingError(
            f"{where}: loss or gradient not finite; the last good checkpoint is in checkpoints/; {advice}"
        )
    return found


def discard_checkpoints(run: Run) -> None:
    """Drop what only a resume would need, once the model is saved."""
    if run.writes:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


class _Log:
    """Means over the steps since the last line; remembers the first step that was not finite.

    A checkpoint is a line too: what follows it is then the same in a resumed run.
    """

    def __init__(self, run: Run, label: str, logging: Logging, checkpoints: Path) -> None:
        self.run, self.label, self.logging, self.checkpoints = run, label, logging, checkpoints
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.bad = torch.zeros(())

    def add(self, step: int, metrics: dict[str, Tensor], *, lr: float, line: bool) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()  # stays on the device: no wait
            wrong = ~torch.isfinite(self.sums[name])
            self.bad = self.bad.to(wrong.device)
            self.bad = torch.where(wrong & (self.bad == 0), float(step), self.bad)
        self.count += 1
        if line or step % self.logging.logging_steps == 0:
            self.line(step, lr=lr)

    def line(self, step: int, *, lr: float) -> None:
        """Log the means over the steps since the last line, if there are any."""
        self.check(step)
        if self.count:
            means = {name: (total / self.count).item() for name, total in self.sums.items()}
            self.run.log(step=step, part=self.label, lr=lr, **means)
        self.sums, self.count = {}, 0

    def check(self, step: int) -> None:
        if (bad := int(self.bad.item())) == 0:
            return
        saved = _steps(self.checkpoints)
        good = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no earlier checkpoint"
        raise TrainingError(
            f"{self.label}: loss or gradient not finite at step {bad} (noticed at {step}; batch {bad - 1} of the "
            f"order drawn from the seed); {good} in {self.checkpoints}; lower --lr or look at that batch"
        )


def _steps(checkpoints: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in checkpoints.glob("step-*.safetensors"))


def save(checkpoints: Path, step: int, learner: Learner, extra: Mapping[str, Tensor]) -> None:
    """Trained weights, optimizer moments, the dropout stream and the loss's own state, in one safetensors file.

    The last two are kept.
    """
    if not world().is_main_process:
        return
    params, optimizer = dict(learner.model.named_parameters()), learner.optimizer
    names = [name for name, p in params.items() if p.requires_grad]
    state = {f"model.{name}": params[name].detach().clone() for name in names}
    for name in names:
        for key, value in optimizer.state[params[name]].items():
            state[f"optimizer.{key}.{name}"] = torch.as_tensor(value).clone()
    state |= {f"state.{name}": value.detach().clone() for name, value in extra.items()}
    state["rng"] = torch.get_rng_state()
    checkpoints.mkdir(parents=True, exist_ok=True)
    beside = checkpoints / f".step-{step}"
    save_file(state, beside)
    beside.replace(checkpoints / f"step-{step}.safetensors")
    for old in _steps(checkpoints)[:-2]:
        (checkpoints / f"step-{old}.safetensors").unlink()


@torch.no_grad()
def resume(checkpoints: Path, learner: Learner, extra: Mapping[str, Tensor], *, step: int | None = None) -> int:
    """Restore the newest checkpoint, or that of a step, and return its step, or 0."""
    saved = _steps(checkpoints) if step is None else [step]
    if not saved:
        return 0
    state = load_file(checkpoints / f"step-{saved[-1]}.safetensors")
    params, optimizer = dict(learner.model.named_parameters()), learner.optimizer
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            params[name].copy_(value)
        elif kind == "state":
            extra[name].copy_(value)
        elif kind == "optimizer":
            moment, _, name = name.partition(".")
            parameter = params[name]
            where = "cpu" if moment == "step" and parameter.device.type == "cpu" else parameter.device
            optimizer.state[parameter][moment] = value.to(where)
    torch.set_rng_state(state["rng"])
    return saved[-1]
