"""Policy optimization: rewards of answers, rollouts, and the learners, which are the policy and its critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyrite.core import specs
from pyrite.core.processes import world
from pyrite.core.runs import Run
from pyrite.data.conditioning import Dimensions, Option, Turn, render
from pyrite.data.responses import Responses
from pyrite.data.text import plain
from pyrite.feedback import scorers
from pyrite.math import ensembles, seeds
from pyrite.math.logps import Logps
from pyrite.math.policy_gradient import (
    Estimates,
    KLControl,
    Moments,
    clamped,
    controlled,
    gae,
    group_normalized,
    merged,
    moments,
    policy_loss,
    reinforce,
    rloo,
    value_loss,
)
from pyrite.models.forward import Packed, score
from pyrite.models.loading import Lora, member_paths
from pyrite.models.policy import Policy, RewardEnsemble, RewardModel, ValueModel, WithValue
from pyrite.training import loop
from pyrite.training.evaluation import gold_scores
from pyrite.training.loop import BatchLoss, Learner, Training
from pyrite.training.rollouts import Players

# Rewards --------------------------------------------------------------------------------------------------------------


Combine = Literal["mean", "weighted", "min"]
Score = Callable[[Responses], Tensor]


@dataclass(frozen=True)
class Objectives:
    """A reward of preferences: a scorer for each of E options, and how an answer's scores are combined into one."""

    dimensions: Dimensions
    scorers: Mapping[str, Score]
    how: Combine = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.how not in ("mean", "weighted", "min"):
            raise ValueError(f"objectives are combined by mean, weighted or min, not {self.how!r}")
        if bool(self.weights) != (self.how == "weighted"):
            raise ValueError(f"objectives combined by {self.how}: give weights to weighted, and to nothing else")
        for id, weight in self.weights.items():
            self.dimensions.option(id)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {id} is {weight}; a weight is 0 or more")

    @property
    def ids(self) -> tuple[str, ...]:
        """The options that can be scored, in order."""
        return tuple(id for id in self.dimensions.ids if id in self.scorers)

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for the first prompt that cannot be rewarded: without preferences, with unknown or
        contradicting ones, or with one that nothing scores or that weighs nothing at all."""
        for row in rows:
            where = f"prompt {row['prompt_id']}"
            if row.get("asked") is None or not row.get("preferences"):
                raise ValueError(
                    f"{where} has no preferences to be rewarded for; --dimensions and --preferences add them"
                )
            try:
                options = self.dimensions.chosen(row["preferences"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            missing = [o.id for o in options if o.id not in self.scorers]
            if missing:
                raise ValueError(f"{where}: nothing scores {', '.join(missing)}; there is {', '.join(self.ids)}")
            unweighed = [o.id for o in options if self.how == "weighted" and o.id not in self.weights]
            if unweighed:
                raise ValueError(f"{where}: no weight for {', '.join(unweighed)}; give every option one")
            if self.how == "weighted" and not sum(self.weights[o.id] for o in options):
                raise ValueError(f"{where}: {', '.join(o.id for o in options)} weigh nothing; one must be positive")

    def score(self, answers: Responses) -> Tensor:
        """Scores (E, N) of N answers; NaN if the prompt of an answer does not ask for an option."""
        asked = answers.owners
        self.check(asked)
        table = torch.full((len(self.ids), len(answers)), torch.nan)
        for row, id in zip(table, self.ids, strict=True):
            mine = [n for n, prompt in enumerate(asked) if id in prompt["preferences"]]
            if mine:
                given = self.scorers[id](answers.alone(mine))
                row[mine] = scorers.check_scores(given, len(mine), name=f"the reward of {id}").cpu()
        return table

    def combine(self, scores: Tensor) -> Tensor:
        """One score for each answer, (N,), from scores (E, N) with NaN gaps."""
        weights = torch.tensor([self.weights.get(id, 0.0) for id in self.ids]) if self.how == "weighted" else None
        return combined(scores, how=self.how, weights=weights)


def combined(scores: Tensor, *, how: Combine = "mean", weights: Tensor | None = None) -> Tensor:
    """Objectives (E, N) to one score (N,), over those a column has (the others are NaN).

    mean, min; weighted: Σ w_i s_i / Σ w_i for weights w (E,).

    >>> combined(torch.tensor([[1.0], [-0.5], [2.0]]), weights=torch.tensor([0.5, 0.25, 0.25]), how="weighted")
    tensor([0.8750])
    """
    there = ~scores.isnan()
    if how == "min":
        return scores.masked_fill(~there, torch.inf).amin(0)
    share = there.to(scores) if weights is None else weights.to(scores)[:, None] * there
    return (share * scores.nan_to_num()).sum(0) / share.sum(0)


def model_scorers(
    source: str | Mapping[str, str],
    dimensions: Dimensions,
    *,
    ensemble: str = "mean()",
    turn: Turn = "user",
    loaded: dict[Path, RewardEnsemble] | None = None,
) -> dict[str, Score]:
    """A scorer an option from reward runs, standardized as these are: one folder for all, or {option id: folder}.

    A base that the models share is held in memory once. loaded: reward runs that the job has loaded already. Raises
    ValueError for an unknown option, a folder without reward models or an unknown ensemble.
    """
    by_id = dict.fromkeys(dimensions.ids, source) if isinstance(source, str) else source
    folders = {dimensions.option(id): folder for id, folder in by_id.items()}
    combine, models = specs.part(ensemble, ensembles), dict[str, RewardEnsemble]()
    loaded = {} if loaded is None else loaded
    for folder in dict.fromkeys(folders.values()):
        if (place := Path(folder).resolve()) not in loaded:
            loaded[place] = _loaded(folder, next(iter(models.values()), None))
        models[folder] = loaded[place]
        combine(torch.zeros(len(models[folder].members), 1))

    def scorer(option: Option, models: RewardEnsemble) -> Score:
        def score(answers: Responses) -> Tensor:
            rows = [{"prompt": render(row.get("asked") or "", [option], turn=turn)} for row in answers.rows]
            return combine(models.standardized(replace(answers, rows=rows)))

        return score

    return {option.id: scorer(option, models[folder]) for option, folder in folders.items()}


def gold_scorers(dimensions: Dimensions) -> dict[str, Score]:
    """The gold scorers of the options that have one, not standardized; they read the raw prompt.

    Raises ValueError if no option has one.
    """

    def scorer(gold: str) -> Score:
        exact = specs.part(gold, scorers)
        return lambda answers: exact([plain(row.get("asked") or "") for row in answers.owners], list(answers.texts))

    found = {option.id: scorer(option.gold) for option in dimensions.options if option.gold}
    if not found:
        raise ValueError(f"none of the preferences {', '.join(dimensions.ids)} has a gold; give reward runs")
    return found


def _loaded(folder: str, beside: RewardEnsemble | None) -> RewardEnsemble:
    """The models of a reward run, on the base of others that are there already."""
    if beside is None:
        return RewardEnsemble.load(folder)
    lead = beside.members[0]
    return RewardEnsemble([RewardModel.load(path, sibling=lead) for path in member_paths(folder)])


AdvantageMethod = Literal["gae", "rloo", "group", "reinforce"]


@dataclass(frozen=True)
class Reward:
    """One reward: score(answers) gives its members' scores (E, N), `combine` makes them one, `weight` multiplies it.

    objectives: the names of the members if each scores one preference; NaN if an answer's prompt does not ask for it.
    check(rows): raises ValueError for prompts whose answers cannot be scored.
    """

    name: str
    score: Score
    combine: Callable[[Tensor], Tensor] = ensembles.mean
    weight: float = 1.0
    objectives: tuple[str, ...] = ()
    check: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None

    @classmethod
    def of_models(
        cls,
        folder: str,
        *,
        ensemble: str = "mean()",
        weight: float = 1.0,
        loaded: dict[Path, RewardEnsemble] | None = None,
    ) -> Reward:
        """A reward run: standardized scores of its members, read by their own tokenizer; a cut answer has no end token.

        Raises ValueError for a folder without reward models, an unknown ensemble or one that cannot take them.
        """
        models, combine = RewardEnsemble.load(folder, loaded=loaded), specs.part(ensemble, ensembles)
        combine(torch.zeros(len(models.members), 1))
        return cls(folder, models.standardized, combine, weight)

    @classmethod
    def of_scorer(cls, spec: str, *, weight: float = 1.0) -> Reward:
        """Any scorer by its spec string, such as "length()" or "mine.py:my_score()", as an ensemble of one.

        It computes in float32, as where gold is measured, whatever the precision of learning.
        """
        scorer = specs.part(spec, scorers)
        if scorer.own:  # one that cannot score is refused now
            scorers.check_scores(scorer(["Say hi."] * 2, ["hi", "hello there"]), 2, name=spec)
        return cls(spec, _in_float32(lambda answers: gold_scores(scorer, answers, name=spec)[None]), weight=weight)

    @classmethod
    def of_preferences(
        cls,
        source: str | Mapping[str, str] | None,
        dimensions: Dimensions,
        *,
        combine: Combine = "mean",
        weights: Mapping[str, float] | None = None,
        ensemble: str = "mean()",
        turn: Turn = "user",
        weight: float = 1.0,
        loaded: dict[Path, RewardEnsemble] | None = None,
    ) -> Reward:
        """The preferences an answer was asked under: a score each, of the raw prompt with that one option, combined.

        source: the folder of one reward run for all options, or {option id: folder}, their scores standardized; None
        for the options' own golds, as they are. combine: mean, weighted (by `weights`, option id to weight) or min.
        `check` all prompts before any work. Raises ValueError for what cannot be loaded or combined.
        """
        if source is None:
            found = gold_scorers(dimensions)
        else:
            found = model_scorers(source, dimensions, ensemble=ensemble, turn=turn, loaded=loaded)
        every = Objectives(dimensions, found, combine, weights or {})
        name = source if isinstance(source, str) else "preferences"
        score = _in_float32(every.score) if source is None else every.score
        return cls(name, score, every.combine, weight, every.ids, every.check)


@dataclass(frozen=True, eq=False)
class Scores:
    """total (N,): the weighted sum of the rewards. members: by reward, (E, N). combined: by reward, (N,).

    objectives: by reward, the names of its members if each scores one preference.
    """

    total: Tensor
    members: dict[str, Tensor]
    combined: dict[str, Tensor]
    objectives: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Of every reward: mean and standard deviation over the answers, the members' means, and how far they differ
        (the population variance over members, averaged over answers); of objectives, the mean of each over the answers
        that have it."""
        found: dict[str, float] = {}
        for name, rows in self.members.items():
            found[f"{name} mean"] = self.combined[name].mean().item()
            found[f"{name} std"] = self.combined[name].std(correction=0).item()
            if self.objectives.get(name):
                means = zip(self.objectives[name], rows.nanmean(1).tolist(), strict=True)
                found |= {f"{name} {id}": mean for id, mean in means if mean == mean}  # NaN: no answer has it
                continue
            found[f"{name} variance"] = rows.var(0, correction=0).mean().item()
            found |= {f"{name} member {i}": row.mean().item() for i, row in enumerate(rows)} if len(rows) > 1 else {}
        return found


