"""A reward model that learns while the policy does: what a budget of gold labels can buy (arXiv:2405.01511).

Words, nouns, the contrast of two language models, arithmetic; every method with the same number of labels, the x-axis
the labels spent. Gold, proxy and KL side by side, and how well live and static reward models rank fresh answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyrite.core import runs, specs
from pyrite.data import rows as data
from pyrite.feedback import judges
from pyrite.feedback.ledger import Account, Budget, Ledger, Pace
from pyrite.feedback.pairing import label
from pyrite.jobs import dpo, generate, online, reward, sft
from pyrite.math import statistics
from pyrite.math.seeds import derive
from pyrite.recipes import study, toy
from pyrite.recipes.study import Chain, Row
from pyrite.report.charts import BLUE, BRASS, FAINT, GREEN, ORANGE, PURPLE, Axis, Chart, curves
from pyrite.report.page import Part, banded, figure, number, numbers, percent, table, text
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training

# settings


@dataclass(frozen=True)
class LabelMethod:
    """How a policy is trained: options of the job online, or a direct loss on pairs of the start."""

    annotator: str | None = None
    """"{static}", "{warm}" and "{several}" stand for reward models: of all labels, of the first few, an ensemble."""
    offline: int = 0
    """Labels that were spent on the start's own answers, before the rounds."""
    online: int = 0
    """Labels for the rounds."""
    epochs: int = 1
    """Passes over each round's pairs."""
    pairs: Literal["labels", "all", "offline"] = "all"
    """What the policy learns: paid pairs alone, all pairs of a round, or the offline ones by DPO."""


def methods(labels: int, warm: int) -> dict[str, LabelMethod]:
    """Every method with the same number of labels."""

    def live(schedule: str, reward: str = "warm") -> LabelMethod:
        learned = f"reward(path={{{reward}!r}}, lr=1e-3, epochs=3, schedule={schedule!r})"
        return LabelMethod(learned, offline=warm, online=labels - warm)

    chance = "schedule=\"even(selector='random()')\""
    return {
        "offline": LabelMethod(offline=labels, epochs=6, pairs="offline"),
        "gold": LabelMethod(online=labels, pairs="labels"),
        "gold_matched": LabelMethod(online=labels, epochs=3, pairs="labels"),
        "static": LabelMethod("reward(path={static!r}, schedule='never()')", offline=labels),
        "live": live("even(replay=3.0)"),
        "live_random": live("even(selector='random()', replay=3.0)"),
        "live_disagreement": live("even(selector='disagreement()', replay=3.0)", "several"),
        "implicit": LabelMethod(f"implicit(lr=3e-4, epochs=2, {chance})", online=labels),
        "self_reward": LabelMethod(f"self_reward({chance})", online=labels),
    }


@dataclass(frozen=True)
class Task:
    """What is rewarded, and by which of the worlds' policies it is tried."""

    gold: str
    """"{strong}" and "{weak}" stand for two language models."""
    world: Literal["stories", "arithmetic"] = "stories"
    methods: tuple[str, ...] = ("offline", "gold", "gold_matched", "static", "live", "live_random")
    max_new_tokens: int = 64


TASKS = {
    # of the first 20 words, so that a longer answer is no better one
    "words": Task("truncated(gold=\"word_collector(words='toy')\", words=20)", methods=tuple(methods(2, 1))),
    "nouns": Task("truncated(gold=\"unique_nouns(tagger='toy')\", words=20)"),
    "distill": Task("distillation(strong={strong!r}, weak={weak!r})"),
    "math": Task("math_chain()", "arithmetic", ("gold", "static", "live"), 48),
}


