"""The page of the overoptimization recipe: results in, HTML out."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyrite.recipes.overoptimization.policies import policy_sections
from pyrite.report.charts import NAMES, OBJECTIVES, mechanism, overoptimization, reach, stages
from pyrite.report.page import (
    Chart,
    Claims,
    Figure,
    Keys,
    Numbers,
    Part,
    Row,
    Samples,
    Table,
    Text,
    Views,
    number,
    page,
    percent,
)

Results = Mapping[str, Any]
ACROSS = {"√KL": "sqrt_kl", "n": "n"}
BANDS = "Bands are intervals; the dot marks the peak of gold."


def overoptimization_page(results: Results) -> str:
    """The whole page from `results.json`; mechanism, samples, fits and the like may be absent.

    Raises ValueError where there is no curve of single reward models.
    """
    noises = _noises(results["curves"])
    story = _story(results["curves"], noises[0])
    parts: list[Part] = [
        _headline(story),
        _gap(results["curves"], noises),
        *_ensembles(results["curves"], noises),
        *policy_sections(results),
        *_mechanism(results, noises),
        *_samples(results),
        *([Claims(results["claims"], title="The published claims")] if results.get("claims") else []),
        *_models(results),
        *_fits(results),
        *_run(results),
    ]
    seeds = ("seed " if len(results["seeds"]) == 1 else "seeds ") + ", ".join(map(str, results["seeds"]))
    eyebrow = f"pyrite · recipe {results['recipe']} · scale {results['scale']} · {seeds}"
    return page(_title(story), parts, lead=_lead(story), eyebrow=eyebrow)


def _noises(curves: Sequence[Row]) -> list[float]:
    return sorted({row["noise"] for row in curves}, reverse=True)


def _story(curves: Sequence[Row], noise: float) -> dict[str, Any]:
    """What happened to single reward models at this noise: the peak, the end, and whether gold fell."""
    line = sorted((r for r in curves if r["objective"] == "single" and r["noise"] == noise), key=lambda r: r["n"])
    if not line:
        raise ValueError(f"results: no curve of single reward models at noise {noise}; the page starts from it")
    top, end = max(line, key=lambda row: row["gold"]), line[-1]
    return {
        "noise": noise,
        "top": top,
        "end": end,
        "gold": _verdict(top, end),
        "rises": end["proxy"] > top["proxy"],
    }


def _verdict(top: Row, end: Row) -> str:
    """fell: the intervals at peak and end are apart; unclear: they meet; rose: the end is the peak."""
    if top["n"] == end["n"]:
        return "rose"
    low, high = top.get("gold_lo"), end.get("gold_hi")
    return "fell" if low is not None and high is not None and high < low else "unclear"


def _title(story: dict[str, Any]) -> str:
    if story["gold"] == "rose":
        return "The gold reward rose to the end."
    gold = "The gold reward fell." if story["gold"] == "fell" else "The gold reward did not."
    return f"The proxy kept rising. {gold}" if story["rises"] else "The gold reward stopped rising."


def _lead(story: dict[str, Any]) -> str:
    top, end = story["top"], story["end"]
    how = f"labels of which {percent(story['noise'])} are wrong" if story["noise"] else "labels without noise"
    start = f"Draw n answers, keep the one that a single reward model likes best. The model learned from {how}."
    if top["n"] == end["n"]:
        tail = f"Gold was still at its best, {number(end['gold'], sign=True)}, at n = {end['n']:,}."
    else:
        tail = (
            f"Gold peaked at **n = {top['n']:,}** ({number(top['gold'], sign=True)}) and ended at "
            f"**{number(end['gold'], sign=True)}**, while the proxy went "
            f"from {number(top['proxy'], sign=True)} to **{number(end['proxy'], sign=True)}**."
        )
    doubt = " The fall is within the intervals." if story["gold"] == "unclear" else ""
    unit = " Both are in standard deviations of the initial policy, whose mean is 0."
    return f"{start} {tail}{doubt}{unit}"


def _headline(story: dict[str, Any]) -> Numbers:
    def group(name: str, row: Row) -> tuple[str, list[tuple[str, str]]]:
        values = [("gold", number(row["gold"], sign=True)), ("proxy", number(row["proxy"], sign=True))]
        return f"{name}, n = {row['n']:,}", [*values, ("KL, nats", number(row["kl"]))]

    groups = [group("Where gold peaks", story["top"]), group("At the end", story["end"])]
    return Numbers(groups[1:] if story["top"]["n"] == story["end"]["n"] else groups)


def _gap(curves: Sequence[Row], noises: Sequence[float]) -> Views:
    caption = (
        "What the single reward models believe (proxy, dashed) and what is true (gold, solid). The shaded gap "
        "is reward that is believed and not there. Thin lines are the models one by one, the thick line is their "
        f"average. {BANDS} Point at a curve for its values."
    )
    alone = [row for row in curves if row["objective"] in ("single", "member")]
    several = any(row["objective"] == "member" for row in alone)
    views: dict[tuple[str, ...], Part] = {}
    for noise in noises:
        for name, x in ACROSS.items():
            chart = overoptimization(
                curves,
                noise=noise,
                x=x,
                objectives=("single",),
                members=several,
                domain=reach(alone),
                height=340,
            )
            views[percent(noise), name] = Figure(chart, caption)
    return Views(("label noise", "against"), views)


def _ensembles(curves: Sequence[Row], noises: Sequence[float]) -> list[Part]:
    found = [name for name in OBJECTIVES if any(row["objective"] == name for row in curves)]
    if len(found) < 2:
        return []
    text = (
        "The same answers, chosen by several models at once: by their **mean**, by the lowest of their "
        "scores (**WCO**, worst case), or by the mean less a penalty on their variance (**UWO**)."
    )
    return [
        Text(text, title="What ensembles change"),
        _gold_by_scorer(curves, noises),
        _scorers(curves, noises, found),
    ]


def _gold_by_scorer(curves: Sequence[Row], noises: Sequence[float]) -> Views:
    shared = reach([row for row in curves if row["objective"] in OBJECTIVES], ("gold",))
    views: dict[tuple[str, ...], Part] = {
        (percent(noise), name): Figure(
            overoptimization(curves, noise=noise, x=x, quantities=("gold",), domain=shared),
            f"Gold alone. {BANDS}",
        )
        for noise in noises
        for name, x in ACROSS.items()
    }
    return Views(("label noise", "against"), views)


def _scorers(curves: Sequence[Row], noises: Sequence[float], found: Sequence[str]) -> Views:
    named = [row for row in curves if row["objective"] in OBJECTIVES]
    views: dict[tuple[str, ...], Part] = {}
    for noise in noises:
        at = [name for name in found if any(r["objective"] == name and r["noise"] == noise for r in curves)]
        drawn: list[Chart] = [
            overoptimization(curves, noise=noise, objectives=(name,), domain=reach(named), height=210) for name in at
        ]
        caption = f"Gold and proxy of each scorer, on one scale. {BANDS}"
        views[(percent(noise),)] = Figure(drawn, caption, names=[NAMES[name] for name in at])
    return Views(("label noise",), views)


def _mechanism(results: Results, noises: Sequence[float]) -> list[Part]:
    found = results.get("mechanism")
    if not found:
        return []
    parts: list[Part] = [
        Text(f"**{found['name'][:1].upper()}{found['name'][1:]}.** {found['text']}", title="How the proxy is fooled")
    ]
    if found.get("shares"):
        caption = "Share of the chosen answers that carry the mark; dashed, their share among all answers."
        levels = [noise for noise in noises if any(row["noise"] == noise for row in found["shares"])]
        views: dict[tuple[str, ...], Part] = {
            (percent(noise),): Figure(mechanism(found["shares"], noise=noise), caption) for noise in levels
        }
        parts.append(Views(("label noise",), views))
    if found.get("truncated"):
        cut = found["truncated"]
        parts.append(
            Text(
                f"Answers cut off before they end are {percent(cut['rate'])} of all answers and "
                f"{percent(cut['share_among_winners'])} of the chosen ones."
            )
        )
    if found.get("exclusion"):
        parts += _exclusion(results["curves"], found["exclusion"])
    return parts


def _exclusion(curves: Sequence[Row], excluded: Sequence[Row]) -> list[Part]:
    """Both pools side by side at every noise level that was run without the fooling answers."""
    text = (
        "The test: take these answers, and those cut off, out of the pool and choose again. "
        "If they are the cause, the fall goes with them."
    )
    views: dict[tuple[str, ...], Part] = {}
    for noise in _noises(excluded):
        pools = [
            [r for r in rows if r["noise"] == noise and r["objective"] in OBJECTIVES] for rows in (curves, excluded)
        ]
        shared = reach([row for pool in pools for row in pool], ("gold",))
        drawn: list[Chart] = [overoptimization(p, quantities=("gold",), domain=shared, height=260) for p in pools if p]
        names = ["All answers", "Without the fooling answers"][-len(drawn) :]
        views[(percent(noise),)] = Figure(drawn, f"Gold of each scorer's choice. {BANDS}", names=names)
    return [Text(text), Views(("label noise",), views)]


def _samples(results: Results) -> list[Part]:
    if not results.get("samples"):
        return []
    words = (results.get("mechanism") or {}).get("words") or {}
    text = (
        "What each scorer picks as it may choose among more answers. Blue is a high reward, orange a low "
        "one: a blue proxy beside an orange gold is an answer that fooled its scorer. Marked words give it away."
    )
    return [Text(text, title="Read the answers"), Samples(results["samples"], words)]


def _models(results: Results) -> list[Part]:
    rows = results.get("reward_models")
    if not rows:
        return []
    columns = ("label noise", "member", "accuracy", "interval", "agreement with the others")
    cells = [
        (
            percent(row["noise"]),
            row["member"],
            percent(row["accuracy"]),
            f"[{percent(row.get('accuracy_lo'))}, {percent(row.get('accuracy_hi'))}]",
            percent(row.get("agreement")),
        )
        for row in rows
    ]
    return [Table(columns, cells, "Accuracy on held-out pairs without noise.", title="The reward models")]


def _fits(results: Results) -> list[Part]:
    rows = results.get("fits")
    if not rows:
        return []
    columns = ("label noise", "scorer", "a", "b", "peak at KL, nats", "gold at the peak")
    cells = [
        (
            percent(row["noise"]),
            NAMES.get(row["objective"], row["objective"]),
            *(row.get(key) for key in ("a", "b", "peak_kl", "peak_gold")),
        )
        for row in rows
    ]
    return [Table(columns, cells, "Least-squares fits of gold = d (a − b d), d = √KL.", title="Fitted curves")]


def _run(results: Results) -> list[Part]:
    parts: list[Part] = []
    again = f"$ pyrite recipe {results['recipe']} --scale {results['scale']} --seeds {len(results['seeds'])}"
    took = f"The run took {number(results['seconds'])} seconds." if results.get("seconds") is not None else ""
    parts.append(Text(f"{took} To repeat it:\n\n{again}", title="The run"))
    if results.get("stages"):
        parts.append(Figure(stages(results["stages"]), "Time of each stage."))
    for key, label in (("config", "Full configuration"), ("manifest", "Versions, hardware and inputs")):
        if results.get(key):
            parts.append(Keys(results[key], label))
    return parts
