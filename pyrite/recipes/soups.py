"""One policy for each preference, merged for each person (arXiv:2310.11564).

Three dimensions of style with exact golds as judges; every method under every combination; an option added later.
Source: Jang et al. 2023, "Personalized Soups". A win rate counts a tie as one half; a unit is one prompt under one
combination, decided by the sum of its options' verdicts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import altair as alt
import numpy as np
import torch

from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data.conditioning import Dimensions, Option, Variants, conditioned
from pyrite.data.responses import Responses
from pyrite.data.text import encode
from pyrite.jobs import dpo, duel, generate, pairs, ppo, reward, sft, soup
from pyrite.math.seeds import derive
from pyrite.models.forward import singles, token_logps
from pyrite.models.policy import Policy
from pyrite.recipes import study, toy
from pyrite.recipes.study import Chain, Row
from pyrite.recipes.toy import Shares
from pyrite.report import charts
from pyrite.report.charts import BLUE, FAINT, GREEN, INK, ORANGE, Chart, span, styled
from pyrite.report.page import Part, banded, figure, number, numbers, percent, table, tabs, text
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training


def _fast(lr: float, epochs: int) -> Training:
    return Training(lr=lr, epochs=epochs, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16)


@dataclass(frozen=True)
class SoupsSettings:
    """One chain: a world that half follows preferences, pairs along them, reward models, every method, duels."""

    dimensions: str = "toy"
    general: str = "pyrite.toy:story_quality()"
    added: str = "lively"
    """An option that comes later: what it takes to serve it too."""
    demos: int = 16_000
    follow: float = 0.6
    """How often a demonstration's prompt names an option of a dimension."""
    test_prompts: int = 40
    answers: int = 1
    """To each test prompt under each combination."""
    train_prompts: int = 128
    """Prompts with answers under every option and none, of which pairs are made."""
    candidates: int = 4
    """Answers to each of them."""
    general_prompts: int = 640
    """Prompts with two answers each, of which general pairs are made."""
    max_new_tokens: int = 64
    sft: Training = toy.SFT
    multitask: Training = _fast(1e-3, 2)
    reward: Training = _fast(5e-4, 2)
    dpo: Training = _fast(2e-3, 2)
    ppo: Training = Training(
        lr=3e-3, epochs=2, batch_size=32, lr_scheduler_type="constant()", micro_batch_tokens=1 << 16
    )
    lora: str = "lora(r=8, alpha=16.0)"
    beta: float = 0.1
    steps: int = 24
    """PPO steps of the policy of one option; the policy of all combinations gets as many for each of its options."""
    prompts_per_step: int = 64
    missing_eos: float = 3.0


SETTINGS = {"toy": SoupsSettings()}
METHODS = ("vb", "pp", "mt", "rlhf", "pmorl", "psoups", "psoups_factor", "psoups_dpo")  # see TOLD
UNTOLD = ("vb", "rlhf")  # these are not told what is preferred: one set of answers serves all combinations
SOUPS: dict[str, tuple[str, Literal["delta", "factor"]]] = {  # how policies of options are learned, and merged
    "psoups": ("ppo", "delta"),
    "psoups_factor": ("ppo", "factor"),
    "psoups_dpo": ("dpo", "delta"),
}
AFTER = ("vb", "pp", "pmorl", "psoups")  # who answers under an added option; only psoups learns something for it

# How the demonstrations follow an option that their prompt names; what several options change adds up.
FOLLOWED: dict[str, dict[str, Any]] = {
    "technical": {"technical": 0.25},
    "plain": {"technical": 0.02},
    "brief": {"sentences": (0.45, 0.4, 0.1, 0.05)},
    "detailed": {"sentences": (0.05, 0.25, 0.4, 0.3)},
    "kind": {"opening": 0.6, "closing": 0.5},
    "curt": {"opening": 0.2, "closing": 0.15},
    "lively": {"vivid": 0.35},
}
NEUTRAL = Shares(drift=0.0, technical=0.1)


# one chain