@dataclass(frozen=True)
class LiveRewardSettings:
    """Two worlds' policies; in each task every method with the same number of labels, from the same start."""

    tasks: dict[str, Task] = field(default_factory=lambda: dict(TASKS))
    labels: int = 400
    """Paid labels of every method, those of its reward model's first training among them."""
    warm: int = 100
    """Of them for the first training of a reward model that is live."""
    held_out: int = 100
    """Couples to measure reward models on; not charged."""
    members: int = 3
    """Of the ensemble whose disagreement selects."""
    rounds: int = 8
    prompts: int = 192
    """A round, if pairs need no label."""
    toy_demos: int = 24_000
    weak_demos: int = 2_000
    math_demos: int = 3_000
    math_prompts: int = 1_536
    answer_prompts: int = 64
    answers: int = 4
    """Answers to each held-out prompt after every round."""
    sft: Training = toy.SFT
    math_sft: Training = replace(toy.SFT, epochs=4, batch_size=32)
    reward: Training = Training(
        lr=1e-3, epochs=6, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16
    )
    online: Training = Training(
        lr=3e-4, batch_size=32, lr_scheduler_type="constant(warmup_steps=5)", micro_batch_tokens=1 << 16
    )
    loss: str = "dpo(beta=0.1)"


SETTINGS = {"toy": LiveRewardSettings()}


# one chain


@dataclass(frozen=True)
class Place:
    """A task of a chain: its stages, its world's policy and prompts, and its gold."""

    one: Chain
    task: Task
    policy: str
    prompts: str
    pool: str
    gold: str
    settings: LiveRewardSettings

    @property
    def judge(self) -> str:
        """The gold as the one who is paid: which of two answers is better, for certain."""
        return f"bradley_terry(gold={self.gold!r}, hard=True)"

    @property
    def evaluation(self) -> Evaluation:
        """Gold, proxy and KL of answers to the world's other prompts; the proxy is the static reward model."""
        return Evaluation(
            eval_prompts=self.pool,
            gold=self.gold,
            proxy=self.one.path("reward_static"),
            eval_limit=None,
            eval_k=self.settings.answers,
            max_new_tokens=self.task.max_new_tokens,
        )


def chain(one: Chain, settings: LiveRewardSettings) -> None:
    """Run every stage that is not done yet."""
    parts = {name: Chain(one.seed, one.folder / name) for name in ("stories", "arithmetic")}
    worlds = {
        name: make(parts[name], settings)
        for name, make in (("stories", _stories), ("arithmetic", _arithmetic))
        if any(task.world == name for task in settings.tasks.values())
    }
    for name, part in parts.items():
        one.runs.update({f"{name}: {stage}": run for stage, run in part.runs.items()})
    for name, task in settings.tasks.items():
        world, start = worlds[task.world], parts[task.world].path("sft", "model")
        gold = task.gold.format(strong=start, weak=parts["stories"].path("weak", "model"))
        part = Chain(derive(one.seed, name), one.folder / name)
        run_task(Place(part, task, start, str(world.pair_prompts), str(world.pool_prompts), gold, settings))
        one.runs.update({f"{name}: {stage}": run for stage, run in part.runs.items()})


def _stories(one: Chain, settings: LiveRewardSettings) -> toy.ToyFiles:
    """The toy world and its policy; and a weaker model, of a few demonstrations, to be told from."""
    seed = derive(one.seed, "world")
    world = toy.write(one.path("world"), seed=seed, n_pool=settings.answer_prompts, n_demos=settings.toy_demos)
    few = one.path("few.parquet")
    if not Path(few).exists():
        data.write(data.load(str(world.demos), "demos")[: settings.weak_demos], few)
    for name, demos in (("sft", str(world.demos)), ("weak", few)):
        one.run(name, sft.Config(str(world.model), demos, Path(name), training=settings.sft))
    return world


def _arithmetic(one: Chain, settings: LiveRewardSettings) -> toy.ToyFiles:
    """Sums and differences of three or four numbers up to 5, step by step; about a third of the answers are right."""
    world = toy.write_math(
        one.path("world"),
        seed=derive(one.seed, "world"),
        n_demos=settings.math_demos,
        n_prompts=settings.math_prompts,
        n_pool=settings.answer_prompts,
        depths=(1,),
        operators="+-",
        largest=5,
    )
    one.run("sft", sft.Config(str(world.model), str(world.demos), Path("sft"), training=settings.math_sft))
    return world


