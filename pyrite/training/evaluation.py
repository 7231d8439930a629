"""Gold reward, proxy reward and KL from the reference, of answers a policy samples: always side by side.

Answers are drawn at temperature 1 without truncation and scored under the same distribution, so that
KL(policy || ref) = E_policy[log pi - log pi_ref] is estimated where it is defined. Natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite.core import specs
from pyrite.core.processes import Advance, on_main, say
from pyrite.data import rows, text
from pyrite.data.responses import Responses
from pyrite.data.rows import OnLong
from pyrite.feedback import scorers
from pyrite.feedback.ledger import Account, GoldLimits
from pyrite.feedback.scorers import Scorer
from pyrite.math import ensembles, seeds, statistics
from pyrite.math.logps import Logps
from pyrite.math.ranges import Count
from pyrite.models.forward import Packed, score, singles, token_logps
from pyrite.models.policy import Policy, RewardEnsemble

# Gold in measurements ----------------------------------------------------------------------------------------------


ALWAYS = GoldLimits()


@dataclass
class Truth:
    """Asks gold about one measurement after another. account: pays for the answers, if they cost anything."""

    scorer: Scorer
    name: str
    asking: GoldLimits = ALWAYS
    account: Account | None = None
    told: bool = False

    def due(self, number: int, *, over: bool) -> bool:
        """Whether measurement `number` (0 is the start) asks gold; the last one of a run always does."""
        return over or number % self.asking.every == 0

    def __call__(self, answers: Responses, *, step: int) -> Tensor | None:
        """Gold of N answers: NaN if it was not asked about an answer or gave no score; None if there is none at all.

        If the remaining budget cannot pay for the whole measurement, nothing is bought: scoring only some answers
        would not be comparable. Gold of answers to fewer than 2 prompts has no standard error, and is not given.
        """
        owner = answers.prompt
        some = owner < self.asking.prompts if self.asking.prompts else torch.ones_like(owner).bool()
        chosen = answers.take(some.nonzero().flatten())
        if self.account is None:
            found: Tensor | None = gold_scores(self.scorer, chosen, name=self.name).cpu()
        else:
            found = on_main(self._buy)([text.plain(prompt) for prompt in chosen.prompts], chosen.texts, step)
        if found is None:
            return None
        known = found.isfinite()
        if len(owner[some][known].unique()) < min(2, len(owner.unique())):
            return None
        gold = found.new_full((len(owner),), math.nan)
        gold[some] = found
        return gold

    def spent(self, step: int) -> dict[str, float]:
        """Answers bought up to a step, and the money spent if they have a price."""
        if self.account is None:
            return {}
        books = self.account.books(round=step)
        return {"gold_labels": books.answered} | ({"gold_money": books.money} if self.asking.cost else {})

    def _buy(self, prompts: list[str], responses: Sequence[Any], step: int) -> Tensor | None:
        """The gold of every answer, NaN if gold gave none; None if the budget does not cover all of them."""
        assert self.account is not None
        if self.account.wanting(prompts, responses, round=step) > self.account.left:
            self._tell(step)
            return None
        found = self.account.ask(self.scorer, prompts, responses, round=step)
        if missing := int(found.isnan().sum()):
            say(f"  gold gave no score to {missing} of {len(found)} answers at step {step}; they are left out")
        return found

    def _tell(self, step: int) -> None:
        if not self.told and self.account is not None:
            bought = self.account.books(round=step).answered
            say(
                f"  the budget of gold, {bought} answers so far, does not pay for the measurement at step {step}; "
                "measuring goes on without gold"
            )
            self.told = True


def gold_scores(scorer: Scorer, answers: Responses, *, name: str) -> Tensor:
    """Scores (N,) of answers by a gold function, which reads plain texts. Raises ValueError if one is not finite."""
    given = scorer([text.plain(prompt) for prompt in answers.prompts], list(answers.texts))
    return scorers.check_scores(given, len(answers), name=name)


# KL and entropy over the whole vocabulary at every position of an answer


CHUNK = 1024  # positions whose logits are in memory at a time


@dataclass(frozen=True, eq=False)
class Divergences:
    """Of N answers: log-probabilities under the reference, and at every position, (T_i,) float32 nats each:

    kl       KL(π ‖ π_ref) = Σ_v π(v) log(π(v)/π_ref(v))
    entropy  −Σ_v π(v) log π(v)
    """

    ref: Logps
    kl: list[Tensor]
    entropy: list[Tensor]

    def summary(self) -> dict[str, Tensor]:
        """kl_exact (N,), nats an answer; entropy_exact (N,), nats a token, the mean over an answer's tokens."""
        kl = torch.stack([row.double().sum() for row in self.kl])
        return {"kl_exact": kl, "entropy_exact": torch.stack([row.double().mean() for row in self.entropy])}


