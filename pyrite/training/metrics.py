"""What a round leaves behind: pairs on disk, a row of metrics, what was spent; and where proxy and gold have parted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyrite.core import runs
from pyrite.core.processes import on_main, say
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.math import statistics
from pyrite.math.statistics import fit_rl
from pyrite.models.policy import Policy
from pyrite.training.annotators import Discriminator, Judged
from pyrite.training.evaluation import Evaluation, Evaluator, Measurement, Truth
from pyrite.training.loop import Shift
from pyrite.training.rounds import Answer

# Overoptimization -----------------------------------------------------------------------------------------------------

# Watching a run for overoptimization: has the proxy parted from gold, and where?.


NEEDS = ("gold", "gold_se", "proxy", "kl_k1")
SURE = 2.0  # standard errors of the difference
FAR = 10.0  # times the largest d measured: a peak beyond is not told


def check_stopping(patience: int | None, evaluation: Evaluation) -> None:
    """Raises ValueError if a run is to be stopped by numbers that nobody measures."""
    if patience is not None and not (evaluation.gold and evaluation.proxy):
        raise ValueError("--early-stopping-patience compares gold with a proxy: give --gold, and --proxy")


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The measurement with the highest gold, the first of equal ones; None without any."""
    measured = [row for row in rows if all(name in row for name in NEEDS)]
    return max(measured, key=lambda row: row["gold"]) if measured else None


def parted(rows: Sequence[Mapping[str, Any]], *, patience: int = 2) -> Mapping[str, Any] | None:
    """The measurement at which the proxy parted from gold, once it is sure; None as long as it is not.

    Each of the last `patience` measurements has gold below the best by more than 2 √(se² + se_best²), and a proxy no
    lower than there. Rows need gold, gold_se, proxy and kl_k1; others are passed over. The errors count as independent,
    though the prompts are the same, so it is slow to say so.

    >>> row = {"gold_se": 0.1, "kl_k1": 1.0}
    >>> rows = [row | {"gold": g, "proxy": p} for g, p in ((1.0, 0.0), (2.0, 1.0), (1.5, 2.0), (1.4, 3.0))]
    >>> parted(rows)["gold"]
    2.0
    """
    top = best(rows)
    measured = [row for row in rows if all(name in row for name in NEEDS)]
    if top is None or len(measured) - measured.index(top) <= patience:
        return None
    last = measured[-patience:]
    fallen = all(top["gold"] - row["gold"] > SURE * math.hypot(top["gold_se"], row["gold_se"]) for row in last)
    return top if fallen and all(row["proxy"] >= top["proxy"] for row in last) else None


