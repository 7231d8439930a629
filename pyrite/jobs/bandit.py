"""Samplers raced in an exact world: softmax policies over a finite set, learned by DPO from every kind of pair.

Uniform pairs converge linearly; pairs drawn uniformly and far apart in reward, by the masses of the theory and at the
rate matched to them, converge quadratically. Rewards, and with them everything else, belong to (seed, repetition).
"""

from __future__ import annotations

import csv
import inspect
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.core.processes import progress, say
from pyrite.core.runs import Run
from pyrite.math import losses, samplers, seeds, statistics, tabular
from pyrite.math.ranges import Count, Half, Natural, NonNegative, Positive, Several, Some
from pyrite.math.samplers import Sampler
from pyrite.math.tabular import World

OUTPUTS = {
    "results.json": "order, rate, floor, bound and final figures of every sampler, and its curve",
    "curves.csv": "error, value lost to the optimum, reward and KL by sampler and step",
    "instances.csv": "order, rate and errors by sampler and instance",
}
PAIRS = 1 << 16  # worked on at once: bounds memory, and stays near the cache
LEVELS = (1e-2, 1e-6)  # errors whose first step is noted
STILL = 1e-9  # a loss whose step from the optimum leaves no larger error has that optimum

Row = dict[str, Any]
Race = dict[str, Tensor]  # one sampler's run: (T+1, I) each, or (I,) each


@dataclass(frozen=True)
class Config:
    """Race samplers over a finite set of responses, where the optimum is known."""

    out: Path
    """Folder of the run, new or empty."""
    samplers: Some[str] = ("uniform", "mix_r", "mix_p")
    """Which pairs are drawn: see `pyrite list samplers`."""
    actions: Several = 20
    """Responses to choose from."""
    instances: Count = 200
    """Reward tables per repetition."""
    seeds: Count = 5
    """Independent repetitions; intervals are over them."""
    beta: Positive = 3.0
    """Strength of the KL, of the loss and of samplers that know it."""
    steps: Count = 60
    """Updates of each policy."""
    loss: str = "dpo"
    """The direct loss of a pair; see `pyrite list losses`."""
    rate: str = "matched"
    """Learning rate: matched to the sampler, best (the best constant one at the optimum), or a number."""
    scale: Positive = 1.0
    """Multiplies the rate."""
    samples: Count | None = None
    """Pairs drawn and labeled anew at each step; exact gradients by default."""
    noise: Half = 0.0
    """Share of labels flipped, 0 to 0.5."""
    rewards: Literal["normal", "unit"] = "normal"
    """Rewards drawn from N(0, 1), or uniformly from [0, 1], where the theorems' bounds hold."""
    ref_spread: NonNegative = 0.0
    """Standard deviation of the reference's logits; 0 is the uniform reference."""
    seed: Natural = 0
    """Of everything that is drawn at random."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {}


def run(config: Config) -> Run:
    """Draw the rewards, run every sampler on them, measure orders, bounds and floors."""
    run = runs.start("bandit", config, inputs=inputs)
    if run.done:
        return run
    zoo, loss, rate = _samplers(config), _loss(config), _rate(config.rate)
    tabular.check_loss(loss)
    tabular.check_options(config.steps, rate, config.scale, config.samples, config.noise)
    world = _world(config)
    run.open()
    instances = len(world.reward)
    say(f"bandit: {len(zoo)} samplers, {instances} instances of {config.actions} responses")
    with _one_thread(), progress("bandit", len(zoo) * instances * config.steps, unit="updates") as advance:
        descend = partial(_race, world, config=config, loss=loss, rate=rate, advance=advance)
        races = {name: descend(name, sampler) for name, sampler in zoo.items()}
    summaries = {name: _plain(_summary(race, name, config)) for name, race in races.items()}
    curves = [row for name, race in races.items() for row in _curve(name, race)]
    if run.writes:
        runs.write_text(run.folder / "curves.csv", _csv(curves))
        rows = [row for name, race in races.items() for row in _instances(name, race, config.instances)]
        runs.write_text(run.folder / "instances.csv", _csv(rows))
        results = {"recipe": "bandit", "config": run.config, "samplers": summaries, "curves": curves}
        runs.write_json(run.folder / "results.json", results)
    return run.finish(instances=instances, samplers=summaries)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain little from threads, and lose much where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _samplers(config: Config) -> dict[str, Sampler]:
    """The samplers by the names they were given."""
    if len(set(config.samplers)) < len(config.samplers):
        raise ValueError(f"--samplers {' '.join(config.samplers)}: one is named twice")
    zoo: dict[str, Sampler] = {}
    for spec in config.samplers:
        found = specs.part(spec, samplers).function
        if not isinstance(found, Sampler):
            raise ValueError(f"--samplers {spec}: returns {type(found).__name__}, not a pyrite.math.samplers.Sampler")
        zoo[spec] = found
    return zoo


def _loss(config: Config) -> tabular.Loss:
    """The loss with the world's beta, where it has one."""
    loss = specs.part(config.loss, losses)
    own = loss.options.get("beta", config.beta)
    if own != config.beta:
        raise ValueError(f"--loss {config.loss} and --beta {config.beta}: give beta once, by --beta")
    takes_beta = "beta" in inspect.signature(loss.function).parameters
    return partial(loss, beta=config.beta) if takes_beta else loss


