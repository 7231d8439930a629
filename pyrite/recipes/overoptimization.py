"""Overoptimization of a reward model by best-of-n and PPO, and what ensembles do about it (arXiv:2310.02743).

SFT, candidates, gold labels with noise, reward models, best-of-n, PPO: gold, proxy and KL on one page. Gold and proxy
are in standard deviations of the initial policy's answers in the best-of-n pool; 0 is their mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data.toy_words import LEXICONS
from pyrite.jobs import best_of_n, generate, label, ppo, reward, sft
from pyrite.math import ensembles, statistics
from pyrite.math.seeds import derive
from pyrite.models import loading
from pyrite.recipes import study, toy
from pyrite.recipes.study import Chain, Claim, Curves, Row
from pyrite.report import charts
from pyrite.report.charts import COLORS, DASHED, NAMES, OBJECTIVES, REWARD, SOLID, Axis
from pyrite.report.page import Part, answers, banded, figure, number, numbers, percent, table, tabs, text
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training
from pyrite.training.rounds import FAR

# settings


@dataclass(frozen=True)
class OveroptimizationSettings:
    """One chain: SFT, candidates, labels, reward models at every noise level, best-of-n, PPO."""

    gold: str = "pyrite.toy:story_quality()"
    toy_demos: int = 24_000
    """Demonstrations of the toy world; 12,000 are too few for it to keep to its topic."""
    sft: Training = toy.SFT
    pair_limit: int = 760
    """Prompts from which pairs are drawn: about 2,000 training pairs once ties and held-out prompts are gone."""
    pair_answers: int = 6
    """Answers to each of them; every two make a pair."""
    pair_top_p: float = 0.9
    """Nucleus from which the answers of a pair are sampled."""
    pool: int = 32
    """Prompts of the best-of-n pool."""
    answers: int = 1056
    """Answers to each of them, some of which will be cut and left out."""
    max_new_tokens: int = 64
    noise: tuple[float, ...] = (0.25, 0.0)
    """Shares of labels that are flipped."""
    members: int = 5
    reward: Training = Training(
        lr=5e-4, epochs=2, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16
    )
    head_std: float = 0.1
    objectives: tuple[str, ...] = ("mean()", "wco()", "uwo(weight=1.0)")
    n: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    shares: tuple[float, ...] = ()
    """Shares of the pairs on which further reward models are trained, at the first level of noise."""
    sizes: tuple[toy.Size, ...] = ()
    """Toy sizes of further reward models, tuned on the demonstrations first, at the first level of noise."""
    betas: tuple[tuple[float, tuple[float, ...]], ...] = ((0.25, (0.0, 0.05)),)
    """PPO: label noise, and the KL strengths tried at it."""
    singles: int = 1
    """Members that PPO optimizes against alone."""
    prompts_per_step: int = 64
    steps: int = 60
    measure_every: int = 6
    eval_k: int = 4
    """Answers to each pool prompt at a measurement."""
    missing_eos: float = 3.0
    """Taken off the score of an answer that was cut, standard deviations of the reward model."""
    ppo: Training = Training(
        lr=3e-4, epochs=2, batch_size=32, lr_scheduler_type="constant()", micro_batch_tokens=1 << 16
    )


TOY = OveroptimizationSettings()
# What a whole study adds: more KL strengths, fewer pairs, larger reward models.
TOY_WIDE = replace(TOY, betas=((0.25, (0.0, 0.05, 0.2)),), shares=(0.25, 0.5), sizes=("base",))
SETTINGS = {"toy": TOY, "toy_wide": TOY_WIDE}


# one chain


@dataclass(frozen=True)
class Target:
    """A policy to train by PPO: at which noise and KL strength, against one member or against all made one score."""

    noise: float
    beta: float
    objective: str
    """single, or the short name of an ensemble."""
    spec: str = "mean()"
    member: int | None = None

    @property
    def against(self) -> str:
        return self.objective if self.member is None else f"{self.objective} {self.member}"

    @property
    def name(self) -> str:
        """Of its stage."""
        return f"PPO, {level(self.noise)}, beta {self.beta:g}, {self.against}"


def targets(settings: OveroptimizationSettings) -> list[Target]:
    """By label noise and KL strength: single members first, then every ensemble."""
    known = {specs.part(spec, ensembles).name: spec for spec in settings.objectives}
    return [
        target
        for noise, betas in settings.betas
        for beta in betas
        for target in (
            *(Target(noise, beta, "single", member=member) for member in range(settings.singles)),
            *(Target(noise, beta, name, spec) for name, spec in known.items()),
        )
    ]


def level(noise: float) -> str:
    """How the stages at a level of label noise are named."""
    return f"noise {100 * noise:g} %"


def chain(one: Chain, settings: OveroptimizationSettings) -> None:
    """Run every stage that is not done yet."""
    seed = derive(one.seed, "world")
    world = toy.write(one.path("world"), seed=seed, n_pool=settings.pool, n_demos=settings.toy_demos)
    demos = str(world.demos)
    one.run("sft", sft.Config(str(world.model), demos, Path("sft"), training=settings.sft))
    for name, prompts, k, limit, top_p in (
        ("pairs", world.pair_prompts, settings.pair_answers, settings.pair_limit, settings.pair_top_p),
        ("pool", world.pool_prompts, settings.answers, settings.pool, 1.0),
    ):
        drawn = generate.Config(one.path("sft", "model"), str(prompts), Path(f"{name}_answers"), k=k, limit=limit)
        one.run(f"{name} answers", replace(drawn, top_p=top_p, max_new_tokens=settings.max_new_tokens), name)
    candidates = one.path("pool_answers", "candidates.parquet")
    scored = label.Config(candidates, Path("pool_labels"), gold=settings.gold, pairs=False)
    one.run("pool labels", scored, draws=False)  # a seed would refuse the run of an earlier version, which has none
    candidates, flips = one.path("pairs_answers", "candidates.parquet"), derive(one.seed, "noise")
    for noise in settings.noise:
        name = f"noise_{100 * noise:g}"
        labeled = label.Config(candidates, Path(f"pairs_{name}"), gold=settings.gold, noise=noise, noise_seed=flips)
        one.run(f"pairs, {level(noise)}", labeled, "pairs")
        _rewarded(one, settings, level(noise), name, "sft", f"pairs_{name}")
    pairs = f"pairs_noise_{100 * settings.noise[0]:g}"
    for share in settings.shares:
        name = f"{100 * share:g}_percent_of_pairs"
        fewer = one.folder / f"pairs_{name}"
        if not (fewer / "held_out.parquet").exists():
            rows = data.load(one.path(pairs, "pairs.parquet"), "pairs")
            kept, _ = data.split(rows, fraction=1 - share, seed=derive(one.seed, "share"))
            data.write(kept, fewer / "pairs.parquet")
            data.write(data.load(one.path(pairs, "held_out.parquet"), "pairs"), fewer / "held_out.parquet")
        _rewarded(one, settings, f"{100 * share:g} % of pairs", name, "sft", fewer.name)
    for size in settings.sizes:
        blank = one.folder / f"{size}_model"
        if not (blank / "tokenizer.json").exists():
            toy.model(derive(one.seed, size), size=size).save_pretrained(blank)
            toy.tokenizer().save_pretrained(blank)
        tuned = sft.Config(str(blank), demos, Path(f"sft_{size}"), training=settings.sft)
        one.run(f"sft, size {size}", tuned, "sft", size)
        _rewarded(one, settings, f"size {size}", f"size_{size}", f"sft_{size}", pairs)
    for target in targets(settings):
        one.run(target.name, _ppo(one, settings, world, target), "ppo")


def variants(settings: OveroptimizationSettings) -> list[str]:
    """How the stages of further reward models are named."""
    return [*(f"{100 * share:g} % of pairs" for share in settings.shares), *(f"size {size}" for size in settings.sizes)]


def _rewarded(one: Chain, settings: OveroptimizationSettings, told: str, name: str, start: str, pairs: str) -> None:
    """Reward models trained from an SFT run on a folder of pairs, and best-of-n against them."""
    trained = reward.Config(
        model=one.path(start, "model"),
        data=one.path(pairs, "pairs.parquet"),
        held_out=one.path(pairs, "held_out.parquet"),
        members=settings.members,
        head_std=settings.head_std,
        training=settings.reward,
        out=Path(f"reward_{name}"),
    )
    one.run(f"reward models, {told}", trained, "reward")
    chosen = best_of_n.Config(
        candidates=one.path("pool_labels", "candidates.parquet"),
        proxy=one.path(f"reward_{name}"),
        objectives=settings.objectives,
        n=settings.n,
        min_answers=1,  # every prompt with a finished answer stays in the curves
        out=Path(f"best_of_n_{name}"),
    )
    one.run(f"best of n, {told}", chosen)


def _ppo(one: Chain, settings: OveroptimizationSettings, world: toy.ToyFiles, target: Target) -> ppo.Config:
    rewards = one.folder / f"reward_noise_{100 * target.noise:g}"
    against = str(rewards if target.member is None else loading.member_paths(rewards)[target.member])
    return ppo.Config(
        model=one.path("sft", "model"),
        prompts=str(world.pair_prompts),
        reward=(against,),
        ensemble=target.spec,
        beta=target.beta,
        steps=settings.steps,
        prompts_per_step=settings.prompts_per_step,
        missing_eos_penalty=settings.missing_eos,
        measure_every=settings.measure_every,
        evaluation=Evaluation(
            eval_prompts=str(world.pool_prompts),
            gold=settings.gold,
            proxy=against,
            eval_limit=settings.pool,
            eval_k=settings.eval_k,
            max_new_tokens=settings.max_new_tokens,
        ),
        training=settings.ppo,
        out=Path(f"ppo_noise_{100 * target.noise:g}_beta_{target.beta:g}_{target.against.replace(' ', '_')}"),
    )


# what best-of-n and PPO have measured


@dataclass(frozen=True)
class Pool:
    """The best-of-n pool of a chain under some reward models.

    gold (Q, N), proxy (E, Q, N), mark (Q, N) whether an answer carries what fools the proxy, row (Q, N) of `rows`.
    """

    gold: Tensor
    proxy: Tensor
    mark: Tensor
    row: Tensor
    rows: list[dict[str, Any]]

    def without_marked(self) -> Pool:
        """Without marked answers: the first others of each prompt, as many as every prompt has."""
        keep = int((~self.mark).sum(1).min())
        index = torch.stack([(~mark).nonzero().squeeze(1)[:keep] for mark in self.mark])
        proxy = torch.stack([proxy.gather(1, index) for proxy in self.proxy])
        return replace(
            self,
            gold=self.gold.gather(1, index),
            proxy=proxy,
            mark=self.mark.gather(1, index),
            row=self.row.gather(1, index),
        )


def read_pool(run: Run, rows: list[dict[str, Any]]) -> Pool:
    """What a best-of-n run has stored. rows: the labeled candidates."""
    stored = load_file(run.folder / "scores.safetensors")
    gold = stored["gold"].double()
    marks = [bool(toy.register_of(rows[i]["response"])) for i in stored["row"].flatten().tolist()]
    standard = (gold - gold.mean()) / gold.std(correction=0)
    return Pool(standard, stored["proxy"].double(), torch.tensor(marks).view_as(gold), stored["row"], rows)


def choosers(pool: Pool, settings: OveroptimizationSettings) -> dict[str, list[Tensor]]:
    """Scores (Q, N) by who chooses, standardized: "single" has those of every member, an ensemble one."""
    found = {"single": list(pool.proxy)}
    for spec in settings.objectives:
        part = specs.part(spec, ensembles)
        scores = part(pool.proxy.flatten(1)).view_as(pool.gold)
        found[part.name] = [(scores - scores.mean()) / scores.std(correction=0)]
    return found


def best(pool: Pool, settings: OveroptimizationSettings, values: Tensor | None = None) -> dict[str, Tensor]:
    """Expected `values` (Q, N) of the best of n, (M, Q), by who chooses; single is the average over members.

    values: by default the chooser's own scores, what it believes of its choice.
    """
    n = list(settings.n)
    return {
        name: torch.stack([statistics.best_of_n(one, one if values is None else values, n) for one in scores]).mean(0)
        for name, scores in choosers(pool, settings).items()
    }


def gold_at(pool: Pool, settings: OveroptimizationSettings) -> dict[str, Tensor]:
    """Gold of the best of n: "single" (E, M, Q), every ensemble (M, Q), how often those win, and other ensembles."""
    n = list(settings.n)
    found = {"single": torch.stack([statistics.best_of_n(proxy, pool.gold, n) for proxy in pool.proxy])}
    for name, gold in best(pool, settings, pool.gold).items():
        if name != "single":
            found[name] = gold
            found[f"wins of {name}"] = statistics.wins(gold.expand_as(found["single"]), found["single"])
    half = ensembles.uwo(pool.proxy.flatten(1), weight=0.5).view_as(pool.gold)
    found["uwo at 0.5"] = statistics.best_of_n(half, pool.gold, n)
    for size in (3, 4):  # the average over all ensembles of that size
        worst = [pool.proxy[list(some)].amin(0) for some in itertools.combinations(range(len(pool.proxy)), size)]
        if worst:
            found[f"wco of {size}"] = torch.stack([statistics.best_of_n(one, pool.gold, n) for one in worst]).mean(0)
    return found


POLICIES = ("noise", "beta", "objective")  # what tells policies trained by PPO apart
POLICY = ("kl", "kl_k3", "sqrt_kl", "gold", "proxy", "length", "missing_eos", "variance")


def policy_rows(one: Chain, settings: OveroptimizationSettings) -> list[Row]:
    """A row for each measurement of each policy trained by PPO, in the units of the pool.

    single: averaged over members. kl in nats an answer. variance: of the members' standardized scores, averaged over
    the answers of a step.
    """
    by_policy: dict[tuple[float, float, str], list[list[Row]]] = {}
    for target in targets(settings):
        key = (target.noise, target.beta, target.objective)
        by_policy.setdefault(key, []).append(_measurements(one, target))
    return [
        {"seed": one.seed, "noise": noise, "beta": beta, "objective": objective, "step": some[0]["step"]}
        | {name: sum(row[name] for row in some) / len(some) for name in some[0] if name != "step"}
        for (noise, beta, objective), lines in by_policy.items()
        for some in zip(*lines, strict=True)
    ]


def _measurements(one: Chain, target: Target) -> list[Row]:
    run = one.runs[target.name]
    pool = load_file(one.runs[f"best of n, {level(target.noise)}"].folder / "scores.safetensors")
    gold, proxy = pool["gold"].double(), _pool_proxy(pool["raw"].double(), run, target)
    found = []
    for row in runs.read_metrics(run.folder):
        if "gold" not in row:
            continue
        kept = {"step": row["step"], "kl": row["kl_k1"], "kl_se": row["kl_k1_se"], "kl_k3": row["kl_k3"]}
        kept |= {"sqrt_kl": max(row["kl_k1"], 0.0) ** 0.5, "length": row["length"], "missing_eos": row["missing_eos"]}
        kept |= {"gold": _standard(row["gold"], gold), "gold_se": row["gold_se"] / gold.std(correction=0).item()}
        kept["proxy"] = _standard(row["proxy"], proxy)
        variance = [value for name, value in row.items() if name.endswith(" variance")]
        found.append(kept | ({"variance": variance[0]} if variance and target.member is None else {}))
    return found


def _pool_proxy(raw: Tensor, run: Run, target: Target) -> Tensor:
    """What a run's reward gives the pool: raw scores (E, Q, N), standardized as the reward run has it."""
    saved = [loading.settings(path) for path in loading.member_paths(run.config["evaluation"]["proxy"])]
    mean, std = (torch.tensor([row[key] for row in saved], dtype=raw.dtype) for key in ("mean", "std"))
    scores = raw if target.member is None else raw[[target.member]]
    return specs.part(target.spec, ensembles)(ensembles.standardize(scores.flatten(1), mean, std))