def _in_float32(score: Score) -> Score:
    """The function, out of reach of the precision in which models are read."""

    def exact(answers: Responses) -> Tensor:
        with torch.autocast(world().device.type, enabled=False):  # type: ignore[union-attr]
            return score(answers)

    return exact


def scored(rewards: Sequence[Reward], answers: Responses) -> Scores:
    """The scores of N answers by all rewards.

    Raises ValueError without a reward, for two of one name, or a score that is not finite.
    """
    if not rewards or len({reward.name for reward in rewards}) < len(rewards):
        raise ValueError(f"rewards {[reward.name for reward in rewards]}: give at least one, and each once")
    members = {reward.name: reward.score(answers).float().cpu() for reward in rewards}
    combined = {
        reward.name: scorers.check_scores(reward.combine(members[reward.name]), len(answers), name=reward.name)
        for reward in rewards
    }
    total = torch.stack([reward.weight * combined[reward.name] for reward in rewards]).sum(0)
    return Scores(total, members, combined, {reward.name: reward.objectives for reward in rewards})


# Rollouts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N = P K answers, K to each of P prompts, prompt by prompt, and what was read of them; T is the longest answer.

    logps, ref: of the policy that drew them and of the reference, token by token. values (N, T) before each token, None
    without a critic.
    """

    responses: Responses
    logps: Logps
    ref: Logps
    scores: Scores
    values: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(N, T), True at tokens."""
        assert self.logps.mask is not None  # `collect` keeps the tokens
        return self.logps.mask

    @cached_property
    def groups(self) -> list[list[int]]:
        """The answers to each prompt."""
        return self.responses.groups()

    @cached_property
    def weights(self) -> list[float]:
        """Response tokens of each prompt: what it counts in its batch."""
        return self.responses.table(self.responses.lengths).sum(1).double().tolist()

    def flat(self, values: Tensor, prompts: Sequence[int]) -> Tensor:
        """Of values (N, T), those of the tokens of some prompts' answers, (R,), as they are packed."""
        index = torch.tensor([i for p in prompts for i in self.groups[p]])
        return values[index][self.mask[index]]


