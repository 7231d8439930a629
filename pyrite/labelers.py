"""Who labels a round's pairs: the judge all of them, or a discriminator beside it; what is paid for is in a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pyrite import runs, text, train
from pyrite.accounts import Account, Budget
from pyrite.judges import Judge
from pyrite.labels import label
from pyrite.ledger import Ledger
from pyrite.live import Judged, Live, Rules, Shelf, groups, names
from pyrite.options import Count, Natural, NonNegative
from pyrite.processes import on_main, world
from pyrite.progress import say
from pyrite.rounds import Answer


@dataclass(frozen=True)
class Paying:
    """What the judge's labels may cost, and where they are kept."""

    budget: Natural | None = None
    """Labels to buy at most."""
    max_cost: NonNegative | None = None
    """Money to spend at most; needs --label-cost."""
    label_cost: NonNegative = 0.0
    """Price of one call of the judge."""
    ledger: Path | None = None
    """SQLite file of paid labels, which runs may share; ledger.db in the run's folder by default."""
    budget_scope: Literal["run", "file"] = "run"
    """Whose purchases count against the budget: this run's, or those of all runs that share the ledger."""
    label_batch: Count = 1
    """Pairs in one call of the judge; more is faster with a cheap one, and puts more at risk when a run is killed."""

    def __post_init__(self) -> None:
        if self.max_cost is not None and not self.label_cost:
            raise ValueError(f"--max-cost {self.max_cost}: give --label-cost, the price of one call, too")

    @property
    def counted(self) -> bool:
        """Whether labels are paid for at all."""
        return self.budget is not None or self.max_cost is not None or self.ledger is not None

    def account(self, folder: Path, judge: str) -> Account:
        """This run's account with the judge."""
        budget = Budget(labels=self.budget, money=self.max_cost, cost=self.label_cost, scope=self.budget_scope)
        ledger = Ledger(self.ledger or folder / "ledger.db")
        return Account(ledger, str(folder.resolve()), judge, "verdict", budget=budget, batch=self.label_batch)


@dataclass
class Labeler:
    """Verdicts of one round after another, and what must outlast a stop."""

    judge: Judge
    rules: Rules
    folder: Path
    budget: Natural | None = None
    account: Account | None = None
    live: Live | None = None
    used: int = 0
    told: bool = False

    def __call__(self, answers: Sequence[Answer], number: int) -> Judged:
        """The pairs of a round."""
        judge = on_main(partial(self.account.ask, self.judge, round=number)) if self.account else self.judge
        judged = self.live(judge, answers, number) if self.live else self._all(judge, answers, number)
        self.used += judged.labelled.labels
        if self.spent(number) and not self.told:
            goes_on = "silver labels go on alone" if self.live else "there is nothing more to learn from"
            say(f"online: the budget is spent after round {number + 1}, with {self.used} labels; {goes_on}")
            self.told = True
        return judged

    def spent(self, number: int) -> bool:
        """Whether this run has had all the labels it may have, after a round."""
        if self.budget is not None and self.used >= self.budget:
            return True
        limit = self.account.budget if self.account else Budget()
        if not self.account or limit.money is None:
            return False
        return self.account.books(round=number).money + limit.cost > limit.money + 1e-9

    def save(self, number: int) -> None:
        """What the next rounds need, beside the policy's checkpoint; the last two are kept."""
        if not self.live or not world().is_main_process:
            return
        for member, learner in enumerate(self.live.discriminator.learners):
            train.save(self._checkpoints(member), number, learner, {})
        shelf = self._shelf(number)
        shelf.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(shelf, self.live.shelf.rows())
        kept = sorted(shelf.parent.glob("shelf-*.json"), key=lambda path: int(path.stem.split("-")[1]))
        for old in kept[:-2]:
            old.unlink()

    def resume(self, number: int, used: int) -> None:
        """Go on after so many rounds, which had so many labels."""
        self.used = used
        if not self.live or not number:
            return
        for member, learner in enumerate(self.live.discriminator.learners):
            train.resume(self._checkpoints(member), learner, {}, step=number)
        self.live.shelf = Shelf.read(runs.read_json(self._shelf(number)))

    def _all(self, judge: Judge, answers: Sequence[Answer], number: int) -> Judged:
        """Every pair is the judge's."""
        made = label(
            judge,
            [text.plain(answer.prompt) for answer in answers],
            [answer.response for answer in answers],
            groups(answers),
            pairing=self.rules.pairing,
            labels=self.rules.labels,
            gap=self.rules.gap,
            seed=self.rules.stream("labels", number),
            name=self.rules.judge,
            names=names(answers),
        )
        return Judged(list(answers), made)

    def _checkpoints(self, member: int) -> Path:
        return self.folder / "checkpoints" / "silver" / str(member)

    def _shelf(self, number: int) -> Path:
        return self.folder / "checkpoints" / "silver" / f"shelf-{number}.json"
