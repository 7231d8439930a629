"""Samplers of preference pairs: raced in an exact world, and in rounds of a language model (arXiv:2409.19605).

Orders, bounds and floors where the optimum is known; then offline, on-policy, hybrid and mixed pairs at equal cost,
measured by the scorer that labels them and by a gold that does not.

Source: Shi et al. 2024, "The crucial role of samplers in online direct preference optimization". Of the language
models' results only what the abstracts say (the current one, and the first version's) is claimed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.jobs import bandit, evaluate, generate, label, online, reward, sft
from pyrite.math import statistics
from pyrite.math.seeds import derive
from pyrite.recipes import study, toy
from pyrite.recipes.study import Chain, Claim, Row, within
from pyrite.report.bandit import READING, bounds, convergence, floors, orders
from pyrite.report.charts import BLUE, BRASS, GREEN, ORANGE, PURPLE, Axis, Chart, curves
from pyrite.report.page import Part, banded, figure, number, numbers, percent, table, text
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training

CAPPED = "mix_p(cap='range')"  # what sampled pairs can be drawn from: no pair weighs without bound
SHARED = ("mix_r(share=1.0)", "mix_r(share=0.5)", "mix_p(share=1.0)", "mix_p(share=0.5)")
THEORY = ("uniform", "mix_r", "mix_p")
DRAWN = {"rate": "best", "scale": 0.1, "instances": 40}
RACES: dict[str, dict[str, Any]] = {  # options of the job bandit
    "orders": {},
    "bounds": {"rewards": "unit", "steps": 8},
    "best": {"samplers": (*THEORY, *SHARED), "rate": "best"},
    "fixed": {"rate": "10.0"},  # what the authors' code uses for every sampler
    **{f"floor {n}": {"samplers": ("uniform", CAPPED), "samples": n, "steps": 120, **DRAWN} for n in (512, 2048, 8192)},
    "sooner": {"samplers": ("uniform", "mix_r", CAPPED), "samples": 8192, "steps": 20, **DRAWN},
}
METHODS = {  # how the pairs of a round are drawn
    "offline": "reference()",
    "on_policy": "on_policy()",
    "hybrid": "hybrid()",
    "mixed": "mixed(kappa=0.5)",
    "mixed_in_part": "mixed(kappa=0.5, on_policy=0.3)",
}


@dataclass(frozen=True)
class SamplersSettings:
    """Races in the exact world; and one chain: a policy, a scorer that stands in for gold, rounds of every method."""

    gold: str = "pyrite.toy:story_quality()"
    """The held-out gold: it labels the scorer's training pairs and measures, and labels no pair of the rounds."""
    races: dict[str, dict[str, Any]] = field(default_factory=lambda: RACES)
    repetitions: int = 5
    """Of every race; intervals are over them."""
    toy_demos: int = 24_000
    sft: Training = toy.SFT
    scorer_answers: int = 4
    """Answers to each prompt from which the scorer's training pairs are made."""
    scorer: Training = Training(
        lr=5e-4, epochs=2, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16
    )
    margin: float = 4.0
    """Log-odds of a label for one standard deviation of the scorer; as published for Safe-RLHF."""
    methods: dict[str, str] = field(default_factory=lambda: METHODS)
    loss: str = "soft_dpo(beta=0.1)"
    rounds: int = 3
    prompts_per_round: int | None = None
    """The next ones in every round; all by default."""
    online: Training = Training(
        lr=3e-4, epochs=2, batch_size=32, lr_scheduler_type="cosine(warmup_steps=5)", micro_batch_tokens=1 << 16
    )
    round_answers: int = 2
    """Answers to each held-out prompt after every round."""
    answer_prompts: int = 128
    answers: int = 4
    """Answers to each held-out prompt at the end."""
    max_new_tokens: int = 64


SETTINGS = {"toy": SamplersSettings()}


def races(all_chains: Chain, settings: SamplersSettings) -> None:
    """Run every race of the exact world; races whose options agree have the same reward tables."""
    for name, options in settings.races.items():
        out = Path("races", name.replace(" ", "_"))
        all_chains.run(f"race: {name}", bandit.Config(out, seeds=settings.repetitions, **options), "rewards")