def collect(
    players: Players,
    rewards: Sequence[Reward],
    rows: Sequence[dict[str, Any]],
    ids: Sequence[list[int]],
    number: int,
    *,
    k: int,
    max_new_tokens: int,
    seed: int,
    critic: ValueModel | WithValue | None = None,
) -> Rollouts:
    """Draw k answers to each prompt {prompt_id, prompt}, given as token ids too, and score and read them.

    Rewards of preferences need asked and preferences in the prompts' rows as well. number: of the batch; an answer
    belongs to (seed, number, prompt_id, its number). All are read in the players' precision. The policy's
    log-probabilities are those of the draws; in bfloat16, whose rounding differs between drawing and learning, they are
    read again.
    """
    drawn = players.draw(rows, ids, number, k=k, max_new_tokens=max_new_tokens, seed=seed)
    groups = drawn.groups()
    assert drawn.logps is not None  # it was drawn
    with players.reading():
        return Rollouts(
            responses=drawn,
            logps=players.policy_logps(drawn, groups)
            if players.precision == "bfloat16"
            else Logps.from_tokens(drawn.split(drawn.logps)),
            ref=players.ref_logps(drawn, groups),
            scores=scored(rewards, drawn),
            values=None if critic is None else drawn.padded(score(critic, drawn, groups, read=critic.values)),
        )


