"""Policy optimization against one reward or an ensemble: PPO with a critic, or RLOO, GRPO and REINFORCE without.

for every step:
    answers    = drawn by the policy
    rewards    = what the proxy makes of them, less the price beta of every token's log-ratio to the reference
    advantages = against a critic (gae), or against the prompt's other answers
    policy     = clipped policy gradient, a few passes; the critic learns the returns
    measure      gold, proxy and KL from the start, always together

Answers are drawn at temperature 1 without truncation. The first step must find KL 0 and ratio 1, or the run stops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from pyrite.core import checkpoints, runs, specs
from pyrite.core.processes import say
from pyrite.core.runs import Run
from pyrite.data.conditioning import Dimensions, Variants
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.feedback import scorers
from pyrite.feedback.ledger import GoldLimits
from pyrite.math import ensembles, statistics
from pyrite.math.policy_gradient import Estimates, KLControl, explained_variance, normalized, token_rewards, whiten
from pyrite.math.ranges import Count, Fraction, Natural, NonNegative, Positive, Share, Some
from pyrite.models.policy import Lora, Policy, RewardEnsemble
from pyrite.training import rounds
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training, TrainingError
from pyrite.training.ppo import AdvantageMethod, Combine, Critic, Learners, Reward, Rollouts, State, collect, estimates
from pyrite.training.rollouts import Players
from pyrite.training.rounds import Journal

OUTPUTS = {
    "model/": "the last policy, Hugging Face layout; a value head on its trunk beside it",
    "value/": "a value model of its own",
    "best/": "with --early-stopping-patience: the policy with the most gold",
    "ledger.db": "every paid score of gold, where they are paid for",
    "metrics.jsonl": "a row a step: scores, KL, ratio, clip fraction, explained variance; gold and proxy when measured",
}
START = 0.01  # nats: what an answer's log-probability may change by reading it again, and its KL at the start


@dataclass(frozen=True)
class Config:
    """Train a policy on rewards of its own answers."""

    model: str
    """Folder or Hub name of the policy to start from, which is also the reference."""
    prompts: str
    """Prompts: prompt, prompt_id."""
    reward: Some[str]
    """Folders of reward runs, or scorers such as "length()"; "0.5*runs/b" weighs one of several. With --dimensions a
    reward run scores each of a prompt's options, one of its own is ID=FOLDER, and golds are the options' own."""
    out: Path
    """Folder of the run, new or empty."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    held_out: Fraction = 0.1
    """Share of the prompts to hold out for measuring if no --eval-prompts are given."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; what --max-new-tokens leaves of the model's context by default."""
    on_long: OnLong | None = None
    """What to do with a longer prompt: cut it to its end, leave its row out, or stop. By default it is cut, unless all
    prompts are too long."""
    ensemble: str = "mean()"
    """How to combine the scores of a reward run's members: mean(), wco(), uwo(weight=0.5)."""
    advantage: str = "gae()"
    """gae(gamma=1.0, lam=0.95), which is PPO and needs a critic; rloo(), grpo(), reinforce(). Advantages get mean 0 and
    variance 1 over the tokens of a batch, unless whiten=False."""
    value: str = "shared()"
    """The critic: shared(weight=0.1, clip=0.2) or detached(...), a head on the policy's trunk; or a model of its own,
    a folder or "model(path='runs/reward/member_0', lr=1e-5, lora='lora(r=16)')"."""
    steps: Count = 100
    """Number of steps; each draws a batch of answers and learns from it."""
    prompts_per_step: Count = 32
    """Prompts in one step. When all have been used, they come again in a new order."""
    k: Count = 1
    """Answers per prompt; rloo and grpo need at least 2."""
    beta: NonNegative = 0.05
    """Price of one nat of KL from the reference, in units of the reward."""
    kl: str = "k1()"
    """How a token's price of KL is estimated from its log-ratio: k1(), the log-ratio; k3(), never below 0; none(). With
    k1(target=6.0, horizon=10000) beta follows the KL towards so many nats an answer."""
    cliprange: Positive = 0.2
    """PPO's clip range: a token's probability ratio is clipped to 1 - cliprange and 1 + cliprange."""
    reward_scaling: str = "fixed(clip=10.0)"
    """How scores are scaled: fixed, not at all; running, centered and divided by their running standard deviation.
    clip: the largest score of an answer, in absolute value; None for no limit."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of an answer without an end token."""
    measure_every: Count = 10
    """Measure and save a checkpoint every N steps."""
    early_stopping_patience: Count | None = None
    """Stop once gold has fallen from its best while the proxy has not, in so many measurements in a row; the best
    policy by gold is kept in best/."""
    evaluation: Evaluation = Evaluation()
    gold_budget: Natural | None = None
    """The most answers that gold may score in measurements. No answer is paid for twice."""
    gold_limits: str = "limits()"
    """What asking gold costs and how often it is asked: "limits(cost=0.01, max_cost=5, ledger='gold.db', batch=8,
    every=2, prompts=64)". Paid answers are kept in the ledger, which runs may share; every and prompts are about
    measurements: one in so many asks gold, about answers to the first prompts."""
    variants: Variants = Variants()
    combine_rewards: tuple[str, ...] = ("mean",)
    """How to combine the scores of a prompt's options: mean, min, or weights such as P1A=0.5 P2B=0.25."""
    template: Template = Template()
    lora: str | None = None
    """Low-rank adapters in place of the weights: "lora(r=16, alpha=32)"; see `pyrite.models.loading.Lora`."""
    training: Training = Training(lr=1e-6, epochs=4)
    """epochs: passes over a batch of answers; batch_size: prompts in an update."""
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    found: dict[str, str | Path] = {"model": config.model, "prompts": config.prompts, **config.evaluation.inputs()}
    found |= config.variants.inputs()
    critic = _parts(config).critic
    found |= {"value": critic.path} if critic and critic.path else {}
    folders = [_owned(name)[1] for _, name in map(_weighed, config.reward)]
    return found | {f"reward {i}": folder for i, folder in enumerate(folders) if Path(folder).exists()}