def run_task(place: Place) -> None:
    """The start's own answers, labeled; reward models of them; then every method."""
    one, settings, most = place.one, place.settings, place.task.max_new_tokens
    tried = {name: methods(settings.labels, settings.warm)[name] for name in place.task.methods}
    one.run("answers", generate.Config(place.policy, place.prompts, Path("answers"), k=2, max_new_tokens=most))
    kinds = [("static", settings.labels, 1), ("warm", settings.warm, 1), ("several", settings.warm, settings.members)]
    for kind, labels, members in kinds[: 3 if "live_disagreement" in tried else 2]:
        bought = "labels_static" if kind == "static" else "labels_warm"
        buy(place, bought, labels)
        config = reward.Config(
            place.policy,
            one.path(bought, "pairs.parquet"),
            Path(f"reward_{kind}"),
            held_out=one.path(bought, "held_out.parquet"),
            members=members,
            training=settings.reward,
        )
        one.run(f"reward model, {kind}", config, "reward")
    rewards = {kind: one.path(f"reward_{kind}") for kind in ("static", "warm", "several")}
    for name, method in tried.items():
        training = replace(settings.online, epochs=method.epochs)
        if method.pairs == "offline":
            pairs, held_out = (one.path("labels_static", f"{part}.parquet") for part in ("pairs", "held_out"))
            config = dpo.Config(place.policy, pairs, Path(name), held_out=held_out, loss=settings.loss)
            config = replace(config, evaluation=place.evaluation, training=training)
        else:  # rounds; prompts and streams are those of every other method
            paid = method.pairs == "labels"
            config = online.Config(
                place.policy,
                place.prompts,
                place.judge,
                Path(name),
                annotator=method.annotator.format(**rewards) if method.annotator else None,
                gold_budget=method.online,
                gold_limits="limits(batch=64)",
                rounds=settings.rounds,
                prompts_per_round=settings.labels // settings.rounds if paid else settings.prompts,
                loss=settings.loss,
                pairing="consecutive(labels='hard')",
                reset_optimizer=False,
                training=training,
                evaluation=place.evaluation,
            )
        one.run(name, config, "rounds")


def buy(place: Place, name: str, labels: int) -> None:
    """Pay for labels of the first couples of the start's answers, two a prompt; ties are paid and make no pair."""
    folder, answers = place.one.folder / name, place.one.path("answers", "candidates.parquet")
    if (folder / "done.json").exists():
        return
    couples = [
        (a, b)
        for a, b in (some[:2] for some in study.grouped(data.load(answers, "candidates"), "prompt_id").values())
        if a["response"] != b["response"] and a["finished"] and b["finished"]
    ]
    if len(couples) < labels + 2:
        have = f"{len(couples)} couples of different answers"
        raise ValueError(f"{answers}: {have}; {labels} labels need 2 more than that")
    judge, seed = specs.part(place.judge, judges), derive(place.one.seed, "offline")
    with Ledger(folder / "ledger.db") as ledger:
        account = Account(ledger, "offline", place.judge, "verdict", Budget(labels=labels), Pace(batch=64))
        data.write(_labeled(couples[:labels], partial(account.ask, judge), seed), folder / "pairs.parquet")
    rest = couples[labels : labels + place.settings.held_out]
    data.write(_labeled(rest, judge, seed), folder / "held_out.parquet")
    runs.write_json(folder / "done.json", {"labels": labels})


def _labeled(couples: Sequence[tuple[Row, Row]], judge: judges.Judge, seed: int) -> list[Row]:
    both = [row for couple in couples for row in couple]
    groups = [[2 * i, 2 * i + 1] for i in range(len(couples))]
    prompts, answers = [row["prompt"] for row in both], [row["response"] for row in both]
    made = label(judge, prompts, answers, groups, pairing="consecutive", labels="hard", seed=seed)
    return [
        {"prompt_id": both[pair.chosen]["prompt_id"], "prompt": both[pair.chosen]["prompt"]}
        | {"chosen": answers[pair.chosen], "rejected": answers[pair.rejected]}
        for pair in made.pairs
    ]


# claims

# Singhal et al. 2024, "D2PO: discriminator-guided DPO with response evaluation models": its abstract, and the curves of
# its figures. Each claim is checked in every task that has its methods.