def _standard(value: float, pool: Tensor) -> float:
    return (value - pool.mean().item()) / pool.std(correction=0).item()


# claims

# Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization". A claim is about best-of-n at a level of
# label noise, or about PPO with 25 % label noise at a KL strength.

SOURCE = "arXiv:2310.02743"
NEGLIGIBLE = 0.1  # standard deviations of gold: a fall or a difference below this counts as none
TOLD = {"mean": "the mean", "wco": "the worst case (WCO)", "uwo": "the uncertainty-weighted mean (UWO)"}
AT_NOISE = """
single-overoptimizes-{at} | fig. 3 | {said} gold of a single reward model falls from its peak while the proxy rises
gain-mean-{at} | fig. 3 | {said} {mean} ends with more gold than the average single reward model
wins-mean-{at} | appendix F.9 | {said} {mean} wins against single reward models on more than half of the prompts (share
    above one half; published {won[0]:.3f})
gain-wco-{at} | fig. 3 | {said} {wco} ends with more gold than the average single reward model
wins-wco-{at} | appendix F.9 | {said} {wco} wins against single reward models on more than half of the prompts (share
    above one half; published {won[1]:.3f})
wco-does-not-overoptimize-{at} | section 5.1 | {said} {wco} is not overoptimized (a fall below 0.1 is none)
gain-uwo-{at} | fig. 3 | {said} {uwo} ends with more gold than the average single reward model
wins-uwo-{at} | appendix F.9 | {said} {uwo} wins against single reward models on more than half of the prompts (share
    above one half; published {won[2]:.3f})
uwo-does-not-overoptimize-{at} | section 5.1 | {said} {uwo} is not overoptimized (a fall below 0.1 is none)
size-of-gain-{at} | section 5.1 | {said} UWO ends with about {more} % more gold than single models
"""
AT_25 = """
mean-overoptimizes-25 | section 5.1 | {said} the mean is still overoptimized
four-members-beat-three-25 | fig. 11 | {said} WCO of four members ends with more gold than of three
five-members-like-four-25 | fig. 11 | {said} a fifth member adds less than 0.1 to WCO
weight-matters-little-25 | fig. 12 | {said} UWO with weight 1 ends less than 0.1 above UWO with weight 0.5
"""
OF_SINGLE = """
ppo-single-overoptimizes | fig. 3 and 4 | {free} a single reward model loses gold from its peak while the proxy rises
ppo-single-needs-more | section 5.2 | {small} a single reward model still loses gold from its peak: alone it needs a
    much larger penalty
"""
OF_CONSERVATIVE = """
ppo-{name}-reduces | section 5.2 | {free} {told} loses less gold from its peak than against a single reward model
ppo-{name}-does-not-eliminate | section 5.2 | {free} {told} still loses gold from its peak
ppo-{name}-prevents | section 5.2 | {small} {told} is not overoptimized (a fall below 0.1 is none)
ppo-{name}-free | section 5.2 | {small} {told} reaches a peak at most 0.1 below that without a penalty
"""
OF_ENSEMBLE = """
ppo-{name}-gain-free | fig. 7 | {free} {told} ends with more gold than against a single reward model
ppo-{name}-gain-small | fig. 7 | {small} {told} ends with more gold than against a single reward model
ppo-{name}-best-beta | fig. 4 | With 25 % label noise, each at its best KL strength, PPO against {told} ends with more
    gold than against a single reward model
"""
OF_VARIANCE = """
ppo-variance-mean | fig. 10 | {free} the mean, the members' variance grows (natural logarithm of the ratio; published
    about 0.9)
ppo-variance-uwo | fig. 10 | {free} UWO, the members' variance grows less than against the mean (difference of
    logarithms)
"""
PENALTIES = {
    "free": "With 25 % label noise and no KL penalty, PPO against",
    "small": "With 25 % label noise and a small KL penalty (beta 0.05), PPO against",
}
NOISY, FREE, SMALL = 0.25, (0.25, 0.0), (0.25, 0.05)  # label noise and KL strength
CurveValue = Callable[[Curves], Tensor]