def run(config: Config) -> Run:
    """Step after step; goes on from the last checkpoint."""
    run = runs.start("ppo", config, inputs=inputs)
    if run.done:
        return run
    loaded: dict[Path, RewardEnsemble] = {}  # a reward run that is the proxy too is loaded once
    named = _parts(config)
    _check(config, named)
    rewards = _rewards(config, loaded)
    both = rounds.split(
        config.prompts, config.evaluation, columns=config.columns, held_out=config.held_out, seed=config.seed
    )
    asked, test = map(config.variants.of, both)
    for reward in rewards:
        reward.check(asked)
    policy = Policy.load(config.model, lora=Lora.parse(config.lora), template=config.template)
    ready = rounds.prepare(
        policy,
        asked,
        config.evaluation,
        test,
        name=config.model,
        size=config.prompts_per_step,
        seed=config.seed,
        asking=GoldLimits.parse(config.gold_budget, config.gold_limits),
        ensemble=config.ensemble,
        loaded=loaded,
        max_prompt=config.max_prompt,
        on_long=config.on_long,
    )
    options: dict[str, Any] = {"steps": config.steps, "clip": config.cliprange, "seed": config.seed}
    learners = Learners.make(policy, config.training, named.critic, **options)
    players = Players(policy, ready.start, config.training.precision)
    run.open()
    say(f"ppo: {config.steps} steps of {ready.size * config.k} answers, {len(test)} prompts to measure on")
    control = KLControl(config.beta, named.kl.target, named.kl.horizon)
    state = State.of(control)
    journal = Journal(run, ready.evaluator, policy, "ppo", config.early_stopping_patience)
    begin = learners.resume(run.folder, state)
    journal.begin(begin)
    drawing: dict[str, Any] = {
        "k": config.k,
        "max_new_tokens": config.evaluation.max_new_tokens,
        "seed": config.seed,
        "critic": learners.critic,
    }

    def step(number: int) -> tuple[int, int, dict[str, float], bool]:
        drawn = collect(players, rewards, *ready.turn(number), number, **drawing)
        if number == 0:
            _check_start(players, drawn)
        shaped, clipped = _shaped(drawn, state, named, config.missing_eos_penalty)
        made = _advantages(drawn, shaped, state, named.advantage)
        found = learners.learn(drawn, made, number) | _summary(drawn, shaped, made, state) | clipped
        state.follow(control, found["rollout_kl"], answers=len(drawn.responses))
        return len(drawn.responses), 0, found, False

    def save(done: int) -> None:
        learners.save(run.folder, done, state)

    journal.go(step, save, begin=begin, total=config.steps, every=config.measure_every, unit="step")
    learners.finish(run)
    return journal.finish(ready, config.training.lr)


