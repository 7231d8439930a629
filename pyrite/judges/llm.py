"""A language model as a judge: two answers, one criterion, any OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrite import options
from pyrite.judges.answers import Answers, Kept, Question
from pyrite.judges.asking import Desk, Pace, Trade
from pyrite.judges.costs import Counter, Prices, by_characters, most
from pyrite.judges.endpoints import Completion, Endpoint, Trouble
from pyrite.judges.forms import Case, Form, demonstrations
from pyrite.judges.pairs import EQUAL, SHOWN, Said, Shown, Verdict, combined, shown
from pyrite.judges.scores import Judge
from pyrite.judges.verdicts import WINS, Reply, probability, read_verdict, several
from pyrite.options import Count, Natural, NonNegative, Positive, Text
from pyrite.progress import say

LEDGER = "judge.db"
ALTERNATIVES = 20  # likeliest tokens in each place, as many as servers give


@dataclass(frozen=True)
class Asking:
    """How a language model is asked to judge."""

    base_url: str = "https://api.openai.com/v1"
    """Address of the OpenAI-compatible server, up to and with its version."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key; it may be unset where a server wants none."""
    system: bool = True
    """Give the instructions as a system turn; otherwise, and for models that turn out to have no such role, they stand
    before the first user turn."""
    reply: Reply = "label"
    """label: the verdict on the first line; reasons: the verdict after its reasons; json: by a schema."""
    ties: bool = True
    """The judge may say that neither answer is better."""
    both_orders: bool = True
    """Ask about each pair in both orders, disagreement is a tie; otherwise once, in an order drawn by the seed."""
    batch: Count = 1
    """Pairs in one request, cheaper and coarser; needs reply label."""
    demonstrations: str | None = None
    """File of solved cases shown first: prompt, a, b, label (A, B or TIE), and optionally reason."""
    temperature: NonNegative = 0.0
    """Of the judge's answers; 0 for the likeliest one."""
    max_tokens: Count = 512
    """Longest reply, its reasons included."""
    logprobs: bool = False
    """Take P(a beats b) from the probabilities of the label, where the server offers them."""
    body: Text = ""
    """More fields of the request, as a JSON object; null leaves one out: '{"max_tokens": null, "seed": 1}'."""
    price_in: NonNegative = 0.0
    """Money for a million tokens read."""
    price_out: NonNegative = 0.0
    """Money for a million tokens written."""
    max_cost: NonNegative | None = None
    """Money that all answers in the ledger's file may cost; the judge stops before it is exceeded."""
    concurrency: Count = 8
    """Requests at once."""
    per_minute: Positive | None = None
    """Requests a minute, at most."""
    timeout: Positive = 60.0
    """Seconds to wait for an answer."""
    retries: Natural = 6
    """Requests after one that was not answered, further and further apart."""
    reasks: Natural = 2
    """Requests after an answer without a verdict."""
    backoff: NonNegative = 1.0
    """Seconds before the first retry; each next one waits twice as long, up to a minute."""
    seed: Natural = 0
    """Of the order of the answers."""


class Estimate(NamedTuple):
    """Questions still to be asked, those answered before, requests, tokens read and (at most) written, their price."""

    questions: int
    answered: int
    requests: int
    tokens_in: int
    tokens_out: int
    cost: float