def chain(one: Chain, settings: SamplersSettings) -> None:
    """Run every stage of a chain. Prompts, streams and order are the same for all methods: only the arms differ."""
    world = toy.write(
        one.path("world"), seed=derive(one.seed, "world"), n_pool=settings.answer_prompts, n_demos=settings.toy_demos
    )
    start, asked, held_out = one.path("sft", "model"), str(world.pair_prompts), str(world.pool_prompts)
    scorer = one.path("scorer")

    def evaluated(name: str, folder: str) -> None:
        config = evaluate.Config(
            model=one.path(folder, "model"),
            prompts=held_out,
            gold=settings.gold,
            proxy=scorer,
            ref=start,
            k=settings.answers,
            max_new_tokens=settings.max_new_tokens,
            out=Path(f"evaluate_{folder}"),
        )
        one.run(f"evaluate: {name}", config, "evaluate")

    one.run("sft", sft.Config(str(world.model), str(world.demos), Path("sft"), training=settings.sft))
    k, most = settings.scorer_answers, settings.max_new_tokens
    one.run("answers", generate.Config(start, asked, Path("answers"), k=k, max_new_tokens=most), "pairs")
    candidates = one.path("answers", "candidates.parquet")
    one.run("pairs", label.Config(candidates, Path("pairs"), gold=settings.gold), "labels")
    pairs, held_out_pairs = (one.path("pairs", f"{name}.parquet") for name in ("pairs", "held_out"))
    one.run("scorer", reward.Config(start, pairs, Path("scorer"), held_out=held_out_pairs, training=settings.scorer))
    evaluated("start", "sft")
    labels = f"reward_model(path={one.path('scorer', 'member_0')!r})"
    for method, sampler in settings.methods.items():
        config = online.Config(
            model=start,
            prompts=asked,
            judge=f"bradley_terry(gold={labels!r}, scale={1 / settings.margin!r})",
            sampler=sampler,
            loss=settings.loss,
            rounds=settings.rounds,
            prompts_per_round=settings.prompts_per_round,
            pairing="consecutive",
            training=settings.online,
            evaluation=Evaluation(
                eval_prompts=held_out,
                gold=settings.gold,
                proxy=scorer,
                eval_limit=None,
                eval_k=settings.round_answers,
                max_new_tokens=settings.max_new_tokens,
            ),
            out=Path(method),
        )
        one.run(f"rounds: {method}", config, "rounds")
        evaluated(method, method)


# what is measured

NUMBERS = ("gold", "proxy", "kl", "length", "missing_eos", "win_rate", "agreement", "loss")
ENDS = ("gold", "proxy", "kl_exact", "length", "missing_eos")


def collect(chains: Sequence[Chain], settings: SamplersSettings, raced: Chain) -> Row:
    """Everything the page shows."""
    rounds = {(chain.seed, method): of_rounds(chain, method) for chain in chains for method in settings.methods}
    exact = {
        name.removeprefix("race: "): runs.read_json(run.folder / "results.json") for name, run in raced.runs.items()
    }
    every = ["start", *settings.methods]
    ends = {(chain.seed, name): _end(chain, name) for chain in chains for name in every}
    models = [
        {
            "end": {method: ends[chain.seed, method] for method in settings.methods},
            "rounds": {method: _columns(rounds[chain.seed, method]) for method in settings.methods},
        }
        for chain in chains
    ]
    given = [budget(chain, settings) for chain in chains]
    return {
        "races": exact,
        "budget": given[0],
        "curves": study.over_chains([row for some in rounds.values() for row in some], ("method", "round"), NUMBERS),
        "ends": [{"method": name, **_means([ends[chain.seed, name] for chain in chains])} for name in every],
        "scorer": [_accuracy(chain) for chain in chains],
        "claims": check(exact, models),
        "samples": study.first_answers(
            {name: chains[0].runs[f"evaluate: {name}"] for name in every}, ("gold", "proxy"), prompts=4
        ),
    }


def budget(chain: Chain, settings: SamplersSettings) -> Row:
    """What every method was given. Raises ValueError if one had more than another."""
    given = {}
    for method in settings.methods:
        rows = runs.read_metrics(chain.runs[f"rounds: {method}"].folder)[1:]
        couples = sum(row["pairs"] + row["ties"] + row["no_verdict"] for row in rows)
        given[method] = {"answers": rows[-1]["answers"], "couples": couples, "labels": rows[-1]["labels"]}
    for name in ("answers", "couples"):
        if len({row[name] for row in given.values()}) > 1:
            told = ", ".join(f"{method} {row[name]}" for method, row in given.items())
            raise ValueError(f"seed {chain.seed}: methods differ in {name} ({told}); their rewards do not compare")
    labels = {method: row["labels"] for method, row in given.items()}  # two equal answers need none
    return {**next(iter(given.values())), "labels": labels, "rounds": settings.rounds}


