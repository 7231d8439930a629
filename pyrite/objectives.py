"""Rewards of preferences: an answer is scored once for every option it was asked under, and the scores become one.

R(x, y | c) = combined over the options i of c of r(x + sentence of i, y): each score reads the raw prompt with that one
option, so that models of single preferences serve every combination.

Jang et al. 2023, arXiv:2310.11564, section 3 (P-MORL; with one option a row, the policies of P-Soups).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrite import ensembles, golds, parts
from pyrite.dimensions import Dimensions, Option, Turn, render
from pyrite.members import member_paths
from pyrite.models import RewardEnsemble, RewardModel
from pyrite.rounds import Answer
from pyrite.text import plain

Combine = Literal["mean", "weighted", "min"]
OneScore = Callable[[Sequence[Answer]], Tensor]


@dataclass(frozen=True)
class Objectives:
    """A scorer of answers for each of E options, how a row's scores become one, and the options' weights."""

    dimensions: Dimensions
    scorers: Mapping[str, OneScore]
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

    def score(self, answers: Sequence[Answer]) -> Tensor:
        """Scores (E, N) of N answers, NaN where an answer was not asked under an option."""
        self.check([vars(answer) for answer in answers])
        table = torch.full((len(self.ids), len(answers)), torch.nan)
        for row, id in zip(table, self.ids, strict=True):
            mine = [n for n, answer in enumerate(answers) if id in (answer.preferences or ())]
            if mine:
                given = self.scorers[id]([answers[n] for n in mine])
                row[mine] = golds.check_scores(given, len(mine), name=f"the reward of {id}").cpu()
        return table

    def combine(self, scores: Tensor) -> Tensor:
        """What (E, N) scores with NaN gaps are together, (N,)."""
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
) -> dict[str, OneScore]:
    """A scorer an option from reward runs, standardized as these are: one folder for all, or {option id: folder}.

    A base that the models share is held in memory once. loaded: reward runs that the job has loaded already. Raises
    ValueError for an unknown option, a folder without reward models or an unknown ensemble.
    """
    by_id = dict.fromkeys(dimensions.ids, source) if isinstance(source, str) else source
    folders = {dimensions.option(id): folder for id, folder in by_id.items()}
    combine, models = parts.part(ensemble, ensembles), dict[str, RewardEnsemble]()
    loaded = {} if loaded is None else loaded
    for folder in dict.fromkeys(folders.values()):
        if (place := Path(folder).resolve()) not in loaded:
            loaded[place] = _loaded(folder, next(iter(models.values()), None))
        models[folder] = loaded[place]
        combine(torch.zeros(len(models[folder].members), 1))

    def scorer(option: Option, models: RewardEnsemble) -> OneScore:
        def score(answers: Sequence[Answer]) -> Tensor:
            asked = [render(answer.asked or "", [option], turn=turn) for answer in answers]
            finished = [answer.finished for answer in answers]
            return combine(models.scores(asked, [answer.response for answer in answers], finished=finished))

        return score

    return {option.id: scorer(option, models[folder]) for option, folder in folders.items()}


def gold_scorers(dimensions: Dimensions) -> dict[str, OneScore]:
    """The exact scorers of the options that have one, as they are; they read the raw prompt. Raises ValueError where
    no option has one."""

    def scorer(gold: str) -> OneScore:
        exact = parts.part(gold, golds)
        return lambda answers: exact([plain(a.asked or "") for a in answers], [a.response for a in answers])

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