class LanguageJudge:
    """A judge that is a language model; calling it judges.

    criterion_id: names the criterion in the ledger; its text by default. ledger: SQLite file of the answers. Raises
    ValueError for options out of range or against each other.
    """

    def __init__(self, model: str, criterion: str, criterion_id: str | None, asking: Asking, ledger: str) -> None:
        options.check(asking)
        self.model, self.criterion, self.asking, self.ledger = model, criterion_id or criterion, asking, ledger
        shown = demonstrations(asking.demonstrations) if asking.demonstrations else ()
        self.form = Form(criterion, asking.reply, asking.ties, shown)
        self.system = asking.system
        self.endpoint = Endpoint(asking.base_url, asking.key_env, asking.timeout)
        self.pace = Pace(asking.concurrency, asking.per_minute, asking.retries, asking.reasks, asking.backoff)
        self.prices = Prices(asking.price_in, asking.price_out)
        self.more = _more(asking.body)
        limits = [asking.max_tokens, self.more.get("max_tokens"), self.more.get("max_completion_tokens")]
        self.longest = max(limit for limit in limits if isinstance(limit, int))
        _refuse(model, asking, self.prices)

    def __call__(self, prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        """P(a beats b), (N,) float64; NaN where there is no verdict."""
        return torch.tensor([verdict.p for verdict in self.verdicts(prompts, a, b)], dtype=torch.float64)

    def verdicts(
        self,
        prompts: Sequence[str],
        a: Sequence[str],
        b: Sequence[str],
        *,
        advance: Callable[[int], object] = lambda _: None,
    ) -> list[Verdict]:
        """The verdicts on N pairs, from the ledger, and from the endpoint what it does not hold.

        Equal answers are a tie that nobody is asked about. advance: told of questions as they end. Raises GoldStopped.
        """
        asked = self.questions(prompts, a, b)
        different = {question.key: question for pair in asked for question in pair.values()}
        with Answers(self.ledger, paid=self.prices.paid) as answers:
            known = answers.find(different)
            advance(len(known))
            new = [question for key, question in different.items() if key not in known]
            Desk(answers, self._trade(), self.pace, advance).ask(new, batch=self.asking.batch)
            known |= answers.find(question.key for question in new)
        return [self._verdict({shown: known.get(question.key) for shown, question in pair.items()}) for pair in asked]

    def questions(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[dict[Shown, Question]]:
        """What is asked about each of N pairs, by the order in which its answers are shown."""
        return [self._pair(*texts) for texts in zip(prompts, a, b, strict=True)]

    def estimate(self, pairs: Sequence[dict[Shown, Question]], count: Counter = by_characters) -> Estimate:
        """What pairs will cost that the ledger does not answer; tokens by `count` of the messages that will be sent.

        Replies are taken to be as long as they may be. Asks nobody.
        """
        different = {question.key: question for pair in pairs for question in pair.values()}
        known: dict[str, Kept] = {}
        if Path(self.ledger).exists():
            with Answers(self.ledger) as answers:
                known = answers.find(different)
        cases = [question.case for key, question in different.items() if key not in known]
        requests = [cases[at : at + self.asking.batch] for at in range(0, len(cases), self.asking.batch)]
        read = sum(count(self.form.messages(some, system=self.system)) for some in requests)
        written = len(requests) * self.longest
        return Estimate(len(cases), len(known), len(requests), read, written, self.prices.of(read, written))

    def _pair(self, prompt: str, a: str, b: str) -> dict[Shown, Question]:
        if a == b:
            return {}
        orders = SHOWN if self.asking.both_orders else (shown(prompt, a, b, seed=self.asking.seed),)
        cases = {"ab": Case(prompt, a, b), "ba": Case(prompt, b, a)}
        return {order: self._question(cases[order]) for order in orders}

    def _question(self, case: Case) -> Question:
        named = json.dumps([self.criterion, self.asking.batch, self._body([case])], sort_keys=True)
        return Question(hashlib.sha256(named.encode()).hexdigest(), self.model, self.criterion, case)

    def _body(self, cases: Sequence[Case], *, system: bool = True) -> dict[str, Any]:
        """A request; null fields of --body leave one out."""
        asking = self.asking
        messages = self.form.messages(cases, system=system)
        body = {"model": self.model, "messages": messages, "temperature": asking.temperature}
        body["max_tokens"] = asking.max_tokens
        if asking.logprobs:
            body |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
        if asking.reply == "json":
            body["response_format"] = self.form.response_format()
        return {name: value for name, value in (body | self.more).items() if value is not None}

    def _trade(self) -> Trade:
        def risk(question: Question) -> float:
            return self.prices.of(most(self.form.messages([question.case])), self.longest)

        def price(completion: Completion) -> float | None:
            read, written = completion.prompt_tokens, completion.completion_tokens
            return None if read is None or written is None else self.prices.of(read, written)

        return Trade(self._send, self._read, price, risk, self.asking.max_cost)

    def _send(self, questions: Sequence[Question]) -> Completion:
        """The answer to questions. A model found to take no system turn is sent none from then on. Raises Trouble."""
        system = self.system
        try:
            return self.endpoint.complete(self._body([question.case for question in questions], system=system))
        except Trouble as trouble:
            if trouble.kind != "system":
                raise
            if not system:  # there was none to take offense at
                raise Trouble("rejected", str(trouble)) from None
            if self.system:
                say("judge: the model takes no system turn; from now on the instructions stand before the user's turn")
            self.system = False
            raise

    def _read(self, completion: Completion, count: int) -> list[Said] | None:
        """What was said of so many cases; None without a verdict on each."""
        asking, text = self.asking, completion.text
        if count > 1:
            labels = several(text, count, ties=asking.ties)
            return None if labels is None else [Said(label, WINS[label]) for label in labels]
        if completion.cut and asking.reply == "reasons":
            return None  # what it would have concluded is not known
        found = read_verdict(text, reply=asking.reply, ties=asking.ties)
        if found is None:
            return None
        p = probability(completion.tokens, text, found) if asking.logprobs and completion.tokens else None
        return [Said(found.label, WINS[found.label] if p is None else p)]

    def _verdict(self, answers: dict[Shown, Kept | None]) -> Verdict:
        """One verdict from the answers about a pair."""
        if not answers:
            return EQUAL
        raw = tuple(kept.raw or "" if kept else "" for kept in answers.values())
        return combined({order: _said(kept) for order, kept in answers.items()}, raw=raw, mean=self.asking.logprobs)


def llm(
    *,
    model: str,
    criterion: str,
    criterion_id: str | None = None,
    base_url: str = Asking.base_url,
    key_env: str = Asking.key_env,
    system: bool = Asking.system,
    reply: Reply = Asking.reply,
    ties: bool = Asking.ties,
    both_orders: bool = Asking.both_orders,
    batch: Count = Asking.batch,
    demonstrations: str | None = Asking.demonstrations,
    temperature: NonNegative = Asking.temperature,
    max_tokens: Count = Asking.max_tokens,
    logprobs: bool = Asking.logprobs,
    body: Text = Asking.body,
    price_in: NonNegative = Asking.price_in,
    price_out: NonNegative = Asking.price_out,
    max_cost: NonNegative | None = Asking.max_cost,
    concurrency: Count = Asking.concurrency,
    per_minute: Positive | None = Asking.per_minute,
    timeout: Positive = Asking.timeout,
    retries: Natural = Asking.retries,
    reasks: Natural = Asking.reasks,
    backoff: NonNegative = Asking.backoff,
    seed: Natural = Asking.seed,
    ledger: str = LEDGER,
) -> Judge:
    """Judge: a language model, at any OpenAI-compatible endpoint, says which answer is better by a criterion.

    criterion: a sentence, all that the judge is told; criterion_id: its name in the ledger. ledger: SQLite file in
    which every answer is kept with its text, tokens and cost; what it holds is never asked again: a model is known by
    its name, not its address. The other options are those of `pyrite judge ask`. NaN: the model gave no verdict, or
    no answer. Raises ValueError for options that cannot be, GoldStopped where the model cannot be asked.
    """
    given = {name: value for name, value in locals().items() if name in Asking.__dataclass_fields__}
    return LanguageJudge(model, criterion, criterion_id, Asking(**given), ledger)


def _refuse(model: str, asking: Asking, prices: Prices) -> None:
    if not model:
        raise ValueError("the judge's model has no name; give model, as its server knows it")
    if asking.max_cost is not None and not prices.paid:
        raise ValueError(f"max_cost is {asking.max_cost} without a price; give price_in and price_out")
    if asking.batch > 1 and (asking.reply != "label" or asking.logprobs):
        raise ValueError(f"batch is {asking.batch}; more than 1 needs reply label, no logprobs")


def _more(body: str) -> dict[str, Any]:
    try:
        found = json.loads(body or "{}")
    except ValueError as error:
        raise ValueError(
            f"--body {body}: the body is no JSON ({error}); write as in '{{\"max_completion_tokens\": 64}}'"
        ) from None
    if not isinstance(found, dict) or {"model", "messages", "stream", "n"} & set(found):
        raise ValueError("body must be a JSON object with further fields, not model, messages, stream or n")
    return found


def _said(kept: Kept | None) -> Said | None:
    return None if kept is None or kept.label is None or kept.p is None else Said(kept.label, kept.p)