# One step ---------------------------------------------------------------------------------------------------------


def _check_start(players: Players, drawn: Rollouts) -> None:
    """Policy, reference and the policy read again must be one at the start. Raises TrainingError."""
    again = players.policy_logps(drawn.responses, drawn.responses.groups())
    for name, other in (("the policy read again", again), ("the reference", drawn.ref)):
        assert drawn.logps.tokens is not None and other.tokens is not None
        off = ((drawn.logps.tokens - other.tokens).abs() * drawn.mask).max().item()
        if not off < START:
            raise TrainingError(
                f"step 1: a token's log-probability under {name} is {off:.3g} nats off what it was drawn with; "
                "at the start both are one model, so something is wrong with it: use another model or report this"
            )


def _shaped(
    drawn: Rollouts, state: State, named: Choices, missing_eos: float | None
) -> tuple[Tensor, dict[str, float]]:
    """Token rewards (N, T): the score at the end, the price of KL on the way. And the share of scores that were cut."""
    scaling, scores = named.scaling, drawn.scores.total
    state.see("scores", scores)
    if scaling.running:
        scores = normalized(scores, state.scores)
    assert drawn.logps.tokens is not None and drawn.ref.tokens is not None
    cut = {} if scaling.clip is None else {"reward_clipped": (scores.abs() > scaling.clip).double().mean()}
    shaped = token_rewards(
        scores.float(),
        drawn.logps.tokens,
        drawn.ref.tokens,
        drawn.mask,
        beta=state.beta.item(),
        kl=named.kl.estimator,
        finished=drawn.responses.finished,
        missing_eos=missing_eos,
        clip=scaling.clip,
    )
    return shaped, {name: share.item() for name, share in cut.items()}


def _advantages(drawn: Rollouts, shaped: Tensor, state: State, by: Advantage) -> Estimates:
    """Against the critic, the prompt's other answers, or the mean of earlier batches."""
    before = state.see("returns", shaped.sum(1))
    baseline = before.mean if before.count else None
    made = estimates(drawn, shaped, method=by.method, gamma=by.gamma, lam=by.lam, baseline=baseline)
    return made._replace(advantages=whiten(made.advantages, drawn.mask)) if by.whiten else made


def _summary(drawn: Rollouts, shaped: Tensor, made: Estimates, state: State) -> dict[str, float]:
    """Metrics of a batch: its KL by two estimators with a standard error, entropy, length, scores by member."""
    k1 = statistics.kl(drawn.logps, drawn.ref, estimator="k1").double()
    k3 = statistics.kl(drawn.logps, drawn.ref, estimator="k3").double()
    assert drawn.logps.tokens is not None
    found = {
        "score": drawn.scores.total.mean().item(),
        "shaped": shaped.sum(1).mean().item(),
        "rollout_kl": k1.mean().item(),
        "rollout_kl_se": (k1.std() / len(k1) ** 0.5).item() if len(k1) > 1 else 0.0,
        "rollout_kl_k3": k3.mean().item(),
        "entropy": (-drawn.logps.tokens[drawn.mask]).mean().item(),
        "rollout_length": drawn.logps.length.double().mean().item(),
        "cut": (~drawn.responses.finished).double().mean().item(),
        "beta": state.beta.item(),
        **drawn.scores.summary(),
    }
    if drawn.values is not None:
        explained = explained_variance(drawn.values, made.returns, drawn.mask).item()
        found |= {"explained_variance": explained} if explained == explained else {}
    return found