def divergences(policy: Policy, ref: Policy, drawn: Responses, *, budget: int = 16384) -> Divergences:
    """Of each response, as the policy drew it. ref: `policy` itself is the policy without its adapters."""
    ref.eval()

    def read(batch: Packed) -> Tensor:
        theirs = ref.readable(batch)
        ours = policy.logits(theirs if theirs.padded else batch)
        with policy.without_adapters() if ref is policy else nullcontext():
            return _by_position(ours, ref.logits(theirs), theirs)

    found = score(policy, drawn, singles(drawn), read=read, budget=budget)
    logps, kl, entropy = (drawn.split(row) for row in found)
    return Divergences(Logps.from_tokens(logps), list(kl), list(entropy))


def _by_position(ours: Callable[[slice], Tensor], theirs: Callable[[slice], Tensor], batch: Packed) -> Tensor:
    """(3, R): log π_ref(target), KL(π ‖ π_ref), entropy of π."""
    found = []
    for begin in range(0, len(batch.target), CHUNK):
        some = slice(begin, begin + CHUNK)
        p, q = (torch.log_softmax(logits(some).float(), -1) for logits in (ours, theirs))
        weight, picked = p.exp(), q.gather(1, batch.target[some, None]).squeeze(1)
        found.append(torch.stack([picked, (weight * (p - q)).sum(-1), -(weight * p).sum(-1)]))
    return torch.cat(found, dim=1)


# Answers of a policy, measured


