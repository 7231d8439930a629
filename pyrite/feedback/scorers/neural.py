"""Golds that ask a model: a reward model, two language models. Loaded at the first text, not before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pyrite.data import text
from pyrite.data.responses import Responses
from pyrite.data.text import Prompt
from pyrite.feedback.scorers.words import Scorer, check_rows
from pyrite.models.forward import score
from pyrite.models.loading import verify
from pyrite.models.packing import Packed
from pyrite.models.policy import Policy, RewardModel

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):\n")
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


@dataclass(frozen=True)
class Asks:
    """A scorer that asks models, each with the class it is loaded by."""

    score: Scorer
    models: tuple[tuple[Any, str], ...]

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        return self.score(prompts, responses)

    def verify(self) -> None:
        """Refuse a model that could not be loaded, without loading it."""
        for kind, path in self.models:
            verify(kind, path)


def reward_model(*, path: str) -> Scorer:
    """Scorer: a trained reward model, a folder or a Hub name, standardized if it knows how.

    With a chat template, a prompt is the user's turn of it, and a conversation in text form its turns; without
    one, the text itself. Loaded at the first texts. Raises ValueError if there is no such model.
    """
    model = cache(lambda: RewardModel.load(path))

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        if not responses:
            return torch.empty(0)
        asked = [turns(prompt) for prompt in prompts] if model().tokenizer.chat_template else prompts
        return model().scores(asked, responses)

    return Asks(score, ((AutoModelForSequenceClassification, path),))


def distillation(*, strong: str, weak: str) -> Scorer:
    """Scorer: mean_t log p_strong(y_t | x, y_<t) − mean_t log p_weak(y_t | x, y_<t), nats a token.

    strong, weak: folders or Hub names of any two causal language models, each with its own tokenizer and template. The
    mean is over the response's tokens alone, without the end token; a response without tokens scores 0. Singhal et al.
    2024, Contrastive Distill (OPT-1.3b and OPT-125m; there also over the prompt: see `with_prompt`). Raises ValueError
    if a text does not fit into a model.
    """
    first = cache(lambda: Policy.load(strong))
    second = first if strong == weak else cache(lambda: Policy.load(weak))

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        if not responses:
            return torch.empty(0)
        return (mean_logps(first(), prompts, responses) - mean_logps(second(), prompts, responses)).float()

    return Asks(score, ((AutoModelForCausalLM, strong), (AutoModelForCausalLM, weak)))


def turns(prompt: str) -> Prompt:
    """The messages of a conversation that `pyrite.data.text.plain` wrote as text; any other text as it is.

    >>> turns("Human:\\nhi\\n\\nAssistant:\\nhello\\n\\nHuman:\\nbye\\n\\nAssistant:\\n")[1]
    {'role': 'assistant', 'content': 'hello'}
    """
    before, *parts = _TURN.split(prompt)
    if before or parts[-2:] != ["Assistant", ""] or len(parts) < 4:
        return prompt
    pairs = zip(parts[:-2:2], parts[1:-2:2], strict=True)
    return [{"role": _ROLES[speaker], "content": content} for speaker, content in pairs]


def mean_logps(policy: Policy, prompts: Sequence[str], responses: Sequence[str], *, budget: int = 16384) -> Tensor:
    """Mean log-probability of each response's tokens, without the end token, (N,) float64 nats; 0 without tokens."""
    said = Responses.said([{"prompt": prompt} for prompt in prompts], responses)
    whole = text.encode(policy.tokenizer, said, max_length=policy.context + 1, as_drawn=True)
    _refuse_cut(whole, policy.context)
    kept = torch.ones(len(whole.ids), dtype=torch.bool)
    kept[whole.lengths.cumsum(0) - 1] = False  # the end token
    spoken = replace(whole, ids=whole.ids[kept], lengths=whole.lengths - 1)
    some = [i for i, length in enumerate(spoken.lengths.tolist()) if length]

    def read(batch: Packed) -> Tensor:
        logps = policy.logps(batch)
        return logps.sum.double() / logps.length

    means = torch.zeros(len(spoken), dtype=torch.float64)
    if some:
        means[some] = score(policy, spoken.take(some), read=read, each="response", budget=budget)
    return means


def _refuse_cut(rows: Responses, context: int) -> None:
    assert rows.truncated is not None  # they have been encoded
    if rows.truncated.any():
        long = int(rows.truncated.nonzero()[0])
        raise ValueError(f"row {long + 1}: prompt and response do not fit into the {context} tokens a model reads")
