"""One whole chain: world, SFT, candidates, labels, reward models at every noise level, best-of-n, PPO."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyrite.core import specs
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.jobs import best_of_n, generate, label, reward, sft
from pyrite.math import ensembles, statistics
from pyrite.math.seeds import derive
from pyrite.recipes import toy
from pyrite.recipes.overoptimization.ppo import Optimized, optimize, told
from pyrite.recipes.overoptimization.settings import Settings


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
    """The runs of one seed; their scores by noise level, and those of further reward models; the policies trained."""

    seed: int
    runs: dict[str, Run]
    scores: dict[float, Scores]
    variants: dict[str, Scores]
    optimized: list[Optimized]


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
        scores[noise] = _scores(folder, settings, f"best_of_n_noise_{100 * noise:g}")
    variants, trained = _variants(folder, settings, world, policy, seed=seed)
    optimized = optimize(folder, settings, world, seed=seed)
    later = trained | {told(one): one.run for one in optimized}
    return Chain(seed, done | later, scores, variants, optimized)


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
    done = {f"pairs, noise {percent} %": label.run(labelled)}
    start = settings.reward_model or policy
    return done | _rewarded(folder, settings, f"noise_{percent}", f"noise {percent} %", start, labelled.out, seed=seed)


def _rewarded(
    folder: Path, settings: Settings, name: str, told: str, start: str, pairs: Path, *, seed: int
) -> dict[str, Run]:
    """Reward models trained from `start` on a folder of pairs, and best-of-n against them."""
    trained = reward.Config(
        model=start,
        data=str(pairs / "pairs.parquet"),
        held_out=str(pairs / "held_out.parquet"),
        members=settings.members,
        head_std=settings.head_std,
        training=settings.reward,
        out=folder / f"reward_{name}",
        seed=derive(seed, "reward"),
    )
    chosen = best_of_n.Config(
        candidates=str(folder / "pool_labels" / "candidates.parquet"),
        rewards=str(trained.out),
        objectives=settings.objectives,
        n=settings.n,
        min_answers=1,  # every prompt with a finished answer stays in the curves
        out=folder / f"best_of_n_{name}",
    )
    return {f"reward models, {told}": reward.run(trained), f"best of n, {told}": best_of_n.run(chosen)}


def _variants(
    folder: Path, settings: Settings, world: dict[str, str], policy: str, *, seed: int
) -> tuple[dict[str, Scores], dict[str, Run]]:
    """Best-of-n against reward models of fewer pairs and of other sizes, at the first level of noise."""
    pairs = folder / f"pairs_noise_{100 * settings.noise[0]:g}"
    done: dict[str, Run] = {}
    found: dict[str, Scores] = {}
    for share in settings.shares:
        name = f"{100 * share:g}_percent_of_pairs"
        fewer = folder / f"pairs_{name}"
        if not (fewer / "held_out.parquet").exists():
            rows = data.load(pairs / "pairs.parquet", "pairs")
            kept, _ = data.split(rows, fraction=1 - share, seed=derive(seed, "share"))
            data.write(kept, fewer / "pairs.parquet")
            data.write(data.load(pairs / "held_out.parquet", "pairs"), fewer / "held_out.parquet")
        start = settings.reward_model or policy
        done |= _rewarded(folder, settings, name, f"{100 * share:g} % of the pairs", start, fewer, seed=seed)
        found[name] = _scores(folder, settings, f"best_of_n_{name}")
    for size in settings.sizes:
        done |= _sized(folder, settings, size, world["demos"], pairs, seed=seed)
        found[f"size_{size}"] = _scores(folder, settings, f"best_of_n_size_{size}")
    return found, done


def _sized(folder: Path, settings: Settings, size: toy.Size, demos: str, pairs: Path, *, seed: int) -> dict[str, Run]:
    """Reward models of another size of the toy world, from a model of that size tuned on the demonstrations."""
    blank = folder / f"{size}_model"
    if not (blank / "tokenizer.json").exists():
        toy.model(derive(seed, size), size=size).save_pretrained(blank)
        toy.tokenizer().save_pretrained(blank)
    tuned = sft.Config(
        model=str(blank), data=demos, training=settings.sft, out=folder / f"sft_{size}", seed=derive(seed, "sft", size)
    )
    done = {f"sft, size {size}": sft.run(tuned)}
    start = str(tuned.out / "model")
    return done | _rewarded(folder, settings, f"size_{size}", f"size {size}", start, pairs, seed=seed)


def gold_at(scores: Scores, settings: Settings) -> dict[str, Tensor]:
    """Gold of each objective's pick by n: "single" (E, M, Q), every ensemble (M, Q), and how often those win."""
    n = list(settings.n)
    single = torch.stack([statistics.best_of_n(proxy, scores.gold, n) for proxy in scores.proxy])
    picked = {"single": single}
    for name, proxy in objectives(scores.proxy, settings).items():
        picked[name] = statistics.best_of_n(proxy, scores.gold, n)
        picked[f"wins of {name}"] = statistics.wins(picked[name].expand_as(single), single)
    half = ensembles.uwo(scores.proxy.flatten(1), weight=0.5).view_as(scores.gold)
    picked["uwo at 0.5"] = statistics.best_of_n(half, scores.gold, n)
    for size in (3, 4):  # the average over all ensembles of that size
        chosen = list(itertools.combinations(range(len(scores.proxy)), size))
        worst = [scores.proxy[list(members)].amin(0) for members in chosen]
        if worst:
            golds = torch.stack([statistics.best_of_n(proxy, scores.gold, n) for proxy in worst])
            picked[f"wco of {size}"] = golds.mean(0)
    return picked


def objectives(proxy: Tensor, settings: Settings) -> dict[str, Tensor]:
    """The ensembles' scores (Q, N) of proxies (E, Q, N) by short name, standardized like any other proxy."""
    combined = {}
    for spec in settings.objectives:
        part = specs.part(spec, ensembles)
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


def _scores(folder: Path, settings: Settings, name: str) -> Scores:
    """What a best-of-n run has stored."""
    tensors = load_file(folder / name / "scores.safetensors")
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