def of_rounds(chain: Chain, method: str) -> list[Row]:
    """A row for the start and each round of a method."""
    found = []
    for row in runs.read_metrics(chain.runs[f"rounds: {method}"].folder):
        row = {**row, "kl": row["kl_k1"], "kl_se": row["kl_k1_se"]}
        errors = [f"{name}_se" for name in ("gold", "proxy", "kl")]
        kept = {name: row[name] for name in (*NUMBERS, *errors) if name in row}
        found.append({"seed": chain.seed, "method": method, "round": row["step"], **kept})
    return found


def _columns(rows: Sequence[Row]) -> dict[str, Tensor]:
    """(rounds+1,) means by round."""
    return {name: torch.tensor([row[name] for row in rows]).double() for name in ("gold", "proxy", "kl")}


def _end(chain: Chain, method: str) -> dict[str, Tensor]:
    """The last policy of a method: (Q,) means by held-out prompt, and how often its answers beat the start's."""
    mine, start = (study.by_prompt(chain.runs[f"evaluate: {name}"], ENDS) for name in (method, "start"))
    found = {name.removesuffix("_exact"): grid.mean(1) for name, grid in mine.items()}
    for name in ("gold", "proxy"):
        found[f"win_{name}"] = statistics.wins(mine[name][:, :, None], start[name][:, None, :]).mean((1, 2))
    return found


def _means(chains: Sequence[Mapping[str, Tensor]]) -> Row:
    """Means of every column, with intervals."""
    row: Row = {}
    for name in chains[0]:
        ends = study.over_prompts([chain[name] for chain in chains])
        row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), (end.item() for end in ends), strict=True))
    return row


def _accuracy(chain: Chain) -> Row:
    """How well the scorer that labels knows gold."""
    (member,) = chain.results("scorer")["members"]
    known = {name: member[name] for name in ("accuracy", "accuracy_lo", "accuracy_hi")}
    return {"seed": chain.seed, "pairs": chain.results("pairs")["pairs"], **known}


# claims
# About the exact world a claim is given one repetition of all races: race -> sampler -> figure -> number. About the
# language model it is given one chain: {"end": method -> gold, proxy, kl (Q,), "rounds": method -> the same by round}.

SOURCE = "arXiv:2409.19605"
Races = Mapping[str, Mapping[str, Mapping[str, float]]]
StepModel = Mapping[str, Mapping[str, Mapping[str, Tensor]]]

IN_EXACT_WORLD = """
order-uniform | theorems on exact DPO | DPO with uniform pairs converges linearly (order 1)
order-mix-r | theorems on exact DPO | DPO with mix_r converges quadratically (order 2)
order-mix-p | theorems on exact DPO | DPO with mix_p converges quadratically (order 2)
fewer-updates-mix-r | theorems and figure on exact DPO | mix_r needs fewer updates than uniform to an error of 1e-6,
    each at its best constant rate
fewer-updates-mix-p | theorems and figure on exact DPO | mix_p needs fewer updates than uniform to an error of 1e-6,
    each at its best constant rate
both-parts-mix-r | definition of the samplers | mix_r with the weights of the theory needs fewer updates to 1e-6 than
    its second pair of arms alone
both-parts-mix-p | definition of the samplers | mix_p with the weights of the theory needs fewer updates to 1e-6 than
    its second pair of arms alone
fixed-rate | figure on exact DPO: one learning rate, 10, for every sampler | At that one rate mix_p converges
    quadratically on a typical reward table too (order 2)
floor | empirical DPO: noise in the gradient ends convergence; the exponent is derived | With N sampled pairs an update,
    DPO stops at an error that falls as N^(-1/2) (exponent)
sooner-mix-r | figure on empirical DPO | With sampled pairs, mix_r has a smaller error than uniform after 20 updates at
    a tenth of the best rate
sooner-mix-p | figure on empirical DPO | With sampled pairs, mix_p with its cap has a smaller error than uniform after
    those updates
"""
OF_LANGUAGE_MODEL = """
mixed-over-offline-proxy | abstract: over 7.4 % above vanilla DPO on Safe-RLHF | At the last round mixed pairs have
    brought more reward than offline ones, by the scorer that labels
mixed-over-on-policy-proxy | abstract of the first version: 3.0 % above on-policy on Safe-RLHF | At the last round mixed
    pairs have brought more reward than on-policy ones, by the scorer that labels
mixed-over-hybrid-proxy | abstract of the first version: over 4.2 % above hybrid on Iterative-Prompt | At the last round
    mixed pairs have brought more reward than hybrid ones, by the scorer that labels
on-policy-over-offline-proxy | implied by the abstract of the first version | At the last round on-policy pairs have
    brought more reward than offline ones, by the scorer that labels
mixed-over-offline-gold | {other} | At the last round mixed pairs have brought more reward than offline ones, by
    held-out gold
mixed-over-on-policy-gold | {other} | At the last round mixed pairs have brought more reward than on-policy ones, by
    held-out gold
mixed-over-hybrid-gold | {other} | At the last round mixed pairs have brought more reward than hybrid ones, by held-out
    gold
on-policy-over-offline-gold | {other} | At the last round on-policy pairs have brought more reward than offline ones, by
    held-out gold
farther | figure of reward over KL | Mixed pairs lead farther from the start than offline ones (KL, nats)
equal-kl-offline | figure of reward over KL | At equal KL, where the shorter curve ends, mixed pairs bring more reward
    than offline ones, by that scorer
equal-kl-on-policy | figure of reward over KL | At equal KL, where the shorter curve ends, mixed pairs bring more reward
    than on-policy ones, by that scorer
""".replace("{other}", "not in, where the scorer that labels is also the one that measures")