SOURCE = "arXiv:2405.01511"
CLAIMED = """
live-over-gold | abstract | With the same labels a live reward brings more gold than learning from them alone
fewer-labels | abstract | A live reward reaches with fewer labels what labels alone reach with all of them (labels
    saved)
live-over-static | abstract | A live reward brings more gold than a static one trained on as many labels
static-over-offline | figure | Rounds with a static reward bring more gold than DPO on the labeled pairs
static-decays | figure of reward accuracy | A static reward ranks the answers of its policy worse after the rounds than
    before (accuracy lost)
live-holds | figure of reward accuracy | After the rounds a live reward ranks its policy's answers better than a static
    one ranks its own's
live-random-over-implicit | ablation | A reward model is a better discriminator than a second policy
live-random-over-self-reward | abstract | A separate discriminator is better than the policy itself
live-over-gold-matched | not in | It still does where labels alone are learned in as many updates
equal-kl | not in | It still does at equal KL: a live reward against as many updates on labels alone
live-over-live-random | not in | Labels for the least certain pairs bring more gold than labels for any
live-disagreement-over-live-random | not in | Labels where reward models disagree bring more gold than labels for any
"""
NOTE = (
    "Claims marked as not in the paper are controls: the paper gives a live reward's policy many more pairs, and so "
    "more updates, than labels alone. One chain decides nothing."
)
Lines = Mapping[str, Mapping[str, Tensor]]  # of one task: method -> column -> (rounds + 1,)


def last(lines: Lines, method: str, column: str = "gold") -> float:
    """After the last round; nan if the method does not have the column."""
    return lines[method][column][-1].item() if column in lines[method] else math.nan


def labels_to(lines: Lines, method: str, gold: float) -> float:
    """Labels after which a method first has that gold; nan if it never has."""
    return statistics.where(lines[method]["gold"], lines[method]["labels"], gold)


def accuracy_lost(lines: Lines) -> float:
    """How much worse the static reward ranks its policy's answers after the rounds than before."""
    right = lines["static"].get("live_accuracy")
    return math.nan if right is None else (right[0] - right[-1]).item()


def _ahead(first: str, second: str) -> Callable[[Lines], float]:
    return lambda lines: last(lines, first) - last(lines, second)


CLAIMS = study.claims(
    SOURCE,
    CLAIMED,
    {
        "live-over-gold": _ahead("live", "gold"),
        "fewer-labels": lambda lines: last(lines, "gold", "labels") - labels_to(lines, "live", last(lines, "gold")),
        "live-over-static": _ahead("live", "static"),
        "static-over-offline": _ahead("static", "offline"),
        "static-decays": accuracy_lost,
        "live-holds": lambda lines: last(lines, "live", "live_accuracy") - last(lines, "static", "live_accuracy"),
        "live-random-over-implicit": _ahead("live_random", "implicit"),
        "live-random-over-self-reward": _ahead("live_random", "self_reward"),
        "live-over-gold-matched": _ahead("live", "gold_matched"),
        "equal-kl": lambda lines: study.at_equal_kl(lines["live"], lines["gold_matched"], "gold"),
        "live-over-live-random": _ahead("live", "live_random"),
        "live-disagreement-over-live-random": _ahead("live_disagreement", "live_random"),
    },
)


def check(tasks: Mapping[str, Sequence[Lines]]) -> list[Row]:
    """Every claim in every task that has its methods. tasks: each with the lines of every chain."""
    return [
        row
        for claim in CLAIMS
        for task, chains in tasks.items()
        for row in study.check(
            [replace(claim, id=f"{claim.id}-{task}", statement=f"{task}: {claim.statement}")], chains
        )
    ]


# results

COLUMNS = ("gold", "proxy", "kl", "length", "labels", "live_accuracy", "proxy_accuracy", "policy_accuracy", "win_rate")
LEVELS = (0.5, 1.0, 1.5)  # of what labels alone gain with all of them