def estimates(
    rollouts: Rollouts,
    rewards: Tensor,
    *,
    method: AdvantageMethod = "gae",
    gamma: float = 1.0,
    lam: float = 0.95,
    baseline: float | Tensor | None = None,
) -> Estimates:
    """Advantages and returns (N, T) from token rewards (N, T); not yet whitened.

    gae needs values. The others take a row's sum for the answer's score, give all its tokens one advantage and have no
    returns to teach (0): rloo and group (`group_normalized`) compare the K answers of a prompt; reinforce subtracts
    `baseline`, by default the mean of this batch. Raises ValueError for gae without values or an unknown method.
    """
    if method == "gae":
        if rollouts.values is None:
            raise ValueError("estimates: gae needs values; collect with a critic, or choose rloo")
        return gae(rewards, rollouts.values, rollouts.mask, gamma=gamma, lam=lam)
    scores = rewards.sum(1)
    grouped = rollouts.responses.table(scores)
    if method == "reinforce":
        one = reinforce(scores, baseline="mean" if baseline is None else baseline)
    elif method == "rloo":
        one = rloo(grouped).flatten()
    elif method == "group":
        one = group_normalized(grouped).flatten()
    else:
        raise ValueError(f"estimates: unknown method {method!r}; choose gae, rloo, group or reinforce")
    advantages = one[:, None] * rollouts.mask
    return Estimates(advantages, torch.zeros_like(advantages))