@dataclass(frozen=True)
class Evaluation:
    """How a policy is measured: the prompts it answers, and what scores the answers."""

    eval_prompts: str | None = None
    """Evaluation prompts: prompt, prompt_id."""
    gold: str | None = None
    """Gold scorer, the reward that counts as true."""
    proxy: str | None = None
    """Proxy: the folder of a reward run."""
    eval_limit: Count | None = 256
    """Use at most this many of the evaluation prompts."""
    eval_k: Count = 1
    """Answers per prompt."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""

    def inputs(self) -> dict[str, str]:
        """What is read."""
        named = {"eval_prompts": self.eval_prompts, "proxy": self.proxy}
        return {name: path for name, path in named.items() if path}


@dataclass(frozen=True)
class Measurement:
    """N answers to P prompts and their `values`, (N,) each, by name; gold is NaN for an answer it was not asked about.

    exact: KL from the reference and entropy by position, if they were asked for.
    """

    responses: Responses
    values: dict[str, Tensor]
    exact: Divergences | None = None

    def summary(self) -> dict[str, dict[str, float]]:
        """Means with standard errors over prompts (answers to one prompt are averaged first)."""
        return {name: _summary(self.by_prompt(name), known=name == "gold") for name in self.values}

    def means(self) -> dict[str, float]:
        """The same as a row of metrics: gold, gold_se and so on."""
        each = self.summary().items()
        return {key: v for name, found in each for key, v in ((name, found["mean"]), (f"{name}_se", found["se"]))}

    def by_prompt(self, name: str) -> Tensor:
        """The mean of a value over the answers to each prompt, (P,) float64; NaN for a prompt without known gold."""
        value, prompt, prompts = self.values[name].double(), self.responses.prompt, len(self.responses.rows)
        known = ~value.isnan() if name == "gold" else torch.ones_like(value).bool()
        total = torch.zeros(prompts, dtype=torch.float64).index_add(0, prompt[known], value[known])
        return total / torch.bincount(prompt[known], minlength=prompts)


@dataclass(frozen=True)
class Evaluator:
    """Prompts and scorers, loaded and checked, ready to measure a policy."""

    prompts: list[dict[str, Any]]
    ids: list[list[int]]
    gold: Scorer | None
    proxy: Callable[[Responses], Tensor] | None
    ref: Policy | None
    options: Evaluation
    seed: int
    asking: GoldLimits = ALWAYS
    long: Mapping[str, int] = field(default_factory=dict)
    """How many prompts were too long, by what was done with them."""
    exact: bool = False
    """Also measure KL and entropy over the whole vocabulary at every position: less noise, one more forward."""

    @classmethod
    def load(
        cls,
        options: Evaluation,
        policy: Policy,
        *,
        ref: str | Policy | None,
        seed: int,
        columns: str | None = None,
        prompts: list[dict[str, Any]] | None = None,
        asking: GoldLimits = ALWAYS,
        ensemble: str = "mean()",
        exact: bool = False,
        loaded: dict[Path, RewardEnsemble] | None = None,
        max_prompt: int | None = None,
        on_long: OnLong | None = None,
    ) -> Evaluator:
        """Load everything, and refuse options and scorers that cannot work. Long prompts: as `pyrite.data.rows.fit`.

        ref: a path, a loaded policy, or `policy` itself, which then is its own reference without its adapters.
        prompts: rows in place of those in `options.eval_prompts`. asking: limits on gold, if the caller asks it.
        ensemble: how the proxy's members become one score. loaded: reward runs that the job has loaded already.
        """
        if asking.sparing and not options.gold:
            raise ValueError("options --gold-... say when gold is asked and what it may cost: give --gold too, or none")
        gold = specs.part(options.gold, scorers) if options.gold else None
        given = prompts is not None
        prompts = prompts or rows.load(str(options.eval_prompts), "prompts", columns=columns)
        prompts = prompts[: options.eval_limit]
        if gold and not asking.counted:  # one that cannot score is refused now, unless a try has a price
            tried = gold([text.plain(prompts[0]["prompt"])] * 2, ["hello", "hello there"])
            scorers.check_scores(tried, 2, name=str(options.gold))
        fitted = rows.fit(
            policy.tokenizer,
            prompts,
            most=rows.room(policy.context, options.max_new_tokens, max_prompt),
            context=policy.context,
            on_long=on_long or ("truncate" if given else None),
            note=lambda words: say(f"to measure on: {words}"),
        )
        prompts, ids = fitted.rows, fitted.ids
        judged = gold, _proxy(options, ensemble, loaded), _reference(policy, ref)
        made = cls(prompts, ids, *judged, options, seed, asking, fitted.counts(), exact)
        replace(made, prompts=prompts[:1], ids=ids[:1])._sample(policy, new=1)  # refuses options out of range
        return made

    def __call__(self, policy: Policy, *, gold: bool = True, progress: Advance | None = None) -> Measurement:
        """Draw answers and score them. gold: whether by gold too."""
        drawn = self._sample(policy, new=self.options.max_new_tokens, progress=progress)
        values: dict[str, Tensor] = {}
        if self.gold and gold:
            values["gold"] = gold_scores(self.gold, drawn, name=str(self.options.gold))
        if self.proxy:
            values["proxy"] = self.proxy(drawn)
        found, exact = self._kl(policy, self.ref, drawn) if self.ref else ({}, None)
        values |= found | {"length": drawn.lengths.double(), "missing_eos": (~drawn.finished).double()}
        return Measurement(drawn, values, exact)

    @property
    def total(self) -> int:
        """Answers in one measurement."""
        return len(self.prompts) * self.options.eval_k

    def _sample(self, policy: Policy, *, new: int, progress: Advance | None = None) -> Responses:
        return policy.draw(
            self.prompts,
            self.ids,
            k=self.options.eval_k,
            max_new_tokens=min(new, self.options.max_new_tokens),
            seed=seeds.derive(self.seed, "evaluate"),
            progress=progress,
        )

    def _kl(self, policy: Policy, ref: Policy, drawn: Responses) -> tuple[dict[str, Tensor], Divergences | None]:
        """k1 and k3 of every answer, and the exact KL if wanted, of the very tokens that were drawn."""
        assert drawn.logps is not None  # it was drawn
        ours = Logps.from_tokens(drawn.split(drawn.logps))
        assert ours.tokens is not None
        ours = replace(ours, sum=ours.tokens.double().sum(1))
        exact = divergences(policy, ref, drawn) if self.exact else None
        with policy.without_adapters() if ref is policy else nullcontext():
            theirs = exact.ref if exact else token_logps(ref, drawn, singles(drawn))
        found = {f"kl_{name}": statistics.kl(ours, theirs, estimator=name).double() for name in ("k1", "k3")}
        return found | (exact.summary() if exact else {}), exact


def _proxy(
    options: Evaluation, ensemble: str, loaded: dict[Path, RewardEnsemble] | None
) -> Callable[[Responses], Tensor] | None:
    combine = specs.part(ensemble, ensembles)
    combine(torch.zeros(2, 1))  # an option out of range is refused now
    if not options.proxy:
        return None
    rewards = RewardEnsemble.load(options.proxy, loaded=loaded)
    return lambda answers: combine(rewards.standardized(answers))


def _reference(policy: Policy, path: str | Policy | None) -> Policy | None:
    if path is None or isinstance(path, Policy):
        return path
    ref = Policy.load(path)
    if ref.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"{path} and the policy have other vocabularies: no KL between them")
    return ref.requires_grad_(False)


def _summary(means: Tensor, *, known: bool = False) -> dict[str, float]:
    """Mean and standard error over prompts. known: leave out prompts without a value."""
    means = means[~means.isnan()] if known else means
    error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else 0.0
    return {"mean": means.mean().item(), "se": error}