@dataclass(frozen=True)
class SoupsChain:
    """A chain and its settings, and what follows from them."""

    one: Chain
    settings: SoupsSettings

    @cached_property
    def dimensions(self) -> Dimensions:
        return Dimensions.load(self.settings.dimensions)

    @property
    def options(self) -> list[str]:
        """Those that are there from the start."""
        return [option.id for option in self.dimensions.options if not option.later]

    @property
    def combinations(self) -> list[str]:
        return ["+".join(ids) for ids in self.dimensions.combinations()]

    @property
    def added(self) -> list[str]:
        """The combinations that the added option brings."""
        option = self.settings.added
        return ["+".join(ids) for ids in self.dimensions.combinations([*self.options, option]) if option in ids]

    def model(self, name: str) -> str:
        return self.one.path(name, "model")

    def prompts(self, name: str) -> str:
        return self.one.path("world", f"{name}_prompts.parquet")


def chain(one: Chain, settings: SoupsSettings) -> None:
    """Run every stage of a chain."""
    place = SoupsChain(one, settings)
    start(place)
    _feedback(place)
    _policies(place)
    _answers(place, METHODS, place.combinations, "answers")
    _answers(place, AFTER, place.added, "answers after an addition")
    for stage, name, answered, general in (
        ("duels", "duels", "answers", None),
        ("duels in general", "duels_general", "answers", settings.general),
        ("duels after an addition", "duels_added", "answers after an addition", None),
    ):
        files = tuple(f"{method}={file}" for method, some in _files(one.runs, answered).items() for file in some)
        one.run(stage, duel.Config(files, Path(name), dimensions=settings.dimensions, general=general))


def start(place: SoupsChain) -> None:
    """The world, and a policy that has learned its demonstrations: it reads preferences and half follows them."""
    one, settings = place.one, place.settings
    words = sorted({word for option in place.dimensions.options for word in option.sentence.split()})
    seed = derive(one.seed, "world")
    world = toy.write(one.path("world"), seed=seed, n_demos=1, n_pool=settings.test_prompts, words=words)
    taught = one.path("demos.parquet")
    if not Path(taught).exists():
        known = [str(row["prompt"]) for row in data.load(world.pair_prompts, "prompts")]
        data.write(demos(settings.demos, known, place.dimensions, follow=settings.follow, seed=one.seed), taught)
    one.run("sft", sft.Config(str(world.model), taught, Path("sft"), training=settings.sft))


def demos(n: int, raw: Sequence[str], dimensions: Dimensions, *, follow: float, seed: int) -> list[data.Row]:
    """Demonstrations whose prompts name an option of each dimension with probability `follow`, and that lean to it."""
    rng = np.random.default_rng(derive(seed, "demos"))
    sides = [[o for o in dimensions.options if o.dimension == name] for name in dimensions.names]
    rows = []
    for _ in range(n):
        prompt = raw[int(rng.random() * len(raw))]
        options = [side[int(rng.random() * len(side))] for side in sides if rng.random() < follow]
        row = conditioned({"prompt_id": data.prompt_id(prompt), "prompt": prompt}, options)
        rows.append(row | {"response": toy.answer(rng, prompt, shares=_leaning(options))})
    return rows


def _leaning(options: Sequence[Option]) -> Shares:
    """How answers under these options are written."""
    return replace(NEUTRAL, **{name: value for option in options for name, value in FOLLOWED[option.id].items()})


def _feedback(place: SoupsChain) -> None:
    """Answers, pairs and a reward model: along every option, and in general."""
    one, settings, options = place.one, place.settings, tuple(place.options)
    for told, wanted, prompts, k in (
        ("", (*options, "neutral"), settings.train_prompts, settings.candidates),
        (" in general", ("neutral",), settings.general_prompts, 2),
    ):
        name = told.replace(" ", "_")
        drawn = generate.Config(
            model=place.model("sft"),
            prompts=place.prompts("pair"),
            limit=prompts,
            k=k,
            max_new_tokens=settings.max_new_tokens,
            variants=Variants(settings.dimensions, wanted),
            out=Path(f"rollouts{name}"),
        )
        one.run(f"rollouts{told}", drawn)
        judged = pairs.Config(one.path(f"rollouts{name}", "candidates.parquet"), Path(f"pairs{name}"))
        if told:
            judged = replace(judged, general=settings.general)
        else:
            kinds = ("labelled", "positive_vs_negative")
            judged = replace(judged, dimensions=settings.dimensions, options=options, kinds=kinds)
        one.run(f"pairs{told}", judged, f"pairs{told}")
        learned = reward.Config(
            model=place.model("sft"),
            data=one.path(f"pairs{name}", "pairs.parquet"),
            held_out=one.path(f"pairs{name}", "held_out.parquet"),
            head_std=0.1,
            training=settings.reward,
            out=Path(f"reward{name}"),
        )
        one.run(f"reward model{told}", learned, "reward", told)


