"""Rounds, as online and ppo run them: prompts by turn, a measurement every few rounds, and exact resumption.

A run of rounds is also watched for overoptimization: has the proxy parted from gold, and where?
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite.core import processes, runs
from pyrite.core.processes import on_main, progress, say
from pyrite.core.runs import Run
from pyrite.data import rows
from pyrite.data.files import Row
from pyrite.data.responses import Responses
from pyrite.data.rows import Fitted, OnLong
from pyrite.feedback.ledger import GoldLimits
from pyrite.math import seeds, statistics
from pyrite.math.statistics import fit_rl
from pyrite.models.policy import Policy, RewardEnsemble
from pyrite.training import loop
from pyrite.training.evaluation import Evaluation, Evaluator, Measurement, Truth
from pyrite.training.loop import Shift

# Prompts and models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The policy, the policy as it was at the start, the prompts to learn from, and the evaluator."""

    policy: Policy
    start: Policy
    weights: loop.Weights
    evaluator: Evaluator
    prompts: Fitted
    size: int
    seed: int

    def turn(self, number: int) -> tuple[list[Row], list[list[int]]]:
        """The prompts of a round, as rows and as tokens."""
        places = turn(len(self.prompts.rows), self.size, self.seed, number)
        return [self.prompts.rows[i] for i in places], [self.prompts.ids[i] for i in places]


def prepare(
    policy: Policy,
    asked: list[Row],
    evaluation: Evaluation,
    test: list[Row],
    *,
    name: str,
    size: int | None,
    seed: int,
    asking: GoldLimits,
    ensemble: str = "mean()",
    loaded: dict[Path, RewardEnsemble] | None = None,
    max_prompt: int | None = None,
    on_long: OnLong | None = None,
) -> Ready:
    """Everything that a run of rounds needs of a loaded policy. name: of the policy, for notes. size: prompts in a
    round, all by default. Other options are those of `Evaluator.load`."""
    loop.set_dropout(policy, name=name)
    weights = loop.Weights.of(policy)
    start = policy if policy.reversible else policy.frozen_copy()
    limits: dict[str, Any] = {"max_prompt": max_prompt, "on_long": on_long}
    evaluator = Evaluator.load(
        evaluation,
        policy,
        ref=start,
        seed=seed,
        prompts=test,
        asking=asking,
        ensemble=ensemble,
        loaded=loaded,
        **limits,
    )
    fitted = encoded(policy, asked, new=evaluation.max_new_tokens, **limits)
    many = len(fitted.rows)
    return Ready(policy, start, weights, evaluator, fitted, min(size or many, many), seed)