def falls(*curve: Any) -> CurveValue:
    """Gold at the peak less gold at the end."""
    return lambda curves: curves.fall(curve).mean(1)


def gain(ours: tuple, theirs: tuple) -> CurveValue:
    """Gold at the end of one curve less that of another."""
    return lambda curves: (curves.own[ours] - curves.own[theirs])[..., -1].mean(1)


def relative_gain(ours: tuple, theirs: tuple) -> CurveValue:
    """Gold at the end of one curve over that of another, less 1; NaN if the other has none to speak of."""

    def value(curves: Curves) -> Tensor:
        mine, base = (curves.own[name][..., -1].mean(1) for name in (ours, theirs))
        return torch.where(base > NEGLIGIBLE, mine / base - 1, torch.nan)

    return value


def above_half(*curve: Any) -> CurveValue:
    """Share of prompts won at the end, ties one half, less one half."""
    return lambda curves: curves.own[curve][..., -1].mean(1) - 0.5


def falls_less(*curve: Any) -> CurveValue:
    """The fall of a policy trained against a single reward model, less that of this one."""
    return lambda curves: (curves.fall((*curve[:2], "single")) - curves.fall(curve)).mean(1)


def cost(objective: str) -> CurveValue:
    """What the small KL penalty costs: the most gold without it above the most gold with it."""
    return lambda curves: (curves.at_peak((*FREE, objective)) - curves.at_peak((*SMALL, objective))).mean(1)


