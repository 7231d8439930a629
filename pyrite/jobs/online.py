"""Online direct preference optimization: answer, judge, learn, round by round.

for every round:
    candidates = answers drawn by the sampler from the policy, the reference, or both mixed
    pairs      = what the judge makes of them
    policy     = a direct loss on the pairs
    measure      gold, proxy and KL from the start, always together

Pairs are learned from the very tokens that were drawn. Rounds may be one step each (strictly on-policy) or large.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite import data, estimators, judges, losses, parts, runs, samplers, seeds, text, train
from pyrite.evaluation import Answers, Evaluation, Evaluator
from pyrite.generate import Samples
from pyrite.labels import Labelled, Labels, Pairing, label
from pyrite.losses.needs import needs
from pyrite.models import Lora, Policy
from pyrite.processes import world
from pyrite.progress import progress, say
from pyrite.rounds import Drawing, Players, RoundLearner
from pyrite.runs import Run
from pyrite.samplers import Sampler
from pyrite.train import Training

OUTPUTS = {
    "model/": "the last policy, Hugging Face layout",
    "rounds/*.parquet": "every pair: prompt_id, prompt, chosen, rejected, strength",
    "metrics.jsonl": "a row a round: gold, proxy, KL, length, agreement with gold, labels spent",
}


@dataclass(frozen=True)
class Config:
    """Train a policy on preferences over its own answers, round by round."""

    model: str
    """Folder or Hub name of the policy to start from."""
    prompts: str
    """Prompts: prompt, prompt_id."""
    judge: str
    """Who says which answer is better: "bradley_terry(gold='length()')"."""
    out: Path
    columns: str | None = None
    held_out: float = 0.1
    """Share of the prompts kept for measuring, where no --eval-prompts are given."""
    sampler: str = "on_policy()"
    """Which two distributions a pair is drawn from: reference(), on_policy(), hybrid(), mixed(kappa=0.5), ..."""
    loss: str = "soft_dpo(beta=0.1)"
    rounds: int = 3
    prompts_per_round: int | None = None
    """Prompts answered in a round; all by default."""
    fresh: bool = False
    """Every round takes prompts that no round before it had, as long as there are any."""
    k: int = 2
    """Answers a prompt; an even number."""
    pairing: Pairing = "best_worst"
    labels: Labels = "soft"
    """soft and hard: the likelier answer is chosen; sampled: drawn by the judge's probability."""
    ref: Literal["start", "previous"] = "start"
    """The reference of loss and sampler: the first policy, or the one each round begins with."""
    restart: bool = True
    """Every round has its own optimizer and learning rate schedule; --no-restart carries both through the run."""
    temperature: float = 1.0
    """After mixing, as are the next two."""
    top_p: float = 1.0
    top_k: int = 0
    on_cut: Literal["keep", "drop"] = "keep"
    """Pairs with an answer that was cut before its end; kept ones have no end token."""
    measure_every: int = 1
    """Rounds between measurements and checkpoints."""
    evaluation: Evaluation = Evaluation()
    lora: Lora = Lora()
    training: Training = Training(lr=5e-7)
    seed: int = 0


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"model": config.model, "prompts": config.prompts, **config.evaluation.inputs()}