def batch_loss(
    learns: Policy | ValueModel | WithValue,
    rollouts: Rollouts,
    made: Estimates,
    *,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    value_weight: float = 0.1,
) -> BatchLoss:
    """The loss of `learns` on some of the prompts, for `loop.Learner` with `rollouts.weights`: sums over their tokens.

    A policy: the clipped policy loss. A value model: the clipped value loss. Both on one trunk: the first and
    value_weight times the second. Metrics: clip_fraction, step_kl (from the policy that drew, nats a token), ratio,
    clamped; value_loss, value_clip_fraction.
    """
    old = rollouts.logps.tokens
    assert old is not None  # `collect` keeps the tokens

    def of(model: nn.Module, batch: Packed, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch)
        logp, values = out if isinstance(learns, WithValue) else (out, out)
        mask = torch.ones(out.shape[-1], dtype=torch.bool, device=out.device)

        def flat(table: Tensor) -> Tensor:
            return rollouts.flat(table, indices).to(out.device)

        loss, metrics = out.new_zeros(()), {}
        if not isinstance(learns, ValueModel):
            step = policy_loss(logp, flat(old), flat(made.advantages), mask, clip=clip, total=1.0)
            loss = loss + step.loss
            metrics |= {"clip_fraction": step.clip_fraction, "step_kl": step.kl, "ratio": step.ratio}
            metrics["clamped"] = clamped(logp, flat(old), mask, total=1.0)
        if not isinstance(learns, Policy):
            before = rollouts.values if rollouts.values is not None else made.returns
            error = value_loss(values, flat(before), flat(made.returns), mask, clip=value_clip, total=1.0)
            loss = loss + (value_weight if isinstance(learns, WithValue) else 1.0) * error.loss
            metrics |= {"value_loss": error.loss.detach(), "value_clip_fraction": error.clip_fraction}
        return loss, metrics

    return of


# Learners -------------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """0-dim tensors that belong in a checkpoint: the price of KL, moments of scores and of shaped returns, updates."""

    beta: Tensor
    scores: Moments
    returns: Moments
    updates: Tensor

    @classmethod
    def of(cls, control: KLControl) -> State:
        beta = torch.tensor(control.beta, dtype=torch.float64)
        return cls(beta, Moments.zero(), Moments.zero(), torch.zeros((), dtype=torch.int64))

    def tensors(self) -> dict[str, Tensor]:
        """By name; the state itself is restored through them."""
        parts = {"scores": self.scores, "returns": self.returns}
        both = {f"{name}.{field}": value for name, part in parts.items() for field, value in vars(part).items()}
        return {"beta": self.beta, "updates": self.updates, **both}

    def follow(self, control: KLControl, kl: float, *, answers: int) -> None:
        """Move beta, once a batch."""
        self.beta.fill_(controlled(replace(control, beta=self.beta.item()), kl, answers=answers).beta)

    def see(self, name: Literal["scores", "returns"], values: Tensor) -> Moments:
        """Merge new values into the moments, in place; returns those before."""
        mine: Moments = getattr(self, name)
        before = Moments(*(value.clone() for value in vars(mine).values()))
        for moment, new in vars(merged(mine, moments(values))).items():
            getattr(mine, moment).copy_(new)
        return before