def growth(objective: str) -> CurveValue:
    """ln of the members' variance at the end over that at the start, without a KL penalty."""

    def value(curves: Curves) -> Tensor:
        variance = curves.own[*FREE, f"variance of {objective}"]
        return (variance[..., -1] / variance[..., 0]).log().mean(1)

    return value


def best_beta(objective: str) -> CurveValue:
    """Gold at the end under the KL strength that is best on the other chains, above that of single reward models."""

    def at_best(curves: Curves, name: str) -> Tensor:
        keys = sorted(key for key in curves.own if key[0] == NOISY and key[2] == name)
        if len(keys) < 3:
            raise KeyError("a sweep over KL strengths")
        ends, others = (torch.stack([some[key][..., -1] for key in keys], -1) for some in (curves.own, curves.others))
        return ends.gather(-1, others.argmax(-1, keepdim=True)).squeeze(-1).mean(1)

    return lambda curves: at_best(curves, objective) - at_best(curves, "single")


LITTLE = study.negligible(NEGLIGIBLE)


def _at_noise(noise: float, more: float, won: tuple[float, float, float]) -> list[Claim]:
    """About best-of-n. Published: by which share UWO ends above single models; shares of prompts won, above half."""
    at, said = f"{100 * noise:g}", f"With {100 * noise:g} % label noise"
    table = AT_NOISE.format(at=at, said=said, more=f"{100 * more:g}", won=won, **TOLD)
    return study.claims(
        SOURCE,
        table,
        {
            f"single-overoptimizes-{at}": falls(noise, "single"),
            f"size-of-gain-{at}": (relative_gain((noise, "uwo"), (noise, "single")), study.contains(more)),
            **{f"gain-{name}-{at}": gain((noise, name), (noise, "single")) for name in TOLD},
            **{f"wins-{name}-{at}": above_half(noise, f"wins of {name}") for name in TOLD},
            **{f"{name}-does-not-overoptimize-{at}": (falls(noise, name), LITTLE) for name in TOLD},
        },
    )


BEST_OF_N = [
    *_at_noise(0.25, 0.75, (0.078, 0.083, 0.082)),
    *study.claims(
        SOURCE,
        AT_25.format(said="With 25 % label noise"),
        {
            "mean-overoptimizes-25": falls(0.25, "mean"),
            "four-members-beat-three-25": gain((0.25, "wco of 4"), (0.25, "wco of 3")),
            "five-members-like-four-25": (gain((0.25, "wco"), (0.25, "wco of 4")), LITTLE),
            "weight-matters-little-25": (gain((0.25, "uwo"), (0.25, "uwo at 0.5")), LITTLE),
        },
    ),
    *_at_noise(0.0, 0.30, (0.049, 0.071, 0.072)),
]
PPO = study.claims(
    SOURCE,
    "".join(
        table.format(name=name, told=TOLD.get(name, ""), **PENALTIES)
        for table, names in (
            (OF_SINGLE, ("single",)),
            (OF_CONSERVATIVE, ("wco", "uwo")),
            (OF_ENSEMBLE, tuple(TOLD)),
            (OF_VARIANCE, ("mean",)),
        )
        for name in names
    ),
    {
        "ppo-single-overoptimizes": falls(*FREE, "single"),
        "ppo-single-needs-more": falls(*SMALL, "single"),
        **{f"ppo-{name}-reduces": falls_less(*FREE, name) for name in TOLD},
        **{f"ppo-{name}-does-not-eliminate": falls(*FREE, name) for name in TOLD},
        **{f"ppo-{name}-prevents": (falls(*SMALL, name), LITTLE) for name in TOLD},
        **{f"ppo-{name}-free": (cost(name), LITTLE) for name in TOLD},
        **{f"ppo-{name}-gain-free": gain((*FREE, name), (*FREE, "single")) for name in TOLD},
        **{f"ppo-{name}-gain-small": gain((*SMALL, name), (*SMALL, "single")) for name in TOLD},
        **{f"ppo-{name}-best-beta": best_beta(name) for name in TOLD},
        "ppo-variance-mean": growth("mean"),
        "ppo-variance-uwo": lambda curves: growth("mean")(curves) - growth("uwo")(curves),
    },
)
CLAIMS = [*BEST_OF_N, *PPO]
NOTE = (
    "Best-of-n is read at the largest n that is at most a quarter of the answers. Its peak is found on one half of the "
    "prompts and measured on the other; with one chain its interval is over prompts and reward models. The curves of "
    "PPO are smoothed over three measurements, their peaks found on the other chains; one chain of PPO decides nothing."
)


def check_best_of_n(golds: Sequence[Mapping[Any, Tensor]], end: int) -> list[Row]:
    """The claims about best-of-n, of each chain's gold by (noise, objective); `end`: the index of the n to read."""
    known = [study.halves(gold, points=end + 1) for gold in golds]
    resampled = study.halves(golds[0], points=end + 1, resamples=2000) if len(golds) == 1 else known[0]
    return study.check(BEST_OF_N, known, alone=lambda claim, _: study.bootstrap(claim, resampled))