def split(
    path: str, evaluation: Evaluation, *, columns: str | None, held_out: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Prompts to learn from and prompts to measure on; none in both, under whatever preferences.

    Raises ValueError if one of them is empty.
    """
    held, derived = evaluation.eval_prompts or held_out, seeds.derive(seed, "held out")
    asked, test = rows.load_apart(path, "prompts", held, seed=derived, columns=columns, note=say)
    if not asked or not test:
        raise ValueError(
            f"{path}: {len(asked)} prompts to learn from and {len(test)} to measure on; give --held-out a share "
            "above 0, or --eval-prompts"
        )
    return asked, test


def encoded(
    policy: Policy,
    some: Sequence[Row],
    *,
    new: int,
    max_prompt: int | None = None,
    on_long: OnLong | None = None,
) -> Fitted:
    """Prompts to learn from, with room for `new` tokens behind each; long ones as `pyrite.data.rows.fit` has them."""
    return rows.fit(
        policy.tokenizer,
        some,
        most=rows.room(policy.context, new, max_prompt),
        context=policy.context,
        on_long=on_long,
        note=lambda words: say(f"to learn from: {words}"),
    )


def turn(n: int, size: int, seed: int, number: int) -> list[int]:
    """Which of n prompts round `number` takes: the next `size` of a shuffled order, then of another one, and so on.

    No prompt is asked twice before all have been asked once, and none twice in a round.
    """
    flat = range(number * size, (number + 1) * size)
    orders = {epoch: _order(n, size, seed, epoch) for epoch in {flat[0] // n, flat[-1] // n}}
    return [orders[p // n][p % n] for p in flat]


@lru_cache(maxsize=8)
def _order(n: int, size: int, seed: int, epoch: int) -> list[int]:
    """All prompts, shuffled. Those of the round that the last order began are moved behind its end."""
    order = loop.order(n, epoch, seed=seeds.derive(seed, "prompts"))
    begun = epoch * n % size
    if not begun:
        return order
    asked = set(_order(n, size, seed, epoch - 1)[-begun:])
    first = [i for i in order if i not in asked][: size - begun]
    return first + [i for i in order if i not in set(first)]


# Overoptimization -----------------------------------------------------------------------------------------------------


NEEDS = ("gold", "gold_se", "proxy", "kl_k1")
SURE = 2.0  # standard errors of the difference
FAR = 10.0  # times the largest d measured: a peak beyond it is not reported


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


# Rounds ---------------------------------------------------------------------------------------------------------------


SHOWN = ("gold", "proxy", "kl_k1", "kl_exact")  # what a run says at its end


@dataclass
class Journal:
    """The metrics of a run of rounds: `rows`, of which the first and the last are `start` and `last`.

    rankers: scores (N,) of answers, by name; measurements tell how often each ranks two answers as gold does.
    """

    run: Run
    evaluator: Evaluator
    policy: Policy
    part: str
    patience: int | None = None
    rankers: Mapping[str, Callable[[Responses], Tensor]] = field(default_factory=dict)
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
        written = runs.read_metrics(self.run.folder)
        self.rows = [{name: value for name, value in row.items() if name != "part"} for row in written]
        self.run.wait()  # nothing is written before everybody has read
        if self.rows:
            self.labels, self.answers = int(self.last["labels"]), int(self.last["answers"])
            return
        self._log({"step": 0, "labels": 0, "answers": 0, **self.measure(0)})
        self._keep_best()

    def go(
        self,
        step: Callable[[int], tuple[int, int, dict[str, float], bool]],
        save: Callable[[int], None],
        *,
        begin: int,
        total: int,
        every: int,
        unit: str,
    ) -> None:
        """Take one round after another from `begin` on; measure and save in every few, and after the last one.

        step(number): one round; the answers it drew, the labels it used, its metrics, and whether it is the last one.
        save(done): the checkpoint after so many rounds. The run also ends once the proxy has parted from gold.
        """
        with progress(self.part, total, unit=f"{unit}s", done=begin) as advance, processes.after_steps(unit) as stops:
            for number in range(begin, total):
                answers, labels, found, last = step(number)
                over = last or number + 1 == total
                measured = over or (number + 1) % every == 0
                self.log(number, answers, found, labels=labels, measured=measured, over=over)
                advance(1)
                if over or (measured and self.parted()):
                    return
                stop = stops()
                if measured or stop:
                    save(number + 1)
                    self.run.pause()
                if stop:
                    raise processes.Stopped(stop, f"{self.part} has {number + 1} of {total} {unit}s")

    def finish(self, ready: Ready, lr: float, **counts: int) -> Run:
        """Say gold, proxy and KL of the start and the end with their standard errors, and write the results."""
        shown = [name for name in SHOWN if f"{name}_se" in self.start | self.last]
        ends = [f"{name} {_told(self.start, name)} -> {_told(self.last, name)}" for name in shown]
        say(f"{self.part}: {', '.join(ends)}, after {self.last['step']} steps and {self.answers} answers")
        moved = loop.tell(self.part, ready.weights.change(self.policy), lr, self.shift)
        long = ready.prompts.counts() | {f"eval_{name}": count for name, count in self.evaluator.long.items()}
        rows = {"start": self.start, "last": self.last, "fit": fitted(self.rows)}
        return self.run.finish(**rows, **counts, answers=self.answers, moved=moved, **long)

    def measure(self, step: int, *, over: bool = False) -> dict[str, float]:
        """Gold, proxy, KL and length of answers to held-out prompts; how often gold prefers them to the start's; how
        often the proxy, the policy's own log-ratio and the rankers rank two fresh answers as gold does."""
        answers = self.evaluator(self.policy, gold=False)
        paid: dict[str, float] = {}
        if self.truth:
            measured = sum("kl_k1" in row for row in self.rows)
            gold = self.truth(answers.responses, step=step) if self.truth.due(measured, over=over) else None
            answers = answers if gold is None else replace(answers, values={"gold": gold, **answers.values})
            paid = self.truth.spent(step)
        means = answers.means() | paid
        return means | self._ranked(answers, step) if "gold" in answers.values else means

    def log(
        self,
        number: int,
        answers: int,
        found: dict[str, float],
        *,
        labels: int = 0,
        measured: bool = True,
        over: bool = False,
    ) -> None:
        """Write the row of a round that drew so many answers, with its measurement if it is `measured`.

        over: it is the last round.
        """
        self.labels += labels
        self.answers += answers
        row = {"step": number + 1, "labels": self.labels, "answers": self.answers, **found}
        if not measured:
            self._log(row)
            return
        row |= self.measure(number + 1, over=over)
        self._log(row | fitted([*self.rows, row]))
        self._keep_best()

    def parted(self) -> bool:
        """Whether the proxy has parted from gold, if that is watched; said once it has."""
        watched = self.patience is not None and "gold" in self.last
        found = on_main(parted)(self.rows, patience=self.patience) if watched else None
        if found:
            say(
                f"{self.part}: the proxy has parted from gold at KL = {found['kl_k1']:.1f} (step {found['step']}: gold "
                f"{found['gold']:.3g}, now {self.last['gold']:.3g}); stopped, best/ holds that policy"
            )
        return found is not None

    @property
    def shift(self) -> Shift:
        """How far the policy has gone from its start: the KL of the last measurement, nats an answer."""
        row = next(row for row in reversed(self.rows) if "kl_k1" in row)
        return Shift("kl", row["kl_k1"], row["kl_k1_se"], least=0.01)

    def _log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.run.log(part=self.part, **row)

    def _keep_best(self) -> None:
        """Save the policy if this measurement is the best so far and a best one is wanted."""
        top = best(self.rows) if self.patience is not None else None
        if top and top["step"] == self.last["step"] and self.run.writes:
            self.policy.save(self.run.folder / "best")
            runs.write_json(self.run.folder / "best.json", {"part": self.part, **top})

    def _ranked(self, answers: Measurement, step: int) -> dict[str, float]:
        """How often gold prefers the answers to the start's, and how often others rank them as gold does."""
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
        ranked |= {name: scores(answers.responses) for name, scores in self.rankers.items()}
        accuracies = {f"{name}_accuracy": _accuracy(answers, s) for name, s in ranked.items() if s is not None}
        return found | {name: value for name, value in accuracies.items() if value is not None}


def _accuracy(answers: Measurement, scores: Tensor) -> float | None:
    """Of every two answers to a prompt that gold tells apart, the share a score ranks as gold does, ties ½."""
    gold = answers.values["gold"].double()
    couples = [pair for group in answers.responses.groups() for pair in itertools.combinations(group, 2)]
    b, a = torch.tensor(couples, dtype=torch.int64).view(-1, 2).unbind(1)
    told_apart = (gold[a] < gold[b]) | (gold[a] > gold[b])  # False if one of them is unknown
    a, b = a[told_apart], b[told_apart]
    if not len(a):
        return None
    better, worse = torch.where(gold[a] > gold[b], a, b), torch.where(gold[a] > gold[b], b, a)
    return statistics.wins(scores[better].double(), scores[worse].double()).mean().item()


def _told(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3g} ± {row[f'{name}_se']:.2g}" if name in row else "not asked"
