"""A language model as a judge: two answers, one criterion, any OpenAI-compatible endpoint."""

from __future__ import annotations

import email.utils
import hashlib
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import torch
from torch import Tensor

from pyrite.core.processes import say
from pyrite.data.text import load_tokenizer
from pyrite.feedback.judges.basic import Judge
from pyrite.feedback.judges.questions import (
    EQUAL,
    SHOWN,
    WINS,
    Case,
    ChatMessage,
    Form,
    Reply,
    Said,
    Shown,
    Verdict,
    combined,
    demonstrations,
    folded,
    probability,
    read_verdict,
    several,
    shown,
)
from pyrite.feedback.ledger import Asker, Budget, Call, Ledger, Outcome, Pace, Question, Trade, Trouble
from pyrite.math import ranges
from pyrite.math.ranges import AnyText, Count, Natural, NonNegative, Positive

# The server -----------------------------------------------------------------------------------------------------------


SAID = 200  # characters of a server's own words in a message
# how servers say that a model takes no system turn: "System role not supported" (vLLM, TGI and llama.cpp with Gemma),
# "Developer instruction is not enabled" (Google), "role does not support 'system'" (OpenAI), 'Unexpected role "system"'
# (Anthropic), "Only user and assistant roles are supported", "Conversation roles must alternate" (Mistral)
_SYSTEM = re.compile(
    r"(?:system|developer)\W{0,3}(?:role|message|prompt|instruction|turn|field|param)|\brole.{0,40}\b(?:system|developer)\b",
    re.IGNORECASE,
)
_NOT = re.compile(r"\bnot\b|n't\b|\bno\b|unsupported|unknown|invalid|unexpected|disabled|forbidden", re.IGNORECASE)
_ROLES = re.compile(
    r"only user(?:,| and) assistant\b|roles must (?:strictly )?alternate|must start with .{0,9}user\b", re.I
)


class Completion(NamedTuple):
    """What a model wrote; token counts and log-probabilities if the server gives them."""

    text: str
    cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server at `base_url`, which may want the key in the environment variable `key_env`.

    timeout: seconds for a whole answer. The key is read for each request, is sent to this address only, and appears in
    no message. No redirect is followed and nothing is sent twice: that is up to the ledger. Raises ValueError for an
    address that cannot be one, or that holds a password.
    """

    base_url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"base_url is {self.base_url!r}; give an address such as http://127.0.0.1:8000/v1")
        if url.userinfo or url.query:
            raise ValueError("base_url holds more than an address; a key belongs into the environment (key_env)")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; give seconds, more than 0")

    def complete(self, body: dict[str, Any]) -> Completion:
        """The completion of a request body. Raises Trouble."""
        key = self._key()
        try:
            status, headers, raw = self._posted(body, key)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Trouble("refused", f"no connection: {error}") from None
        except (httpx.TimeoutException, TimeoutError):
            raise Trouble("lost", f"no answer within {self.timeout:g} seconds") from None
        except httpx.HTTPError as error:
            raise Trouble("lost", f"the connection was cut ({type(error).__name__})") from None
        said = raw.decode("utf-8", "replace")
        said = said.replace(key, "[key]") if len(key) >= 8 else said  # a key too short to be a secret is none
        if status == 200:
            return _completion(said)
        raise self._refusal(status, " ".join(said.split()), headers.get("Retry-After"))

    def _key(self) -> str:
        key = os.environ.get(self.key_env, "").strip()
        if not key.isascii() or not key.isprintable():
            raise Trouble("fatal", f"the key in {self.key_env} holds characters that no header can carry; set it again")
        return key

    @cached_property
    def _client(self) -> httpx.Client:
        """A new connection for each request: one that was kept may end at any time, and nobody knows what was paid."""
        here = httpx.URL(self.base_url).host in ("localhost", "127.0.0.1", "::1")
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(timeout=self.timeout, follow_redirects=False, limits=limits, trust_env=not here)

    def _posted(self, body: dict[str, Any], key: str) -> tuple[int, httpx.Headers, bytes]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        until, parts = time.monotonic() + self.timeout, []
        with self._client.stream("POST", url, json=body, headers=headers) as response:
            for part in response.iter_bytes():  # a timeout between parts alone would let a slow server drip on
                parts.append(part)
                if time.monotonic() > until:
                    raise TimeoutError
        return response.status_code, response.headers, b"".join(parts)

    def _refusal(self, status: int, said: str, retry_after: str | None) -> Trouble:
        """What a status other than 200 means."""
        message = f"{self.base_url} answered {status}: {said[:SAID] or 'no words'}"
        if status == 429 and "insufficient_quota" in said:
            return Trouble("fatal", f"{message}; the account has no money left")
        if status in (400, 422, 500) and _no_system(said):
            return Trouble("again", message)
        if status in (408, 409, 425, 429) or status >= 500:
            return Trouble("refused", message, _wait(retry_after))
        if status in (400, 413, 422):
            return Trouble("rejected", message)
        hint = {401: f"check the key in {self.key_env}", 403: f"check the key in {self.key_env}"}
        return Trouble("fatal", f"{message}; {hint.get(status, 'check the address and the name of the model')}")


def _no_system(said: str) -> bool:
    """Whether a server's words say that the model takes no system turn."""
    sentences = re.split(r"[.;!?]\s", said)
    return bool(_ROLES.search(said)) or any(_SYSTEM.search(one) and _NOT.search(one) for one in sentences)