@dataclass(frozen=True)
class Critic:
    """What predicts values: a head on the policy's trunk (shared, detached), or a model of its own at `path`.

    lr, lora: of a model of its own. weight: of the loss of a head. clip: of predicted values.
    """

    kind: Literal["shared", "detached", "model"] = "shared"
    path: str | None = None
    lr: float | None = None
    lora: Lora | None = None
    weight: float = 0.1
    clip: float | None = 0.2


@dataclass
class Learners:
    """The policy's optimizer, with the value head on its trunk if it has one, or beside it the critic's."""

    policy: Learner
    critic: ValueModel | WithValue | None
    value: Learner | None
    by: Critic
    steps: int
    clip: float
    seed: int

    @classmethod
    def make(
        cls,
        policy: Policy,
        training: Training,
        value: Critic | None = None,
        *,
        steps: int,
        clip: float = 0.2,
        seed: int = 0,
    ) -> Learners:
        """value: the critic, None for none. steps: batches of answers, in all.

        Raises ValueError for a critic that cannot be loaded, or reads other tokens.
        """
        torch.manual_seed(seeds.derive(seed, "dropout"))
        by = value or Critic()
        if value is None:
            return cls(Learner(policy, training), None, None, by, steps, clip, seed)
        if value.path is None:
            both = WithValue(policy, detach=value.kind == "detached")
            return cls(Learner(both, training), both, None, by, steps, clip, seed)
        critic = ValueModel.load(value.path, lora=value.lora)
        if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ValueError(f"--value {value.path}: its vocabulary is not the policy's, whose tokens it reads")
        loop.set_dropout(critic, name=value.path)
        learner = Learner(critic, replace(training, lr=value.lr or training.lr))
        return cls(Learner(policy, training), critic, learner, by, steps, clip, seed)

    def learn(self, drawn: Rollouts, made: Estimates, number: int) -> dict[str, float]:
        """A few passes over a batch; means over the updates. Raises TrainingError if one of them is not finite."""
        training = self.policy.training
        prompts = len(drawn.responses.rows)
        each = loop.steps(prompts, training)
        order = loop.batches(prompts, training, seed=seeds.derive(self.seed, "order", number))
        seen = [
            self._update(batch, drawn, made, at=number * each + update, of=self.steps * each)
            for update, batch in enumerate(order)
        ]
        return {**loop.means(seen, f"step {number + 1}", "lower --lr, or raise --beta"), "updates": len(seen)}

    def save(self, folder: Path, number: int, state: State) -> None:
        """The critic's checkpoint first: that of the policy is the one that counts."""
        if self.value:
            loop.save(folder / "checkpoints" / "value", number, self.value, {})
        loop.save(folder / "checkpoints", number, self.policy, state.tensors())

    def resume(self, folder: Path, state: State) -> int:
        """Steps done."""
        begin = loop.resume(folder / "checkpoints", self.policy, state.tensors())
        if self.value and begin:
            loop.resume(folder / "checkpoints" / "value", self.value, {}, step=begin)
        return begin

    def finish(self, run: Run) -> None:
        """Save what was learned."""
        if run.writes:
            self.policy.model.save(run.folder / "model")  # type: ignore[operator]
            if self.value:
                self.value.model.save(run.folder / "value")  # type: ignore[operator]
        loop.discard_checkpoints(run)

    def _update(self, batch: list[int], drawn: Rollouts, made: Estimates, *, at: int, of: int) -> dict[str, Tensor]:
        """Update `at` of `of`: the policy's, and that of a critic of its own."""
        found: dict[str, Tensor] = {}
        options: dict[str, Any] = {"clip": self.clip, "value_clip": self.by.clip, "value_weight": self.by.weight}
        for learner in (self.policy, self.value):
            if learner is None:
                continue
            loss = batch_loss(learner.model, drawn, made, **options)  # type: ignore[arg-type]
            lr = loop.learning_rate(at, of, learner.training)
            new = learner.update(batch, drawn.responses, drawn.groups, loss, weights=drawn.weights, lr=lr)
            found |= new if learner is self.policy else {f"critic_{name}": value for name, value in new.items()}
        return found
