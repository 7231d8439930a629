"""One whole chain: two worlds with a policy each, and in every task every method from the same start."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.feedback.ledger import GoldLimits
from pyrite.jobs import dpo, generate, online, reward, sft
from pyrite.math.seeds import derive
from pyrite.recipes import toy
from pyrite.recipes.live_reward.offline import Offline, offline
from pyrite.recipes.live_reward.settings import Method, Settings, Task, methods
from pyrite.training.evaluation import Evaluation


@dataclass(frozen=True)
class World:
    """A policy that has learned a world's demonstrations, and its prompts."""

    policy: Path
    prompts: Path
    pool: Path


@dataclass(frozen=True)
class Trained:
    """One method in one task, and the labels it had before its rounds."""

    task: str
    method: str
    run: Run
    before: int


@dataclass
class Chain:
    """The runs of one seed."""

    seed: int
    runs: dict[str, Run] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time of all its runs."""
        every = [*self.runs.values(), *(one.run for one in self.trained)]
        return sum(run.results["seconds"] for run in every if run.results)


@dataclass(frozen=True)
class Place:
    """Where a task of a chain is at home."""

    folder: Path
    task: Task
    world: World
    gold: str
    settings: Settings
    seed: int

    @property
    def judge(self) -> str:
        """The gold as the one who is paid: which of two answers is better, for certain."""
        return f"bradley_terry(gold={self.gold!r}, hard=True)"

    def evaluation(self, static: Run) -> Evaluation:
        """Gold, proxy and KL of answers to the world's other prompts; the proxy is the static reward model."""
        return Evaluation(
            eval_prompts=str(self.world.pool),
            gold=self.gold,
            rewards=str(static.folder),
            eval_limit=None,
            eval_k=self.settings.answers,
            max_new_tokens=self.task.max_new_tokens,
        )


def run(folder: Path, settings: Settings, *, seed: int) -> Chain:
    """Run every stage that is not done yet."""
    chain = Chain(seed)
    worlds = {
        name: make(folder / name, settings, chain, seed=seed) for name, make in WORLDS.items() if _used(settings, name)
    }
    for name, task in settings.tasks.items():
        weak = str(folder / "stories" / "weak" / "model")
        strong = str(worlds[task.world].policy)
        gold = task.gold.format(strong=strong, weak=weak)
        place = Place(folder / name, task, worlds[task.world], gold, settings, derive(seed, name))
        _task(place, name, chain)
    return chain


def _used(settings: Settings, world: str) -> bool:
    return any(task.world == world for task in settings.tasks.values())


def _stories(folder: Path, settings: Settings, chain: Chain, *, seed: int) -> World:
    """The toy world; and a weaker model, of a few demonstrations, to be told from."""
    world = toy.write(
        folder / "world", seed=derive(seed, "world"), n_pool=settings.answer_prompts, n_demos=settings.toy_demos
    )
    few = folder / "few.parquet"
    if not few.exists():
        rows.write(rows.load(str(world.demos), "demos")[: settings.weak_demos], few)
    for name, demos in (("sft", world.demos), ("weak", few)):
        config = sft.Config(str(world.model), str(demos), folder / name, training=settings.sft, seed=derive(seed, name))
        chain.runs[f"stories: {name}"] = sft.run(config)
    return World(folder / "sft" / "model", world.pair_prompts, world.pool_prompts)


def _arithmetic(folder: Path, settings: Settings, chain: Chain, *, seed: int) -> World:
    """Sums and differences of three or four numbers up to 5, step by step; about a third of the answers are right."""
    world = toy.write_math(
        folder / "world",
        seed=derive(seed, "world"),
        n_demos=settings.math_demos,
        n_prompts=settings.math_prompts,
        n_pool=settings.answer_prompts,
        depths=(1,),
        operators="+-",
        largest=5,
    )
    config = sft.Config(
        str(world.model), str(world.demos), folder / "sft", training=settings.math_sft, seed=derive(seed, "sft")
    )
    chain.runs["arithmetic: sft"] = sft.run(config)
    return World(folder / "sft" / "model", world.pair_prompts, world.pool_prompts)


WORLDS = {"stories": _stories, "arithmetic": _arithmetic}


def _task(place: Place, name: str, chain: Chain) -> None:
    """The start's own labeled answers, reward models of them, then every method."""
    settings = place.settings
    every = {method: methods(settings.labels, settings.warm)[method] for method in place.task.methods}
    drawn = generate.Config(
        str(place.world.policy),
        str(place.world.prompts),
        place.folder / "answers",
        k=2,
        max_new_tokens=place.task.max_new_tokens,
        seed=derive(place.seed, "answers"),
    )
    chain.runs[f"{name}: answers"] = generate.run(drawn)
    sizes = {"static": settings.labels, "warm": settings.warm}
    bought = {
        kind: offline(
            place.folder / f"labels_{kind}",
            place.folder / "answers",
            place.judge,
            n,
            seed=derive(place.seed, "offline"),
        )
        for kind, n in sizes.items()
    }
    rewards = {"static": _reward(place, bought["static"], "static", members=1)}
    rewards["warm"] = _reward(place, bought["warm"], "warm", members=1)
    if any("{several" in (method.silver or "") for method in every.values()):
        rewards["several"] = _reward(place, bought["warm"], "several", members=settings.members)
    chain.runs |= {f"{name}: reward model, {kind}": run for kind, run in rewards.items()}
    for label, method in every.items():
        before = {settings.labels: bought["static"], settings.warm: bought["warm"]}.get(method.offline)
        if method.pairs == "offline":
            run = _offline(place, label, method, bought["static"], rewards["static"])
        else:
            run = _online(place, label, method, rewards)
        chain.trained.append(Trained(name, label, run, before.labels if before else 0))


def _reward(place: Place, pairs: Offline, kind: str, *, members: int) -> Run:
    config = reward.Config(
        str(place.world.policy),
        str(pairs.pairs),
        place.folder / f"reward_{kind}",
        held_out=str(pairs.held_out),
        members=members,
        training=place.settings.reward,
        seed=derive(place.seed, "reward"),
    )
    return reward.run(config)


def _offline(place: Place, label: str, method: Method, pairs: Offline, static: Run) -> Run:
    """DPO on the start's own pairs."""
    config = dpo.Config(
        str(place.world.policy),
        str(pairs.pairs),
        place.folder / label,
        held_out=str(pairs.held_out),
        loss=place.settings.loss,
        evaluation=place.evaluation(static),
        training=replace(place.settings.online, epochs=method.epochs),
        seed=derive(place.seed, "rounds"),
    )
    return dpo.run(config)


def _online(place: Place, label: str, method: Method, rewards: dict[str, Run]) -> Run:
    """Rounds. Prompts and streams are those of every other method."""
    settings = place.settings
    folders = {kind: str(run.folder) for kind, run in rewards.items()}
    prompts = settings.labels // settings.rounds if method.pairs == "labels" else settings.prompts
    config = online.Config(
        str(place.world.policy),
        str(place.world.prompts),
        place.judge,
        place.folder / label,
        silver=method.silver and method.silver.format(**folders),
        label_schedule=method.schedule if method.silver else "even()",
        asking=GoldLimits(gold_budget=method.online, gold_batch=64),
        rounds=settings.rounds,
        prompts_per_round=prompts,
        loss=settings.loss,
        labels="hard",
        restart=False,
        pairing="consecutive",
        training=replace(settings.online, epochs=method.epochs),
        evaluation=place.evaluation(rewards["static"]),
        seed=derive(place.seed, "rounds"),
    )
    return online.run(config)
