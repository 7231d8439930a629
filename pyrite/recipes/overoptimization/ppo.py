"""Policies trained by PPO against reward models of a chain, measured in the units of best-of-n on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyrite.core import runs
from pyrite.core import specs as parts
from pyrite.core.runs import Run
from pyrite.jobs import ppo
from pyrite.math import ensembles
from pyrite.math.seeds import derive
from pyrite.models import loading
from pyrite.models.loading import member_paths
from pyrite.recipes.overoptimization.settings import Settings
from pyrite.training.evaluation import Evaluation


@dataclass(frozen=True)
class Target:
    """What a policy is trained against: one member of a reward run, or all of them made one score."""

    objective: str
    """single, or the short name of an ensemble."""
    spec: str = "mean()"
    member: int | None = None

    @property
    def name(self) -> str:
        return self.objective if self.member is None else f"{self.objective} {self.member}"


@dataclass(frozen=True)
class Optimized:
    """One trained policy and its rows {step, kl, kl_se, kl_k3, gold, gold_se, proxy, variance, ...}, one a measurement.

    Gold and proxy in standard deviations of the initial policy's answers in the best-of-n pool, 0 being their mean;
    kl in nats an answer. variance: of the members' standardized scores, averaged over the answers of a step.
    """

    noise: float
    beta: float
    target: Target
    run: Run
    rows: list[dict[str, Any]]


def optimize(folder: Path, settings: Settings, world: Mapping[str, str], *, seed: int) -> list[Optimized]:
    """Train and measure every policy that is not done yet: by label noise, KL strength, and what it is against."""
    found = []
    for noise, betas in settings.ppo.betas:
        for beta in betas:
            for target in targets(settings):
                run = ppo.run(_config(folder, settings, world, noise, beta, target, seed=seed))
                found.append(Optimized(noise, beta, target, run, _rows(run, folder, noise, target)))
    return found


def targets(settings: Settings) -> list[Target]:
    """Single members first, then every ensemble."""
    specs = {parts.part(spec, ensembles).name: spec for spec in settings.objectives}
    singles = [Target("single", member=member) for member in range(settings.ppo.singles)]
    return [*singles, *(Target(name, spec) for name, spec in specs.items())]


def told(one: Optimized) -> str:
    """The name of its stage."""
    return f"PPO, noise {100 * one.noise:g} %, beta {one.beta:g}, {one.target.name}"


def _config(
    folder: Path, settings: Settings, world: Mapping[str, str], noise: float, beta: float, target: Target, *, seed: int
) -> ppo.Config:
    wanted = settings.ppo
    rewards = folder / f"reward_noise_{100 * noise:g}"
    reward = str(rewards if target.member is None else member_paths(rewards)[target.member])
    return ppo.Config(
        model=str(folder / "sft" / "model"),
        prompts=world["pairs_prompts"],
        columns=settings.prompt_columns,
        reward=(reward,),
        objective=target.spec,
        beta=beta,
        steps=wanted.steps,
        prompts_per_step=wanted.prompts_per_step,
        missing_eos=wanted.missing_eos or None,
        measure_every=wanted.measure_every,
        evaluation=Evaluation(
            eval_prompts=world["pool_prompts"],
            gold=settings.gold,
            rewards=reward,
            ensemble=target.spec,
            eval_limit=settings.pool,
            eval_k=wanted.eval_k,
            max_new_tokens=settings.max_new_tokens,
        ),
        training=wanted.training,
        out=folder / f"ppo_noise_{100 * noise:g}_beta_{beta:g}_{target.name.replace(' ', '_')}",
        seed=derive(seed, "ppo"),
    )


def _rows(run: Run, folder: Path, noise: float, target: Target) -> list[dict[str, Any]]:
    """The measurements of a run, in the units of the pool."""
    pool = load_file(folder / f"best_of_n_noise_{100 * noise:g}" / "scores.safetensors")
    gold, proxy = pool["gold"].double(), _pool_proxy(pool["raw"].double(), run, target)
    rows = []
    for row in runs.read_metrics(run.folder):
        if "gold" not in row:
            continue
        kept = {"step": row["step"], "kl": row["kl_k1"], "kl_se": row["kl_k1_se"], "kl_k3": row["kl_k3"]}
        kept |= {"length": row["length"], "missing_eos": row["missing_eos"]}
        kept |= {"gold": _standard(row["gold"], gold), "gold_se": row["gold_se"] / gold.std(correction=0).item()}
        kept |= {"proxy": _standard(row["proxy"], proxy), "sqrt_kl": max(row["kl_k1"], 0.0) ** 0.5}
        variance = [value for name, value in row.items() if name.endswith(" variance")]
        rows.append(kept | ({"variance": variance[0]} if variance and target.member is None else {}))
    return rows


def _pool_proxy(raw: Tensor, run: Run, target: Target) -> Tensor:
    """What a run's reward gives the pool: raw scores (E, Q, N), standardized as the reward run has it."""
    models = member_paths(run.config["evaluation"]["rewards"])
    scores = raw if target.member is None else raw[[target.member]]
    saved = [loading.settings(path) for path in models]
    mean, std = (torch.tensor([row[key] for row in saved], dtype=raw.dtype) for key in ("mean", "std"))
    return parts.part(target.spec, ensembles)(ensembles.standardize(scores.flatten(1), mean, std))


def _standard(value: float, pool: Tensor) -> float:
    return (value - pool.mean().item()) / pool.std(correction=0).item()
