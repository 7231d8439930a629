"""The page of the soups recipe: results in, HTML out."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pyrite.recipes.soups.duels import duel_sections, matrix_chart, pareto_chart
from pyrite.report.charts import stages
from pyrite.report.page import Claims, Figure, Keys, Numbers, Part, Row, Table, Text, number, page, percent

Results = Mapping[str, Any]
AXES = (("technical", "brief"), ("detailed", "kind"), ("plain", "curt"))


def soups_charts(results: Results) -> dict[str, alt.LayerChart]:
    """The charts worth a file of their own, by name."""
    drawn = {"win_rates": matrix_chart(results["duels"]["matrix"])}
    for x, y in AXES:
        if all(name in results["duels"]["pareto"][0] for name in (x, y)):
            drawn[f"pareto_{x}_{y}"] = pareto_chart(results["duels"]["pareto"], x, y)
    return drawn


def soups_page(results: Results) -> str:
    """The whole page from `results.json`."""
    parts: list[Part] = [
        _headline(results),
        Text(_METHODS),
        *_kl(results.get("kl", [])),
        *duel_sections(results["duels"]),
        *_added(results),
        *_costs(results["costs"]),
        *_general(results),
        Text(_CLAIMED, title="The published claims"),
        Claims(results["claims"]),
        *_trained(results),
        *_samples(results.get("samples", [])),
        *_run(results),
    ]
    seeds = ("seed " if len(results["seeds"]) == 1 else "seeds ") + ", ".join(map(str, results["seeds"]))
    eyebrow = f"pyrite · recipe {results['recipe']} · scale {results['scale']} · {seeds}"
    return page(_title(results), parts, lead=_LEAD, eyebrow=eyebrow)


_LEAD = (
    "Three ways in which an answer can be wanted, two options each, eight combinations. Personalized soups train one "
    "small adapter for each option and average three of them for each combination; P-MORL trains one policy on all "
    "combinations; the other methods are what there was before. An exact measure of each option is the judge: a method "
    "wins a prompt under a combination where it is better in more of its options than the other."
)
_METHODS = (
    "**vb** is the policy as it is, asked without preferences; **pp** is asked with them; **mt** is tuned on chosen "
    "answers of every option; **rlhf** learned a general reward by PPO; **pmorl** learned every combination, rewarded "
    "for each of its options; **psoups** averages policies of single options, learned by PPO, exactly; "
    "**psoups_factor** averages the two factors of their adapters apart, as published; **psoups_dpo** averages "
    "policies learned by DPO from the pairs of an option."
)
_CLAIMED = (
    "A claim holds where its whole 95 % interval over chains lies above 0, and does not where it lies below; with one "
    "chain nothing is decided."
)


def _title(results: Results) -> str:
    """Who has the highest average win rate."""
    top = max(results["duels"]["averages"], key=lambda row: row["half"])
    return f"{top['method']} wins most: {percent(top['half'])} on average over its opponents."


def _headline(results: Results) -> Numbers:
    rows = sorted(results["duels"]["averages"], key=lambda row: -row["half"])
    return Numbers([("Average win rate, ties one half", [(row["method"], percent(row["half"])) for row in rows])])


def _kl(rows: Sequence[Row]) -> list[Part]:
    """How far from the start the judged answers are."""
    cells = []
    for row in rows:
        error = f" ± {number(row['kl_se'])}" if "kl_se" in row else f" [{number(row['kl_lo'])}, {number(row['kl_hi'])}]"
        cells.append((row["method"], number(row["kl"]) + error))
    caption = (
        "The mean log-ratio (k1) of the judged answers to the policy that all methods start from, under the same "
        "prompts. In brackets 95 % over chains; of one chain, one standard error over answers."
    )
    return [Table(("method", "KL from the start, nats"), cells, caption)] if cells else []


def _added(results: Results) -> list[Part]:
    """The combinations that an option added later brings."""
    found = results.get("added")
    if not found:
        return []
    text = (
        "One more option comes later. Soups train one more policy, and serve its combinations with the policies they "
        "have; P-MORL, not trained again, is told the option in the prompt like the policy it started from."
    )
    drawn = matrix_chart(found["matrix"])
    return [Text(text, title="An option added later"), Figure(drawn, "Win rates over the combinations it adds.")]


def _costs(rows: Sequence[Row]) -> list[Part]:
    columns = (
        "method",
        "combinations",
        "policies",
        "answers drawn",
        "combinations with one more option",
        "policies to train for it",
        "answers for it",
    )
    names = ("combinations", "policies", "answers", "combinations_more", "policies_more", "answers_more")
    cells = [(row["method"], *(f"{row[name]:,}" for name in names)) for row in rows]
    caption = "P-MORL draws as many answers for each option as the soups' policies, and is trained again for one more."
    return [Table(columns, cells, caption, "What it costs")]


def _general(results: Results) -> list[Part]:
    found = results.get("general")
    if not found:
        return []
    text = "The same answers, judged by general quality alone, whatever was preferred."
    return [Text(text, title="In general"), Figure(matrix_chart(found["matrix"]), "Win rates in general quality.")]


def _trained(results: Results) -> list[Part]:
    """Reward models and the policies of PPO."""
    models = [
        (
            row["seed"],
            row["kind"],
            percent(row["accuracy"]),
            f"[{percent(row['accuracy_lo'])}, {percent(row['accuracy_hi'])}]",
        )
        for row in results["reward_models"]
    ]
    policies = [
        (
            row["policy"],
            number(row["score"]),
            f"{number(row['kl_k1'])} ± {number(row['kl_k1_se'])}",
            number(row["length"]),
            percent(row["missing_eos"]),
        )
        for row in results["policies"]
    ]
    return [
        Table(("seed", "model", "accuracy", "interval"), models, "On held-out pairs.", "The reward models"),
        Table(
            ("policy", "reward", "KL, nats", "tokens", "cut"),
            policies,
            "At their ends, on test prompts; the reward is that of the last batch, in standard deviations.",
            "The policies",
        ),
    ]


def _samples(rows: Sequence[Row]) -> list[Part]:
    cells = [(row["method"], row["combination"], str(row["prompt"]), row["response"]) for row in rows]
    return [Table(("method", "combination", "prompt", "answer"), cells, "", "Read the answers")] if cells else []


def _run(results: Results) -> list[Part]:
    again = f"$ pyrite recipe {results['recipe']} --scale {results['scale']} --seeds {len(results['seeds'])}"
    took = f"The runs took {number(results['seconds'])} seconds."
    parts: list[Part] = [Text(f"{took} To repeat it:\n\n{again}", title="The run")]
    if results.get("stages"):
        parts.append(Figure(stages(_grouped(results["stages"])), "Time of the stages."))
    for key, label in (("config", "Full configuration"), ("manifest", "Versions, hardware and inputs")):
        if results.get(key):
            parts.append(Keys(results[key], label))
    return parts


def _grouped(rows: Sequence[Row]) -> list[Row]:
    """Stages of one kind as one bar: "ppo brief" and "ppo kind" are both ppo."""
    total: dict[str, float] = {}
    for row in rows:
        kind = str(row["stage"]).split(",")[0]
        kind = kind.split()[0] if kind.startswith(("ppo ", "dpo ", "answers")) else kind
        kind = "soups" if "soup " in str(row["stage"]) else kind
        total[kind] = total.get(kind, 0.0) + row["seconds"]
    return [{"stage": stage, "seconds": seconds} for stage, seconds in total.items()]