def _policies(place: SoupsChain) -> None:
    """What the methods train. P-MORL gets as many steps as all policies of the soups together."""
    one, settings, options = place.one, place.settings, place.options
    demos = one.path("pairs", "demos.parquet")
    tuned = sft.Config(place.model("sft"), demos, Path("mt"), lora=settings.lora, training=settings.multitask)
    one.run("multitask", tuned)
    trained: dict[str, Any] = {
        f"ppo: {option}": _ppo(place, f"ppo_{option}", [option]) for option in (*options, settings.added)
    }
    general = replace(_ppo(place, "rlhf", ()), reward=(one.path("reward_in_general"),), variants=Variants())
    every = replace(_ppo(place, "pmorl", place.combinations), steps=settings.steps * len(options))
    for option in options:
        mine = one.folder / f"pairs_{option}"
        for name in ("pairs", "held_out"):
            if not (mine / f"{name}.parquet").exists():
                rows = data.load(one.path("pairs", f"{name}.parquet"), "pairs")
                data.write([row for row in rows if row["preferences"] == [option]], mine / f"{name}.parquet")
        trained[f"dpo: {option}"] = dpo.Config(
            place.model("sft"),
            str(mine / "pairs.parquet"),
            Path(f"dpo_{option}"),
            held_out=str(mine / "held_out.parquet"),
            lora=settings.lora,
            training=settings.dpo,
        )
    for stage, config in {"rlhf": general, "pmorl": every, **trained}.items():
        one.run(stage, config, "policies")  # one seed for all: adapters that start alike average well


def _ppo(place: SoupsChain, name: str, wanted: Sequence[str]) -> ppo.Config:
    """A policy trained by PPO on prompts under these preferences, rewarded by the model of all options."""
    settings = place.settings
    return ppo.Config(
        model=place.model("sft"),
        prompts=place.prompts("pair"),
        reward=(place.one.path("reward"),),
        variants=Variants(settings.dimensions, tuple(wanted)),
        lora=settings.lora,
        beta=settings.beta,
        steps=settings.steps,
        prompts_per_step=settings.prompts_per_step,
        missing_eos_penalty=settings.missing_eos,
        measure_every=settings.steps,
        evaluation=Evaluation(
            eval_prompts=place.prompts("pool"),
            eval_limit=settings.test_prompts,
            max_new_tokens=settings.max_new_tokens,
        ),
        training=settings.ppo,
        out=Path(name),
    )


def _answers(place: SoupsChain, methods: Sequence[str], combinations: Sequence[str], stage: str) -> None:
    """Answers of methods to the test prompts under combinations, with the same random streams; a soup for each."""
    models = {"vb": "sft", "pp": "sft", "mt": "mt", "rlhf": "rlhf", "pmorl": "pmorl"}
    after = "" if stage == "answers" else f"_after_{place.settings.added}"

    def answered(told: str, name: str, model: str, wanted: Sequence[str]) -> None:
        config = generate.Config(
            model=place.model(model),
            prompts=place.prompts("pool"),
            k=place.settings.answers,
            max_new_tokens=place.settings.max_new_tokens,
            variants=Variants(place.settings.dimensions, tuple(wanted)),
            out=Path("answers", f"{name}{after}"),
        )
        place.one.run(f"{stage}: {told}", config, "answers")

    for method in methods:
        if method in models:
            answered(method, method, models[method], ["neutral"] if method in UNTOLD else combinations)
            continue
        learned, mode = SOUPS[method]
        for combination in combinations:
            name = f"{method}_{combination}"
            policies = tuple(place.model(f"{learned}_{option}") for option in combination.split("+"))
            place.one.run(f"soup: {name}", soup.Config(policies, Path(name), mode=mode))
            answered(f"{method}, {combination}", name, name, [combination])


