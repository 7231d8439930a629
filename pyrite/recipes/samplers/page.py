"""The page of the samplers recipe: results in, HTML out."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pyrite.report.bandit import READING, bandit_charts
from pyrite.report.charts import BLUE, BRASS, FAINT, GREEN, ORANGE, PURPLE, SOLID, Axis, Row, draw, stages
from pyrite.report.page import Claims, Figure, Keys, Numbers, Part, Table, Text, number, page, percent

Results = Mapping[str, Any]
NAMES = {
    "start": "start",
    "offline": "offline",
    "on_policy": "on-policy",
    "hybrid": "hybrid",
    "mixed": "mixed",
    "mixed_in_part": "mixed, 0.3 on-policy",
}
COLORS = {"offline": ORANGE, "on_policy": BLUE, "hybrid": PURPLE, "mixed": GREEN, "mixed_in_part": BRASS}
REWARDS = {"proxy": "reward by the scorer that labels", "gold": "held-out gold reward"}
TITLES = {**REWARDS, "kl": "KL from the start, nats", "round": "rounds"}


def samplers_charts(results: Results) -> dict[str, alt.LayerChart]:
    """The charts worth a file of their own, by name."""
    races, curves = results["races"], results["curves"]
    found = {name: convergence(races[name]) for name in ("orders", "best", "fixed") if name in races}
    return found | {f"{y}_over_kl": over(curves, "kl", y) for y in REWARDS}


def convergence(race: Results) -> alt.LayerChart:
    """The error of every sampler of a race against updates."""
    return bandit_charts(race)["error"]  # type: ignore[return-value]


def over(curves: Sequence[Row], x: str, y: str, *, height: int = 300) -> alt.LayerChart:
    """One number (proxy, gold, kl) against another (kl, round), a line for each method, a point a round.

    Raises ValueError where no row has both.
    """
    points = [_point(row, x, y) for row in curves if row.get(x) is not None and row.get(y) is not None]
    if not points:
        raise ValueError(f"over: no row has both {x} and {y}")
    tooltip = {"line": "method", "round": "round", "across": TITLES.get(x, x), "shown": TITLES.get(y, y)}
    dots = [{**point, "flag": ""} for point in points] if x == "kl" else []
    across, up = Axis(x, TITLES.get(x, x), whole=x == "round"), Axis("value", TITLES.get(y, y))
    return draw(points, across, up, tooltip=tooltip, height=height, peaks=dots)


def _point(row: Row, x: str, y: str) -> Row:
    low, high = row.get(f"{y}_lo"), row.get(f"{y}_hi")
    band = "" if low is None or high is None else f"  [{low:.2f}, {high:.2f}]"
    name = NAMES.get(row["method"], row["method"])
    return {
        **{x: row[x], "round": row["round"], "value": row[y], "line": name, "label": name, "dash": SOLID},
        **{"lo": None if x == "kl" else low, "hi": None if x == "kl" else high},  # a curve over KL may turn back
        **{"color": COLORS.get(row["method"], FAINT), "across": f"{row[x]:.3g}", "shown": f"{row[y]:.3g}{band}"},
    }


def samplers_page(results: Results) -> str:
    """The whole page from `results.json`."""
    parts: list[Part] = [
        _headline(results["ends"]),
        *_language_model(results),
        *_exact_world(results["races"]),
        Text(_CLAIMED, title="The published claims"),
        Claims(results["claims"]),
        *_samples(results.get("samples", [])),
        *_run(results),
    ]
    seeds = ("seed " if len(results["seeds"]) == 1 else "seeds ") + ", ".join(map(str, results["seeds"]))
    eyebrow = f"pyrite · recipe {results['recipe']} · scale {results['scale']} · {seeds}"
    return page(_title(results), parts, lead=_lead(results), eyebrow=eyebrow)


def _title(results: Results) -> str:
    """What the claims about mixed pairs came to."""
    verdicts = [r["holds"] for r in results["claims"] if r["id"].startswith("mixed-over-")]
    held = sum(verdict is True for verdict in verdicts)
    return f"Mixed pairs against others: {held} of {len(verdicts)} comparisons hold."


def _lead(results: Results) -> str:
    budget, ends = results["budget"], results["ends"]
    best = {name: max((m for m in ends if m != "start"), key=lambda m: ends[m][name]["mean"]) for name in REWARDS}
    return (
        "A direct loss learns from pairs of answers; a sampler says which two. In a world of twenty answers the right "
        "sampler makes convergence quadratic. Here the same samplers also draw the pairs of a language model, for "
        f"{budget['rounds']} rounds: **{budget['answers']:,} answers, {budget['couples']:,} pairs for every method**. "
        f"The scorer that labels the pairs puts {NAMES[best['proxy']]} first, the gold that never labels one "
        f"{NAMES[best['gold']]}."
    )


def _headline(ends: Results) -> Numbers:
    return Numbers(
        [
            (NAMES.get(name, name), [(label, number(end[key]["mean"])) for label, key in _SHORT.items()])
            for name, end in ends.items()
        ]
    )


_CLAIMED = (
    "A claim holds where its whole 95 % interval lies on the claimed side, and does not where it lies on the other. "
    "Intervals of the exact world are over repetitions, each with its own reward tables. Those of the language model "
    "are over chains; with one chain, over prompts, and then they do not know what another seed would have brought."
)
_SHORT = {"scorer": "proxy", "gold": "gold", "KL, nats": "kl"}


def _language_model(results: Results) -> list[Part]:
    curves, scorers = results["curves"], results["scorer"]
    known = ", ".join(percent(row["accuracy"]) for row in scorers)
    one = len(results["seeds"]) == 1
    bands = "bands are 95 % over prompts" if one else "bands are 95 % over chains"
    return [
        Text(
            "**Two rewards.** Pairs are labeled by a reward model that was trained on pairs of the first policy's own "
            f"answers and ranks {known} of held-out pairs right; a label is its Bradley-Terry probability. What it is "
            "worth to please that scorer is said by the exact gold reward of the toy world, which labels no pair of "
            "the rounds. In the first round policy and reference are the same, and so are all methods.",
            title="Rounds of a language model",
        ),
        Figure(
            [over(curves, "kl", y) for y in REWARDS],
            "Reward against KL from the start, a dot a round: what a method pays for its reward.",
            names=("By the scorer", "By gold"),
        ),
        Figure(
            [over(curves, "round", y) for y in (*REWARDS, "kl")],
            f"Round by round; {bands}.",
            names=("Scorer", "Gold", "KL"),
        ),
        _ends_table(results["ends"]),
        _rounds_table(curves),
    ]


def _ends_table(ends: Results) -> Table:
    columns = ("method", "scorer", "gold", "KL, nats", "beats start: scorer", "beats start: gold", "tokens")
    rows = [
        (
            NAMES.get(name, name),
            *(_with_interval(end[key]) for key in ("proxy", "gold")),
            number(end["kl"]["mean"]),
            *(percent(end[key]["mean"]) for key in ("win_proxy", "win_gold")),
            number(end["length"]["mean"]),
        )
        for name, end in ends.items()
    ]
    return Table(
        columns, rows, "Answers to held-out prompts after the last round, with 95 % intervals; ties count half."
    )


def _with_interval(value: Row) -> str:
    return f"{number(value['mean'])} [{number(value['lo'])}, {number(value['hi'])}]"


def _rounds_table(curves: Sequence[Row]) -> Table:
    columns = ("method", "round", "scorer", "gold", "KL, nats", "tokens", "beats start: gold", "labels agree with gold")
    rows = [
        (
            *(NAMES.get(row["method"], row["method"]), row["round"]),
            *(row.get(name) for name in ("proxy", "gold", "kl", "length")),
            *(percent(row.get(name)) for name in ("win_rate", "agreement")),
        )
        for row in curves
        if row["round"]
    ]
    return Table(columns, rows, "Every round: agreement is of the round's labels, before it is learned from.")


def _exact_world(races: Results) -> list[Part]:
    parts: list[Part] = [Text(READING, title="The exact world")]
    told = {
        "orders": "Each sampler at the rate matched to it: uniform pairs are a straight line, the others bend down.",
        "best": "Each at its best constant rate. `share=1.0` draws only pairs far apart in reward, `share=0.5` half.",
        "fixed": "One rate, 10, for every sampler, as in the authors' code: matched to it by luck or not at all.",
    }
    for name, caption in told.items():
        if name in races:
            shown = f"{caption} Medians over reward tables; the bands hold the middle 90 %."
            parts += [Figure(convergence(races[name]), shown), _race_table(races[name])]
    return [*parts, *_bounds(races), *_floors(races)]


def _race_table(race: Results) -> Table:
    columns = ("sampler", "order", "order of one step", "rate", "left by a step", "updates to 1e-6", "diverged")
    keys = ("order", "step_order", "rate", "contraction", "steps_to_1e-06")
    rows = [(name, *(row[key] for key in keys), percent(row["diverged"])) for name, row in race["samplers"].items()]
    return Table(columns, rows, "Medians over reward tables.")


def _bounds(races: Results) -> list[Part]:
    found = [(n, r["bound"]) for race in races.values() for n, r in race["samplers"].items() if r["bound"]]
    rows = [(name, str(b["constant"]), b["order"], percent(b["holds"]), b["closest"]) for name, b in found]
    columns = ("sampler", "constant", "order", "holds on", "most of it used at the first update")
    return [Table(columns, rows, "Rewards in [0, 1]; max |δ| ≤ c^t or c^(2^t − 1).", "Bounds")] if rows else []


def _floors(races: Results) -> list[Part]:
    found = [
        (race["options"], name, row["floor"])
        for key, race in races.items()
        for name, row in race["samplers"].items()
        if row["floor"] and key.startswith("floor")
    ]
    rows = [(o["samples"], n, number(f["measured"]["mean"], 5), number(f["predicted"], 5)) for o, n, f in found]
    caption = "Mean |δ| over the second half of the run, at a tenth of the best rate; predicted from noise alone."
    return (
        [Table(("pairs an update", "sampler", "measured", "predicted"), rows, caption, "Noise floors")] if rows else []
    )


def _samples(samples: Sequence[Row]) -> list[Part]:
    if not samples:
        return []
    columns = ("policy", "scorer", "gold", "answer")
    parts: list[Part] = [Text("The same prompts, answered after the last round.", title="Read the answers")]
    for sample in samples:
        rows = [(NAMES.get(a["policy"], a["policy"]), a["proxy"], a["gold"], a["response"]) for a in sample["answers"]]
        parts.append(Table(columns, rows, f"“{sample['prompt']}”"))
    return parts


def _run(results: Results) -> list[Part]:
    again = f"$ pyrite recipe {results['recipe']} --scale {results['scale']} --seeds {len(results['seeds'])}"
    took = f"The runs took {number(results['seconds'])} seconds."
    labels = ", ".join(f"{NAMES.get(name, name)} {n:,}" for name, n in results["budget"]["labels"].items())
    cost = f"Labels paid for by each method (two equal answers need none): {labels}."
    parts: list[Part] = [Text(f"{took} {cost} To repeat it:\n\n{again}", title="The run")]
    if results.get("stages"):
        parts.append(Figure(stages(results["stages"]), "Time of the stages."))
    for key, label in (("config", "Full configuration"), ("manifest", "Versions, hardware and inputs")):
        if results.get(key):
            parts.append(Keys(results[key], label))
    return parts