def check_ppo(rows: Sequence[Row]) -> list[Row]:
    """The claims about PPO, of the rows of all chains; the folds of a chain are the other chains."""
    chains = len({row["seed"] for row in rows})

    def lines(some: Sequence[Row], name: str) -> Tensor:
        """(C, M)"""
        by_chain = study.grouped(some, "seed").values()
        return torch.tensor([[row[name] for row in line if name in row] for line in by_chain], dtype=torch.float64)

    curves: dict[Any, Tensor] = {}
    for key, some in study.grouped(rows, *POLICIES).items():
        curves[key] = smoothed(lines(some, "gold"))
        if key[2] != "single":  # the variance is unknown before the first step
            curves[*key[:2], f"variance of {key[2]}"] = lines([row for row in some if row["step"]], "variance")
    others = {key: (v.sum(0) - v) / (len(v) - 1) if len(v) > 1 else v for key, v in curves.items()}
    folds = [
        Curves(*({key: v[i][None, None] for key, v in some.items()} for some in (curves, others)))
        for i in range(chains)
    ]
    return study.check(PPO, folds) if folds else []


def smoothed(curve: Tensor) -> Tensor:
    """Each point (C, M) with its neighbors, three or at the ends two of them, averaged."""
    total, count = curve.clone(), torch.ones_like(curve)
    total[:, 1:] += curve[:, :-1]
    total[:, :-1] += curve[:, 1:]
    count[:, 1:] += 1
    count[:, :-1] += 1
    return total / count


# results

MECHANISM = "leftover registers"
EXPLAINED = (
    "About 4 % of the demonstrations drift into a leftover register, such as a legal notice or an advert, with words "
    "of its own, and so does a policy trained on them. Preference pairs are drawn conservatively (top-p 0.9), which "
    "cuts the registers out: no reward model ever sees one judged. Each then gives them a worth of its own, left over "
    "from its random head and the order of its data. Best-of-n searches the full distribution; where a reward model "
    "happens to like them, larger n finds them more and more often, while gold takes a point off for every such word. "
    "The members of an ensemble disagree about them, so the worst case and the penalty on disagreement mostly refuse "
    "them. Every answer in the pool ends properly: answers cut short are left out before anything is scored."
)
SHOWN = (1, 16, 256, 1024)  # values of n in the browser of samples
PROMPTS = 12  # prompts in the browser of samples


def collect(chains: list[Chain], settings: OveroptimizationSettings) -> Row:
    """Curves, fits, policies, claims, mechanism, reward models and samples."""
    labeled = [data.load(one.folder / "pool_labels" / "candidates.parquet", "candidates") for one in chains]
    stages = {noise: level(noise) for noise in settings.noise}
    pools = {
        told: [read_pool(one.runs[f"best of n, {told}"], rows) for one, rows in zip(chains, labeled, strict=True)]
        for told in (*stages.values(), *variants(settings))
    }
    at = {noise: pools[told] for noise, told in stages.items()}
    end = end_index(settings, [pool for some in at.values() for pool in some])
    golds = {told: [gold_at(pool, settings) for pool in some] for told, some in pools.items()}
    by_chain = [
        {(noise, name): gold for noise, told in stages.items() for name, gold in golds[told][i].items()}
        for i in range(len(chains))
    ]
    curves = [row for noise, some in at.items() for row in _curves(some, settings, noise)]
    rows = [row for one in chains for row in policy_rows(one, settings)]
    policies = study.over_chains(rows, (*POLICIES, "step"), POLICY, errors=2.0)
    cut = [one.results("pool answers")["missing_eos"] for one in chains]
    return {
        "end_n": settings.n[end],
        "curves": curves,
        "fits": _fits(curves, settings.n[end]),
        "policies": policies,
        "policy_fits": _policy_fits(policies),
        "bars": _bars(golds, settings, end),
        "claims": [*check_best_of_n(by_chain, end), *check_ppo(rows)],
        "mechanism": {
            "name": MECHANISM,
            "text": EXPLAINED,
            "words": {name: sorted(set().union(*kinds.values())) for name, kinds in LEXICONS.items()},
            "shares": [row for noise, some in at.items() for row in _shares(some, settings, noise)],
            "exclusion": _exclusion(at, settings),
            "truncated": {
                "rate": sum(cut) / len(cut),
                "share_among_winners": 0.0,  # they are left out of the pool before anything is scored
            },
        },
        "reward_models": [
            row
            for i, one in enumerate(chains)
            for noise, told in stages.items()
            for row in _reward_models(one, noise, one.results(f"reward models, {told}"), at[noise][i])
        ],
        "samples": [row for noise, some in at.items() for row in _samples(some[0], settings, noise)],
    }


def end_index(settings: OveroptimizationSettings, pools: Sequence[Pool]) -> int:
    """Index of the largest n that is at most a quarter of the answers to a prompt, in every pool."""
    fewest = min(pool.gold.shape[1] for pool in pools)
    return max(i for i, n in enumerate(settings.n) if n <= max(fewest / 4, 1))


def _point(noise: float, objective: str, n: int, member: int | None = None) -> Row:
    kl = statistics.best_of_n_kl(n)
    return {"noise": noise, "objective": objective, "member": member, "n": n, "kl": kl, "sqrt_kl": kl**0.5}


def _curves(
    pools: Sequence[Pool], settings: OveroptimizationSettings, noise: float, *, members: bool = True
) -> list[Row]:
    """Gold and proxy by objective and n; bands over prompts of one chain, or over whole chains."""
    gold = [best(pool, settings, pool.gold) for pool in pools]
    proxy = [best(pool, settings) for pool in pools]
    effective = [statistics.effective_samples(pools[0].gold.shape[1], [n]).item() for n in settings.n]
    rows = []
    for name in gold[0]:
        both = {"gold": gold, "proxy": proxy}
        bands = {key: study.over_prompts([one[name] for one in some]) for key, some in both.items()}
        for i, n in enumerate(settings.n):
            row = _point(noise, name, n) | {"effective_samples": effective[i]}
            for key, band in bands.items():
                row |= dict(zip((key, f"{key}_lo", f"{key}_hi"), (end[i].item() for end in band), strict=True))
            rows.append(row)
    if len(pools) == 1 and members:
        for member, one in enumerate(pools[0].proxy):
            lines = (statistics.best_of_n(one, values, list(settings.n)).mean(1) for values in (pools[0].gold, one))
            for n, true, believed in zip(settings.n, *(line.tolist() for line in lines), strict=True):
                rows.append(_point(noise, "member", n, member) | {"gold": true, "proxy": believed})
    return rows


