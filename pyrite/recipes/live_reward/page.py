"""The page of the live reward recipe: results in, HTML out."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pyrite.report.charts import BLUE, BRASS, FAINT, GREEN, ORANGE, PURPLE, SOLID, Axis, Row, draw, stages
from pyrite.report.page import Claims, Figure, Keys, Numbers, Part, Table, Text, number, page, percent

Results = Mapping[str, Any]
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
COLORS = {
    "offline": FAINT,
    "gold": ORANGE,
    "gold_matched": "#7a3b00",
    "static": PURPLE,
    "live": GREEN,
    "live_random": BLUE,
    "live_disagreement": "#2a7f86",
    "implicit": BRASS,
    "self_reward": "#8a8f98",
}
TASKS = {
    "words": "Word collector",
    "nouns": "Unique nouns",
    "distill": "Contrast of two models",
    "math": "Arithmetic",
}
TOLD = {
    "words": "Gold counts the different vivid words among the first 20 of an answer.",
    "nouns": "Gold counts the different nouns among the first 20 words of an answer.",
    "distill": "Gold is the mean log-likelihood of an answer under the start less that under a weaker model, in nats.",
    "math": "Gold is 0 where every step of a calculation is right, and loses a point for each wrong character.",
}
TITLES = {
    "labels": "labels paid",
    "gold": "gold reward",
    "kl": "KL from the start, nats",
    "round": "rounds",
    "live_accuracy": "fresh pairs ranked as gold does",
}


def live_reward_charts(results: Results) -> dict[str, alt.LayerChart]:
    """The charts worth a file of their own, by name."""
    found = {}
    for task in dict.fromkeys(row["task"] for row in results["curves"]):
        rows = [row for row in results["curves"] if row["task"] == task]
        found |= {f"{task}_gold_over_{x}": over(rows, x, "gold") for x in ("labels", "kl")}
        found[f"{task}_accuracy"] = over(rows, "round", "live_accuracy")
    return found


def over(curves: Sequence[Row], x: str, y: str, *, height: int = 260) -> alt.LayerChart:
    """One number against another, a line for each method, a point a round. Raises ValueError where no row has both."""
    points = [_point(row, x, y) for row in curves if row.get(x) is not None and row.get(y) is not None]
    if not points:
        raise ValueError(f"over: no row has both {x} and {y}")
    tooltip = {"line": "method", "round": "round", "across": TITLES[x], "shown": TITLES[y]}
    dots = [{**point, "flag": ""} for point in points] if x != "round" else []
    across = Axis(x, TITLES[x], whole=x != "kl")
    return draw(points, across, Axis("value", TITLES[y]), tooltip=tooltip, height=height, peaks=dots)


def _point(row: Row, x: str, y: str) -> Row:
    low, high = row.get(f"{y}_lo"), row.get(f"{y}_hi")
    band = "" if low is None or high is None else f"  [{low:.2f}, {high:.2f}]"
    name = NAMES.get(row["method"], row["method"])
    shown = x == "round" or (x == "labels" and row["method"] in ("gold", "live"))
    return {
        **{x: row[x], "round": row["round"], "value": row[y], "line": name, "label": name, "dash": SOLID},
        **{"lo": low if shown else None, "hi": high if shown else None},  # a curve over KL may turn back
        **{"color": COLORS.get(row["method"], FAINT), "across": f"{row[x]:.3g}", "shown": f"{row[y]:.3g}{band}"},
    }


def live_reward_page(results: Results) -> str:
    """The whole page from `results.json`."""
    tasks = list(dict.fromkeys(row["task"] for row in results["curves"]))
    parts: list[Part] = [
        _headline(results),
        *(part for task in tasks for part in _task(results, task)),
        *_levels(results, tasks),
        Text(_CLAIMED, title="The published claims"),
        Claims(results["claims"]),
        *_books(results),
        *_samples(results.get("samples", [])),
        *_run(results),
    ]
    seeds = ("seed " if len(results["seeds"]) == 1 else "seeds ") + ", ".join(map(str, results["seeds"]))
    eyebrow = f"pyrite · recipe {results['recipe']} · scale {results['scale']} · {seeds}"
    return page(_title(results, tasks), parts, lead=_lead(results), eyebrow=eyebrow)


def _title(results: Results, tasks: Sequence[str]) -> str:
    """In how many tasks a live reward ended above labels alone."""
    ends = {(row["task"], row["method"]): row["gold"] for row in results["ends"]}
    ahead = sum(ends[task, "live"] > ends[task, "gold"] for task in tasks)
    labels = results["config"]["labels"]
    return f"{labels} labels: a live reward ends above labels alone in {ahead} of {len(tasks)} tasks."


def _lead(results: Results) -> str:
    config = results["config"]
    return (
        f"Every method may ask gold {config['labels']} times which of two answers is better. Labels alone teach the "
        f"policy {config['labels']} pairs; a reward model that learns from a few of them labels "
        f"{config['rounds'] * config['prompts']:,} more for nothing. It stays live: {config['warm']} labels before the "
        "first round, the others bought as the policy moves, where the reward model is least certain. The same labels "
        "learned in three passes are the fair comparison for the number of updates; KL says what each method pays."
    )


def _headline(results: Results) -> Numbers:
    starts = {row["task"]: row["gold"] for row in results["curves"] if row["round"] == 0 and row["method"] == "gold"}
    ends = {(row["task"], row["method"]): row["gold"] for row in results["ends"]}
    groups = []
    for task, start in starts.items():
        shown = [("start", number(start))]
        shown += [
            (label, number(ends[task, method]))
            for label, method in (("labels alone", "gold"), ("static", "static"), ("live", "live"))
            if (task, method) in ends
        ]
        groups.append((TASKS.get(task, task), shown))
    return Numbers(groups)


def _task(results: Results, task: str) -> list[Part]:
    rows = [row for row in results["curves"] if row["task"] == task]
    known = ", ".join(
        f"{kind} {percent(sum(values) / len(values))}" for kind, values in _accuracies(results["rewards"], task).items()
    )
    one = len(results["seeds"]) == 1
    bands = "over prompts" if one else "over chains"
    return [
        Text(
            f"{TOLD.get(task, '')} Reward models rank held-out pairs of the start right before the rounds: {known}.",
            title=TASKS.get(task, task),
        ),
        Figure(
            [over(rows, "labels", "gold"), over(rows, "kl", "gold")],
            f"Gold against labels paid and against KL, a dot a round; bands are 95 % {bands}.",
            names=("What labels buy", "What it costs in KL"),
        ),
        Figure(
            [over(rows, "round", "live_accuracy")],
            "Of every two fresh answers of a method's own policy, how often its discriminator ranks them as gold does.",
        ),
        _ends_table([row for row in results["ends"] if row["task"] == task]),
    ]


def _accuracies(rewards: Sequence[Row], task: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rewards:
        if row["task"] == task:
            found.setdefault(row["kind"], []).append(row["accuracy"])
    return found


def _ends_table(ends: Sequence[Row]) -> Table:
    columns = ("method", "labels", "gold", "KL, nats", "tokens", "beats start", "discriminator right", "static right")
    rows = [
        (
            NAMES.get(row["method"], row["method"]),
            f"{row['labels']:,.0f}",
            _with_interval(row, "gold"),
            number(row["kl"]),
            number(row["length"]),
            *(percent(row.get(name)) for name in ("win_rate", "live_accuracy", "proxy_accuracy")),
        )
        for row in ends
    ]
    return Table(columns, rows, "After the last round, with 95 % intervals. Right: fresh pairs ranked as gold does.")


def _with_interval(row: Row, name: str) -> str:
    band = f" [{number(row[f'{name}_lo'])}, {number(row[f'{name}_hi'])}]" if f"{name}_lo" in row else ""
    return f"{number(row[name])}{band}"


def _levels(results: Results, tasks: Sequence[str]) -> list[Part]:
    """Labels each method needs to fixed levels of gold."""
    levels = results["levels"]
    shares = list(dict.fromkeys(row["share"] for row in levels))
    by_place = {(row["task"], row["method"], row["share"]): row for row in levels}
    methods = dict.fromkeys((row["task"], row["method"]) for row in levels)
    rows = [
        (
            TASKS.get(task, task),
            NAMES.get(method, method),
            *(_needed(by_place[task, method, share]) for share in shares),
        )
        for task, method in methods
        if task in tasks
    ]
    caption = (
        "Labels paid until gold has gained 50 %, 100 % and 150 % of what labels alone gain with all of theirs; in "
        "brackets 95 % over chains, or in how many chains the level was reached."
    )
    columns = ("task", "method", *(f"{round(100 * share)} % of the gain" for share in shares))
    return [Table(columns, rows, caption, "Labels needed")]


def _needed(row: Row) -> str:
    if not row["reached"]:
        return "never"
    if row["reached"] < row["chains"]:
        return f"{row['labels']:,.0f} ({row['reached']} of {row['chains']} chains)"
    band = f" [{row['labels_lo']:,.0f}, {row['labels_hi']:,.0f}]" if "labels_lo" in row else ""
    return f"{row['labels']:,.0f}{band}"


_CLAIMED = (
    "A claim holds where its whole 95 % interval over chains lies above 0, and does not where it lies below; with one "
    "chain nothing is decided. Claims marked as not in the paper are controls: the paper gives a live reward's policy "
    "many more pairs, and so more updates, than labels alone."
)


def _books(results: Results) -> list[Part]:
    """Labels paid and pairs learned, of the first chain."""
    first = results["seeds"][0]
    columns = (
        "task",
        "method",
        "before the rounds",
        "in the rounds",
        "ties",
        "pairs learned",
        "gold pairs",
        "silver pairs",
    )
    names = ("before", "labels", "ties", "pairs", "gold_pairs", "silver_pairs")
    rows = [
        (
            TASKS.get(row["task"], row["task"]),
            NAMES.get(row["method"], row["method"]),
            *(f"{row[n]:,.0f}" for n in names),
        )
        for row in results["books"]
        if row["seed"] == first
    ]
    return [
        Table(columns, rows, f"Labels and pairs, seed {first}. A tie is paid for and teaches nothing.", "The books")
    ]


def _samples(samples: Sequence[Row]) -> list[Part]:
    if not samples:
        return []
    parts: list[Part] = [Text("What the live policy was taught in its last round.", title="Read the pairs")]
    for sample in samples:
        rows = [(pair["source"], str(pair["prompt"]), pair["chosen"], pair["rejected"]) for pair in sample["pairs"]]
        task = str(sample["task"])
        parts.append(Table(("labeled by", "prompt", "chosen", "rejected"), rows, TASKS.get(task, task)))
    return parts


def _run(results: Results) -> list[Part]:
    again = f"$ pyrite recipe {results['recipe']} --scale {results['scale']} --seeds {len(results['seeds'])}"
    took = f"The runs took {number(results['seconds'])} seconds."
    parts: list[Part] = [Text(f"{took} To repeat it:\n\n{again}", title="The run")]
    if results.get("stages"):
        parts.append(Figure(stages(results["stages"]), "Time of the stages."))
    for key, label in (("config", "Full configuration"), ("manifest", "Versions, hardware and inputs")):
        if results.get(key):
            parts.append(Keys(results[key], label))
    return parts
