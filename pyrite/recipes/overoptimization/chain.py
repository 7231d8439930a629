"""One whole chain: world, SFT, candidates, labels, reward models at every noise level, best-of-n."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyrite import data, ensembles, estimators, parts, toy
from pyrite.jobs import best_of_n, generate, label, reward, sft
from pyrite.recipes.overoptimization.settings import Settings
from pyrite.runs import Run
from pyrite.seeds import derive


@dataclass(frozen=True)
class Scores:
    """Best-of-n of one chain at one noise level; gold and proxies in standard deviations of the initial policy.

    gold (Q, N), proxy (E, Q, N), mark (Q, N) whether an answer carries what fools the proxy, row (Q, N) of `rows`.
    """

    gold: Tensor
    proxy: Tensor
    mark: Tensor
    row: Tensor
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Chain:
    """The runs of one seed, and their scores by noise level."""

    seed: int
    runs: dict[str, Run]
    scores: dict[float, Scores]


def run(folder: Path, settings: Settings, *, seed: int) -> Chain:
    """Run every stage that is not done yet."""
    world = _world(folder, settings, seed)
    done: dict[str, Run] = {}
    tuned = sft.Config(
        model=world["model"],
        data=world["demos"],
        columns=settings.demo_columns,
        training=settings.sft,
        out=folder / "sft",
        seed=derive(seed, "sft"),
    )
    done["sft"] = sft.run(tuned)
    policy = str(folder / "sft" / "model")
    for name, k, limit, top_p in (
        ("pairs", settings.pair_answers, settings.pair_limit, settings.pair_top_p),
        ("pool", settings.answers, settings.pool, settings.pool_top_p),
    ):
        drawn = generate.Config(
            model=policy,
            prompts=world[f"{name}_prompts"],
            columns=settings.prompt_columns,
            k=k,
            limit=limit,
            top_p=top_p,
            max_new_tokens=settings.max_new_tokens,
            out=folder / f"{name}_answers",
            seed=derive(seed, name),
        )
        done[f"{name} answers"] = generate.run(drawn)
    pool = label.Config(
        candidates=str(folder / "pool_answers" / "candidates.parquet"),
        gold=settings.gold,
        pairs=False,
        out=folder / "pool_labels",
    )
    done["pool labels"] = label.run(pool)
    scores = {}
    for noise in settings.noise:
        done |= _at_noise(folder, settings, noise, policy, seed=seed)
        scores[noise] = _scores(folder, settings, noise)
    return Chain(seed, done, scores)


def _at_noise(folder: Path, settings: Settings, noise: float, policy: str, *, seed: int) -> dict[str, Run]:
    """Pairs with this share of flipped labels, the reward models trained on them, and best-of-n against those."""
    percent = f"{100 * noise:g}"
    labelled = label.Config(
        candidates=str(folder / "pairs_answers" / "candidates.parquet"),
        gold=settings.gold,
        noise=noise,
        noise_seed=derive(seed, "noise"),
        ties="drop",
        seed=derive(seed, "pairs"),
        out=folder / f"pairs_noise_{percent}",
    )
    trained = reward.Config(
        model=settings.reward_model or policy,
        data=str(labelled.out / "pairs.parquet"),
        held_out=str(labelled.out / "held_out.parquet"),
        members=settings.members,
        head_std=settings.head_std,
        training=settings.reward,
        out=folder / f"reward_noise_{percent}",
        seed=derive(seed, "reward"),
    )
    chosen = best_of_n.Config(
        candidates=str(folder / "pool_labels" / "candidates.parquet"),
        rewards=str(trained.out),
        objectives=settings.objectives,
        n=settings.n,
        out=folder / f"best_of_n_noise_{percent}",
    )
    return {
        f"pairs, noise {percent} %": label.run(labelled),
        f"reward models, noise {percent} %": reward.run(trained),
        f"best of n, noise {percent} %": best_of_n.run(chosen),
    }


def gold_at(scores: Scores, settings: Settings) -> dict[str, Tensor]:
    """Gold of each objective's pick by n: "single" (E, M, Q), every ensemble (M, Q), and how often those win."""
    n = list(settings.n)
    single = torch.stack([estimators.best_of_n(proxy, scores.gold, n) for proxy in scores.proxy])
    picked = {"single": single}
    for name, proxy in objectives(scores.proxy, settings).items():
        picked[name] = estimators.best_of_n(proxy, scores.gold, n)
        picked[f"wins of {name}"] = estimators.wins(picked[name].expand_as(single), single)
    half = ensembles.uwo(scores.proxy.flatten(1), weight=0.5).view_as(scores.gold)
    picked["uwo at 0.5"] = estimators.best_of_n(half, scores.gold, n)
    for size in (3, 4):  # the average over all ensembles of that size
        chosen = list(itertools.combinations(range(len(scores.proxy)), size))
        worst = [scores.proxy[list(members)].amin(0) for members in chosen]
        if worst:
            golds = torch.stack([estimators.best_of_n(proxy, scores.gold, n) for proxy in worst])
            picked[f"wco of {size}"] = golds.mean(0)
    return picked


def objectives(proxy: Tensor, settings: Settings) -> dict[str, Tensor]:
    """The ensembles' scores (Q, N) of proxies (E, Q, N) by short name, standardized like any other proxy."""
    combined = {}
    for spec in settings.objectives:
        part = parts.part(spec, ensembles)
        scores = part(proxy.flatten(1)).view(proxy.shape[1:])
        combined[part.name] = (scores - scores.mean()) / scores.std(correction=0)
    return combined


def _world(folder: Path, settings: Settings, seed: int) -> dict[str, str]:
    """Model and data: the embedded world where none are named."""
    if settings.model:
        named = {"model": settings.model, "demos": settings.demos}
        return named | {"pairs_prompts": settings.pair_prompts, "pool_prompts": settings.pool_prompts}
    world = toy.write(folder / "world", seed=derive(seed, "world"), n_pool=settings.pool, n_demos=settings.toy_demos)
    return {
        "model": str(world.model),
        "demos": str(world.demos),
        "pairs_prompts": str(world.pair_prompts),
        "pool_prompts": str(world.pool_prompts),
    }


def _scores(folder: Path, settings: Settings, noise: float) -> Scores:
    tensors = load_file(folder / f"best_of_n_noise_{100 * noise:g}" / "scores.safetensors")
    rows = data.load(folder / "pool_labels" / "candidates.parquet", "candidates")
    gold = tensors["gold"].double()
    picked = [rows[i]["response"] for i in tensors["row"].flatten().tolist()]
    fooling = [bool(not settings.model and toy.register_of(response)) for response in picked]
    return Scores(
        gold=(gold - gold.mean()) / gold.std(correction=0),
        proxy=tensors["proxy"].double(),
        mark=torch.tensor(fooling).view_as(gold),
        row=tensors["row"],
        rows=rows,
    )
