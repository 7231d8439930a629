"""What recipes share: chains of stages, claims and their verdicts, intervals over chains, results.json and the page."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data.files import Row
from pyrite.math import statistics
from pyrite.math.ranges import Count, Natural
from pyrite.math.seeds import derive
from pyrite.report import charts
from pyrite.report.page import Part, details, figure, number, page, table, text
from pyrite.report.page import claims as claims_table


@dataclass(frozen=True)
class Config:
    """One or more whole chains, each with a seed of its own."""

    scale: str = "toy"
    """Which settings. toy: minutes on 2 cores; toy_wide, of overoptimization: with more KL strengths, fewer pairs and
    larger reward models. Both use the embedded toy world; for other models and data run the jobs."""
    out: Path | None = None
    """Folder of the run, new or empty; runs/RECIPE by default."""
    seeds: Count = 1
    """Independent whole chains."""
    first_seed: Natural = 0
    """Seed of the first chain; the next ones follow it."""


@dataclass(frozen=True)
class Plan:
    """What identifies a run of a recipe: other settings are another run."""

    out: Path
    scale: str
    seeds: int
    first_seed: int
    settings: Any


@dataclass(frozen=True)
class Chain:
    """One seed: its folder, and its runs by the name of their stage."""

    seed: int
    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def path(self, *parts: str) -> str:
        """A path in the folder, as jobs are given it."""
        return str(self.folder.joinpath(*parts))

    def run(self, stage: str, config: Any, *stream: str, draws: bool = True) -> None:
        """Run a stage, by the job whose config this is, unless it is done.

        config.out is a path in the chain's folder. A seed is drawn for `stream`, by default the name of that path;
        none for a stage that draws nothing.
        """
        drawn = draws and hasattr(config, "seed")
        seed = {"seed": derive(self.seed, *(stream or (config.out.name,)))} if drawn else {}
        job = importlib.import_module(type(config).__module__)
        self.runs[stage] = job.run(replace(config, out=self.folder / config.out, **seed))

    def results(self, stage: str) -> Row:
        """What the job of a stage returned."""
        return self.runs[stage].results or {}


@dataclass(frozen=True)
class Recipe:
    """An experiment: settings by scale, how a chain is run, what is measured of all chains, and what the page says."""

    name: str
    scales: dict[str, Any]
    chain: Callable[[Chain, Any], None]
    """Runs every stage of a chain that is not done yet."""
    collect: Callable[..., Row]
    """All that the page shows, "curves" and "claims" at least, from the chains and the settings (and from `once`)."""
    story: Callable[[Row], tuple[str, str, list[Part]]]
    """Title, lead and sections of the page, from results.json; claims and timing are added to them."""
    figures: Callable[[Row], Mapping[str, charts.Chart]]
    """The charts worth a file of their own, by name, from results.json."""
    once: Callable[[Chain, Any], None] | None = None
    """Runs what all chains share: a chain in the folder of the recipe, with the first seed."""
    note: str = ""
    """What a reader should know about the claims."""

    def folder(self, config: Config) -> Path:
        """Where the run goes."""
        return config.out or Path("runs") / self.name

    def run(self, config: Config) -> Path:
        """Run every chain and write results.json, figures and the page. What is done already is not done again.

        Returns the page's path. Raises ValueError for a scale that the recipe does not have.
        """
        if config.scale not in self.scales:
            raise ValueError(f"recipe {self.name}: --scale {config.scale}: there is {', '.join(self.scales)}")
        out, settings = self.folder(config), self.scales[config.scale]
        run = runs.start(self.name, Plan(out, config.scale, config.seeds, config.first_seed, settings), inputs={})
        if run.done:
            return out / "report.html"
        run.open()
        shared = [Chain(config.first_seed, out)] if self.once else []
        if self.once:
            self.once(shared[0], settings)
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        chains = [Chain(seed, out / f"seed_{seed}") for seed in seeds]
        for chain in chains:
            say(f"{self.name}: chain with seed {chain.seed}")
            self.chain(chain, settings)
        say(f"{self.name}: curves, claims and the page")
        seconds = {
            (chain, stage): done.results["seconds"]
            for chain, one in enumerate((*shared, *chains))
            for stage, done in one.runs.items()
            if done.results
        }
        found = {
            "recipe": self.name,
            "scale": config.scale,
            "seeds": list(seeds),
            "seconds": round(sum(seconds.values()), 1),
            "stages": [
                {"stage": stage, "seconds": took} for (chain, stage), took in seconds.items() if chain <= len(shared)
            ],
            **self.collect(chains, settings, *shared),
            "config": asdict(settings),
            "manifest": runs.read_json(out / "manifest.json"),
        }
        runs.write_json(out / "results.json", found)
        for name, chart in self.figures(found).items():
            charts.save(chart, out / "figures", name)
        runs.write_text(out / "report.html", self.page(found))
        tell(found["claims"])
        run.finish(chains=len(chains))
        return out / "report.html"

    def page(self, results: Row) -> str:
        """The whole page, from results.json."""
        title, lead, parts = self.story(results)
        seeds = results["seeds"]
        told = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
        eyebrow = f"pyrite · recipe {self.name} · scale {results['scale']} · {told}"
        if results.get("claims"):
            parts = [
                *parts,
                text(f"{CLAIMED} {self.note}", title="The published claims"),
                claims_table(results["claims"]),
            ]
        return page(title, [*parts, *_repeat(results)], lead=lead, eyebrow=eyebrow)


CLAIMED = "A claim holds if its whole 95 % interval lies on the claimed side, and does not if it lies on the other."


def _repeat(results: Row) -> list[Part]:
    """How long the run took, how to repeat it, and on what it ran."""
    seeds = results["seeds"]
    again = f"$ pyrite recipe {results['recipe']} --scale {results['scale']} --seeds {len(seeds)}"
    again += f" --first-seed {seeds[0]}" if seeds[0] else ""
    took = f"The runs took {number(results.get('seconds'))} seconds."
    parts: list[Part] = [text(f"{took} To repeat them:\n\n{again}", title="The run")]
    kinds: dict[str, float] = {}
    for row in results.get("stages") or []:
        kind = str(row["stage"]).split(",")[0].split(":")[0]
        kinds[kind] = kinds.get(kind, 0.0) + row["seconds"]
    if kinds:
        rows = [
            {"label": kind, "value": seconds, "text": f"{seconds:,.1f} s", "color": charts.BLUE}
            for kind, seconds in kinds.items()
        ]
        parts.append(figure(charts.bars(rows), "Time by kind of stage."))
    for key, label in (("config", "Full configuration"), ("manifest", "Versions, hardware and inputs")):
        if results.get(key):
            parts.append(details(results[key], label))
    return parts


# claims

Value = Callable[[Any], Tensor | float]
Rule = Callable[[float, float], bool | None]


def within(low: float = 0.0, high: float = math.inf) -> Rule:
    """Holds if the whole interval lies between `low` and `high`, does not if it lies outside; undecided otherwise."""
    return lambda lo, hi: True if low < lo and hi < high else False if hi < low or lo > high else None


POSITIVE = within()


def negligible(limit: float) -> Rule:
    """Holds if the whole interval lies below `limit`, does not if it lies above 0."""
    return lambda lo, hi: True if hi < limit else False if lo > 0 else None


def contains(value: float) -> Rule:
    """Holds if the interval contains `value`."""
    return lambda lo, hi: lo <= value <= hi


@dataclass(frozen=True)
class Claim:
    """What was published, the number that a chain gives for it, and what its interval must do for it to hold.

    value: a number, or a tensor whose mean it is, of what the recipe has measured of a chain. It raises KeyError if
    something that it needs was not run.
    """

    id: str
    source: str
    statement: str
    value: Value
    rule: Rule = POSITIVE


def claims(source: str, table: str, values: Mapping[str, Value | tuple[Value, Rule]]) -> list[Claim]:
    """Claims from a table: each line is `id | place in the source | statement`, and an indented line continues it.

    A place that begins with "not in" says that the source does not claim it. values: by id; a claim holds if its value
    is positive, unless a rule stands beside the value.
    """
    found = []
    for line in filter(None, table.replace("\n ", " ").splitlines()):
        name, place, statement = (" ".join(cell.split()) for cell in line.split("|"))
        missing = place.startswith("not in")
        told = place.replace("not in", f"not in {source}", 1) if missing else f"{source}, {place}"
        given = values[name]
        value, rule = given if isinstance(given, tuple) else (given, POSITIVE)
        found.append(Claim(name, told, statement, value, rule))
    return found


def check(
    claims: Sequence[Claim],
    chains: Sequence[Any],
    *,
    alone: Callable[[Claim, Any], tuple[float, float] | None] | None = None,
) -> list[Row]:
    """A row for each claim that can be measured: {id, source, statement, by_seed, measured, interval, holds}.

    The interval is Student's t over chains. One chain has the one that `alone` gives, and otherwise decides nothing.
    """
    rows = []
    for claim in claims:
        try:
            points = [torch.as_tensor(claim.value(chain), dtype=torch.float64).mean().item() for chain in chains]
        except KeyError:  # about something that was not run
            continue
        row: Row = {"id": claim.id, "source": claim.source, "statement": claim.statement}
        row["by_seed"] = [point if math.isfinite(point) else None for point in points]
        if len(points) > 1:
            mean, lo, hi = t_interval(points)
        else:
            mean, (lo, hi) = points[0], (alone and alone(claim, chains[0])) or (math.nan, math.nan)
        known = math.isfinite(mean + lo + hi)
        row |= {"measured": mean if math.isfinite(mean) else None, "interval": [lo, hi] if known else None}
        rows.append({**row, "holds": claim.rule(lo, hi) if known else None})
    return rows


def tell(claims: Sequence[Mapping[str, Any]]) -> None:
    """A line for each claim: verdict, what was measured, interval."""
    for row in claims:
        shown = {True: "holds", False: "does not hold", None: "undecided"}[row["holds"]]
        interval = " [{:+.3f}, {:+.3f}]".format(*row["interval"]) if row["interval"] else ""
        measured = "–" if row["measured"] is None else f"{row['measured']:+.3f}"
        say(f"  {shown:14} {measured}{interval}  {row['statement']}")


# means over chains


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of chains and its 95 % interval, by Student's t."""
    mean, lo, hi = (value.item() for value in statistics.t_interval(torch.tensor(values, dtype=torch.float64)))
    return mean, lo, hi


