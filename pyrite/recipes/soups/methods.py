"""The methods: each trains what it needs and answers the test prompts under every combination of preferences.

vb: the policy as it is, without preferences. pp: it is told them. mt: tuned on the chosen answers of all options.
rlhf: PPO on a general reward. pmorl: PPO on every combination, rewarded for each of its options. psoups: a policy for
each option, by PPO or (psoups_dpo) by DPO, averaged for each combination; psoups_factor averages the adapters' factors
as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions, Variants
from pyrite.jobs import dpo, generate, ppo, sft, soup
from pyrite.math.seeds import derive
from pyrite.recipes.soups.settings import Settings
from pyrite.training.evaluation import Evaluation

Runs = dict[str, Run]
Method = Callable[["Place", Runs], list[Path]]  # candidates of the test prompts


@dataclass(frozen=True)
class Place:
    """Where a chain is at home, and which combinations of preferences it serves."""

    folder: Path
    settings: Settings
    dimensions: Dimensions
    base: str
    train: str
    test: str
    seed: int
    added: str | None = None

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """All of them; after an option was added, those that it adds."""
        if self.added is None:
            return self.dimensions.combinations()
        first = [option.id for option in self.dimensions.options if not option.later]
        return [c for c in self.dimensions.combinations([*first, self.added]) if self.added in c]

    def after(self, added: str) -> Place:
        """The same place once an option was added."""
        return replace(self, added=added)

    def variants(self, *wanted: str) -> Variants:
        return Variants(self.settings.dimensions, wanted)


def vb(place: Place, runs: Runs) -> list[Path]:
    """One set of answers serves all combinations."""
    return [_answers(place, runs, "vb", place.base, ["neutral"])]


def pp(place: Place, runs: Runs) -> list[Path]:
    return [_answers(place, runs, "pp", place.base, map("+".join, place.combinations))]


def mt(place: Place, runs: Runs) -> list[Path]:
    config = sft.Config(
        place.base,
        str(place.folder / "pairs" / "demos.parquet"),
        place.folder / "mt",
        lora=place.settings.lora,
        training=place.settings.multitask,
        seed=derive(place.seed, "mt"),
    )
    runs["multitask"] = sft.run(config)
    return [_answers(place, runs, "mt", str(config.out / "model"), map("+".join, place.combinations))]


def rlhf(place: Place, runs: Runs) -> list[Path]:
    config = replace(_ppo(place, "rlhf"), reward=(str(place.folder / "reward_in_general"),), variants=Variants())
    runs["rlhf"] = ppo.run(config)
    return [_answers(place, runs, "rlhf", str(config.out / "model"), ["neutral"])]


def pmorl(place: Place, runs: Runs) -> list[Path]:
    """Trained once, before any option was added; as many steps as all policies of the soups together."""
    settings, known = place.settings, replace(place, added=None).combinations
    config = replace(
        _ppo(place, "pmorl"),
        variants=place.variants(*map("+".join, known)),
        steps=settings.steps * len({option for combination in known for option in combination}),
    )
    runs["pmorl"] = ppo.run(config)
    return [_answers(place, runs, "pmorl", str(config.out / "model"), map("+".join, place.combinations))]


def psoups(place: Place, runs: Runs) -> list[Path]:
    return _soups(place, runs, "psoups", _policies(place, runs), "delta")


def psoups_factor(place: Place, runs: Runs) -> list[Path]:
    return _soups(place, runs, "psoups_factor", _policies(place, runs), "factor")


def psoups_dpo(place: Place, runs: Runs) -> list[Path]:
    made = {}
    for option in _options(place):
        mine = place.folder / f"pairs_{option}"
        for name in ("pairs", "held_out"):
            if not (mine / f"{name}.parquet").exists():
                rows = data.load(place.folder / "pairs" / f"{name}.parquet", "pairs")
                data.write([row for row in rows if row["preferences"] == [option]], mine / f"{name}.parquet")
        config = dpo.Config(
            place.base,
            str(mine / "pairs.parquet"),
            place.folder / f"dpo_{option}",
            held_out=str(mine / "held_out.parquet"),
            lora=place.settings.lora,
            training=place.settings.dpo,
            seed=derive(place.seed, "policies"),  # one seed for all: adapters that start alike average well
        )
        runs[f"dpo {option}"] = dpo.run(config)
        made[option] = config.out / "model"
    return _soups(place, runs, "psoups_dpo", made, "delta")


METHODS: dict[str, Method] = {
    method.__name__: method for method in (vb, pp, mt, rlhf, pmorl, psoups, psoups_factor, psoups_dpo)
}
AFTER = ("vb", "pp", "pmorl", "psoups")  # who answers under an added option; of these only psoups learns something


def _options(place: Place) -> list[str]:
    """Those that the combinations of a place are made of."""
    return list(dict.fromkeys(option for combination in place.combinations for option in combination))


def _policies(place: Place, runs: Runs) -> dict[str, Path]:
    """A policy for each option, by PPO on prompts that carry it."""
    made = {}
    for option in _options(place):
        config = replace(_ppo(place, f"ppo_{option}"), variants=place.variants(option))
        runs[f"ppo {option}"] = ppo.run(config)
        made[option] = config.out / "model"
    return made


def _ppo(place: Place, name: str) -> ppo.Config:
    """What all policies trained by PPO have in common: adapters on the same base, the conditioned reward model."""
    settings = place.settings
    return ppo.Config(
        model=place.base,
        prompts=place.train,
        reward=(str(place.folder / "reward"),),
        lora=settings.lora,
        beta=settings.beta,
        steps=settings.steps,
        prompts_per_step=settings.prompts_per_step,
        missing_eos=settings.missing_eos,
        measure_every=settings.steps,
        evaluation=Evaluation(
            eval_prompts=place.test, eval_limit=settings.test_prompts, max_new_tokens=settings.max_new_tokens
        ),
        training=settings.ppo,
        out=place.folder / name,
        seed=derive(place.seed, "policies"),
    )


def _soups(place: Place, runs: Runs, name: str, policies: dict[str, Path], mode: str) -> list[Path]:
    """A soup for each combination, and its answers."""
    files = []
    for combination in place.combinations:
        told = "+".join(combination)
        config = soup.Config(
            tuple(str(policies[option]) for option in combination),
            place.folder / f"{name}_{told}",
            mode=mode,  # type: ignore[arg-type]
        )
        runs[f"{name}, soup {told}"] = soup.run(config)
        files.append(_answers(place, runs, f"{name}_{told}", str(config.out / "model"), [told]))
    return files


def _answers(place: Place, runs: Runs, name: str, model: str, wanted: Sequence[str] | map[str]) -> Path:
    """Answers of a model to the test prompts under these preferences, the same streams of randomness for all."""
    settings = place.settings
    name = f"{name}_after_{place.added}" if place.added else name
    config = generate.Config(
        model=model,
        prompts=place.test,
        k=settings.answers,
        max_new_tokens=settings.max_new_tokens,
        variants=place.variants(*wanted),
        out=place.folder / "answers" / name,
        seed=derive(place.seed, "answers"),
    )
    runs[f"answers, {name}"] = generate.run(config)
    return config.out / "candidates.parquet"
