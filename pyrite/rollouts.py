"""A batch of rollouts: answers the policy drew, with all that policy optimization learns from.

Log-probabilities of the policy come with the draws; reference, rewards and values read the very tokens or texts drawn.
Answers are drawn at temperature 1 without truncation, so that draws, ratios and the KL are of one distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyrite import ensembles, golds, objectives, parts, samplers, text
from pyrite.dimensions import Dimensions, Turn
from pyrite.generate import Samples
from pyrite.logps import Logps
from pyrite.models import Policy, RewardEnsemble
from pyrite.objectives import Combine, Objectives
from pyrite.packing import Row
from pyrite.policy_gradient import Estimates, clamped, gae, group_normalized, policy_loss, reinforce, rloo, value_loss
from pyrite.processes import world
from pyrite.rounds import Answer, Drawing, Players
from pyrite.train import BatchLoss
from pyrite.values import Critic, ValueModel, WithValue, response_values

Method = Literal["gae", "rloo", "group", "center", "reinforce"]
Score = Callable[[Sequence[Answer]], Tensor]


@dataclass(frozen=True)
class Reward:
    """One proxy: score(answers) -> (E, N) of its members, how they become one, what it weighs.

    objectives: the names of members that are no ensemble, but scores of one preference each, NaN where an answer was
    not asked under it. check(rows): raises ValueError for prompts whose answers could not be scored.
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
        models, combine = RewardEnsemble.load(folder, loaded=loaded), parts.part(ensemble, ensembles)
        combine(torch.zeros(len(models.members), 1))
        return cls(folder, standardized(models), combine, weight)

    @classmethod
    def of_scorer(cls, spec: str, *, weight: float = 1.0) -> Reward:
        """Any scorer by its spec string, such as "length()" or "mine.py:my_score()", as an ensemble of one.

        It computes in float32, as where gold is measured, whatever the precision of learning.
        """
        scorer = parts.part(spec, golds)
        if scorer.own:  # one that cannot score is refused now
            golds.check_scores(scorer(["Say hi."] * 2, ["hi", "hello there"]), 2, name=spec)

        def score(answers: Sequence[Answer]) -> Tensor:
            given = scorer([text.plain(a.prompt) for a in answers], [a.response for a in answers])
            return golds.check_scores(given, len(answers), name=spec)[None]

        return cls(spec, _in_float32(score), weight=weight)

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
            scorers = objectives.gold_scorers(dimensions)
        else:
            scorers = objectives.model_scorers(source, dimensions, ensemble=ensemble, turn=turn, loaded=loaded)
        every = Objectives(dimensions, scorers, combine, weights or {})
        name = source if isinstance(source, str) else "preferences"
        score = _in_float32(every.score) if source is None else every.score
        return cls(name, score, every.combine, weight, every.ids, every.check)


def standardized(models: RewardEnsemble) -> Score:
    """The members' standardized scores of answers as they were drawn."""

    def score(answers: Sequence[Answer]) -> Tensor:
        asked, said, done = ([getattr(a, name) for a in answers] for name in ("prompt", "response", "finished"))
        return models.scores(asked, said, finished=done)

    return score