def collect(chains: list[Chain], settings: LiveRewardSettings) -> Row:
    """Every round of every method, labels to fixed levels of gold, claims, books, reward models, samples."""
    every = methods(settings.labels, settings.warm)
    tried = [(task, name) for task, options in settings.tasks.items() for name in options.methods]
    rounds = [row for one in chains for task, name in tried for row in _rounds(one, task, name, every[name])]
    by_task = study.grouped(rounds, "task", "seed")
    lines = {task: [_lines(by_task[task, one.seed]) for one in chains] for task in settings.tasks}
    ends = {(row["task"], row["method"]): row["round"] for row in rounds}
    return {
        "rounds": rounds,
        "curves": study.over_chains(rounds, ("task", "method", "round"), COLUMNS),
        "ends": study.over_chains(
            [row for row in rounds if row["round"] == ends[row["task"], row["method"]]], ("task", "method"), COLUMNS
        ),
        "levels": [row for task, some in lines.items() for row in _levels(task, some)],
        "books": [_books(one, task, name, every[name]) for one in chains for task, name in tried],
        "rewards": [_accuracy(one, name) for one in chains for name in one.runs if "reward model" in name],
        "claims": check(lines),
        "samples": [_sample(chains[0], task) for task, options in settings.tasks.items() if "live" in options.methods],
    }


def _rounds(one: Chain, task: str, name: str, method: LabelMethod) -> list[Row]:
    """A row for the start and each measured round; of offline DPO for the start and the end."""
    rows = [row for row in runs.read_metrics(one.runs[f"{task}: {name}"].folder) if "gold" in row]
    rows = rows if method.pairs != "offline" else [rows[0], rows[-1]]
    found = []
    for i, row in enumerate(rows):
        row = {**row, "kl": row["kl_k1"], "labels": method.offline + row.get("labels", 0)}
        known = {"seed": one.seed, "task": task, "method": name, "round": i}
        errors = {f"{of}_se": row[key] for of, key in (("gold", "gold_se"), ("kl", "kl_k1_se")) if key in row}
        found.append(known | {column: row[column] for column in COLUMNS if column in row} | errors)
    return found


def _lines(rounds: Sequence[Row]) -> Lines:
    """The columns of one task in one chain, by method."""
    return {
        method: {
            column: torch.tensor([row[column] for row in rows]).double()
            for column in COLUMNS
            if all(column in row for row in rows)
        }
        for (method,), rows in study.grouped(rounds, "method").items()
    }


def _levels(task: str, chains: Sequence[Lines]) -> list[Row]:
    """Labels each method needs to reach fixed levels of gold: shares of what labels alone gain with all of them."""
    rows = []
    for share in LEVELS:
        for method in chains[0]:
            needed = []
            for lines in chains:
                start, end = lines["gold"]["gold"][0].item(), last(lines, "gold")
                needed.append(labels_to(lines, method, start + share * (end - start)) if end > start else math.nan)
            reached = [labels for labels in needed if not math.isnan(labels)]
            row = {"task": task, "method": method, "share": share, "reached": len(reached), "chains": len(chains)}
            rows.append(row | (study.spread("labels", reached) if reached else {}))
    return rows


def _books(one: Chain, task: str, name: str, method: LabelMethod) -> Row:
    """What was paid and what was learned, over all rounds."""
    rows = runs.read_metrics(one.runs[f"{task}: {name}"].folder)
    known = {"seed": one.seed, "task": task, "method": name, "before": method.offline}
    known["labels"] = one.results(f"{task}: {name}").get("labels", 0)
    return known | {
        key: sum(row.get(key, 0) for row in rows) for key in ("pairs", "ties", "gold_pairs", "silver_pairs")
    }


def _accuracy(one: Chain, name: str) -> Row:
    """How well a reward model knows gold before the rounds."""
    task, kind = name.split(": reward model, ")
    found = one.results(name)
    right = [member["accuracy"] for member in found["members"]]
    mean = sum(right) / len(right)
    return {"seed": one.seed, "task": task, "kind": kind, "pairs": found["pairs"], "accuracy": mean}