def run(config: Config) -> Run:
    """Round after round; goes on from the last checkpoint."""
    run = runs.start("online", config, inputs=inputs(config))
    if run.done:
        return run
    sampler, judge, loss = _parts(config)
    asked, test = _prompts(config)
    policy = Policy.load(config.model, lora=config.lora)
    start = policy if policy.reversible else copy.deepcopy(policy).requires_grad_(False)
    evaluator = Evaluator.load(config.evaluation, policy, ref=start, seed=config.seed, prompts=test)
    players = Players(policy, start if config.ref == "start" else copy.deepcopy(policy).requires_grad_(False))
    learner = RoundLearner(
        policy, loss, config.training, rounds=config.rounds, restart=config.restart, seed=config.seed
    )
    drawing, ids = _drawing(sampler, config), _ids(policy, asked, config)
    players.draw(asked[:1], ids[:1], replace(drawing, max_new_tokens=1), number=0)  # refuses options out of range
    run.open()
    say(f"online: {config.rounds} rounds of {len(_places(config, len(asked), 0))} prompts, {len(test)} to measure on")
    book = Book(run, evaluator, policy, config)
    begin = train.resume(run.folder / "checkpoints", learner.learner, learner.state)
    book.begin(begin)
    with progress("online", config.rounds, unit="rounds", done=begin) as advance:
        for number in range(begin, config.rounds):
            if config.ref == "previous":
                players.ref.load_state_dict(policy.state_dict())
            places = _places(config, len(asked), number)
            rows, some = [asked[i] for i in places], [ids[i] for i in places]
            drawn = players.draw(rows, some, drawing, number=number)
            answers = text.decode(policy.tokenizer, drawn.responses())
            labelled = _label(judge, rows, answers, drawn, config, number)
            prefs = players.preferences(some, drawn, labelled.pairs, learner.wanted)
            book.write(number, rows, answers, drawn, labelled, learner.learn(prefs, number))
            if (number + 1) % config.measure_every == 0 and number + 1 < config.rounds:
                train.save(run.folder / "checkpoints", number + 1, learner.learner, learner.state)
                run.pause()
            advance(1)
    if run.writes:
        policy.save(run.folder / "model")
    train.discard_checkpoints(run)
    return run.finish(start=book.start, last=book.last, labels=book.labels, answers=book.answers)


def _parts(config: Config) -> tuple[Sampler, judges.Judge, Any]:
    """The named parts, and whatever the options alone show to be impossible."""
    sampler: Any = parts.part(config.sampler, samplers).function
    judge = parts.part(config.judge, judges)
    samplers.check_decodable(sampler)
    loss = parts.part(config.loss, losses)
    if "kl" in needs(loss):
        raise ValueError(f"--loss {config.loss} reads the reference's whole distribution, which rounds do not keep")
    if config.k < 2 or config.k % 2:
        raise ValueError(f"--k {config.k}: answers are drawn two by two; give an even number")
    for name in ("rounds", "measure_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: give at least 1")
    if needs(loss) & {"batch", "running"} and world().num_processes > 1:
        raise ValueError(f"--loss {config.loss} reads the whole batch at once: run it in one process")
    return sampler, judge, loss