def _files(found: Mapping[str, Run], stage: str = "answers") -> dict[str, list[Path]]:
    """The answers of each method, among the runs of a chain."""
    files: dict[str, list[Path]] = {}
    for name, run in found.items():
        if name.startswith(f"{stage}: "):
            method = name.removeprefix(f"{stage}: ").split(",")[0]
            files.setdefault(method, []).append(run.folder / "candidates.parquet")
    return files


# what is measured

STAGES = {"duels": "duels", "added": "duels after an addition", "general": "duels in general"}
KEYS = {  # of the tables of the job duel
    "matrix": ("first", "second"),
    "by_combination": ("first", "second", "combination"),
    "by_criterion": ("first", "second", "option"),
    "averages": ("method",),
    "scores": ("method", "combination", "option", "by"),
    "pareto": ("method",),
}


def collect(chains: Sequence[Chain], settings: SoupsSettings) -> Row:
    """Everything the page shows."""
    fought = [{name: one.results(stage) for name, stage in STAGES.items()} for one in chains]
    kl = [row for one in chains for row in divergence(one.folder / "sft" / "model", _files(one.runs))]
    trained = [
        {"policy": name, **one.results(name)["last"]}
        for one in chains
        for name in one.runs
        if name in ("rlhf", "pmorl") or name.startswith("ppo: ")
    ]
    return {
        **{name: together([duels[name] for duels in fought]) for name in STAGES},
        "kl": study.over_chains(kl, ("method",), ("kl",)),
        "costs": costs(settings),
        "claims": study.check(CLAIMS, fought),
        "reward_models": [row for one in chains for row in _accuracies(one)],
        "policies": study.over_chains(trained, ("policy",), ("score", "kl_k1", "length", "missing_eos")),
        "samples": _samples(chains[0]),
    }


def together(duels: Sequence[Mapping[str, Any]]) -> Row:
    """The duels of several chains as those of one: means with intervals over chains. Those of one stay as they are."""
    tables: Row = {name: duels[0][name] for name in KEYS}
    if len(duels) > 1:
        for name, keys in KEYS.items():
            rows = [row for chain in duels for row in chain[name]]
            columns = [c for c in rows[0] if c not in keys and not c.endswith(("_lo", "_hi"))] if rows else []
            tables[name] = study.over_chains(rows, keys, columns)
    over = "chains" if len(duels) > 1 else "prompts"
    return {"methods": duels[0]["methods"], "calls": sum(chain["calls"] for chain in duels), "over": over, **tables}


def divergence(base: Path, files: Mapping[str, Sequence[Path]]) -> list[Row]:
    """KL from the start (k1, nats) of each method's answers: the start reads their texts under the same prompts.

    A special token in the middle of an answer, as an untrained policy may draw, is not in its text.
    """
    start, found = Policy.load(str(base)), []
    for method, mine in files.items():
        rows = [row for file in mine for row in data.load(file, "candidates")]
        said, done = ([row[name] for row in rows] for name in ("response", "finished"))
        read = encode(start.tokenizer, Responses.said(rows, said, finished=done), as_drawn=True)
        theirs = token_logps(start, read, singles(read)).sum.tolist()
        ratios = torch.tensor([row["logp"] - logp for row, logp in zip(rows, theirs, strict=True)], dtype=torch.float64)
        error = (ratios.std() / len(ratios) ** 0.5).item()
        found.append({"method": method, "kl": ratios.mean().item(), "kl_se": error})
    return found


def costs(settings: SoupsSettings) -> list[Row]:
    """What has to be trained for all combinations, and for one more option: policies, and answers drawn to learn from.

    P-MORL gets as many answers for each option as the soups' policies do; for one more option it is trained again.
    """
    place = SoupsChain(Chain(0, Path()), settings)
    options, each = len(place.options), settings.steps * settings.prompts_per_step
    more = {"policies_more": 1, "combinations_more": len(place.combinations) + len(place.added)}
    both = {"combinations": len(place.combinations), "answers": each * options, **more}
    return [
        {"method": "psoups", "policies": options, **both, "answers_more": each},
        {"method": "pmorl", "policies": 1, **both, "answers_more": each * (options + 1)},
    ]