def _sample(one: Chain, task: str) -> Row:
    """The first pairs that the live policy was taught in its last round."""
    files = sorted((one.runs[f"{task}: live"].folder / "rounds").glob("*.parquet"))
    pairs = data.load(str(files[-1]), "pairs")[:2] if files else []
    shown = ("prompt", "chosen", "rejected", "source")
    return {"task": task, "pairs": [{key: pair.get(key) for key in shown} for pair in pairs]}


# charts and page

NAMES = {
    "offline": "offline DPO",
    "gold": "labels alone",
    "gold_matched": "labels alone, 3 passes",
    "static": "static reward",
    "live": "live reward",
    "live_random": "live, any pairs",
    "live_disagreement": "live, disagreement",
    "implicit": "a second policy",
    "self_reward": "the policy itself",
}
COLORS = dict(zip(NAMES, (FAINT, ORANGE, "#7a3b00", PURPLE, GREEN, BLUE, "#2a7f86", BRASS, "#8a8f98"), strict=True))
TITLES = {"words": "Word collector", "nouns": "Unique nouns", "distill": "Contrast of two models", "math": "Arithmetic"}
TOLD = {
    "words": "Gold counts the different vivid words among the first 20 of an answer.",
    "nouns": "Gold counts the different nouns among the first 20 words of an answer.",
    "distill": "Gold is the mean log-likelihood of an answer under the start less that under a weaker model, in nats.",
    "math": "Gold is 0 where every step of a calculation is right, and loses a point for each wrong character.",
}
AXES = {
    "labels": "labels paid",
    "gold": "gold reward",
    "kl": "KL from the start, nats",
    "round": "rounds",
    "live_accuracy": "fresh pairs ranked as gold does",
}


def over(rows: Sequence[Row], x: str, y: str) -> Chart:
    """One number against another, a line for each method, a dot a round. Raises ValueError if no row has both.

    Bands of all methods would hide the lines, and a curve over KL may turn back: only some have one.
    """
    return curves(
        rows,
        Axis(x, AXES[x], whole=x != "kl"),
        Axis(y, AXES[y]),
        by="method",
        names=NAMES,
        colors=COLORS,
        tooltip={"round": "round"},
        dot=lambda row: x != "round",
        band=lambda row: x == "round" or (x == "labels" and row["method"] in ("gold", "live")),
    )


def _of(rows: Sequence[Row], task: str) -> list[Row]:
    return [row for row in rows if row["task"] == task]


def figures(results: Row) -> dict[str, Chart]:
    """The charts worth a file of their own."""
    found = {}
    for task in dict.fromkeys(row["task"] for row in results["curves"]):
        rows = _of(results["curves"], task)
        found |= {f"{task}_gold_over_{x}": over(rows, x, "gold") for x in ("labels", "kl")}
        found[f"{task}_accuracy"] = over(rows, "round", "live_accuracy")
    return found


def story(results: Row) -> tuple[str, str, list[Part]]:
    """Title, lead and sections of the page."""
    config, tasks = results["config"], list(dict.fromkeys(row["task"] for row in results["curves"]))
    ends = {(row["task"], row["method"]): row["gold"] for row in results["ends"]}
    ahead = sum(ends[task, "live"] > ends[task, "gold"] for task in tasks)
    title = f"{config['labels']} labels: a live reward ends above labels alone in {ahead} of {len(tasks)} tasks."
    lead = (
        f"Every method may ask gold {config['labels']} times which of two answers is better. Labels alone teach the "
        f"policy {config['labels']} pairs; a reward model that learns from a few of them labels "
        f"{config['rounds'] * config['prompts']:,} more for nothing. It stays live: {config['warm']} labels before the "
        "first round, the others bought as the policy moves, where the reward model is least certain. The same labels "
        "learned in three passes are the fair comparison for the number of updates; KL says what each method pays."
    )
    starts = {row["task"]: row["gold"] for row in results["curves"] if row["round"] == 0 and row["method"] == "gold"}
    groups = [
        (
            TITLES[task],
            [
                ("start", number(start)),
                *((told, number(ends[task, name])) for told, name in SHORT.items() if (task, name) in ends),
            ],
        )
        for task, start in starts.items()
    ]
    parts = [numbers(groups), *(part for task in tasks for part in _task_parts(results, task))]
    return title, lead, [*parts, _levels_table(results["levels"]), _books_table(results), *_samples(results["samples"])]