def _order(race: str, sampler: str) -> Callable[[Races], float]:
    return lambda exact: exact[race][sampler]["order"]


def _sooner(first: str, second: str) -> Callable[[Races], float]:
    """How many updates more the second sampler needs to an error of 1e-6, each at its best constant rate."""
    return lambda exact: exact["best"][second]["steps_to_1e-06"] - exact["best"][first]["steps_to_1e-06"]


def _early(sampler: str) -> Callable[[Races], float]:
    return lambda exact: exact["sooner"]["uniform"]["mean_error"] - exact["sooner"][sampler]["mean_error"]


def _floor_slope(exact: Races) -> float:
    """d log error / d log N at the last update, from the fewest pairs to the most, mix_p with its cap."""
    errors = {int(name.split()[-1]): race[CAPPED]["mean_error"] for name, race in exact.items() if "floor" in name}
    return math.log(errors[max(errors)] / errors[min(errors)]) / math.log(max(errors) / min(errors))


def _at_equal_kl(second: str) -> Callable[[StepModel], float]:
    return lambda chain: study.at_equal_kl(chain["rounds"]["mixed"], chain["rounds"][second], "proxy")


def _ahead(first: str, second: str, name: str) -> Callable[[StepModel], Tensor]:
    return lambda chain: chain["end"][first][name] - chain["end"][second][name]


EXACT = study.claims(
    SOURCE,
    IN_EXACT_WORLD,
    {
        "order-uniform": (_order("orders", "uniform"), within(0.9, 1.1)),
        "order-mix-r": (_order("orders", "mix_r"), within(1.9, 2.1)),
        "order-mix-p": (_order("orders", "mix_p"), within(1.9, 2.1)),
        "fewer-updates-mix-r": _sooner("mix_r", "uniform"),
        "fewer-updates-mix-p": _sooner("mix_p", "uniform"),
        "both-parts-mix-r": _sooner("mix_r", "mix_r(share=1.0)"),
        "both-parts-mix-p": _sooner("mix_p", "mix_p(share=1.0)"),
        "fixed-rate": (_order("fixed", "mix_p"), within(1.9, 2.1)),
        "floor": (_floor_slope, within(-0.55, -0.45)),
        "sooner-mix-r": _early("mix_r"),
        "sooner-mix-p": _early(CAPPED),
    },
)
BOUNDS = [  # a theorem about every reward table: one that breaks it is enough against it
    Claim(
        f"bound-{name.replace('_', '-')}",
        f"{SOURCE}, theorems on exact DPO",
        f"{name}: on every reward table the error stays within the bound of the theorem (share of them)",
        lambda race, name=name: race["samplers"][name]["bound"]["holds"],
        lambda lo, hi: hi == 1.0,
    )
    for name in THEORY
]
COMPARED = (("mixed", "offline"), ("mixed", "on_policy"), ("mixed", "hybrid"), ("on_policy", "offline"))
MODEL = study.claims(
    SOURCE,
    OF_LANGUAGE_MODEL,
    {
        **{
            f"{first}-over-{second}-{reward}".replace("_", "-"): _ahead(first, second, reward)
            for first, second in COMPARED
            for reward in ("proxy", "gold")
        },
        "farther": _ahead("mixed", "offline", "kl"),
        "equal-kl-offline": _at_equal_kl("offline"),
        "equal-kl-on-policy": _at_equal_kl("on_policy"),
    },
)
CLAIMS = [*EXACT, *BOUNDS, *MODEL]