def _prompts(config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to learn from and prompts to measure on; none in both."""
    rows = data.load(config.prompts, "prompts", columns=config.columns, note=say)
    if config.evaluation.eval_prompts:
        test = data.load(config.evaluation.eval_prompts, "prompts", columns=config.columns)
        kept = {row["prompt_id"] for row in test}
        asked = [row for row in rows if row["prompt_id"] not in kept]
    else:
        asked, test = data.split(rows, fraction=config.held_out, seed=seeds.derive(config.seed, "held out"))
    if not asked or not test:
        raise ValueError(f"{config.prompts}: {len(asked)} prompts to learn from and {len(test)} to measure on")
    return asked, test


def _drawing(sampler: Sampler, config: Config) -> Drawing:
    return Drawing(
        sampler,
        k=config.k,
        max_new_tokens=config.evaluation.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
    )


def _ids(policy: Policy, rows: list[dict[str, Any]], config: Config) -> list[list[int]]:
    return text.encode_prompts(
        policy.tokenizer,
        [row["prompt"] for row in rows],
        max_length=policy.context - config.evaluation.max_new_tokens,
        where=lambda i: f"{config.prompts}: prompt {rows[i]['prompt_id']}",
    )


def _places(config: Config, n: int, number: int) -> list[int]:
    """Indices of the prompts of a round: the same ones, or the next ones of one shuffled order after another."""
    size = min(config.prompts_per_round or n, n)
    if not config.fresh:
        return train.order(n, 0, seed=seeds.derive(config.seed, "prompts"))[:size]
    flat = range(number * size, (number + 1) * size)
    orders = {p // n: train.order(n, p // n, seed=seeds.derive(config.seed, "prompts")) for p in (flat[0], flat[-1])}
    return [orders[p // n][p % n] for p in flat]


def _label(
    judge: judges.Judge, rows: list[dict], answers: list[str], drawn: Samples, config: Config, number: int
) -> Labelled:
    """Pairs of answers to the same prompt."""
    owner = drawn.prompt.tolist()
    usable = [config.on_cut == "keep" or done for done in drawn.finished.tolist()]
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(owner):
        if usable[i]:
            groups.setdefault(prompt, []).append(i)
    return label(
        judge,
        [text.plain(rows[p]["prompt"]) for p in owner],
        answers,
        list(groups.values()),
        pairing=config.pairing,
        labels=config.labels,
        seed=seeds.derive(config.seed, "labels", number),
        name=config.judge,
    )


@dataclass
class Book:
    """What every round leaves behind: its pairs, its row of metrics, what was spent."""

    run: Run
    evaluator: Evaluator
    policy: Policy
    config: Config
    start: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    labels: int = 0
    answers: int = 0

    def begin(self, done: int) -> None:
        """Measure the start, or read what a stopped run has written, up to its last checkpoint."""
        self.run.rewind(done, part="online")
        before = runs.read_metrics(self.run.folder)
        if before:
            self.start, self.last = before[0], before[-1]
            self.labels, self.answers = int(self.last["labels"]), int(self.last["answers"])
            return
        answers = self.evaluator(self.policy)
        if self.run.writes and "gold" in answers.values:
            runs.write_json(self.run.folder / "start.json", _by_prompt(answers).tolist())
        self.start = self.last = {"step": 0, "labels": 0, "answers": 0, **_means(answers)}
        self.run.log(part="online", **self.start)

    def measure(self) -> dict[str, float]:
        """Gold, proxy, KL and length of answers to held-out prompts; how often gold prefers them to the start's."""
        answers = self.evaluator(self.policy)
        measured = _means(answers)
        if "gold" in answers.values:
            start = torch.tensor(runs.read_json(self.run.folder / "start.json"), dtype=torch.float64)
            measured["win_rate"] = estimators.win_rate(_by_prompt(answers), start).item()
        return measured

    def write(
        self, number: int, rows: list[dict], answers: list[str], drawn: Samples, labelled: Labelled, learned: dict
    ) -> None:
        """After a round."""
        owner, done = drawn.prompt.tolist(), number + 1
        pairs = [
            {
                "prompt_id": rows[owner[pair.chosen]]["prompt_id"],
                "prompt": rows[owner[pair.chosen]]["prompt"],
                "chosen": answers[pair.chosen],
                "rejected": answers[pair.rejected],
                "strength": pair.strength,
            }
            for pair in labelled.pairs
        ]
        self.labels, self.answers = self.labels + labelled.asked, self.answers + len(answers)
        found = {"pairs": len(pairs), "ties": labelled.ties, "no_verdict": labelled.missing}
        found |= {"labels": self.labels, "answers": self.answers, **self._agreement(pairs), **learned}
        if not pairs:
            say(
                f"online: round {done} gave no pair ({labelled.ties} ties, {labelled.missing} without verdict): skipped"
            )
        if self.run.writes and pairs:
            data.write(pairs, self.run.folder / "rounds" / f"{done:05d}.parquet")
        if done % self.config.measure_every == 0 or done == self.config.rounds:
            found |= self.measure()
        self.last = {"step": done, **found}
        self.run.log(part="online", **self.last)

    def _agreement(self, pairs: list[dict[str, Any]]) -> dict[str, float]:
        """How often gold prefers the chosen answer too, ties one half."""
        if not self.evaluator.gold or not pairs:
            return {}
        asked = [text.plain(pair["prompt"]) for pair in pairs]
        chosen, rejected = (self.evaluator.gold(asked, [p[side] for p in pairs]) for side in ("chosen", "rejected"))
        return {"agreement": estimators.wins(chosen, rejected).mean().item()}


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
