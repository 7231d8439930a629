"""One whole chain: a world that half follows preferences, pairs along them, reward models, every method, duels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.conditioning import Dimensions, Option, Variants, conditioned
from pyrite.jobs import duel, generate, pairs, reward, sft
from pyrite.math.seeds import derive
from pyrite.models.packing import Row
from pyrite.models.policy import Policy
from pyrite.recipes import toy
from pyrite.recipes.soups import methods
from pyrite.recipes.soups.methods import Place
from pyrite.recipes.soups.settings import FOLLOWED, NEUTRAL, Settings
from pyrite.training.evaluation import response_logps


@dataclass
class Chain:
    """The runs of one seed; the duels over all combinations, over those that came later, and over general quality."""

    seed: int
    runs: dict[str, Run] = field(default_factory=dict)
    duels: Run | None = None
    added: Run | None = None
    general: Run | None = None
    kl: dict[str, list[float]] = field(default_factory=dict)
    """By method, of each answer the log-ratio of its policy to the start, nats: their mean is the KL (k1)."""

    @property
    def seconds(self) -> float:
        return sum(run.results["seconds"] for run in self.runs.values() if run.results)


def run(folder: Path, settings: Settings, *, seed: int) -> Chain:
    """Run every stage that is not done yet."""
    chain = Chain(seed)
    place = _start(folder, settings, chain, seed=seed)
    _learn(place, chain)
    answers = {name: methods.METHODS[name](place, chain.runs) for name in settings.methods}
    chain.kl = _kl(place, answers)
    chain.duels = chain.runs["duels"] = duel.run(_duels(place, answers, "duels"))
    quality = replace(_duels(place, answers, "duels_general"), general=settings.general)
    chain.general = chain.runs["duels in general"] = duel.run(quality)
    if settings.added:
        known = [name for name in methods.AFTER if name in settings.methods]
        later = {name: methods.METHODS[name](place.after(settings.added), chain.runs) for name in known}
        chain.added = chain.runs["duels after an addition"] = duel.run(_duels(place, later, "duels_added"))
    return chain


def demos(n: int, raw: Sequence[str], dimensions: Dimensions, *, follow: float, seed: int) -> list[data.Row]:
    """Demonstrations whose prompts name an option of each dimension with probability `follow`, and that lean to it."""
    rng = np.random.default_rng(derive(seed, "demos"))
    sides = [[o for o in dimensions.options if o.dimension == name] for name in dimensions.names]
    rows = []
    for _ in range(n):
        prompt = raw[int(rng.random() * len(raw))]
        options = [side[int(rng.random() * len(side))] for side in sides if rng.random() < follow]
        row = conditioned({"prompt_id": data.prompt_id(prompt), "prompt": prompt}, options)
        rows.append(row | {"response": toy.answer(rng, prompt, shares=leaning(options))})
    return rows


def leaning(options: Sequence[Option]) -> toy.Shares:
    """How answers under these options are written."""
    changed = {name: value for option in options for name, value in FOLLOWED[option.id].items()}
    return replace(NEUTRAL, **changed)  # type: ignore[arg-type]


def _start(folder: Path, settings: Settings, chain: Chain, *, seed: int) -> Place:
    """The world, and a policy that has learned its demonstrations: it reads preferences and half follows them."""
    dimensions = Dimensions.load(settings.dimensions)
    words = sorted({word for option in dimensions.options for word in option.sentence.split()})
    world = toy.write(
        folder / "world", seed=derive(seed, "world"), n_demos=1, n_pool=settings.test_prompts, words=words
    )
    known = [str(row["prompt"]) for row in data.load(world.pair_prompts, "prompts")]
    taught = folder / "demos.parquet"
    if not taught.exists():
        data.write(demos(settings.demos, known, dimensions, follow=settings.follow, seed=seed), taught)
    config = sft.Config(str(world.model), str(taught), folder / "sft", training=settings.sft, seed=derive(seed, "sft"))
    chain.runs["sft"] = sft.run(config)
    names = ("sft/model", "world/pair_prompts.parquet", "world/pool_prompts.parquet")
    base, train, test = (str(folder / name) for name in names)
    return Place(folder, settings, dimensions, base=base, train=train, test=test, seed=seed)


def _learn(place: Place, chain: Chain) -> None:
    """Answers, pairs and a reward model: along every option, and in general."""
    settings, known = place.settings, place.dimensions.ids
    drawn = _drawn(place, "rollouts", (*known, "neutral"), limit=settings.train_prompts, k=settings.candidates)
    plain = _drawn(place, "rollouts_in_general", ("neutral",), limit=settings.general_prompts, k=2)
    about = pairs.Config(
        candidates=str(drawn.out / "candidates.parquet"),
        dimensions=settings.dimensions,
        options=known,
        kinds=settings.kinds,
        ties="drop",
        out=place.folder / "pairs",
        seed=derive(place.seed, "pairs"),
    )
    general = pairs.Config(
        candidates=str(plain.out / "candidates.parquet"),
        general=settings.general,
        ties="drop",
        out=place.folder / "pairs_in_general",
        seed=derive(place.seed, "pairs in general"),
    )
    for name, answers, config in (("", drawn, about), (" in general", plain, general)):
        chain.runs[f"rollouts{name}"] = generate.run(answers)
        chain.runs[f"pairs{name}"] = pairs.run(config)
        trained = reward.Config(
            model=place.base,
            data=str(config.out / "pairs.parquet"),
            held_out=str(config.out / "held_out.parquet"),
            head_std=0.1,
            training=settings.reward,
            out=place.folder / f"reward{name}".replace(" ", "_"),
            seed=derive(place.seed, "reward", name),
        )
        chain.runs[f"reward model{name}"] = reward.run(trained)


def _drawn(place: Place, name: str, wanted: tuple[str, ...], *, limit: int, k: int) -> generate.Config:
    return generate.Config(
        model=place.base,
        prompts=place.train,
        limit=limit,
        k=k,
        max_new_tokens=place.settings.max_new_tokens,
        variants=Variants(place.settings.dimensions, wanted),
        out=place.folder / name,
        seed=derive(place.seed, name),
    )


def _kl(place: Place, answers: dict[str, list[Path]]) -> dict[str, list[float]]:
    """Log-ratios of the answers that are judged: the start reads their texts under the same prompts.

    A special token in the middle of an answer, as an untrained policy may draw, is not in its text.
    """
    start = Policy.load(place.base)
    found = {}
    for method, files in answers.items():
        rows = [row for file in files for row in data.load(file, "candidates")]
        asked, said, done = ([row[name] for row in rows] for name in ("prompt", "response", "finished"))
        both = text.encode_all(start.tokenizer, asked, said, finished=done, as_drawn=True)
        theirs = response_logps(start, [Row(one.prompt, [one.response]) for one in both]).sum.tolist()
        found[method] = [row["logp"] - logp for row, logp in zip(rows, theirs, strict=True)]
    return found


def _duels(place: Place, answers: dict[str, list[Path]], name: str) -> duel.Config:
    return duel.Config(
        answers=tuple(f"{method}={file}" for method, files in answers.items() for file in files),
        dimensions=place.settings.dimensions,
        out=place.folder / name,
        seed=derive(place.seed, name),
    )