def fitted(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Least squares of gold and proxy, relative to the first row, as d (a − b ln d) of d = √KL, with gold's peak.

    gold_fit_a, gold_fit_b, proxy_fit_a, proxy_fit_b, each where 3 later rows or more have it at different positive KL;
    gold_peak_kl in nats and gold_peak, the gold there, where gold turns within 10 times the largest d. KL is the exact
    one where it was measured, else k1; rows without both are passed over. Gao et al. 2022, arXiv:2210.10760, section 1.

    >>> rows = [{"gold": 1.0, "kl_k1": 0.0}]
    >>> rows += [{"gold": 1.0 + d * (0.35 - 0.15 * math.log(d)), "kl_k1": d * d} for d in (1.0, 2.0, 3.0)]
    >>> {name: round(value, 6) for name, value in fitted(rows).items()}
    {'gold_fit_a': 0.35, 'gold_fit_b': 0.15, 'gold_peak_kl': 14.391916, 'gold_peak': 1.56905}
    """
    found: dict[str, float] = {}
    for name in ("gold", "proxy"):
        points = [(_nats(row) ** 0.5, row[name]) for row in rows[1:] if name in row and _nats(row) > 0]
        if not rows or name not in rows[0] or len({d for d, _ in points}) < 3:
            continue
        d, values = torch.tensor(points, dtype=torch.float64).unbind(1)
        fit = fit_rl(d, values - rows[0][name])
        found |= {f"{name}_fit_a": fit.a, f"{name}_fit_b": fit.b}
        if name == "gold" and fit.peak <= FAR * d.max().item():
            found |= {"gold_peak_kl": fit.peak**2, "gold_peak": rows[0]["gold"] + fit.peak_gold}
    return found


def _nats(row: Mapping[str, Any]) -> float:
    """KL of a measurement; 0 of a row without."""
    return row.get("kl_exact", row.get("kl_k1", 0.0))


# Metrics of a round ---------------------------------------------------------------------------------------------------

# What every online round leaves behind: its pairs on disk, its row of metrics, what was spent.


SHOWN = ("gold", "proxy", "kl_k1", "kl_exact")  # what a run ends by saying


@dataclass
class Journal:
    """The books of a run of rounds; `start` and `last` are its first and last row, `rows` all of them."""

    run: Run
    evaluator: Evaluator
    policy: Policy
    discriminator: Discriminator | None = None
    part: str = "online"
    patience: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    labels: int = 0
    answers: int = 0
    truth: Truth | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        asking, gold = self.evaluator.asking, self.evaluator.gold
        if gold:
            name = str(self.evaluator.options.gold)
            account = asking.account(self.run.folder, name, "score") if asking.counted else None
            self.truth = Truth(gold, name, asking, account)

    @property
    def start(self) -> dict[str, Any]:
        return self.rows[0]

    @property
    def last(self) -> dict[str, Any]:
        return self.rows[-1]

    def begin(self, done: int) -> None:
        """Measure the start, or read what a stopped run has written, up to its last checkpoint."""
        self.run.rewind(done, part=self.part)
        self.run.wait()
        self.rows = [_unnamed(row) for row in runs.read_metrics(self.run.folder)]
        self.run.wait()  # nothing is written before everybody has read
        if self.rows:
            self.labels, self.answers = int(self.last["labels"]), int(self.last["answers"])
            return
        self._log({"step": 0, "labels": 0, "answers": 0, **self.measure(0)})
        self._keep_best()

    def measure(self, step: int, *, over: bool = False) -> dict[str, float]:
        """Gold, proxy, KL and length of answers to held-out prompts; how often gold prefers them to the start's; how
        often the proxy, the policy's own log-ratio and a discriminator rank two fresh answers as gold does."""
        answers = self.evaluator(self.policy, gold=False)
        paid: dict[str, float] = {}
        if self.truth:
            gold = self._gold(self.truth, answers, step, over=over)
            answers = answers if gold is None else replace(answers, values={"gold": gold, **answers.values})
            paid = self.truth.spent(step)
        measured = _means(answers) | paid
        return measured | self._ranked(answers, step) if "gold" in answers.values else measured

    def write(
        self,
        number: int,
        drawn: int,
        judged: Judged,
        learned: dict[str, float],
        *,
        measured: bool,
        over: bool = False,
    ) -> None:
        """After a round that drew so many answers."""
        labelled, answers = judged.labelled, judged.answers
        pairs = [_row(answers[p.chosen], answers[p.rejected], p.strength, p.source) for p in labelled.pairs]
        self.labels += labelled.labels
        found = {"pairs": len(pairs), "ties": labelled.ties, "no_verdict": labelled.missing}
        found |= {**judged.found, **self._agreement(pairs), **learned}
        if not pairs:
            say(
                f"online: round {number + 1} gave no pair ({labelled.ties} ties, {labelled.missing} without verdict): "
                "skipped"
            )
        if self.run.writes and pairs:
            data.write(pairs, self.run.folder / "rounds" / f"{number + 1:05d}.parquet")
        self.log(number, drawn, found, measured=measured, over=over)

    def log(self, number: int, drawn: int, found: dict[str, float], *, measured: bool, over: bool = False) -> None:
        """The row of a round, after what it measures; of the run's last one if it is `over`."""
        self.answers += drawn
        row = {"step": number + 1, "labels": self.labels, "answers": self.answers, **found}
        if not measured:
            self._log(row)
            return
        row |= self.measure(number + 1, over=over)
        self._log(row | fitted([*self.rows, row]))
        self._keep_best()

    def parted(self) -> bool:
        """Whether the proxy has parted from gold, where that is watched; said once it has."""
        watched = self.patience is not None and "gold" in self.last
        found = on_main(parted)(self.rows, patience=self.patience) if watched else None
        if found:
            say(
                f"{self.part}: the proxy has parted from gold at KL = {found['kl_k1']:.1f} (step {found['step']}: gold "
                f"{found['gold']:.3g}, now {self.last['gold']:.3g}); stopped, best/ holds that policy"
            )
        return found is not None

    @property
    def fit(self) -> dict[str, float]:
        """Gold and proxy against √KL, over the whole run."""
        return fitted(self.rows)

    @property
    def shift(self) -> Shift:
        """How far the policy has gone from its start: the KL of the last measurement, nats an answer."""
        row = next(row for row in reversed(self.rows) if "kl_k1" in row)
        return Shift("kl", row["kl_k1"], row["kl_k1_se"], least=0.01)

    def tell(self) -> None:
        """Say gold, proxy and KL of the start and the end, each with its standard error, negative ones as they are."""
        shown = [name for name in SHOWN if f"{name}_se" in self.start | self.last]
        ends = [f"{name} {_told(self.start, name)} -> {_told(self.last, name)}" for name in shown]
        say(f"{self.part}: {', '.join(ends)}, after {self.last['step']} steps and {self.answers} answers")

    def _log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.run.log(part=self.part, **row)

    def _keep_best(self) -> None:
        """Save the policy where this measurement is the best so far and a best one is wanted."""
        top = best(self.rows) if self.patience is not None else None
        if top and top["step"] == self.last["step"] and self.run.writes:
            self.policy.save(self.run.folder / "best")
            runs.write_json(self.run.folder / "best.json", {"part": self.part, **top})

    def _gold(self, truth: Truth, answers: Measurement, step: int, *, over: bool) -> Tensor | None:
        """Gold of the answers, where this measurement asks for it."""
        measured = sum("kl_k1" in row for row in self.rows)
        if not truth.due(measured, over=over):
            return None
        asked, said = [text.plain(row["prompt"]) for row in answers.rows], [row["response"] for row in answers.rows]
        return truth(asked, said, answers.drawn.prompt, step=step)

    def _ranked(self, answers: Measurement, step: int) -> dict[str, float]:
        """What gold says of the start's answers, and of those who rank these."""
        found: dict[str, float] = {}
        first, mine = self.run.folder / "start.json", answers.by_prompt("gold")
        if self.run.writes and not step and not first.exists():
            runs.write_json(first, [None if value != value else value for value in mine.tolist()])
        self.run.wait()
        if first.exists():
            start = torch.tensor([math.nan if v is None else v for v in runs.read_json(first)], dtype=torch.float64)
            both = mine.isfinite() & start.isfinite()
            found |= {"win_rate": statistics.win_rate(mine[both], start[both]).item()} if both.any() else {}
        ranked = {"proxy": answers.values.get("proxy"), "policy": answers.values.get("kl_k1")}
        if self.discriminator:
            ranked["live"] = self.discriminator.scores(drawn_answers(answers, self.evaluator)).mean(0)
        accuracies = {f"{name}_accuracy": _accuracy(answers, s) for name, s in ranked.items() if s is not None}
        return found | {name: value for name, value in accuracies.items() if value is not None}

    def _agreement(self, pairs: list[dict[str, Any]]) -> dict[str, float]:
        """How often gold prefers the chosen answer too, ties one half; not asked where gold is asked sparingly."""
        if not self.evaluator.gold or self.evaluator.asking.sparing or not pairs:
            return {}
        asked = [text.plain(pair["prompt"]) for pair in pairs]
        chosen, rejected = (self.evaluator.gold(asked, [p[side] for p in pairs]) for side in ("chosen", "rejected"))
        return {"agreement": statistics.wins(chosen, rejected).mean().item()}


def drawn_answers(answers: Measurement, evaluator: Evaluator) -> list[Answer]:
    """Measured answers as discriminators read them."""
    tokens, owner = answers.drawn.responses(), answers.drawn.prompt.tolist()
    return [
        Answer(row["prompt_id"], row["prompt"], row["response"], row["finished"], list(evaluator.ids[p]), ids)
        for row, p, ids in zip(answers.rows, owner, tokens, strict=True)
    ]


def _row(chosen: Answer, rejected: Answer, strength: float, source: str) -> dict[str, Any]:
    both = {"chosen": chosen.response, "rejected": rejected.response}
    return {"prompt_id": chosen.prompt_id, "prompt": chosen.prompt, **both, "strength": strength, "source": source}


def _accuracy(answers: Measurement, scores: Tensor) -> float | None:
    """Of every two answers to a prompt that gold tells apart, the share a score ranks as gold does, ties ½."""
    gold, owner = answers.values["gold"].double(), answers.drawn.prompt
    a, b = _couples(owner)
    told_apart = (gold[a] < gold[b]) | (gold[a] > gold[b])  # not where one of them is unknown
    a, b = a[told_apart], b[told_apart]
    if not len(a):
        return None
    better, worse = torch.where(gold[a] > gold[b], a, b), torch.where(gold[a] > gold[b], b, a)
    return statistics.wins(scores[better].double(), scores[worse].double()).mean().item()


def _couples(owner: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every two answers of one prompt; answers of a prompt stand together."""
    sizes = torch.bincount(owner).tolist()
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    pairs = [(begin + i, begin + j) for begin, n in zip(begins, sizes, strict=True) for i in range(n) for j in range(i)]
    return tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))  # type: ignore[return-value]


def _means(answers: Measurement) -> dict[str, float]:
    measured: dict[str, float] = {}
    for name, value in answers.summary().items():
        measured |= {name: value["mean"], f"{name}_se": value["se"]}
    return measured


def _told(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3g} ± {row[f'{name}_se']:.2g}" if name in row else "not asked"


def _unnamed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "part"}