def _fits(curves: Sequence[Row], end: int) -> list[Row]:
    """R(d) = d (a - b d) with d = sqrt KL, up to the end."""
    rows = []
    points = [row for row in curves if row["member"] is None and 1 < row["n"] <= end]
    for (noise, name), line in study.grouped(points, "noise", "objective").items():
        d, gold = (torch.tensor([row[key] for row in line], dtype=torch.float64) for key in ("sqrt_kl", "gold"))
        fit = statistics.fit_best_of_n(d, gold)
        peak = {"peak_kl": fit.peak**2 if fit.b > 0 else None, "peak_gold": fit.peak_gold if fit.b > 0 else None}
        rows.append({"noise": noise, "objective": name, "a": fit.a, "b": fit.b, **peak})
    return rows


def _policy_fits(rows: Sequence[Row]) -> list[Row]:
    """R(d) = d (a − b ln d), d = √KL, of gold less that of the start, for every policy that has moved.

    A peak beyond ten times the largest d measured is left out: nothing speaks for it.
    """
    found = []
    for line in study.grouped(rows, *POLICIES).values():
        moved = [(row["sqrt_kl"], row["gold"] - line[0]["gold"]) for row in line if row["sqrt_kl"] > 0]
        if len({d for d, _ in moved}) < 3:
            continue
        d, gold = torch.tensor(moved, dtype=torch.float64).unbind(1)
        fit = statistics.fit_rl(d, gold)
        known = {name: line[0][name] for name in ("noise", "beta", "objective")} | {"a": fit.a, "b": fit.b}
        if fit.b > 0 and fit.peak <= FAR * d.max().item():
            known |= {"peak_kl": fit.peak**2, "peak_gold": fit.peak_gold + line[0]["gold"]}
        found.append(known)
    return found


def _bars(
    golds: Mapping[str, Sequence[Mapping[str, Tensor]]], settings: OveroptimizationSettings, end: int
) -> list[Row]:
    """Gold of best-of-n at the end by number of members, UWO's weight, number of pairs and reward-model size.

    At the first level of noise; intervals are over chains.
    """
    main = golds[level(settings.noise[0])]
    uwo = next((spec for spec in settings.objectives if spec.startswith("uwo")), "uwo(weight=0.5)")
    wanted = [("members", f"{k} members", "wco", f"wco of {k}", main) for k in (3, 4)]
    wanted += [("members", f"{settings.members} members", "wco", "wco", main)]
    wanted += [("weight", "weight 0.5", "uwo", "uwo at 0.5", main)]
    wanted += [("weight", uwo[4:-1].replace("=", " "), "uwo", "uwo", main)]
    groups = [("size" if told.startswith("size") else "pairs", told, golds[told]) for told in variants(settings)]
    groups += [("pairs", "all pairs", main)] if settings.shares else []
    groups += [("size", "size small", main)] if settings.sizes else []
    wanted += [(group, told, name, name, some) for group, told, some in groups for name in OBJECTIVES]
    return [
        {"group": group, "label": told, "objective": objective}
        | study.spread("gold", [gold[name][..., end, :].mean().item() for gold in some])
        for group, told, objective, name, some in wanted
        if name in some[0]
    ]


def _shares(pools: Sequence[Pool], settings: OveroptimizationSettings, noise: float) -> list[Row]:
    """The share of marked answers among the best of n, by who chooses."""
    found = [{k: v.mean(1) for k, v in best(pool, settings, pool.mark.double()).items()} for pool in pools]
    base = torch.stack([pool.mark.double().mean() for pool in pools]).mean().item()
    return [
        {"noise": noise, "objective": name, "n": n, "share": share, "base": base}
        for name in found[0]
        for n, share in zip(settings.n, torch.stack([one[name] for one in found]).mean(0).tolist(), strict=True)
    ]


def _exclusion(at: Mapping[float, Sequence[Pool]], settings: OveroptimizationSettings) -> list[Row]:
    """The curves again on pools without marked answers; none if such an answer is all a prompt has."""
    fewest = min(int((~pool.mark).sum(1).min()) for some in at.values() for pool in some)
    shorter = replace(settings, n=tuple(n for n in settings.n if n <= fewest))
    return [
        row
        for noise, some in at.items()
        if shorter.n
        for row in _curves([pool.without_marked() for pool in some], shorter, noise, members=False)
    ]


def _reward_models(one: Chain, noise: float, trained: Row, pool: Pool) -> list[Row]:
    """Each member's accuracy, and its correlation with the others on the pool."""
    together = torch.corrcoef(pool.proxy.flatten(1))
    others = (together.sum(1) - 1) / (len(together) - 1)
    return [
        {"seed": one.seed, "noise": noise, "member": member, "agreement": others[member].item()}
        | {key: measured[key] for key in ("accuracy", "accuracy_lo", "accuracy_hi")}
        for member, measured in enumerate(trained["members"])
    ]


def _samples(pool: Pool, settings: OveroptimizationSettings, noise: float) -> list[Row]:
    """What each scorer really picks among the first n answers of a prompt."""
    judges = {f"single {member}": proxy for member, proxy in enumerate(pool.proxy[:3])}
    judges |= {name: scores[0] for name, scores in choosers(pool, settings).items() if name != "single"}
    rows = []
    for q in range(min(PROMPTS, len(pool.gold))):
        picks = []
        for name, proxy in judges.items():
            for n in (n for n in SHOWN if n <= proxy.shape[1]):
                best = int(proxy[q, :n].argmax())
                response = pool.rows[int(pool.row[q, best])]["response"]
                register = toy.register_of(response)
                pick = {"objective": name, "n": n, "response": response, "tags": [register] if register else []}
                picks.append(pick | {"gold": pool.gold[q, best].item(), "proxy": proxy[q, best].item()})
        rows.append({"prompt": str(pool.rows[int(pool.row[q, 0])]["prompt"]), "noise": noise, "picks": picks})
    return rows


# charts and page

ACROSS = {"√KL": "sqrt_kl", "n": "n"}
BANDS = "Bands are intervals; the dot marks the peak of gold."
ROOT, STEP = Axis("sqrt_kl", "√KL from the reference (√nats)"), Axis("step", "steps", whole=True)
GROUPS = {
    "members": "Members of WCO",
    "weight": "Weight of UWO",
    "pairs": "Preference pairs",
    "size": "Size of the reward model",
}