@dataclass(frozen=True, eq=False)
class Scores:
    """total (N,), the rewards' weighted sum; members by reward, (E, N) each, and what each made of them, (N,).

    objectives: by reward, what its members are called where they are no ensemble.
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


def _in_float32(score: Callable[[Sequence[Answer]], Tensor]) -> Callable[[Sequence[Answer]], Tensor]:
    """The function, out of reach of the precision in which models are read."""

    def exact(answers: Sequence[Answer]) -> Tensor:
        with torch.autocast(world().device.type, enabled=False):  # type: ignore[union-attr]
            return score(answers)

    return exact


def scored(rewards: Sequence[Reward], answers: Sequence[Answer]) -> Scores:
    """What all rewards say of N answers.

    Raises ValueError without a reward, for two of one name, or a score that is not finite.
    """
    if not rewards or len({reward.name for reward in rewards}) < len(rewards):
        raise ValueError(f"rewards {[reward.name for reward in rewards]}: give at least one, and each once")
    members = {reward.name: reward.score(answers).float().cpu() for reward in rewards}
    combined = {
        reward.name: golds.check_scores(reward.combine(members[reward.name]), len(answers), name=reward.name)
        for reward in rewards
    }
    total = torch.stack([reward.weight * combined[reward.name] for reward in rewards]).sum(0)
    return Scores(total, members, combined, {reward.name: reward.objectives for reward in rewards})


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N = P K answers, K to each of P prompts, prompt by prompt: a packed row a prompt; T is the longest answer.

    logps, ref: of the policy that drew them and of the reference, token by token. values (N, T) before each token, None
    without a critic. mask (N, T) True at tokens; finished (N,) bool.
    """

    answers: list[Answer]
    rows: list[Row]
    logps: Logps
    ref: Logps
    scores: Scores
    finished: Tensor
    values: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        assert self.logps.mask is not None  # `collect` keeps the tokens
        return self.logps.mask

    @property
    def k(self) -> int:
        """Answers a prompt."""
        return len(self.rows[0].responses)

    @property
    def weights(self) -> list[float]:
        """Response tokens of each row: what it counts in its batch."""
        return self.mask.sum(1).view(-1, self.k).sum(1).double().tolist()

    def flat(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Of values (N, T), those of some rows' tokens, (R,), in the order in which the rows are packed."""
        index = (torch.tensor(rows)[:, None] * self.k + torch.arange(self.k)).flatten()
        return values[index][self.mask[index]]


def collect(
    players: Players,
    rewards: Sequence[Reward],
    prompts: Sequence[dict[str, Any]],
    ids: Sequence[list[int]],
    *,
    k: int,
    max_new_tokens: int,
    seed: int,
    number: int,
    critic: Critic | None = None,
    reread: bool = False,
) -> Rollouts:
    """k answers to each prompt {prompt_id, prompt}, given as token ids too, and what everybody makes of them.

    Rewards of preferences need asked and preferences in the prompts' rows as well. number: of the batch; a sample's
    stream belongs to (seed, number, prompt_id, sample). All are read in the players' precision. reread: take the
    policy's log-probabilities from the forward it learns by, not from the draws. In bfloat16, where draws are rounded
    otherwise, this is always done.
    """
    drawing = Drawing(samplers.on_policy(), k=k, max_new_tokens=max_new_tokens, seed=seed)
    drawn = players.draw(prompts, ids, drawing, number=number)
    answers = players.answers(prompts, ids, drawn)
    tokens = drawn.responses()
    rows = [Row(list(prompt), tokens[p * k : (p + 1) * k]) for p, prompt in enumerate(ids)]
    with players.reading():
        return Rollouts(
            answers=answers,
            rows=rows,
            logps=players.policy_logps(rows) if reread or players.precision == "bfloat16" else _drawn_logps(drawn),
            ref=players.ref_logps(rows),
            scores=scored(rewards, answers),
            finished=drawn.finished,
            values=None if critic is None else response_values(critic, rows),
        )


def estimates(
    rollouts: Rollouts,
    rewards: Tensor,
    *,
    method: Method = "gae",
    gamma: float = 1.0,
    lam: float = 0.95,
    baseline: float | Tensor | None = None,
) -> Estimates:
    """Advantages and returns (N, T) from token rewards (N, T); not yet whitened.

    gae needs values. The others take a row's sum for the answer's score, give all its tokens one advantage and have no
    returns to teach (0): rloo, group (`group_normalized`) and center (without its scale) compare the K answers of a
    prompt; reinforce subtracts `baseline`, by default the mean of this batch. Raises ValueError for gae without values
    or an unknown method.
    """
    if method == "gae":
        if rollouts.values is None:
            raise ValueError("estimates: gae needs values; collect with a critic, or choose rloo")
        return gae(rewards, rollouts.values, rollouts.mask, gamma=gamma, lam=lam)
    scores = rewards.sum(1)
    grouped = scores.view(-1, rollouts.k)
    if method == "reinforce":
        one = reinforce(scores, baseline="mean" if baseline is None else baseline)
    elif method == "rloo":
        one = rloo(grouped).flatten()
    elif method in ("group", "center"):
        one = group_normalized(grouped, scale=method == "group").flatten()
    else:
        raise ValueError(f"estimates: unknown method {method!r}; choose gae, rloo, group, center or reinforce")
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
    """What `learns` is taught by some of the rows, for `train.Learner` with `rollouts.weights`: sums over their tokens.

    A policy: the clipped policy loss. A value model: the clipped value loss. Both on one trunk: the first and
    value_weight times the second. Metrics: clip_fraction, step_kl (from the policy that drew, nats a token), ratio,
    clamped; value_loss, value_clip_fraction.
    """
    old = rollouts.logps.tokens
    assert old is not None  # `collect` keeps the tokens

    def of(model: nn.Module, rows: list[Row], indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(learns.pack(rows))
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


def _drawn_logps(drawn: Samples) -> Logps:
    return Logps.from_tokens([row[:n] for row, n in zip(drawn.policy_logps, drawn.length.tolist(), strict=True)])