def check(races: Mapping[str, Row], models: Sequence[StepModel]) -> list[Row]:
    """Every claim. Repetitions of the races stand for chains; prompts of a single chain give an interval."""
    repetitions = len(races["orders"]["samplers"]["uniform"]["by_repetition"]["order"])
    exact = [
        {name: {sampler: _numbers(row, i) for sampler, row in race["samplers"].items()} for name, race in races.items()}
        for i in range(repetitions)
    ]
    return [
        *study.check(EXACT, exact),
        *study.check(BOUNDS, [races["bounds"]], alone=_over_tables),
        *study.check(MODEL, models, alone=_over_prompts),
    ]


def _numbers(summary: Row, repetition: int) -> dict[str, float]:
    """The figures of one repetition; one that was never reached is no number."""
    values = {name: values[repetition] for name, values in summary["by_repetition"].items()}
    return {name: math.nan if value is None else value for name, value in values.items()}


def _over_tables(claim: Claim, race: Row) -> tuple[float, float]:
    """If all of N tables keep a bound, at least 0.05^(1/N) of all that could be drawn do, with 95 % confidence."""
    share = float(claim.value(race))
    tables = race["config"]["instances"] * race["config"]["seeds"]
    return (0.05 ** (1 / tables), 1.0) if share == 1.0 else (share, share)


def _over_prompts(claim: Claim, chain: StepModel) -> tuple[float, float] | None:
    values = claim.value(chain)
    if not isinstance(values, Tensor):
        return None
    found = statistics.bootstrap(values)
    return found.lo.item(), found.hi.item()


# the page

NAMES = {"on_policy": "on-policy", "mixed_in_part": "mixed, 0.3 on-policy"}
COLORS = {"offline": ORANGE, "on_policy": BLUE, "hybrid": PURPLE, "mixed": GREEN, "mixed_in_part": BRASS}
REWARDS = {"proxy": "reward by the scorer that labels", "gold": "held-out gold reward"}
TITLES = {**REWARDS, "kl": "KL from the start, nats", "round": "rounds"}
NOTE = (
    "Intervals of the exact world are over repetitions, each with its own reward tables. Those of the language model "
    "are over chains; with one chain, over prompts, and then they do not know what another seed would have brought."
)
TOLD = {
    "orders": "Each sampler at the rate matched to it: uniform pairs are a straight line, the others bend down.",
    "best": "Each at its best constant rate. `share=1.0` draws only pairs far apart in reward, `share=0.5` half.",
    "fixed": "One rate, 10, for every sampler, as in the authors' code: matched to it by luck or not at all.",
}


def figures(results: Row) -> dict[str, Chart]:
    """The charts worth a file of their own."""
    races = {name: convergence(results["races"][name]["curves"]) for name in TOLD if name in results["races"]}
    return races | {f"{reward}_over_kl": over(results, "kl", reward) for reward in REWARDS}


def over(results: Row, x: str, y: str) -> Chart:
    """Reward or KL against KL or rounds, a line for each method. A curve over KL may turn back, so it has no band."""
    return curves(
        results["curves"],
        Axis(x, TITLES[x], whole=x == "round"),
        Axis(y, TITLES[y]),
        by="method",
        names=NAMES,
        colors=COLORS,
        tooltip={"round": "round"},
        dot=lambda row: x == "kl",
        band=lambda row: x != "kl",
        height=300,
    )