def _accuracies(chain: Chain) -> list[Row]:
    return [
        {"seed": chain.seed, "kind": name, **{k: member[k] for k in ("accuracy", "accuracy_lo", "accuracy_hi")}}
        for name in ("reward model", "reward model in general")
        for member in chain.results(name)["members"]
    ]


def _samples(chain: Chain) -> list[Row]:
    """Answers of some methods to the first prompts under two opposite combinations."""
    rows = []
    for method, combination in itertools.product(("pp", "pmorl", "psoups"), (PAIRS[0], PAIRS[1])):
        told = "+".join(combination)
        run = chain.runs.get(f"answers: {method}") or chain.runs[f"answers: {method}, {told}"]
        given = data.load(run.folder / "candidates.parquet", "candidates")
        mine = [row for row in given if row["preferences"] == list(combination)][:3]
        place = {"method": method, "combination": told}
        rows += [{**place, "prompt": row["asked"], "response": row["response"]} for row in mine]
    return rows


# claims

# About the duels of a chain, {"duels": all combinations, "added": those of the added option, "general": ...}.

SOURCE = "arXiv:2310.11564"
CLAIMED = """
psoups-best | table 3 | Personalized soups have the highest average win rate of the published methods (published 55.23
    %)
pmorl-best | table 4 (people) | P-MORL has the highest average win rate of the published methods (published 58.70 %)
psoups-over-vb | table 3 | {soups} the policy as it is {rate}
psoups-over-rlhf | table 3 | {soups} RLHF on a general reward {rate}
psoups-over-pp | table 3 | {soups} prompting {rate}
psoups-over-mt | table 3 | {soups} multitask tuning {rate}
psoups-over-pmorl | table 3 | {soups} P-MORL {rate}
pmorl-over-vb | table 3 | {pmorl} the policy as it is {rate}
pmorl-over-rlhf | table 3 | {pmorl} RLHF on a general reward {rate}
pmorl-over-pp | table 3 | {pmorl} prompting {rate}
pmorl-over-mt | table 3 | {pmorl} multitask tuning {rate}
psoups-over-pmorl-added | section 4.4 | With an option added later soups win against P-MORL, here not trained again
    (published 59.06 %)
no-free-lunch | section 5 | In general quality RLHF on a general reward wins against personalized soups
psoups-over-psoups-factor | not in | {soups} soups of averaged factors {rate}
psoups-over-psoups-dpo | not in | {soups} soups of DPO policies {rate}
"""
WORDS = {
    "soups": "Over all combinations personalized soups win against",
    "pmorl": "Over all combinations P-MORL wins against",
    "rate": "(win rate less one half)",
}
PUBLISHED = ("vb", "rlhf", "pp", "mt", "pmorl", "psoups")
PAIRS = (("technical", "brief", "curt"), ("plain", "detailed", "kind"))


