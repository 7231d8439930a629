"""Samplers raced in an exact world: softmax policies over a finite set, learned by DPO from every kind of pair.

Uniform pairs converge linearly; pairs drawn uniformly and far apart in reward, by the masses of the theory and at the
rate matched to them, converge quadratically. Rewards, and with them everything else, belong to (seed, repetition).
"""

from __future__ import annotations

import inspect
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
from pyrite.data import rows as data
from pyrite.math import losses, samplers, seeds, statistics, tabular
from pyrite.math.ranges import Count, Half, Natural, NonNegative, Positive, Several, Some
from pyrite.math.samplers import Sampler
from pyrite.math.tabular import World

OUTPUTS = {
    "results.json": "order, rate, floor, bound and final figures of every sampler, and its curve",
    "instances.parquet": "order, rate and errors by sampler and instance",
}
PAIRS = 1 << 16  # worked on at once: bounds memory, and stays near the cache
LEVELS = (1e-2, 1e-6)  # errors whose first step is noted
STILL = 1e-9  # a loss whose step from the optimum leaves no larger error has that optimum


@dataclass(frozen=True)
class Config:
    """Race samplers over a finite set of responses, where the optimum is known."""

    out: Path
    """Folder of the run, new or empty."""
    samplers: Some[str] = ("uniform", "mix_r", "mix_p")
    """Samplers to race; see `pyrite list samplers`."""
    actions: Several = 20
    """Responses to choose from."""
    instances: Count = 200
    """Reward tables in each repetition."""
    seeds: Count = 5
    """Independent repetitions; intervals are computed over them."""
    beta: Positive = 3.0
    """KL strength of the loss, and of samplers that read it."""
    steps: Count = 60
    """Updates of each policy."""
    loss: str = "dpo"
    """Direct preference loss; see `pyrite list losses`."""
    rate: str = "matched"
    """Learning rate: matched (to the sampler), best (the best constant rate at the optimum), or a number."""
    scale: Positive = 1.0
    """Factor on the learning rate."""
    samples: Count | None = None
    """Pairs drawn and labeled at each step; by default the gradient is exact."""
    noise: Half = 0.0
    """Share of labels to flip, 0 to 0.5."""
    rewards: Literal["normal", "unit"] = "normal"
    """Draw rewards from N(0, 1), or uniformly from [0, 1], for which the theorems' bounds hold."""
    ref_spread: NonNegative = 0.0
    """Standard deviation of the reference's logits; 0 is the uniform reference."""
    seed: Natural = 0
    """Random seed."""


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
    world = _world(config)
    run.open()
    instances = len(world.reward)
    say(f"bandit: {len(zoo)} samplers, {instances} instances of {config.actions} responses")
    with _one_thread(), progress("bandit", len(zoo) * instances * config.steps, unit="updates") as advance:
        races = {name: _race(world, name, zoo[name], config, loss, rate, advance) for name in zoo}
    summaries = {name: _plain(_summary(name, race, config)) for name, race in races.items()}
    if run.writes:
        rows = [row for name, race in races.items() for row in _instances(name, race, config.instances)]
        data.write(rows, run.folder / "instances.parquet")
        curves = [row for name, race in races.items() for row in _curve(name, race)]
        results = {"recipe": "bandit", "config": run.config, "samplers": summaries, "curves": curves}
        runs.write_json(run.folder / "results.json", results)
    return run.finish(instances=instances, samplers=summaries)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain little from threads, and lose much if other work keeps the cores busy."""
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


def _loss(config: Config) -> tabular.PairLoss:
    """The loss, with the world's beta if it takes one."""
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
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"--rate {text!r}: give matched, best or a number above 0")
    return rate


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
    config: Config,
    loss: tabular.PairLoss,
    rate: tabular.Rate,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """One sampler on all instances, a cacheful of them at a time: by step (T+1, I), or (order, rate, ...) just (I,)."""
    made = []
    size = max(1, PAIRS // config.actions**2)
    for begin in range(0, len(world.reward), size):
        some = World(world.reward[begin : begin + size], world.ref[begin : begin + size], world.beta)
        draws, directions = (seeds.generator(config.seed, use, begin) for use in (f"draws {name}", "directions"))
        path = tabular.descend(
            some,
            sampler,
            steps=config.steps,
            loss=loss,
            rate=rate,
            scale=config.scale,
            samples=config.samples,
            noise=config.noise,
            generator=draws,
            advance=advance,
        )
        # one exact step from the optimum stays there if the loss has that optimum
        away = tabular.descend(some, sampler, steps=1, loss=loss, rate="best", noise=config.noise, start=some.optimum)
        one_step, _ = tabular.order_test(some, sampler, loss=loss, rate=rate, scale=config.scale, generator=directions)
        curvature, last = tabular.spectrum(some, sampler), path.rate[-1]
        race = {
            "error": path.error,
            "mean_error": path.mean_error,
            "value_gap": some.best_value - (path.reward - some.beta * path.kl),
            "reward": path.reward,
            "kl": path.kl,
            "order": tabular.trajectory_order(path.error),
            "step_order": one_step,
            "rate": last,
            "contraction": tabular.contraction(curvature, some.beta, last),
            "drift": away.error[1],
            **{f"steps_to_{level:g}": _first_below(path.error, level) for level in LEVELS},
        }
        if config.samples is not None:
            race["floor"] = tabular.noise_floor(curvature, some.beta, last, config.samples)
        made.append(race)
    return {key: torch.cat([race[key] for race in made], -1) for key in made[0]}


def _first_below(error: Tensor, level: float) -> Tensor:
    """The first step at which each error (T+1, I) is below the level, (I,); ∞ if none is."""
    below = error < level
    return torch.where(below.any(0), below.int().argmax(0).double(), math.inf)


def _summary(name: str, race: dict[str, Tensor], config: Config) -> data.Row:
    """The figures of one sampler: medians over instances, means with intervals over repetitions."""
    home = bool((race["drift"] < STILL).all())  # else an error is no error
    tail = home and config.samples is None
    last = {key: race[key][-1] for key in ("mean_error", "value_gap", "reward", "kl")}
    levels = [f"steps_to_{level:g}" for level in LEVELS]
    repetitions = {key: race[key].view(config.seeds, -1) for key in ("order", *levels)}
    return {
        "order": race["order"].nanmedian() if tail else None,
        "order_range": _range(race["order"]) if tail else None,
        "step_order": race["step_order"].nanmedian() if home else None,
        "rate": race["rate"].median(),
        "contraction": race["contraction"].median() if home else None,
        "drift": race["drift"].max(),
        "error": race["error"][-1].median(),
        **{key: race[key].median() for key in levels},
        **{key: _over_seeds(values, config.seeds) for key, values in last.items()},
        "diverged": (~(race["error"][-1] <= race["error"][0])).double().mean() if home else None,
        "bound": _bound(race["error"], name, config),
        "floor": _floor(race, config),
        "by_repetition": {
            "order": repetitions["order"].nanmedian(1).values.tolist(),
            **{key: repetitions[key].median(1).values.tolist() for key in levels},
            "mean_error": last["mean_error"].view(config.seeds, -1).mean(1).tolist(),
        },
    }


def _bound(error: Tensor, name: str, config: Config) -> data.Row | None:
    """How the theorem's bound fares, if its assumptions hold."""
    plain = config.rate == "matched" and config.scale == 1 and config.loss in ("dpo", "dpo()")
    world = config.rewards == "unit" and config.ref_spread == 0 and config.samples is None and config.noise == 0
    name = name.removesuffix("()")
    if not (plain and world and name in tabular.BOUNDS):
        return None
    limit = tabular.bound(name, config.steps)[:, None]
    constant, order = tabular.BOUNDS[name]
    holds = (error <= limit + tabular.ROUNDING).all(0).double().mean()
    return {"constant": constant, "order": order, "holds": holds, "closest": (error[1] / limit[1]).max()}


def _floor(race: dict[str, Tensor], config: Config) -> data.Row | None:
    """The mean error of the second half against what noise alone would leave."""
    if config.samples is None:
        return None
    measured = race["mean_error"][config.steps // 2 :].mean(0)
    clean = config.noise == 0 and config.loss in ("dpo", "dpo()")
    return {"measured": _over_seeds(measured, config.seeds), "predicted": race["floor"].mean() if clean else None}


def _curve(name: str, race: dict[str, Tensor]) -> list[data.Row]:
    """One row a step: medians of error and value gap with the middle 90 % of the instances, means of the rest."""
    columns: data.Row = {key: race[key].mean(1).tolist() for key in ("mean_error", "reward", "kl")}
    for key in ("error", "value_gap"):
        low, high = _range(race[key])
        columns |= {key: race[key].median(1).values.tolist(), f"{key}_lo": low, f"{key}_hi": high}
    steps = range(len(race["error"]))
    return _plain([{"sampler": name, "step": i} | {key: values[i] for key, values in columns.items()} for i in steps])


def _instances(name: str, race: dict[str, Tensor], n: int) -> list[data.Row]:
    """One row an instance, n of them a repetition."""
    columns = {
        f"last_{key}" if values.dim() == 2 else key: torch.atleast_2d(values)[-1].tolist()
        for key, values in race.items()
    }
    where = [{"sampler": name, "seed": i // n, "instance": i % n} for i in range(len(race["order"]))]
    return _plain([at | {key: values[i] for key, values in columns.items()} for i, at in enumerate(where)])


def _range(values: Tensor) -> list[Any]:
    """Both ends of the middle 90 % of the instances, (..., I) -> (...) each; those without a value are left out."""
    return values.nanquantile(torch.tensor([0.05, 0.95], dtype=values.dtype), dim=-1).tolist()


def _over_seeds(values: Tensor, repetitions: int) -> data.Row:
    """The mean over instances, and its interval over repetitions if there are at least 2."""
    means = values.view(repetitions, -1).mean(1)
    if repetitions < 2:
        return {"mean": means[0], "lo": None, "hi": None}
    return statistics.t_interval(means)._asdict()


def _plain(value: Any) -> Any:
    """Tensors as numbers; None for what JSON cannot hold (not finite)."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