def _rate(text: str) -> tabular.Rate:
    if text == "matched" or text == "best":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--rate {text!r}: give matched, best or a number") from None


def _world(config: Config) -> World:
    """Rewards and reference of every instance, repetition by repetition."""
    draw = torch.randn if config.rewards == "normal" else torch.rand
    shape, rewards, refs = (config.instances, config.actions), [], []
    for repetition in range(config.seeds):
        stream = seeds.generator(config.seed, "rewards", repetition)
        rewards.append(draw(shape, dtype=torch.float64, generator=stream))
        refs.append(torch.randn(shape, dtype=torch.float64, generator=stream))
    return tabular.world(torch.cat(rewards), beta=config.beta, ref=config.ref_spread * torch.cat(refs))


def _race(
    world: World,
    name: str,
    sampler: Sampler,
    *,
    config: Config,
    loss: tabular.Loss,
    rate: tabular.Rate,
    advance: Callable[[int], None],
) -> Race:
    """One sampler on all instances, a cacheful of them at a time."""
    made: list[Race] = []
    size = max(1, PAIRS // config.actions**2)
    how: dict[str, Any] = {"loss": loss, "rate": rate, "scale": config.scale}
    for begin in range(0, len(world.reward), size):
        some = World(world.reward[begin : begin + size], world.ref[begin : begin + size], world.beta)
        draws, directions = (seeds.generator(config.seed, use, begin) for use in (f"draws {name}", "directions"))
        sampled: dict[str, Any] = {"samples": config.samples, "noise": config.noise, "generator": draws}
        path = tabular.descend(some, sampler, steps=config.steps, advance=advance, **how, **sampled)
        curvature = tabular.spectrum(some, sampler)
        race = {
            "error": path.error,
            "mean_error": path.mean_error,
            "reward": path.reward,
            "kl": path.kl,
            "value_gap": some.best_value - (path.reward - some.beta * path.kl),
            "rate": path.rate[-1],
            "order": tabular.trajectory_order(path.error),
            "step_order": tabular.order_test(some, sampler, generator=directions, **how)[0],
            "contraction": tabular.contraction(curvature, some.beta, path.rate[-1]),
            "drift": _drift(some, sampler, loss, config.noise),
        }
        if config.samples is not None:
            race["floor"] = tabular.noise_floor(curvature, some.beta, path.rate[-1], config.samples)
        made.append(race)
    return {key: torch.cat([race[key] for race in made], -1) for key in made[0]}


def _drift(world: World, sampler: Sampler, loss: tabular.Loss, noise: float) -> Tensor:
    """How far one exact step leads away from π ∝ π_ref e^{r/β}, (I,): not at all where the loss has that optimum."""
    return tabular.descend(world, sampler, steps=1, loss=loss, rate="best", noise=noise, start=world.optimum).error[1]


def _summary(race: Race, name: str, config: Config) -> Row:
    """The figures of one sampler: medians over instances, means with intervals over repetitions."""
    home = bool((race["drift"] < STILL).all())  # else an error is no error
    tail = home and config.samples is None
    last = {key: race[key][-1] for key in ("mean_error", "value_gap", "reward", "kl")}
    return {
        "order": race["order"].nanmedian() if tail else None,
        "order_range": _range(race["order"]) if tail else None,
        "step_order": race["step_order"].nanmedian() if home else None,
        "rate": race["rate"].median(),
        "contraction": race["contraction"].median() if home else None,
        "drift": race["drift"].max(),
        "error": race["error"][-1].median(),
        **{f"steps_to_{level:g}": _first_below(race["error"], level).median() for level in LEVELS},
        **{key: _over_seeds(values, config.seeds) for key, values in last.items()},
        "diverged": (~(race["error"][-1] <= race["error"][0])).double().mean() if home else None,
        "bound": _bound(race, name, config),
        "floor": _floor(race, config),
    }


def _bound(race: Race, name: str, config: Config) -> Row | None:
    """How the theorem's bound fares, where its assumptions hold."""
    plain = config.rate == "matched" and config.scale == 1 and config.loss in ("dpo", "dpo()")
    world = config.rewards == "unit" and config.ref_spread == 0 and config.samples is None and config.noise == 0
    name = name.removesuffix("()")
    if not (plain and world and name in tabular.BOUNDS):
        return None
    limit, error = tabular.bound(name, config.steps)[:, None], race["error"]
    constant, order = tabular.BOUNDS[name]
    holds = (error <= limit + tabular.ROUNDING).all(0).double().mean()
    return {"constant": constant, "order": order, "holds": holds, "closest": (error[1] / limit[1]).max()}


def _floor(race: Race, config: Config) -> Row | None:
    """The mean error of the second half against what noise alone would leave."""
    if config.samples is None:
        return None
    measured = race["mean_error"][config.steps // 2 :].mean(0)
    clean = config.noise == 0 and config.loss in ("dpo", "dpo()")
    predicted = race["floor"].mean() if clean else None
    return {"measured": _over_seeds(measured, config.seeds), "predicted": predicted}


def _curve(name: str, race: Race) -> list[Row]:
    """One row a step: medians of error and value gap with the middle 90 % of the instances, means of the rest."""
    columns: Row = {key: race[key].mean(1).tolist() for key in ("mean_error", "reward", "kl")}
    for key in ("error", "value_gap"):
        low, high = _range(race[key])
        columns |= {key: race[key].median(1).values.tolist(), f"{key}_lo": low, f"{key}_hi": high}
    rows = range(len(race["error"]))
    return _plain([{"sampler": name, "step": i} | {key: values[i] for key, values in columns.items()} for i in rows])


def _instances(name: str, race: Race, instances: int) -> list[Row]:
    """One row an instance."""
    columns = {key: race[key] for key in ("order", "step_order", "rate", "contraction")}
    columns |= {f"last_{key}": race[key][-1] for key in ("error", "mean_error", "value_gap", "reward", "kl")}
    columns |= {f"steps_to_{level:g}": _first_below(race["error"], level) for level in LEVELS}
    table = {key: values.tolist() for key, values in columns.items()}
    rows = range(len(race["order"]))
    where = [{"sampler": name, "seed": i // instances, "instance": i % instances} for i in rows]
    return _plain([at | {key: values[i] for key, values in table.items()} for i, at in enumerate(where)])


def _first_below(error: Tensor, level: float) -> Tensor:
    """The first step at which each error (T+1, I) is below the level, (I,); ∞ where none is."""
    below = error < level
    return torch.where(below.any(0), below.int().argmax(0).double(), math.inf)


def _range(values: Tensor) -> list[Any]:
    """Both ends of the middle 90 % of the instances, (..., I) -> (...) each; those without a value are left out."""
    return values.nanquantile(torch.tensor([0.05, 0.95], dtype=values.dtype), dim=-1).tolist()


def _over_seeds(values: Tensor, repetitions: int) -> Row:
    """The mean over instances, with its interval over repetitions where there are at least 2."""
    means = values.view(repetitions, -1).mean(1)
    if repetitions < 2:
        return {"mean": means[0], "lo": None, "hi": None}
    return statistics.t_interval(means)._asdict()


def _plain(value: Any) -> Any:
    """Tensors as numbers; what JSON cannot hold (not finite) as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