def spread(name: str, values: Sequence[float], *, half: float = math.nan) -> Row:
    """{name, name_lo, name_hi}: the mean of chains and its interval; of one chain its value, `half` either side."""
    mean, lo, hi = t_interval(values) if len(values) > 1 else (values[0], values[0] - half, values[0] + half)
    return {name: mean} | ({f"{name}_lo": lo, f"{name}_hi": hi} if math.isfinite(lo + hi) else {})


def over_prompts(values: Sequence[Tensor]) -> statistics.Interval:
    """Mean and 95 % interval of values by prompt, (..., Q) of each chain: over the prompts of one, or over chains."""
    if len(values) == 1:
        return statistics.bootstrap(values[0])
    return statistics.t_interval(torch.stack([value.mean(-1) for value in values], -1))


def at_equal_kl(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str) -> float:
    """How far one curve over KL, {"kl": (P,), name: (P,)}, is above another at the KL where the shorter one ends."""
    kl = min(curve["kl"].max().item() for curve in (ours, theirs))
    first, second = (statistics.where(curve["kl"], curve[name], kl) for curve in (ours, theirs))
    return first - second


def grouped(rows: Iterable[Row], *by: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in the order of their first rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return groups


def over_chains(rows: Sequence[Row], by: Sequence[str], columns: Sequence[str], *, errors: float = 1.96) -> list[Row]:
    """Rows of all chains as one for each value of `by`: how many chains, and the `spread` of each column they have.

    The interval of one chain is `errors` standard errors either side, if the row has them (NAME_se).
    """
    found = []
    for key, some in grouped(rows, *by).items():
        mean: Row = {**dict(zip(by, key, strict=True)), "chains": len(some)}
        for name in columns:
            values = [row[name] for row in some if row.get(name) is not None]
            if values:
                mean |= spread(name, values, half=errors * some[0].get(f"{name}_se", math.nan))
            known = [row[f"{name}_se"] for row in some if f"{name}_se" in row]
            mean |= {f"{name}_se": sum(known) / len(known)} if known else {}
        found.append(mean)
    return found


# curves and the bootstrap over prompts


@dataclass(frozen=True)
class Curves:
    """Curves (B, F, M) by name: B resamples (1 if as measured), F folds of the data, M points.

    The peak of a curve is found on `others`, what the other folds say: then looking for it does not create it.
    """

    own: Mapping[Any, Tensor]
    others: Mapping[Any, Tensor]

    def at_peak(self, name: Any, of: Any = None) -> Tensor:
        """The curve, or the curve `of`, where the curve `name` has its peak on the other folds; (B, F)."""
        peak = self.others[name].argmax(-1, keepdim=True)
        return self.own[name if of is None else of].gather(-1, peak).squeeze(-1)

    def fall(self, name: Any) -> Tensor:
        """From the peak to the end, (B, F)."""
        return self.at_peak(name) - self.own[name][..., -1]


def halves(values: Mapping[Any, Tensor], *, points: int | None = None, resamples: int = 0) -> Curves:
    """Means over the even and over the odd prompts, which are the folds. values: (M, Q), or (E, M, Q) of E members.

    points: only the first so many. resamples: over so many draws of prompts within each half, and of members; with 0
    over what was measured. An odd prompt out is left out.
    """
    each = next(iter(values.values())).shape[-1] // 2
    split, own = {}, {}
    for name, curve in values.items():
        members = curve if curve.dim() == 3 else curve[None]
        split[name] = torch.stack([members[..., half : 2 * each : 2] for half in (0, 1)], 1).double()  # (E, 2, M, Q/2)
    if resamples:
        g = torch.Generator().manual_seed(0)
        weights = [_draws(resamples, each, g) for _ in range(2)]
        seats = _draws(resamples, max(len(curve) for curve in split.values()), g)
        one = torch.ones(resamples, 1, dtype=torch.float64)
        for name, curve in split.items():
            means = torch.stack([torch.einsum("emq,bq->bem", curve[:, half], weights[half]) for half in (0, 1)], 1)
            own[name] = torch.einsum("bhem,be->bhm", means, seats if len(curve) > 1 else one)
    else:
        own = {name: curve.mean((0, 3))[None] for name, curve in split.items()}
    own = {name: curve[..., :points] for name, curve in own.items()}
    return Curves(own, {name: curve.flip(1) for name, curve in own.items()})


def bootstrap(claim: Claim, resampled: Any) -> tuple[float, float]:
    """The 95 % interval of a claim from resampled curves, or what holds them."""
    lo, hi = torch.quantile(torch.as_tensor(claim.value(resampled)), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return lo.item(), hi.item()


def _draws(times: int, size: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` things is drawn, over size; (times, size)."""
    drawn = torch.randint(0, size, (times, size), generator=generator)
    ones = torch.ones(times, size, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones) / size


# answers that the job evaluate drew


def answers(run: Run) -> list[Row]:
    """Every answer that a run of the job evaluate drew, with its scores."""
    return pyarrow.parquet.read_table(run.folder / "answers.parquet").to_pylist()


def by_prompt(run: Run, columns: Sequence[str]) -> dict[str, Tensor]:
    """Columns of the answers of a run of the job evaluate, (Q, K): K answers to each of Q prompts, in their order."""
    prompts = grouped(answers(run), "prompt_id").values()
    values = {name: [[float(row[name]) for row in rows] for rows in prompts] for name in columns}
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in values.items()}


def first_answers(policies: Mapping[str, Run], columns: Sequence[str], *, prompts: int) -> list[Row]:
    """The first answer of each policy to the same few prompts: {prompt, answers: [{policy, response, ...}]}."""
    firsts = {name: [row for row in answers(run) if row["sample"] == 0] for name, run in policies.items()}
    return [
        {
            "prompt": data.plain(rows[0]["prompt"]),
            "answers": [
                {"policy": name, **{key: row[key] for key in ("response", *columns)}}
                for name, row in zip(firsts, rows, strict=True)
            ],
        }
        for rows in list(zip(*firsts.values(), strict=True))[:prompts]
    ]


def answer_tables(samples: Sequence[Row], columns: Mapping[str, str], names: Mapping[str, str]) -> list[Part]:
    """`first_answers` as tables. columns: their titles; names: of the policies."""
    if not samples:
        return []
    parts: list[Part] = [text("The same prompts, answered by each policy.", title="Read the answers")]
    for sample in samples:
        rows = [
            (names.get(a["policy"], a["policy"]), *(a[key] for key in columns), a["response"])
            for a in sample["answers"]
        ]
        parts.append(table(("policy", *columns.values(), "answer"), rows, f"“{sample['prompt']}”"))
    return parts
