"""How often the gold that measures a run is asked, and what its answers may cost: the truth has a price too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyrite import golds
from pyrite.accounts import Account, Budget
from pyrite.golds import Scorer
from pyrite.ledger import Ledger
from pyrite.options import Count, Natural, NonNegative, Several, check
from pyrite.processes import on_main
from pyrite.progress import say


@dataclass(frozen=True)
class Asking:
    """When gold is asked in a run's measurements, and what that may cost; by default always, for nothing."""

    gold_every: Count = 1
    """Measurements to one with gold; the first and the last have it too."""
    gold_prompts: Several | None = None
    """Held-out prompts whose answers gold is asked about, the first ones; all by default."""
    gold_budget: Natural | None = None
    """Answers gold may score at most, in the measurements; none is scored twice."""
    gold_max_cost: NonNegative | None = None
    """Money to spend on that at most; needs --gold-cost."""
    gold_cost: NonNegative = 0.0
    """Price of scoring one answer."""
    gold_ledger: Path | None = None
    """SQLite file of paid scores, which runs may share; ledger.db in the run's folder by default."""
    gold_batch: Count = 1
    """Answers in one call of gold."""

    def __post_init__(self) -> None:
        check(self)
        if self.gold_max_cost is not None and not self.gold_cost:
            raise ValueError(f"--gold-max-cost {self.gold_max_cost}: give --gold-cost, the price of one answer, too")

    @property
    def sparing(self) -> bool:
        """Whether gold is asked less than always: then nobody asks it anything but measurements."""
        return self != ALWAYS

    @property
    def counted(self) -> bool:
        """Whether its answers are paid for, through a ledger."""
        limits = (self.gold_budget, self.gold_max_cost, self.gold_ledger)
        return self.gold_cost > 0 or any(limit is not None for limit in limits)

    def account(self, folder: Path, gold: str) -> Account | None:
        """The run's account with the gold, where its answers are counted."""
        if not self.counted:
            return None
        ledger = Ledger(self.gold_ledger or folder / "ledger.db")
        return Account(ledger, str(folder.resolve()), gold, "score", budget=self._budget(), batch=self.gold_batch)

    def _budget(self) -> Budget:
        return Budget(self.gold_budget, self.gold_max_cost, self.gold_cost)


ALWAYS = Asking()


@dataclass
class Truth:
    """Gold of one measurement after another; `account` where it is paid for."""

    scorer: Scorer
    name: str
    asking: Asking = ALWAYS
    account: Account | None = None
    told: bool = False

    def due(self, number: int, *, over: bool) -> bool:
        """Whether measurement `number` (0 is the start) asks gold; the last one of a run always does."""
        return over or number % self.asking.gold_every == 0

    def __call__(self, prompts: list[str], responses: list[str], owner: Tensor, *, step: int) -> Tensor | None:
        """Gold of N answers, answer i to prompt owner[i]: NaN where gold was not asked or gave none; None of all.

        A budget that does not cover what a measurement still has to buy buys nothing of it: part of its answers would
        be another measurement. Gold of answers to fewer than 2 prompts is none, for it has no standard error.
        """
        some = (owner < self.asking.gold_prompts if self.asking.gold_prompts else torch.ones_like(owner).bool()).cpu()
        chosen = some.nonzero().flatten().tolist()
        asked, said = [prompts[i] for i in chosen], [responses[i] for i in chosen]
        if self.account is None:
            found: Tensor | None = golds.check_scores(self.scorer(asked, said), len(said), name=self.name).cpu()
        else:
            found = on_main(self._buy)(asked, said, step)
        if found is None:
            return None
        known = found.isfinite()
        if len(owner[some][known].unique()) < min(2, len(owner.unique())):
            return None
        gold = found.new_full((len(owner),), math.nan)
        gold[some] = found
        return gold

    def spent(self, step: int) -> dict[str, float]:
        """Answers bought up to a step, and money where they have a price."""
        if self.account is None:
            return {}
        books = self.account.books(round=step)
        return {"gold_labels": books.labels} | ({"gold_money": books.money} if self.asking.gold_cost else {})

    def _buy(self, prompts: list[str], responses: list[str], step: int) -> Tensor | None:
        """Every answer's gold, or None where the budget does not cover it; NaN where gold gave none."""
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
            bought = self.account.books(round=step).labels
            say(
                f"  the budget of gold, {bought} answers so far, does not pay for the measurement at step {step}; "
                "measuring goes on without gold"
            )
            self.told = True
