"""The page of the references recipe: results in, HTML out."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pyrite.report.charts import BLUE, BRASS, DASHED, FAINT, GREEN, ORANGE, PURPLE, SOLID, Axis, Row, draw, stages
from pyrite.report.page import Claims, Figure, Keys, Numbers, Part, Table, Text, number, page, percent

Results = Mapping[str, Any]
NAMES = {
    "self": "own reference",
    "none": "none (posterior)",
    "prior": "prior (likelihood)",
    "family": "stronger, same family",
    "stranger": "stronger, other family",
    "tokenizer": "stronger, other tokenizer",
}
COLORS = {"self": BLUE, "none": ORANGE, "prior": PURPLE, "family": GREEN, "stranger": BRASS, "tokenizer": "#444b54"}
OWN, STRONG = ("self", "none", "prior"), ("self", "family", "stranger", "tokenizer")
TITLES = {
    "gold": "gold reward",
    "kl": "KL from the start, nats",
    "length": "length, tokens",
    "policy_accuracy": "policy ranks pairs right",
    "accuracy": "reward ranks pairs right",
}


def against_beta(
    curves: Sequence[Row], y: str, *, refs: Sequence[str], level: float | None = None, height: int = 300
) -> alt.LayerChart:
    """One number (gold, kl, length, accuracy, ...) against beta (log scale), a line for each reference.

    `level` is a dashed line: where the policy started. Raises ValueError where no reference has that number.
    """
    rows = sorted((row for row in curves if row["ref"] in refs and row.get(y) is not None), key=lambda r: r["beta"])
    if not rows:
        raise ValueError(f"against_beta: no row of {', '.join(refs)} has {y}")
    points = [_point(row, y) for ref in refs for row in rows if row["ref"] == ref]
    if level is not None:
        ends = (rows[0]["beta"], rows[-1]["beta"])
        base = {"value": level, "lo": None, "hi": None, "line": "start", "label": "start", "color": FAINT}
        points += [{**base, "beta": beta, "dash": DASHED, "shown": f"{level:.3g}", "bad": ""} for beta in ends]
    tops = [{**point, "flag": ""} for point in points if point["bad"]]
    tooltip = {"line": "reference", "beta": "β", "shown": TITLES.get(y, y), "bad": "degenerate"}
    across = Axis("beta", "β, strength of the reference (log scale)", format="~g", log=True, base=10)
    return draw(points, across, Axis("value", TITLES.get(y, y)), tooltip=tooltip, height=height, peaks=tops)


def _point(row: Row, y: str) -> Row:
    low, high = row.get(f"{y}_lo"), row.get(f"{y}_hi")
    band = "" if low is None or high is None else f"  [{low:.2f}, {high:.2f}]"
    name = NAMES.get(row["ref"], row["ref"])
    return {
        **{"beta": row["beta"], "value": row[y], "lo": low, "hi": high, "line": name, "label": name},
        **{"color": COLORS.get(row["ref"], FAINT), "dash": SOLID, "shown": f"{row[y]:.3g}{band}"},
        "bad": f"{row['degenerate']} of {row['chains']} chains" if row["degenerate"] else "",
    }


def references_page(results: Results) -> str:
    """The whole page from `results.json`."""
    curves, start = results["curves"], results["start"]
    tops = {ref: _top(curves, ref) for ref in NAMES if any(row["ref"] == ref for row in curves)}
    parts: list[Part] = [
        _headline(tops, start),
        *_questions(curves, start, results["strong"]),
        *_indicators(results.get("indicators", [])),
        Claims(results["claims"], title="The published claims"),
        *_samples(results.get("samples", [])),
        _table(curves),
        *_run(results),
    ]
    seeds = ("seed " if len(results["seeds"]) == 1 else "seeds ") + ", ".join(map(str, results["seeds"]))
    eyebrow = f"pyrite · recipe {results['recipe']} · scale {results['scale']} · {seeds}"
    return page(_title(tops), parts, lead=_lead(tops, start), eyebrow=eyebrow)


def _top(curves: Sequence[Row], ref: str) -> Row:
    return max((row for row in curves if row["ref"] == ref), key=lambda row: row["gold"])


def _title(tops: Mapping[str, Row]) -> str:
    best = max(tops.values(), key=lambda row: row["gold"])
    return f"Most gold: {NAMES[best['ref']]}, β = {best['beta']:g}."


def _lead(tops: Mapping[str, Row], start: Row) -> str:
    own = tops["self"]
    return (
        "Direct preference optimization pulls a policy toward its preferences and back to a reference; β says how "
        f"hard it is pulled back. The policy starts at a gold reward of **{number(start['gold'])}**. With its own "
        f"reference it got to **{number(own['gold'])}** at β = {own['beta']:g}, "
        f"{number(own['kl'])} nats away. One policy was trained for every reference and β, on the same pairs for "
        "the same number of steps."
    )


def _headline(tops: Mapping[str, Row], start: Row) -> Numbers:
    groups = [("Start", [("gold", number(start["gold"])), ("tokens", number(start["length"]))])]
    for ref, row in tops.items():
        values = [("gold", number(row["gold"])), ("KL, nats", number(row["kl"])), ("tokens", number(row["length"]))]
        groups.append((f"{NAMES[ref]}, β = {row['beta']:g}", values))
    return Numbers(groups)


def _questions(curves: Sequence[Row], start: Row, strong: Mapping[str, Row]) -> list[Part]:
    def pair(refs: Sequence[str], second: str) -> list[alt.LayerChart]:
        gold = against_beta(curves, "gold", refs=refs, level=start["gold"], height=260)
        level = {"length": start["length"], "kl": 0.0}.get(second)
        return [gold, against_beta(curves, second, refs=refs, level=level, height=260)]

    dots = "A dot marks a degenerate policy: more than 20 % of its answers never end, or half of its 4-grams repeat."
    shown = "; ".join(f"{NAMES[name]}: {number(row['gold'])}" for name, row in strong.items())
    return [
        Text("How strong should the pull be? The same data and steps, only β differs.", title="1. How much β"),
        Figure(pair(("self",), "kl"), f"Gold and KL against β. {dots}", names=("Gold", "KL")),
        Figure(
            [against_beta(curves, name, refs=("self",), height=200) for name in ("policy_accuracy", "accuracy")],
            "Held-out pairs ranked right by the policy's own log-probability, and by its reward β log π/π_ref.",
            names=("Policy", "Reward"),
        ),
        Text(
            "Is a reference needed at all? Without one (**posterior**) the reward is β log π(y|x); with the "
            "unconditional **prior** it is β log π(y|x)/π(y), the likelihood of the prompt given the answer.",
            title="2. Is a reference needed",
        ),
        Figure(pair(OWN, "length"), f"Gold and answer length against β. {dots}", names=("Gold", "Length")),
        Text(f"References better than the policy itself. Gold of their own answers: {shown}.", title="3. Better ones"),
        Figure(pair(STRONG, "kl"), f"Gold and KL against β. {dots}", names=("Gold", "KL")),
    ]


def _indicators(rows: Sequence[Row]) -> list[Part]:
    if not rows:
        return []
    caption = (
        "Before anything is trained: the spread of the reference's margins on the training pairs, which β multiplies; "
        "their correlation with the policy's own margins; how often the reference ranks the chosen answer first."
    )
    columns = ("reference", "sd of margins, nats", "correlation with the policy's", "ranks chosen first")
    cells = [(NAMES[row["ref"]], row["sd"], row["correlation"], percent(row["accuracy"])) for row in rows]
    return [Table(columns, cells, caption)]


def _samples(samples: Sequence[Row]) -> list[Part]:
    if not samples:
        return []
    columns = ("policy", "gold", "tokens", "answer")
    parts: list[Part] = [Text("The same prompts, answered by some of the policies.", title="Read the answers")]
    for sample in samples[:3]:
        rows = [(a["policy"], a["gold"], a["length"], a["response"]) for a in sample["answers"]]
        parts.append(Table(columns, rows, f"“{sample['prompt']}”"))
    return parts


def _table(curves: Sequence[Row]) -> Table:
    columns = ("reference", "β", "gold", "best checkpoint", "KL, nats", "tokens", "unended", "policy", "reward", "deg.")
    rows = [
        (
            *(NAMES[row["ref"]], f"{row['beta']:g}"),
            *(row.get(name) for name in ("gold", "best_gold", "kl", "length")),
            *(percent(row.get(name)) for name in ("missing_eos", "policy_accuracy", "accuracy")),
            f"{row['degenerate']}/{row['chains']}",
        )
        for row in curves
    ]
    caption = "Means over chains, at the last step; gold also at the checkpoint with the lowest held-out loss."
    return Table(columns, rows, caption, title="Every policy")


def _run(results: Results) -> list[Part]:
    again = f"$ pyrite recipe {results['recipe']} --scale {results['scale']} --seeds {len(results['seeds'])}"
    took = f"The runs took {number(results['seconds'])} seconds."
    parts: list[Part] = [Text(f"{took} To repeat it:\n\n{again}", title="The run")]
    if results.get("stages"):
        parts.append(Figure(stages(results["stages"]), "Time of the stages before optimization."))
    for key, label in (("config", "Full configuration"), ("manifest", "Versions, hardware and inputs")):
        if results.get(key):
            parts.append(Keys(results[key], label))
    return parts