def _completion(raw: str) -> Completion:
    try:
        found = json.loads(raw)
        choice = found["choices"][0]
        text = choice["message"].get("content") or ""
        usage = found.get("usage") or {}
        tokens = (choice.get("logprobs") or {}).get("content") or None
        asked, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(text, str) and isinstance(asked, int | None) and isinstance(written, int | None)):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Trouble("unusable", f"the answer is no chat completion: {raw[:SAID]!r}") from None
    return Completion(text, choice.get("finish_reason") == "length", asked, written, tokens)


def _wait(header: str | None) -> float:
    """Seconds of a Retry-After, a number or a date; 0 without one."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header or "").timestamp() - time.time())
    except ValueError:
        return 0.0


# What it costs --------------------------------------------------------------------------------------------------------


TURN = 16  # tokens a chat template adds to a turn, at most
Counter = Callable[[Sequence[ChatMessage]], int]


def most(messages: Sequence[ChatMessage]) -> int:
    """Tokens that no tokenizer exceeds: one a byte, and those of the template."""
    return sum(len(turn["content"].encode()) + TURN for turn in messages)


def by_characters(messages: Sequence[ChatMessage]) -> int:
    """About as many tokens as English text has: characters / 4."""
    return round(sum(len(turn["content"]) for turn in messages) / 4)


def by_tokenizer(name: str) -> Counter:
    """Counts tokens with a tokenizer, a folder or a Hub name, by its chat template if any. Raises ValueError.

    If the template takes no system turn, its text is counted as part of the first user turn, as it will be sent.
    """
    from jinja2 import TemplateError

    tokenizer, _ = load_tokenizer(name)

    def rendered(messages: Sequence[ChatMessage]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def count(messages: Sequence[ChatMessage]) -> int:
        if tokenizer.chat_template:
            try:
                text = rendered(messages)
            except TemplateError:
                if messages[0]["role"] != "system":
                    raise
                text = rendered(folded(messages))
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return sum(len(tokenizer(turn["content"])["input_ids"]) for turn in messages)

    return count


# The judge ------------------------------------------------------------------------------------------------------------


LEDGER = "judge.db"
ALTERNATIVES = 20  # likeliest tokens in each place, as many as servers give
MILLION = 1_000_000


@dataclass(frozen=True)
class JudgeOptions:
    """How a language model is asked to judge."""

    base_url: str = "https://api.openai.com/v1"
    """Address of the OpenAI-compatible server, up to and with its version."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key; leave it unset if the server wants none."""
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
    """Take P(a beats b) from the probabilities of the label, if the server offers them."""
    body: AnyText = ""
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

    def __init__(
        self, model: str, criterion: str, criterion_id: str | None, options: JudgeOptions, ledger: str
    ) -> None:
        ranges.check(options)
        self.model, self.criterion, self.options, self.ledger = model, criterion_id or criterion, options, ledger
        shown = demonstrations(options.demonstrations) if options.demonstrations else ()
        self.form = Form(criterion, options.reply, options.ties, shown)
        self.system = options.system
        self.endpoint = Endpoint(options.base_url, options.key_env, options.timeout)
        self.more = _more(options.body)
        limits = [options.max_tokens, self.more.get("max_tokens"), self.more.get("max_completion_tokens")]
        self.longest = max(limit for limit in limits if isinstance(limit, int))
        self.paid = options.price_in > 0 or options.price_out > 0
        if not model:
            raise ValueError("the judge's model has no name; give model, as its server knows it")
        if options.max_cost is not None and not self.paid:
            raise ValueError(f"max_cost is {options.max_cost} without a price; give price_in and price_out")
        if options.batch > 1 and (options.reply != "label" or options.logprobs):
            raise ValueError(f"batch is {options.batch}; more than 1 needs reply label, no logprobs")

    def __call__(self, prompts: list[str], a: list[str], b: list[str]) -> Tensor:
        """P(a beats b), (N,) float64; NaN if there is no verdict."""
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
        with Ledger(self.ledger) as ledger:
            if self.paid:
                ledger.flush()
            known = _answered(ledger, different)
            advance(len(known))
            new = [question for key, question in different.items() if key not in known]
            Asker(ledger, self._trade(), self._pace(), advance).ask(new)
            known |= _answered(ledger, [question.key for question in new])
        return [self._verdict({shown: known.get(question.key) for shown, question in pair.items()}) for pair in asked]

    def questions(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[dict[Shown, Question]]:
        """What is asked about each of N pairs, by the order in which its answers are shown."""
        return [self._pair(*texts) for texts in zip(prompts, a, b, strict=True)]

    def estimate(self, pairs: Sequence[dict[Shown, Question]], count: Counter = by_characters) -> Estimate:
        """What pairs will cost that the ledger does not answer; tokens by `count` of the messages that will be sent.

        Replies are taken to be as long as they may be. Asks nobody.
        """
        different = {question.key: question for pair in pairs for question in pair.values()}
        known: dict[str, Call] = {}
        if Path(self.ledger).exists():
            with Ledger(self.ledger) as ledger:
                known = _answered(ledger, different)
        cases = [Case(*question.texts) for key, question in different.items() if key not in known]
        requests = [cases[at : at + self.options.batch] for at in range(0, len(cases), self.options.batch)]
        read = sum(count(self.form.messages(some, system=self.system)) for some in requests)
        written = len(requests) * self.longest
        return Estimate(len(cases), len(known), len(requests), read, written, self.price(read, written))

    def price(self, read: int, written: int) -> float:
        """Money for so many tokens read and written."""
        return (read * self.options.price_in + written * self.options.price_out) / MILLION

    def _pair(self, prompt: str, a: str, b: str) -> dict[Shown, Question]:
        if a == b:
            return {}
        orders = SHOWN if self.options.both_orders else (shown(prompt, a, b, seed=self.options.seed),)
        cases = {"ab": Case(prompt, a, b), "ba": Case(prompt, b, a)}
        return {order: self._question(cases[order]) for order in orders}

    def _question(self, case: Case) -> Question:
        named = json.dumps([self.criterion, self.options.batch, self._body([case])], sort_keys=True)
        return Question(hashlib.sha256(named.encode()).hexdigest(), case)

    def _body(self, cases: Sequence[Case], *, system: bool = True) -> dict[str, Any]:
        """A request; null fields of --body leave one out."""
        options = self.options
        messages = self.form.messages(cases, system=system)
        body = {"model": self.model, "messages": messages, "temperature": options.temperature}
        body["max_tokens"] = options.max_tokens
        if options.logprobs:
            body |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
        if options.reply == "json":
            body["response_format"] = self.form.response_format()
        return {name: value for name, value in (body | self.more).items() if value is not None}

    def _pace(self) -> Pace:
        options = self.options
        return Pace(
            options.concurrency,
            options.per_minute,
            options.batch,
            options.retries,
            options.reasks,
            options.backoff,
            patience=math.inf,
        )

    def _trade(self) -> Trade:
        budget = Budget(money=self.options.max_cost)
        return Trade(self._send, "completion", self.model, self.criterion, budget=budget, risk=self._risk, strict=True)

    def _risk(self, question: Question) -> float:
        """The most that a question can cost."""
        return self.price(most(self.form.messages([Case(*question.texts)])), self.longest)

    def _send(self, questions: Sequence[Question]) -> list[Outcome]:
        """One request. A model found to take no system turn is sent none from then on. Raises Trouble."""
        system = self.system
        try:
            body = self._body([Case(*question.texts) for question in questions], system=system)
            return self._outcomes(questions, self.endpoint.complete(body))
        except Trouble as trouble:
            if trouble.kind != "again":
                raise
            if not system:  # there was none to take offense at
                raise Trouble("rejected", str(trouble)) from None
            if self.system:
                say("judge: the model takes no system turn; from now on the instructions stand before the user's turn")
            self.system = False
            raise

    def _outcomes(self, questions: Sequence[Question], completion: Completion) -> list[Outcome]:
        """What was said of each question; its tokens and price are shared among them."""
        n, said = len(questions), self._read(completion, len(questions))
        asked, written = completion.prompt_tokens, completion.completion_tokens
        price = None if asked is None or written is None else self.price(asked, written)
        found = []
        for i, question in enumerate(questions):
            verdict = said[i] if said else None
            outcome = Outcome(
                "answered" if verdict else "open",
                verdict and verdict.p,
                verdict and verdict.label,
                completion.text,
                error=None if verdict else f"no verdict in the answer {_shown(completion)}",
                unusable=int(verdict is None),
                tokens_in=(asked or 0) // n + (i < (asked or 0) % n),
                tokens_out=(written or 0) // n + (i < (written or 0) % n),
                cost=(price or 0.0) / n,
                released=0.0 if price is None else self._risk(question),
            )
            found.append(outcome)
        return found

    def _read(self, completion: Completion, count: int) -> list[Said] | None:
        """What was said of so many cases; None without a verdict on each."""
        options, text = self.options, completion.text
        if count > 1:
            labels = several(text, count, ties=options.ties)
            return None if labels is None else [Said(label, WINS[label]) for label in labels]
        if completion.cut and options.reply == "reasons":
            return None  # what it would have concluded is not known
        found = read_verdict(text, reply=options.reply, ties=options.ties)
        if found is None:
            return None
        p = probability(completion.tokens, text, found) if options.logprobs and completion.tokens else None
        return [Said(found.label, WINS[found.label] if p is None else p)]

    def _verdict(self, answers: dict[Shown, Call | None]) -> Verdict:
        """One verdict from the answers about a pair."""
        if not answers:
            return EQUAL
        raw = tuple(call.text or "" if call else "" for call in answers.values())
        return combined({order: _said(call) for order, call in answers.items()}, raw=raw, mean=self.options.logprobs)


def llm(*, model: str, criterion: str, criterion_id: str | None = None, ledger: str = LEDGER, **options: Any) -> Judge:
    """Judge: a language model, at any OpenAI-compatible endpoint, says which answer is better by a criterion.

    criterion: a sentence, all that the judge is told; criterion_id: its name in the ledger. ledger: SQLite file in
    which every answer is kept with its text, tokens and cost; what it holds is never asked again: a model is known by
    its name, not its address. The other options are those of `pyrite judge ask`. NaN: the model gave no verdict, or
    no answer. Raises ValueError for options that cannot be, GoldStopped if the model cannot be asked.
    """
    return LanguageJudge(model, criterion, criterion_id, JudgeOptions(**options), ledger)


def _options_of(function: Callable, options: type) -> None:
    """Give a function the fields of a dataclass as its further options."""
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
    more = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields(options)]
    function.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    function.__annotations__ |= options.__annotations__


_options_of(llm, JudgeOptions)


def _answered(ledger: Ledger, keys: Iterable[str]) -> dict[str, Call]:
    return {key: call for key, call in ledger.find(keys).items() if call.state == "answered"}


def _shown(completion: Completion) -> str:
    """The beginning of a judge's answer, for a message."""
    words = " ".join(completion.text.split())
    return (repr(words[:80]) if words else "(it is empty)") + (" (it was cut at max_tokens)" if completion.cut else "")


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


def _said(call: Call | None) -> Said | None:
    return Said(call.label, call.answer) if call and call.label and call.answer is not None else None  # type: ignore