# Parts --------------------------------------------------------------------------------------------------------------


class Advantage(NamedTuple):
    """How rewards become advantages."""

    method: AdvantageMethod
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True


def gae(*, gamma: Share = 1.0, lam: Share = 0.95, whiten: bool = True) -> Advantage:
    """Generalized advantage estimation against a critic: lam 0 trusts the critic, 1 the returns; gamma discounts."""
    return Advantage("gae", gamma, lam, whiten)


def rloo(*, whiten: bool = True) -> Advantage:
    """Against the mean of the prompt's other answers."""
    return Advantage("rloo", whiten=whiten)


def grpo(*, whiten: bool = True) -> Advantage:
    """Against the mean of the prompt's answers, divided by their standard deviation."""
    return Advantage("group", whiten=whiten)


def reinforce(*, whiten: bool = True) -> Advantage:
    """Against the mean of earlier batches."""
    return Advantage("reinforce", whiten=whiten)


def shared(*, weight: NonNegative = 0.1, clip: Positive | None = 0.2) -> Critic:
    """A head on the policy's trunk, which learns from both losses. weight: of the critic's loss. clip: how far a
    predicted value may move in a batch and still be rewarded for it; None for no limit."""
    return Critic("shared", weight=weight, clip=clip)


def detached(*, weight: NonNegative = 0.1, clip: Positive | None = 0.2) -> Critic:
    """A head on the policy's trunk, which learns from the policy's loss alone."""
    return Critic("detached", weight=weight, clip=clip)


def model(*, path: str, lr: Positive | None = None, lora: str | None = None, clip: Positive | None = 0.2) -> Critic:
    """A model or reward model of its own. lr: the policy's by default. lora: adapters in place of its weights."""
    return Critic("model", path, lr, Lora.parse(lora), clip=clip)


class KL(NamedTuple):
    """How a token's price of KL is estimated, and the KL that beta follows."""

    estimator: Literal["k1", "k3", "none"]
    target: float | None = None
    horizon: float = 10_000.0


def k1(*, target: Positive | None = None, horizon: Positive = 10_000.0) -> KL:
    """The log-ratio. target: nats an answer towards which beta moves, over `horizon` answers."""
    return KL("k1", target, horizon)


def k3(*, target: Positive | None = None, horizon: Positive = 10_000.0) -> KL:
    """Never below 0. target: nats an answer towards which beta moves, over `horizon` answers."""
    return KL("k3", target, horizon)


def none() -> KL:
    """Tokens have no price."""
    return KL("none")


class Scaling(NamedTuple):
    """How scores are scaled."""

    running: bool
    clip: float | None


def fixed(*, clip: Positive | None = 10.0) -> Scaling:
    """Scores as they are, held at `clip`."""
    return Scaling(False, clip)


def running(*, clip: Positive | None = 10.0) -> Scaling:
    """Scores divided by their running standard deviation and centered, held at `clip`."""
    return Scaling(True, clip)


ADVANTAGES = {one.__name__: one for one in (gae, rloo, grpo, reinforce)}
VALUES = {one.__name__: one for one in (shared, detached, model)}
KLS = {one.__name__: one for one in (k1, k3, none)}
SCALINGS = {one.__name__: one for one in (fixed, running)}


class Choices(NamedTuple):
    """The parts that the options name; critic is None if the advantages need none."""

    advantage: Advantage
    critic: Critic | None
    kl: KL
    scaling: Scaling


def _parts(config: Config) -> Choices:
    """The parts that the options name. Raises ValueError for an option that names none."""
    advantage = _part("advantage", config.advantage, ADVANTAGES)
    critic = _part("value", config.value, VALUES)
    kl, scaling = _part("kl", config.kl, KLS), _part("reward-scaling", config.reward_scaling, SCALINGS)
    return Choices(advantage, critic if advantage.method == "gae" else None, kl, scaling)


