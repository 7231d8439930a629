"""One whole chain: a world, a policy, pairs, stronger models, one policy for every reference and beta."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.jobs import dpo, evaluate, generate, label, scratch, sft
from pyrite.math.seeds import derive
from pyrite.recipes import toy
from pyrite.recipes.references.settings import Settings
from pyrite.training.evaluation import Evaluation

# reference -> what --ref is told; a path stands for a stronger model
OWN = {"self": "self", "none": "none", "prior": "prior"}


@dataclass(frozen=True)
class Trained:
    """One policy: its reference, its beta, its training run and its evaluation."""

    ref: str
    beta: float
    run: Run
    evaluation: Run


@dataclass(frozen=True)
class Chain:
    """The runs of one seed."""

    seed: int
    folder: Path
    runs: dict[str, Run]
    start: Run
    strong: dict[str, Run]
    trained: list[Trained]

    @property
    def seconds(self) -> float:
        """Time of all its runs."""
        every = [*self.runs.values(), self.start, *self.strong.values()]
        every += [run for one in self.trained for run in (one.run, one.evaluation)]
        return sum(run.results["seconds"] for run in every if run.results)


def run(folder: Path, settings: Settings, *, seed: int) -> Chain:
    """Run every stage that is not done yet."""
    world = toy.write(
        folder / "world", seed=derive(seed, "world"), n_pool=settings.answer_prompts, n_demos=settings.toy_demos
    )
    done = {"sft": _sft(folder / "sft", str(world.model), str(world.demos), settings, derive(seed, "sft"))}
    policy = str(folder / "sft" / "model")
    done |= _pairs(folder, policy, world, settings, seed=seed)
    better = folder / "better" / "demos.parquet"
    if not better.exists():
        asked = [row["prompt"] for row in rows.load(world.pair_prompts, "prompts")]
        rows.write(
            toy.demos(settings.better_demos, seed=derive(seed, "better"), among=asked, shares=settings.better), better
        )
    paths = _stronger(folder, policy, better, settings, done, seed=seed)
    start = _evaluated(folder / "evaluate_sft", policy, policy, world, folder, settings, seed=seed)
    strong = {
        name: _evaluated(folder / f"evaluate_{name}", path, None, world, folder, settings, seed=seed)
        for name, path in paths.items()
    }
    trained = [
        _trained(folder, policy, world, ref, spec, beta, settings, seed=seed)
        for ref, spec in {**OWN, **paths}.items()
        for beta in (settings.betas if ref == "self" else settings.other_betas)
    ]
    return Chain(seed, folder, done, start, strong, trained)


def _sft(out: Path, model: str, demos: str, settings: Settings, seed: int, *, stronger: bool = False) -> Run:
    training = settings.stronger if stronger else settings.sft
    return sft.run(sft.Config(model=model, data=demos, training=training, out=out, seed=seed))


def _pairs(folder: Path, policy: str, world: toy.World, settings: Settings, *, seed: int) -> dict[str, Run]:
    drawn = generate.Config(
        model=policy,
        prompts=str(world.pair_prompts),
        k=settings.pair_answers,
        limit=settings.pair_prompts,
        top_p=settings.pair_top_p,
        max_new_tokens=settings.max_new_tokens,
        out=folder / "answers",
        seed=derive(seed, "pairs"),
    )
    labelled = label.Config(
        candidates=str(folder / "answers" / "candidates.parquet"),
        gold=settings.gold,
        noise=settings.noise,
        noise_seed=derive(seed, "noise"),
        ties="drop",
        seed=derive(seed, "labels"),
        out=folder / "pairs",
    )
    return {"answers": generate.run(drawn), "pairs": label.run(labelled)}


def _stronger(
    folder: Path, policy: str, better: Path, settings: Settings, done: dict[str, Run], *, seed: int
) -> dict[str, str]:
    """Models that write better: one that comes from the policy, one that does not, one with another tokenizer."""
    toy.model(derive(seed, "larger"), size="base").save_pretrained(folder / "larger")
    toy.tokenizer().save_pretrained(folder / "larger")
    done["tokenizer"] = scratch.run(
        scratch.Config(
            data=str(better),
            kind="demos",
            vocabulary=settings.vocabulary,
            context=256,
            out=folder / "words",
            seed=derive(seed, "words"),
        )
    )
    starts = {"family": policy, "stranger": str(folder / "larger"), "tokenizer": str(folder / "words" / "model")}
    for name, start in starts.items():
        made = _sft(folder / name, start, str(better), settings, derive(seed, name), stronger=True)
        done[f"stronger: {name}"] = made
    return {name: str(folder / name / "model") for name in starts}


def _trained(
    folder: Path, policy: str, world: toy.World, ref: str, spec: str, beta: float, settings: Settings, *, seed: int
) -> Trained:
    name = f"{ref}_beta_{beta:g}"
    config = dpo.Config(
        model=policy,
        data=str(folder / "pairs" / "pairs.parquet"),
        held_out=str(folder / "pairs" / "held_out.parquet"),
        loss=f"dpo(beta={beta:g})",
        ref=spec,
        ref_cache=folder / "references",
        training=settings.dpo,
        measure_every=settings.measure_every,
        evaluation=Evaluation(
            eval_prompts=str(world.pool_prompts),
            gold=settings.gold,
            eval_limit=None,
            max_new_tokens=settings.max_new_tokens,
        ),
        out=folder / name,
        seed=derive(seed, "dpo"),
    )
    made = dpo.run(config)
    model = str(folder / name / "model")
    return Trained(
        ref, beta, made, _evaluated(folder / f"evaluate_{name}", model, policy, world, folder, settings, seed=seed)
    )


def _evaluated(
    out: Path, model: str, ref: str | None, world: toy.World, folder: Path, settings: Settings, *, seed: int
) -> Run:
    """Answers to the held-out prompts; against the policy's start where they share a vocabulary, its pairs too."""
    extra: dict[str, Any] = {"ref": ref, "pairs": str(folder / "pairs" / "held_out.parquet")} if ref else {}
    config = evaluate.Config(
        model=model,
        prompts=str(world.pool_prompts),
        gold=settings.gold,
        k=settings.answers,
        max_new_tokens=settings.max_new_tokens,
        out=out,
        seed=derive(seed, "evaluate"),
        **extra,
    )
    return evaluate.run(config)