def story(results: Row) -> tuple[str, str, list[Part]]:
    """Title, lead and sections."""
    verdicts = [row["holds"] for row in results["claims"] if row["id"].startswith("mixed-over-")]
    title = f"Mixed pairs against others: {sum(v is True for v in verdicts)} of {len(verdicts)} comparisons hold."
    given, ends = results["budget"], results["ends"]
    best = {name: _named(max(ends[1:], key=lambda row: row[name])["method"]) for name in REWARDS}
    lead = (
        "A direct loss learns from pairs of answers; a sampler says which two. In a world of twenty answers the right "
        "sampler makes convergence quadratic. Here the same samplers also draw the pairs of a language model, for "
        f"{given['rounds']} rounds: **{given['answers']:,} answers, {given['couples']:,} pairs for every method**. The "
        f"scorer that labels the pairs puts {best['proxy']} first, the gold that never labels one {best['gold']}."
    )
    short = {"scorer": "proxy", "gold": "gold", "KL, nats": "kl"}
    headline = numbers([(_named(r["method"]), [(told, number(r[key])) for told, key in short.items()]) for r in ends])
    answers = study.answer_tables(results["samples"], {"proxy": "scorer", "gold": "gold"}, NAMES)
    return title, lead, [headline, *_language_model(results), *_exact_world(results["races"]), *answers]


def _named(method: str) -> str:
    return NAMES.get(method, method)


def _language_model(results: Row) -> list[Part]:
    known = ", ".join(percent(row["accuracy"]) for row in results["scorer"])
    units = "prompts" if len(results["seeds"]) == 1 else "chains"
    labels = ", ".join(f"{_named(name)} {n:,}" for name, n in results["budget"]["labels"].items())
    return [
        text(
            "**Two rewards.** Pairs are labeled by a reward model that was trained on pairs of the first policy's own "
            f"answers and ranks {known} of held-out pairs right; a label is its Bradley-Terry probability. What it is "
            "worth to please that scorer is said by the exact gold reward of the toy world, which labels no pair of "
            "the rounds. In the first round policy and reference are the same, and so are all methods. Labels paid "
            f"for by each method (two equal answers need none): {labels}.",
            title="Rounds of a language model",
        ),
        figure(
            [over(results, "kl", reward) for reward in REWARDS],
            "Reward against KL from the start, a dot a round: what a method pays for its reward.",
            names=("By the scorer", "By gold"),
        ),
        figure(
            [over(results, "round", y) for y in (*REWARDS, "kl")],
            f"Round by round; bands are 95 % over {units}.",
            names=("Scorer", "Gold", "KL"),
        ),
        _ends_table(results["ends"]),
        _rounds_table(results["curves"]),
    ]


def _ends_table(ends: Sequence[Row]) -> Part:
    columns = ("method", "scorer", "gold", "KL, nats", "beats start: scorer", "beats start: gold", "tokens")
    rows = [
        (
            _named(row["method"]),
            *(banded(row, name) for name in ("proxy", "gold")),
            number(row["kl"]),
            *(percent(row[key]) for key in ("win_proxy", "win_gold")),
            number(row["length"]),
        )
        for row in ends
    ]
    caption = "Answers to held-out prompts after the last round, with 95 % intervals; ties count half."
    return table(columns, rows, caption)


def _rounds_table(rows: Sequence[Row]) -> Part:
    columns = ("method", "round", "scorer", "gold", "KL, nats", "tokens", "beats start: gold", "labels agree with gold")
    cells = [
        (
            *(_named(row["method"]), row["round"]),
            *(row.get(name) for name in ("proxy", "gold", "kl", "length")),
            *(percent(row.get(name)) for name in ("win_rate", "agreement")),
        )
        for row in rows
        if row["round"]
    ]
    return table(columns, cells, "Every round: agreement is of the round's labels, before it is learned from.")


def _exact_world(races: Mapping[str, Row]) -> list[Part]:
    parts: list[Part] = [text(READING, title="The exact world")]
    for name, told in TOLD.items():
        if name in races:
            caption = f"{told} Medians over reward tables; the bands hold the middle 90 %."
            parts += [figure(convergence(races[name]["curves"]), caption), orders(races[name]["samplers"].items())]
    drawn = [
        (f"{sampler}, {race['config']['samples']:,} pairs an update", row)
        for name, race in races.items()
        for sampler, row in race["samplers"].items()
        if name.startswith("floor")
    ]
    promised = races["bounds"]["samplers"].items() if "bounds" in races else []
    return [*parts, *bounds(promised), *floors(drawn)]


RECIPE = study.Recipe("samplers", SETTINGS, chain, collect, story, figures, races, NOTE)