def policy_chart(rows: Sequence[Row], y: str = "gold", x: Axis = ROOT) -> charts.Chart:
    """A column of measured policies against `x`, a line for each objective, a dot at the peak of gold.

    Gold is solid, the proxy dashed; lines follow the steps. Raises ValueError if no row has the column.
    """
    told = [{**row, "KL": f"{row['kl']:.2f} ± {row['kl_se']:.2f}"} for row in rows]
    lines = study.grouped(sorted(told, key=lambda row: OBJECTIVES.index(row["objective"])), "objective").values()
    tops = [max(line, key=lambda row: row["gold"]) for line in lines] if y == "gold" else []
    return charts.curves(
        [row for line in lines for row in line],
        x,
        Axis(y, REWARD.title if y in ("gold", "proxy") else "variance over members"),
        by="objective",
        names=NAMES,
        colors=COLORS,
        tooltip={"step": "step", "KL": "KL, nats"},
        dot=lambda row: row in tops,
        band=lambda row: False,
        dash=DASHED if y == "proxy" else SOLID,
        order="step",
        height=280,
    )


def bar_chart(rows: Sequence[Row]) -> charts.Chart:
    """Gold of best-of-n as bars, with intervals if they are known."""
    named = [
        {"label": f"{row['label']}, {NAMES[row['objective']]}", "color": COLORS[row["objective"]]}
        | {"value": row["gold"], "lo": row.get("gold_lo"), "hi": row.get("gold_hi"), "text": number(row["gold"])}
        for row in rows
    ]
    return charts.bars(named, REWARD.title)


def mark_chart(shares: Sequence[Row]) -> charts.Chart:
    """The share of marked answers among the best of n, by who chooses; dashed, their share among all answers."""
    top = max(max(row["share"], row["base"]) for row in shares) or 0.01
    return charts.curves(
        shares,
        charts.AXES["n"],
        Axis("share", "share of the winners", format=".0%" if top > 0.05 else ".1%"),
        by="objective",
        names=NAMES,
        colors=COLORS,
        level=("all answers", shares[0]["base"]),
        domain=(0.0, 1.08 * top),
    )


def figures(results: Row) -> dict[str, charts.Chart]:
    """The charts worth a file of their own."""
    found: dict[str, charts.Chart] = {
        f"overoptimization_{x}_noise_{100 * noise:g}": charts.overoptimization(results["curves"], noise=noise, x=x)
        for noise in _noises(results["curves"])
        for x in ACROSS.values()
    }
    for (noise, beta), rows in study.grouped(results["policies"], "noise", "beta").items():
        for y in ("gold", "proxy"):
            found[f"ppo_{y}_noise_{100 * noise:g}_beta_{beta:g}"] = policy_chart(rows, y)
    return found


def story(results: Row) -> tuple[str, str, list[Part]]:
    """Title, lead and sections. Raises ValueError if there is no curve of single reward models."""
    curves, noises = results["curves"], _noises(results["curves"])
    line = [row for row in curves if row["objective"] == "single" and row["noise"] == noises[0]]
    if not line:
        raise ValueError(f"results: no curve of single reward models at noise {noises[0]}; the page starts from it")
    top, end = max(line, key=lambda row: row["gold"]), line[-1]
    parts: list[Part] = [
        _headline(top, end),
        _gap(curves, noises),
        *_ensembles(curves, noises),
        *_policies(results),
        *_mechanism(results, noises),
        text(
            "What each scorer picks as it may choose among more answers. Blue is a high reward, orange a low one: a "
            "blue proxy beside an orange gold is an answer that fooled its scorer. Marked words give it away.",
            title="Read the answers",
        ),
        answers(results["samples"], results["mechanism"]["words"]),
        _models(results["reward_models"]),
        table(
            ("label noise", "scorer", "a", "b", "peak at KL, nats", "gold at the peak"),
            [(percent(row["noise"]), NAMES[row["objective"]], *_fit(row)) for row in results["fits"]],
            "Least-squares fits of gold = d (a − b d), d = √KL.",
            title="Fitted curves",
        ),
    ]
    return _title(top, end), _lead(top, end), parts


def _noises(rows: Sequence[Row]) -> list[float]:
    return sorted({row["noise"] for row in rows}, reverse=True)


def _at(rows: Sequence[Row], noise: float) -> list[Row]:
    return [row for row in rows if row["noise"] == noise]


def _fell(top: Row, end: Row) -> bool:
    """Whether the intervals at the peak and at the end are apart."""
    return top["n"] != end["n"] and end.get("gold_hi", top["gold"]) < top.get("gold_lo", end["gold"])


def _title(top: Row, end: Row) -> str:
    if top["n"] == end["n"]:
        return "The gold reward rose to the end."
    if end["proxy"] <= top["proxy"]:
        return "The gold reward stopped rising."
    return f"The proxy kept rising. The gold reward {'fell' if _fell(top, end) else 'did not'}."


def _lead(top: Row, end: Row) -> str:
    how = f"labels of which {percent(top['noise'])} are wrong" if top["noise"] else "labels without noise"
    start = f"Draw n answers, keep the one that a single reward model likes best. The model learned from {how}."
    unit = "Both are in standard deviations of the initial policy, whose mean is 0."
    if top["n"] == end["n"]:
        return f"{start} Gold was still at its best, {number(end['gold'], sign=True)}, at n = {end['n']:,}. {unit}"
    best, last, first, proxy = (
        number(value, sign=True) for value in (top["gold"], end["gold"], top["proxy"], end["proxy"])
    )
    doubt = "" if _fell(top, end) else " The fall is within the intervals."
    return (
        f"{start} Gold peaked at **n = {top['n']:,}** ({best}) and ended at **{last}**, while the proxy went from "
        f"{first} to **{proxy}**.{doubt} {unit}"
    )


def _headline(top: Row, end: Row) -> Part:
    groups = [
        (
            f"{name}, n = {row['n']:,}",
            [*((key, number(row[key], sign=True)) for key in ("gold", "proxy")), ("KL, nats", number(row["kl"]))],
        )
        for name, row in (("Where gold peaks", top), ("At the end", end))
    ]
    return numbers(groups[1:] if top["n"] == end["n"] else groups)


def _gap(curves: Sequence[Row], noises: Sequence[float]) -> Part:
    """Gold and proxy of single reward models, and the gap between them."""
    alone = [row for row in curves if row["objective"] in ("single", "member")]
    members, shared = any(row["objective"] == "member" for row in alone), charts.reach(alone)
    caption = (
        "What the single reward models believe (proxy, dashed) and what is true (gold, solid). The shaded gap "
        "is reward that is believed and not there. Thin lines are the models one by one, the thick line is their "
        f"average. {BANDS} Point at a curve for its values."
    )

    def drawn(noise: float, x: str) -> charts.Chart:
        return charts.overoptimization(
            curves, noise=noise, x=x, objectives=("single",), members=members, domain=shared, height=340
        )

    views = {(percent(z), name): figure(drawn(z, x), caption) for z in noises for name, x in ACROSS.items()}
    return tabs(("label noise", "against"), views)


