"""The races of the exact world; and one whole chain: a world, a policy, a scorer, rounds of every method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyrite.core.runs import Run
from pyrite.jobs import bandit, evaluate, generate, label, online, reward, sft
from pyrite.math.seeds import derive
from pyrite.recipes import toy
from pyrite.recipes.samplers.settings import Settings
from pyrite.training.evaluation import Evaluation


@dataclass(frozen=True)
class Trained:
    """One method: its rounds, and the evaluation of its last policy."""

    method: str
    run: Run
    evaluation: Run


@dataclass(frozen=True)
class Chain:
    """The runs of one seed."""

    seed: int
    runs: dict[str, Run]
    start: Run
    trained: list[Trained]

    @property
    def seconds(self) -> float:
        """Time of all its runs."""
        every = [*self.runs.values(), self.start]
        every += [run for one in self.trained for run in (one.run, one.evaluation)]
        return sum(run.results["seconds"] for run in every if run.results)


def races(folder: Path, settings: Settings, *, seed: int) -> dict[str, Run]:
    """Every race of the exact world that is not run yet; the same reward tables wherever their options agree."""
    done = {}
    for name, race in settings.races.items():
        out = folder / name.replace(" ", "_")
        config = bandit.Config(out=out, seeds=settings.repetitions, seed=derive(seed, "rewards"), **vars(race))
        done[name] = bandit.run(config)
    return done


def run(folder: Path, settings: Settings, *, seed: int) -> Chain:
    """Run every stage that is not done yet."""
    world = toy.write(
        folder / "world", seed=derive(seed, "world"), n_pool=settings.answer_prompts, n_demos=settings.toy_demos
    )
    start = sft.Config(
        model=str(world.model),
        data=str(world.demos),
        training=settings.sft,
        out=folder / "sft",
        seed=derive(seed, "sft"),
    )
    done = {"sft": sft.run(start)}
    done |= _scorer(folder, str(world.pair_prompts), settings, seed=seed)
    at_start = _evaluated(folder, "sft", world, settings, seed=seed)
    trained = [
        Trained(
            method,
            _rounds(folder, method, sampler, world, settings, seed=seed),
            _evaluated(folder, method, world, settings, seed=seed),
        )
        for method, sampler in settings.methods.items()
    ]
    return Chain(seed, done, at_start, trained)


def _scorer(folder: Path, prompts: str, settings: Settings, *, seed: int) -> dict[str, Run]:
    """A reward model, trained on pairs of the policy's own answers that gold has labeled."""
    policy = str(folder / "sft" / "model")
    drawn = generate.Config(
        model=policy,
        prompts=prompts,
        k=settings.scorer_answers,
        max_new_tokens=settings.max_new_tokens,
        out=folder / "answers",
        seed=derive(seed, "pairs"),
    )
    labelled = label.Config(
        candidates=str(folder / "answers" / "candidates.parquet"),
        gold=settings.gold,
        ties="drop",
        seed=derive(seed, "labels"),
        out=folder / "pairs",
    )
    learned = reward.Config(
        model=policy,
        data=str(folder / "pairs" / "pairs.parquet"),
        held_out=str(folder / "pairs" / "held_out.parquet"),
        training=settings.scorer,
        out=folder / "scorer",
        seed=derive(seed, "scorer"),
    )
    return {"answers": generate.run(drawn), "pairs": label.run(labelled), "scorer": reward.run(learned)}


def _rounds(folder: Path, method: str, sampler: str, world: toy.World, settings: Settings, *, seed: int) -> Run:
    """Rounds of one method. Prompts, streams and order are those of every other method: only the arms differ."""
    scorer = f"reward_model(path={str(folder / 'scorer' / 'member_0')!r})"
    config = online.Config(
        model=str(folder / "sft" / "model"),
        prompts=str(world.pair_prompts),
        judge=f"bradley_terry(gold={scorer!r}, scale={1 / settings.margin!r})",
        sampler=sampler,
        loss=settings.loss,
        rounds=settings.rounds,
        prompts_per_round=settings.prompts_per_round,
        pairing="consecutive",
        training=settings.online,
        evaluation=Evaluation(
            eval_prompts=str(world.pool_prompts),
            gold=settings.gold,
            rewards=str(folder / "scorer"),
            eval_limit=None,
            eval_k=settings.round_answers,
            max_new_tokens=settings.max_new_tokens,
        ),
        out=folder / method,
        seed=derive(seed, "rounds"),
    )
    return online.run(config)


def _evaluated(folder: Path, name: str, world: toy.World, settings: Settings, *, seed: int) -> Run:
    """Answers of a policy to the held-out prompts, against the start."""
    config = evaluate.Config(
        model=str(folder / name / "model"),
        prompts=str(world.pool_prompts),
        gold=settings.gold,
        rewards=str(folder / "scorer"),
        ref=str(folder / "sft" / "model"),
        k=settings.answers,
        max_new_tokens=settings.max_new_tokens,
        out=folder / f"evaluate_{name}",
        seed=derive(seed, "evaluate"),
    )
    return evaluate.run(config)