SHORT = {"labels alone": "gold", "static": "static", "live": "live"}


def _task_parts(results: Row, task: str) -> list[Part]:
    rows = _of(results["curves"], task)
    right = study.over_chains(_of(results["rewards"], task), ("kind",), ("accuracy",))
    known = ", ".join(f"{row['kind']} {percent(row['accuracy'])}" for row in right)
    bands = "over prompts" if len(results["seeds"]) == 1 else "over chains"
    cells = [
        (
            *(NAMES[row["method"]], f"{row['labels']:,.0f}", banded(row, "gold")),
            *(number(row["kl"]), number(row["length"])),
            *(percent(row.get(name)) for name in ("win_rate", "live_accuracy", "proxy_accuracy")),
        )
        for row in _of(results["ends"], task)
    ]
    columns = ("method", "labels", "gold", "KL, nats", "tokens", "beats start", "annotator right", "static right")
    return [
        text(
            f"{TOLD[task]} Reward models rank held-out pairs of the start right before the rounds: {known}.",
            title=TITLES[task],
        ),
        figure(
            [over(rows, "labels", "gold"), over(rows, "kl", "gold")],
            f"Gold against labels paid and against KL, a dot a round; bands are 95 % {bands}.",
            names=("What labels buy", "What it costs in KL"),
        ),
        figure(
            over(rows, "round", "live_accuracy"),
            "Of every two fresh answers of a method's own policy, how often its annotator ranks them as gold does.",
        ),
        table(columns, cells, "After the last round, with 95 % intervals. Right: fresh pairs ranked as gold does."),
    ]


def _levels_table(levels: Sequence[Row]) -> Part:
    """Labels each method needs to fixed levels of gold."""
    shares = list(dict.fromkeys(row["share"] for row in levels))
    needed = study.grouped(levels, "task", "method")
    caption = (
        "Labels paid until gold has gained 50 %, 100 % and 150 % of what labels alone gain with all of theirs; in "
        "brackets 95 % over chains, or in how many chains the level was reached."
    )
    columns = ("task", "method", *(f"{round(100 * share)} % of the gain" for share in shares))
    cells = [(TITLES[task], NAMES[method], *map(_needed, rows)) for (task, method), rows in needed.items()]
    return table(columns, cells, caption, "Labels needed")


def _needed(row: Row) -> str:
    if not row["reached"]:
        return "never"
    if row["reached"] < row["chains"]:
        return f"{row['labels']:,.0f} ({row['reached']} of {row['chains']} chains)"
    return banded(row, "labels", lambda labels: f"{labels:,.0f}")


def _books_table(results: Row) -> Part:
    """Labels paid and pairs learned, of the first chain."""
    first = results["seeds"][0]
    names = {
        **{"before": "before the rounds", "labels": "in the rounds", "ties": "ties", "pairs": "pairs learned"},
        **{"gold_pairs": "gold pairs", "silver_pairs": "silver pairs"},
    }
    cells = [
        (TITLES[row["task"]], NAMES[row["method"]], *(f"{row[name]:,.0f}" for name in names))
        for row in results["books"]
        if row["seed"] == first
    ]
    caption = f"Labels and pairs, seed {first}. A tie is paid for and teaches nothing."
    return table(("task", "method", *names.values()), cells, caption, "The books")


def _samples(samples: Sequence[Row]) -> list[Part]:
    parts = [text("What the live policy was taught in its last round.", title="Read the pairs")]
    for sample in samples:
        cells = [(pair["source"], str(pair["prompt"]), pair["chosen"], pair["rejected"]) for pair in sample["pairs"]]
        parts.append(table(("labeled by", "prompt", "chosen", "rejected"), cells, TITLES[sample["task"]]))
    return parts


RECIPE = study.Recipe("live_reward", SETTINGS, chain, collect, story, figures, note=NOTE)
