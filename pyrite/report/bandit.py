"""What the job bandit found, as charts, tables and a page."""

from collections.abc import Iterable
from math import log10

from pyrite.report.charts import Axis, Chart, Row, curves
from pyrite.report.page import Part, details, figure, number, page, percent, table, text

Named = Iterable[tuple[str, Row]]  # names of samplers, and their summaries
LEAST = 1e-16  # what is smaller is rounding: drawn here

TITLES = {"error": "log10 of the error, max |δ| in nats", "value_gap": "log10 of the value lost, nats"}
READING = (
    "δ is the difference in reward of two responses less the difference the policy implies, β times the gap of "
    "log π/π_ref; at the optimum it is 0 for every pair. On this scale **linear convergence is a straight line** and "
    "**quadratic convergence bends down**, twice as many digits with every update, until rounding (about 1e-15) or "
    "the noise of sampled pairs stops it. An order of 1 is linear, 2 quadratic."
)


def bandit_page(results: Row) -> str:
    """The whole page from `results.json`. Raises ValueError if it holds no curve."""
    config, samplers = results["config"], results["samplers"].items()
    gradients = "exact gradients" if config["samples"] is None else f"{config['samples']:,} pairs drawn a step"
    world = f"{config['actions']} responses, β = {config['beta']:g}, {gradients}, rate: {config['rate']}"
    count = f"{config['instances'] * config['seeds']:,} instances ({config['seeds']} repetitions)"
    caption = "Medians over instances; the bands hold the middle 90 %."
    drawn = [convergence(results["curves"], key) for key in TITLES]
    parts: list[Part] = [
        figure(drawn, caption, names=["Error", "Value lost"], title="Convergence"),
        text(READING),
        orders(samplers, title="Orders"),
        *bounds(samplers),
        *floors(samplers),
        details(config, "Full configuration", title="The run"),
    ]
    return page("Samplers in an exact world", parts, lead=f"{world}; {count}.", eyebrow="pyrite · bandit")


def convergence(rows: Iterable[Row], key: str = "error") -> Chart:
    """The error, or the value lost ("value_gap"), against updates, by sampler."""
    digits = [{**row, **{name: _digits(row.get(name)) for name in (key, f"{key}_lo", f"{key}_hi")}} for row in rows]
    return curves(digits, Axis("step", "updates"), Axis(key, TITLES[key]), by="sampler", height=300)


def _digits(value: float | None) -> float | None:
    return None if value is None else log10(max(value, LEAST))


def orders(samplers: Named, title: str = "") -> Part:
    """Orders, rates and errors of samplers."""
    names = {
        "order": "order",
        "step_order": "order of one step",
        "rate": "rate",
        "contraction": "left by a step",
        "steps_to_1e-06": "updates to 1e-6",
        "error": "last error",
        "drift": "drift from the optimum",
    }
    means = {"value_gap": "value lost", "reward": "reward", "kl": "KL, nats"}
    rows = [
        (name, *(row[key] for key in names), percent(row["diverged"]), *(row[key]["mean"] for key in means))
        for name, row in samplers
    ]
    caption = "Medians over instances; means of what is in nats."
    return table(("sampler", *names.values(), "diverged", *means.values()), rows, caption, title)


def bounds(samplers: Named) -> list[Part]:
    """How the theorems' bounds fared, if they were promised."""
    found = [(name, row["bound"]) for name, row in samplers if row["bound"]]
    rows = [(name, str(b["constant"]), b["order"], percent(b["holds"]), b["closest"]) for name, b in found]
    columns = ("sampler", "constant", "order", "instances where it holds", "most of it used at the first update")
    caption = "max |δ| ≤ c^t (order 1) or c^(2^t − 1) (order 2) for rewards in [0, 1]."
    return [table(columns, rows, caption, title="The theorems' bounds")] if rows else []


def floors(samplers: Named) -> list[Part]:
    """Where drawn pairs stopped, if pairs were drawn."""
    found = [(name, row["floor"]) for name, row in samplers if row["floor"]]
    rows = [(name, number(floor["measured"]["mean"], 5), number(floor["predicted"], 5)) for name, floor in found]
    caption = "Mean |δ| over the second half of the run, and what sampling noise alone leaves near the optimum."
    return [table(("sampler", "measured", "predicted"), rows, caption, title="Noise floor")] if rows else []