def _part(name: str, spec: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    """The part that an option's spec string names."""
    if name == "value" and not re.match(rf"\s*({'|'.join(known)})\s*(\(|$)", spec):
        spec = f"model(path={spec!r})"  # a folder or Hub name
    try:
        return specs.part(spec, known).function
    except ValueError as error:
        raise ValueError(f"--{name} {spec}: {error}") from None


# Options ----------------------------------------------------------------------------------------------------------


def _check(config: Config, named: Choices) -> None:
    """Raises ValueError for whatever the options alone show to be impossible."""
    rounds.check_stopping(config.early_stopping_patience, config.evaluation)
    specs.part(config.ensemble, ensembles)  # also if no reward has members
    names = [name for _, name in _each(config.reward)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--reward names {twice[0]} more than once; give each reward once, with its weight")
    if named.advantage.method in ("rloo", "group") and config.k < 2:
        raise ValueError(f"--advantage {config.advantage} compares the answers to a prompt: give --k 2 or more")
    if named.critic is None and config.value != Config.value:
        raise ValueError(f"--advantage {config.advantage} has no critic: leave --value out")


def _rewards(config: Config, loaded: dict[Path, RewardEnsemble]) -> list[Reward]:
    """Every reward, loaded."""
    if config.variants.dimensions:
        return _of_preferences(config, Dimensions.load(config.variants.dimensions), loaded)
    if config.combine_rewards != Config.combine_rewards:
        raise ValueError("--combine-rewards is about preferences: give --dimensions")
    for _, name in _each(config.reward):
        if re.fullmatch(r"[^()]+", name) and not Path(name).is_dir() and not hasattr(scorers, name) and ":" not in name:
            raise ValueError(f"--reward {name}: no such folder{checkpoints.nearest(name)}; scorers have parentheses")
    return [
        Reward.of_models(name, ensemble=config.ensemble, weight=weight, loaded=loaded)
        if Path(name).is_dir()
        else Reward.of_scorer(name, weight=weight)
        for weight, name in _each(config.reward)
    ]


def _of_preferences(config: Config, dimensions: Dimensions, loaded: dict[Path, RewardEnsemble]) -> list[Reward]:
    """Rewards that score every option a prompt was asked under, from the raw prompt with that one option."""
    given = _each(config.reward)
    own = dict(_owned(name) for _, name in given if _owned(name)[0])
    if own and len(own) < len(given):
        raise ValueError(f"--reward {' '.join(config.reward)}: give ID=FOLDER for every option, or none")
    sources = [(1.0, own)] if own else [(weight, None if name == "golds" else name) for weight, name in given]
    how: Combine = {("mean",): "mean", ("min",): "min"}.get(config.combine_rewards, "weighted")  # type: ignore[assignment]
    pairs = [weight.partition("=") for weight in config.combine_rewards if how == "weighted"]
    try:
        weights = {id: float(value) for id, _, value in pairs}
    except ValueError as error:
        said = " ".join(config.combine_rewards)
        raise ValueError(f"--combine-rewards {said}: write mean, min, or weights as P1A=0.5") from error
    return [
        Reward.of_preferences(
            source,
            dimensions,
            combine=how,
            weights=weights,
            ensemble=config.ensemble,
            turn=config.variants.preference_turn,
            weight=weight,
            loaded=loaded,
        )
        for weight, source in sources
    ]


def _each(rewards: Sequence[str]) -> list[tuple[float, str]]:
    if not rewards:
        raise ValueError("--reward: give at least one reward run or scorer")
    return [_weighed(reward) for reward in rewards]


def _owned(reward: str) -> tuple[str, str]:
    """ "P1A=runs/b" is ("P1A", "runs/b"); a folder whose path has a "=" is no option's own."""
    id, equals, folder = reward.partition("=")
    return (id, folder) if equals and not Path(reward).exists() else ("", reward)


def _weighed(reward: str) -> tuple[float, str]:
    """ "0.5*runs/b" is (0.5, "runs/b")."""
    match = re.fullmatch(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*\*\s*(.+)", reward)
    return (float(match[1]), match[2]) if match else (1.0, reward)