def _ensembles(curves: Sequence[Row], noises: Sequence[float]) -> list[Part]:
    named = [row for row in curves if row["objective"] in OBJECTIVES]
    found = [name for name in OBJECTIVES if any(row["objective"] == name for row in named)]
    if len(found) < 2:
        return []
    said = (
        "The same answers, chosen by several models at once: by their **mean**, by the lowest of their "
        "scores (**WCO**, worst case), or by the mean less a penalty on their variance (**UWO**)."
    )
    gold, both = charts.reach(named, ("gold",)), charts.reach(named)
    alone: dict[tuple[str, ...], Part] = {
        (percent(z), name): figure(
            charts.overoptimization(curves, noise=z, x=x, quantities=("gold",), domain=gold), f"Gold alone. {BANDS}"
        )
        for z in noises
        for name, x in ACROSS.items()
    }
    caption = f"Gold and proxy of each scorer, on one scale. {BANDS}"
    beside: dict[tuple[str, ...], Part] = {}
    for z in noises:
        at = [name for name in found if any(row["objective"] == name and row["noise"] == z for row in named)]
        drawn = [charts.overoptimization(curves, noise=z, objectives=(n,), domain=both, height=210) for n in at]
        beside[(percent(z),)] = figure(drawn, caption, names=[NAMES[name] for name in at])
    title = "What ensembles change"
    return [text(said, title), tabs(("label noise", "against"), alone), tabs(("label noise",), beside)]


def _policies(results: Row) -> list[Part]:
    """What PPO found, and what else could be turned."""
    rows, parts = results["policies"], []
    if rows:
        said = (
            "Policies trained by PPO against the same reward models, measured on the prompts of best-of-n in the same "
            "units. They go much further from the reference than best-of-n can, so look at gold against proxy, not at "
            "one KL for both: reinforcement learning spends far more KL for the same gain. Lines follow the steps and "
            "may turn back; the dot marks the most gold. A KL below 0 is an estimate with an error, written as it is "
            "and drawn at 0."
        )
        paths = "Gold (solid) and what each policy's own reward says (dashed), by what it was trained against."
        steps = "The variance over members, of the answers a policy draws as it learns."
        along: dict[tuple[str, ...], Part] = {}
        by_step: dict[tuple[str, ...], Part] = {}
        for (noise, beta), some in study.grouped(rows, "noise", "beta").items():
            key = (percent(noise), f"beta {beta:g}")
            both = [policy_chart(some), policy_chart(some, "proxy")]
            along[key] = figure(both, paths, names=("Gold", "Proxy"))
            drawn = [policy_chart(some, x=STEP)]
            if any(row.get("variance") is not None for row in some):
                drawn.append(policy_chart(some, "variance", STEP))
            by_step[key] = figure(drawn, steps, names=("Gold by step", "Members' variance by step")[: len(drawn)])
        by = ("label noise", "KL penalty")
        title = "What PPO makes of the same reward models"
        parts += [text(said, title), tabs(by, along), tabs(by, by_step), _ends(rows)]
    if results["policy_fits"]:
        columns = ("label noise", "beta", "against", "a", "b", "peak at KL, nats", "gold at the peak")
        cells = [
            (percent(row["noise"]), f"{row['beta']:g}", NAMES[row["objective"]], *_fit(row))
            for row in results["policy_fits"]
        ]
        parts.append(table(columns, cells, "Least-squares fits of gold = start + d (a − b ln d), d = √KL."))
    groups = {group: some for (group,), some in study.grouped(results["bars"], "group").items() if len(some) > 1}
    if groups:
        caption = f"Gold of best-of-{results['end_n']:,}; lines are intervals over chains."
        drawn = [bar_chart(some) for some in groups.values()]
        parts.append(figure(drawn, caption, [GROUPS[group] for group in groups], title="What else could be turned"))
    return parts


def _fit(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("a", "b", "peak_kl", "peak_gold"))


def _ends(rows: Sequence[Row]) -> Part:
    """Peak and end of every policy."""
    cells = []
    for (noise, beta, objective), line in study.grouped(rows, *POLICIES).items():
        top, end = max(line, key=lambda row: row["gold"]), line[-1]
        known = (percent(noise), f"{beta:g}", NAMES[objective], number(top["gold"]), number(top["kl"]))
        last = (banded(end, "gold"), number(end["proxy"]), f"{number(end['kl'])} ± {number(end['kl_se'])}")
        cells.append((*known, *last, number(end["length"])))
    columns = ("label noise", "beta", "against", "most gold", "at KL", "gold at the end", "proxy", "KL, nats", "tokens")
    caption = (
        "The most gold is looked for, so it flatters; the claims below find the peak on other chains. Intervals of "
        "gold: over chains, or with one chain two standard errors over prompts."
    )
    return table(columns, cells, caption)


def _mechanism(results: Row, noises: Sequence[float]) -> list[Part]:
    found, curves = results["mechanism"], results["curves"]
    cut = found["truncated"]
    shares = "Share of the chosen answers that carry the mark; dashed, their share among all answers."
    parts: list[Part] = [
        text(f"**{found['name'].capitalize()}.** {found['text']}", title="How the proxy is fooled"),
        tabs(
            ("label noise",),
            {(percent(z),): figure(mark_chart(_at(found["shares"], z)), shares) for z in noises},
        ),
        text(
            f"Answers cut off before they end are {percent(cut['rate'])} of all answers and "
            f"{percent(cut['share_among_winners'])} of the chosen ones."
        ),
    ]
    views: dict[tuple[str, ...], Part] = {}
    for noise in _noises(found["exclusion"]):
        pools = [
            [r for r in rows if r["noise"] == noise and r["objective"] in OBJECTIVES]
            for rows in (curves, found["exclusion"])
        ]
        shared = charts.reach([row for pool in pools for row in pool], ("gold",))
        drawn = [charts.overoptimization(pool, quantities=("gold",), domain=shared, height=260) for pool in pools]
        names = ("All answers", "Without the fooling answers")
        views[(percent(noise),)] = figure(drawn, f"Gold of each scorer's choice. {BANDS}", names)
    if views:
        said = (
            "The test: take these answers, and those cut off, out of the pool and choose again. "
            "If they are the cause, the fall goes with them."
        )
        parts += [text(said), tabs(("label noise",), views)]
    return parts


def _models(rows: Sequence[Row]) -> Part:
    cells = [
        (
            percent(row["noise"]),
            row["member"],
            banded(row, "accuracy", percent),
            percent(row["agreement"]),
        )
        for row in rows
    ]
    columns = ("label noise", "member", "accuracy", "agreement with the others")
    return table(columns, cells, "Accuracy on held-out pairs without noise.", title="The reward models")


RECIPE = study.Recipe("overoptimization", SETTINGS, chain, collect, story, figures, note=NOTE)