def _halves(duels: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Win rates, ties one half, by both methods."""
    return {(row["first"], row["second"]): row["half"] for row in duels["matrix"]}


def ahead(first: str, second: str, duels: Mapping[str, Any]) -> float:
    """Win rate of one method against another, less one half."""
    return _halves(duels)[first, second] - 0.5


def _ahead(first: str, second: str) -> study.Value:
    return lambda chain: ahead(first, second, chain["duels"])


def best(method: str, duels: Mapping[str, Any]) -> float:
    """Average win rate among the published methods, less that of the best other one."""
    rates = _halves(duels)
    means = {m: sum(rates[m, o] for o in PUBLISHED if o != m) / (len(PUBLISHED) - 1) for m in PUBLISHED}
    return means[method] - max(value for name, value in means.items() if name != method)


CLAIMS = study.claims(
    SOURCE,
    CLAIMED.format(**WORDS),
    {
        f"{first}-over-{second}".replace("_", "-"): _ahead(first, second)
        for first in ("psoups", "pmorl")
        for second in METHODS
    }
    | {
        "psoups-best": lambda chain: best("psoups", chain["duels"]),
        "pmorl-best": lambda chain: best("pmorl", chain["duels"]),
        "psoups-over-pmorl-added": lambda chain: ahead("psoups", "pmorl", chain["added"]),
        "no-free-lunch": lambda chain: ahead("rlhf", "psoups", chain["general"]),
    },
)


# the page

NOTE = "Intervals are over chains; with one chain nothing is decided."
LEAD = (
    "Three ways in which an answer can be wanted, two options each, eight combinations. Personalized soups train one "
    "small adapter for each option and average three of them for each combination; P-MORL trains one policy on all "
    "combinations; the other methods are what there was before. An exact measure of each option is the judge: a method "
    "wins a prompt under a combination if it is better in more of its options than the other."
)
TOLD = (
    "**vb** is the policy as it is, asked without preferences; **pp** is asked with them; **mt** is tuned on chosen "
    "answers of every option; **rlhf** learned a general reward by PPO; **pmorl** learned every combination, rewarded "
    "for each of its options; **psoups** averages policies of single options, learned by PPO, exactly; "
    "**psoups_factor** averages the two factors of their adapters apart, as published; **psoups_dpo** averages "
    "policies learned by DPO from the pairs of an option."
)
UNITS = (
    "A unit is one prompt under one combination of preferences, the same for both methods. The judge says for each "
    "option which answer is better; the unit goes to the method that wins more options. **Ties one half** counts a tie "
    "for half a win to each, **without ties** leaves it out; a unit with a missing verdict is dropped and counted. "
    "{calls} questions were put to the judge."
)
FRONT = (
    "Mean scores over the combinations that ask for an option. Filled: no other method is at least as good in all "
    "objectives, not only in these two, and better in one."
)
LATER = (
    "One more option comes later. Soups train one more policy, and serve its combinations with the policies they "
    "have; P-MORL, not trained again, is told the option in the prompt like the policy it started from."
)


def figures(results: Row) -> dict[str, Chart]:
    """The charts worth a file of their own."""
    drawn: dict[str, Chart] = {"win_rates": matrix_chart(results["duels"]["matrix"])}
    for x, y in (("technical", "brief"), ("detailed", "kind"), ("plain", "curt")):
        drawn[f"pareto_{x}_{y}"] = pareto_chart(results["duels"]["pareto"], x, y)
    return drawn


def story(results: Row) -> tuple[str, str, list[Part]]:
    """Title, lead and sections."""
    averages = sorted(results["duels"]["averages"], key=lambda row: -row["half"])
    title = f"{averages[0]['method']} wins most: {percent(averages[0]['half'])} on average over its opponents."
    rates = [(row["method"], percent(row["half"])) for row in averages]
    samples = [(row["method"], row["combination"], str(row["prompt"]), row["response"]) for row in results["samples"]]
    parts: list[Part] = [
        numbers([("Average win rate, ties one half", rates)]),
        text(TOLD),
        table(
            ("method", "KL from the start, nats"),
            [(row["method"], banded(row, "kl")) for row in results["kl"]],
            "The mean log-ratio (k1) of the judged answers to the policy that all methods start from, under the same "
            "prompts, with its 95 % interval over chains; of one chain, over answers.",
        ),
        *duel_sections(results["duels"]),
        text(LATER, title="An option added later"),
        figure(matrix_chart(results["added"]["matrix"]), "Win rates over the combinations it adds."),
        _costs(results["costs"]),
        text("The same answers, judged by general quality alone, whatever was preferred.", title="In general"),
        figure(matrix_chart(results["general"]["matrix"]), "Win rates in general quality."),
        *_trained(results),
        table(("method", "combination", "prompt", "answer"), samples, "", "Read the answers"),
    ]
    return title, LEAD, parts


def _costs(rows: Sequence[Row]) -> Part:
    columns = {
        "combinations": "combinations",
        "policies": "policies",
        "answers": "answers drawn",
        "combinations_more": "combinations with one more option",
        "policies_more": "policies to train for it",
        "answers_more": "answers for it",
    }
    cells = [(row["method"], *(f"{row[name]:,}" for name in columns)) for row in rows]
    caption = "P-MORL draws as many answers for each option as the soups' policies, and is trained again for one more."
    return table(("method", *columns.values()), cells, caption, "What it costs")


def _trained(results: Row) -> list[Part]:
    """Reward models and the policies of PPO."""
    models = [(row["seed"], row["kind"], banded(row, "accuracy", percent)) for row in results["reward_models"]]
    policies = [
        (row["policy"], *(banded(row, name) for name in ("score", "kl_k1", "length")), percent(row["missing_eos"]))
        for row in results["policies"]
    ]
    caption = "At their ends, on test prompts; the reward is that of the last batch, in standard deviations."
    return [
        table(("seed", "model", "accuracy"), models, "On held-out pairs, with 95 % intervals.", "The reward models"),
        table(("policy", "reward", "KL, nats", "tokens", "cut"), policies, caption, "The policies"),
    ]


def duel_sections(duels: Row) -> list[Part]:
    """Who wins, under which combination and by which option; what each option costs another; scores."""
    over = duels["over"]
    once = [row for i, row in enumerate(duels["matrix"]) if not _met(row, duels["matrix"][:i])]
    counts = ("wins", "losses", "ties", "missing")
    cells = [
        (
            *(row[name] for name in ("first", "second", *counts)),
            *(banded(row, r, percent) for r in ("half", "without")),
        )
        for row in once
        if row.get("without") is not None
    ]
    columns = ("method", "against", "won", "lost", "tied", "missing", "ties one half", "without ties")
    matrix = f"Win rate of the method on the left against the one below, ties one half; 95 % intervals over {over}."
    return [
        text(UNITS.format(calls=number(duels["calls"])), title="Who wins"),
        figure(matrix_chart(duels["matrix"]), matrix),
        table(columns, cells, f"Every two methods, by both tie rules, with 95 % intervals over {over}."),
        _apiece(duels["by_combination"], "combination", "Win rates under one combination, ties one half."),
        _apiece(duels["by_criterion"], "option", "Win rates by the verdicts on one option alone, ties one half."),
        _fronts(duels),
        _scores(duels["scores"], over),
    ]


def _met(row: Row, before: Sequence[Row]) -> bool:
    """Whether two methods have met before, the other way round."""
    return any((row["second"], row["first"]) == (other["first"], other["second"]) for other in before)


def _apiece(rows: Sequence[Row], by: str, caption: str) -> Part:
    """A matrix for each combination or option."""
    return tabs((by,), {key: figure(matrix_chart(some), caption) for key, some in study.grouped(rows, by).items()})


def _fronts(duels: Row) -> Part:
    """Every two options that some combination has together."""
    options = [name for name in duels["pareto"][0] if name in FOLLOWED]
    together = [set(combination.split("+")) for combination in {row["combination"] for row in duels["scores"]}]
    views: dict[tuple[str, ...], Part] = {
        (f"{x} and {y}",): figure(pareto_chart(duels["pareto"], x, y), FRONT)
        for x, y in itertools.combinations(options, 2)
        if any({x, y} <= ids for ids in together)
    }
    return tabs(("objectives",), views, title="What each option costs another")


def _scores(rows: Sequence[Row], over: str) -> Part:
    """Mean scores of methods by option, one table a combination."""
    views: dict[tuple[str, ...], Part] = {}
    for key, some in study.grouped(rows, "combination").items():
        columns = list(dict.fromkeys(row["option"] for row in some))
        found = {(row["method"], row["option"]): f"{number(row['mean'])} ± {number(row['se'])}" for row in some}
        cells = [(name, *(found.get((name, o)) for o in columns)) for name in dict.fromkeys(r["method"] for r in some)]
        views[key] = table(("method", *columns), cells, f"Mean over {over} and standard error over prompts.")
    return tabs(("combination",), views, title="Scores by option")


def matrix_chart(rows: Sequence[Row]) -> alt.LayerChart:
    """Win rates of the method of a row against the one of a column, the number and its interval in each cell.

    rows: {first, second, half, half_lo, half_hi} in any order; blue above 50 %, orange below, told apart by every kind
    of color vision. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("matrix_chart: there is no duel to draw")
    methods = list(dict.fromkeys(row["first"] for row in rows))
    cells = []
    for row in (row for row in rows if row["half"] is not None):
        value, low, high = row["half"], row.get("half_lo"), row.get("half_hi")
        band = "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f}"
        cell = {"first": row["first"], "second": row["second"], "value": value, "shown": f"{100 * value:.0f} %"}
        cells.append({**cell, "band": band, "ink": "#ffffff" if abs(value - 0.5) > 0.38 else INK})
    names = alt.Axis(labelAngle=0, labelOverlap=False, labelExpr="split(datum.label, '_')")  # in several lines
    across = alt.X("second:N", title="against", sort=methods, axis=names)
    up = alt.Y("first:N", title=None, sort=methods, axis=alt.Axis(labelColor=INK, labelLimit=220, grid=False))
    # fixed ends, so that matrices can be compared
    scale = alt.Scale(domain=[0, 0.5, 1], range=[ORANGE, "#f4f2ee", BLUE], interpolate="rgb", clamp=True)
    block = charts.table("cells", alt.MarkDef("rect", stroke="#ffffff", strokeWidth=2))
    block = block.encode(alt.Color("value:Q", scale=scale, legend=None))
    color = alt.Color("ink:N", scale=None)
    told = charts.table("cells", alt.MarkDef("text", fontSize=14, fontWeight=600, dy=-6)).encode(
        alt.Text("shown:N"), color
    )
    bands = charts.table("cells", alt.MarkDef("text", fontSize=10, dy=11)).encode(alt.Text("band:N"), color)
    chart = alt.layer(block, told, bands).encode(across, up).resolve_scale(color="independent")
    words = " ".join(f"{cell['first']} against {cell['second']}: {cell['shown']}." for cell in cells)
    return styled(chart, {"cells": cells}, words, height=52 * len(methods))


def pareto_chart(rows: Sequence[Row], x: str, y: str) -> alt.LayerChart:
    """Methods by their mean score in two objectives; filled if no method is at least as good in all objectives.

    rows: {method, front, and a mean for each objective}. Raises ValueError if no row has both objectives.
    """
    some = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not some:
        raise ValueError(f"pareto_chart: no row has both {x} and {y}")
    left, right = span([{"value": row[x]} for row in some])
    low, high = span([{"value": row[y]} for row in some])
    points: list[Row] = []
    for row in sorted(some, key=lambda row: row[y]):  # labels of points near each other, left to right, are moved up
        near = [point["place"] for point in points if abs(point["x"] - row[x]) < 0.2 * (right - left)]
        place = max([row[y], *(other + 12 * (high - low) / 300 for other in near)])
        front = row["front"] > 0.5  # in most chains
        color, standing = (GREEN, "on the front") if front else (FAINT, "dominated")
        point = {"method": row["method"], "x": row[x], "y": row[y], "across": number(row[x]), "up": number(row[y])}
        points.append(
            {**point, "place": place, "color": color, "fill": color if front else "#ffffff", "standing": standing}
        )
    right += 0.25 * (right - left)  # room for the labels
    across = alt.X("x:Q", title=x, scale=alt.Scale(domain=[left, right], nice=False, zero=False))
    up = alt.Scale(domain=[low, high], nice=False, zero=False)
    names = {"method": "method", "across": x, "up": y, "standing": "over all objectives"}
    shown = [alt.Tooltip(f"{name}:N", title=title) for name, title in names.items()]
    stroke, fill = alt.Stroke("color:N", scale=None), alt.Fill("fill:N", scale=None)
    dots = charts.table("points", alt.MarkDef("point", filled=True, size=110, opacity=1, strokeWidth=2))
    dots = dots.encode(alt.Y("y:Q", title=y, scale=up), fill, stroke, tooltip=shown)
    labels = charts.table("points", alt.MarkDef("text", align="left", dx=10, fontSize=12, fontWeight=600))
    labels = labels.encode(alt.Y("place:Q"), alt.Text("method:N"), alt.Color("color:N", scale=None))
    told = " ".join(f"{p['method']}: {x} {p['across']}, {y} {p['up']}, {p['standing']}." for p in points)
    return styled(alt.layer(dots, labels).encode(across), {"points": points}, told, height=300)


RECIPE = study.Recipe("soups", SETTINGS, chain, collect, story, figures, note=NOTE)
