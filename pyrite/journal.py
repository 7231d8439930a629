"""What every online round leaves behind: its pairs on disk, its row of metrics, what was spent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrite import data, estimators, runs, text, watch
from pyrite.discriminators import Discriminator
from pyrite.evaluation import Answers, Evaluator
from pyrite.live import Judged
from pyrite.models import Policy
from pyrite.progress import say
from pyrite.rounds import Answer
from pyrite.runs import Run
from pyrite.watch import Stopping


@dataclass
class Journal:
    """The books of a run of rounds; `start` and `last` are its first and last row."""

    run: Run
    evaluator: Evaluator
    policy: Policy
    discriminator: Discriminator | None = None
    part: str = "online"
    stopping: Stopping = Stopping()
    start: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    labels: int = 0
    answers: int = 0

    def begin(self, done: int) -> None:
        """Measure the start, or read what a stopped run has written, up to its last checkpoint."""
        self.run.rewind(done, part=self.part)
        before = runs.read_metrics(self.run.folder)
        if before:
            self.start, self.last = before[0], before[-1]
            self.labels, self.answers = int(self.last["labels"]), int(self.last["answers"])
            return
        measured = self.measure()
        self.start = self.last = {"step": 0, "labels": 0, "answers": 0, **measured}
        self.run.log(part=self.part, **self.start)
        self._keep_best()

    def measure(self) -> dict[str, float]:
        """Gold, proxy, KL and length of answers to held-out prompts; how often gold prefers them to the start's; how
        often the proxy, the policy's own log-ratio and a discriminator rank two fresh answers as gold does."""
        answers = self.evaluator(self.policy)
        measured = _means(answers)
        if "gold" not in answers.values:
            return measured
        first = self.run.folder / "start.json"
        if self.run.writes and not first.exists():
            runs.write_json(first, _by_prompt(answers).tolist())
        self.run.wait()
        start = torch.tensor(runs.read_json(first), dtype=torch.float64)
        measured["win_rate"] = estimators.win_rate(_by_prompt(answers), start).item()
        ranked = {"proxy": answers.values.get("proxy"), "policy": answers.values.get("kl_k1")}
        if self.discriminator:
            ranked["live"] = self.discriminator.scores(drawn_answers(answers, self.evaluator)).mean(0)
        accuracies = {f"{name}_accuracy": _accuracy(answers, s) for name, s in ranked.items() if s is not None}
        return measured | {name: value for name, value in accuracies.items() if value is not None}

    def write(self, number: int, drawn: int, judged: Judged, learned: dict[str, float], *, measured: bool) -> None:
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
        self.log(number, drawn, found, measured=measured)

    def log(self, number: int, drawn: int, found: dict[str, float], *, measured: bool) -> None:
        """The row of a round, after what it measures."""
        self.answers += drawn
        counts = {"step": number + 1, "labels": self.labels, "answers": self.answers}
        self.last = counts | found | (self.measure() if measured else {})
        self.run.log(part=self.part, **self.last)
        if measured:
            self._keep_best()

    def parted(self) -> bool:
        """Whether the proxy has parted from gold, where that is watched; said once it has."""
        found = self.stopping.parted(runs.read_metrics(self.run.folder))
        if found:
            say(
                f"{self.part}: the proxy has parted from gold at KL = {found['kl_k1']:.1f} (step {found['step']}: gold "
                f"{found['gold']:.3g}, now {self.last['gold']:.3g}); stopped, best/ holds that policy"
            )
        return found is not None

    def _keep_best(self) -> None:
        """Save the policy where this measurement is the best so far and a best one is wanted."""
        top = watch.best(runs.read_metrics(self.run.folder)) if self.stopping.stop_when_parted else None
        if top and top["step"] == self.last["step"] and self.run.writes:
            self.policy.save(self.run.folder / "best")
            runs.write_json(self.run.folder / "best.json", top)

    def _agreement(self, pairs: list[dict[str, Any]]) -> dict[str, float]:
        """How often gold prefers the chosen answer too, ties one half."""
        if not self.evaluator.gold or not pairs:
            return {}
        asked = [text.plain(pair["prompt"]) for pair in pairs]
        chosen, rejected = (self.evaluator.gold(asked, [p[side] for p in pairs]) for side in ("chosen", "rejected"))
        return {"agreement": estimators.wins(chosen, rejected).mean().item()}


def drawn_answers(answers: Answers, evaluator: Evaluator) -> list[Answer]:
    """Measured answers as discriminators read them."""
    tokens, owner = answers.drawn.responses(), answers.drawn.prompt.tolist()
    return [
        Answer(row["prompt_id"], row["prompt"], row["response"], row["finished"], list(evaluator.ids[p]), ids)
        for row, p, ids in zip(answers.rows, owner, tokens, strict=True)
    ]


def _row(chosen: Answer, rejected: Answer, strength: float, source: str) -> dict[str, Any]:
    both = {"chosen": chosen.response, "rejected": rejected.response}
    return {"prompt_id": chosen.prompt_id, "prompt": chosen.prompt, **both, "strength": strength, "source": source}


def _accuracy(answers: Answers, scores: Tensor) -> float | None:
    """Of every two answers to a prompt that gold tells apart, the share a score ranks as gold does, ties ½."""
    gold, owner = answers.values["gold"].double(), answers.drawn.prompt
    a, b = _couples(owner)
    told_apart = gold[a] != gold[b]
    a, b = a[told_apart], b[told_apart]
    if not len(a):
        return None
    better, worse = torch.where(gold[a] > gold[b], a, b), torch.where(gold[a] > gold[b], b, a)
    return estimators.wins(scores[better].double(), scores[worse].double()).mean().item()


def _couples(owner: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every two answers of one prompt; answers of a prompt stand together."""
    sizes = torch.bincount(owner).tolist()
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    pairs = [(begin + i, begin + j) for begin, n in zip(begins, sizes, strict=True) for i in range(n) for j in range(i)]
    return tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))  # type: ignore[return-value]


def _means(answers: Answers) -> dict[str, float]:
    measured: dict[str, float] = {}
    for name, value in answers.summary().items():
        measured |= {name: value["mean"], f"{name}_se": value["se"]}
    return measured


def _by_prompt(answers: Answers) -> Tensor:
    """Mean gold of the answers to each prompt, (P,)."""
    total = torch.zeros(answers.prompts, dtype=torch.float64)
    total.index_add_(0, answers.drawn.prompt, answers.values["gold"].double())
    return total / torch.bincount(answers.drawn.prompt, minlength=answers.prompts)
