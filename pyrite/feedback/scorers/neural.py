"""Golds that ask a model: a reward model, two language models, a text encoder. Loaded at the first text, not before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pyrite.data import text
from pyrite.data.text import Encoded, Prompt
from pyrite.feedback.scorers.words import Scorer, check_rows, tokens
from pyrite.models.forward import by_prompt
from pyrite.models.loading import opened, verify
from pyrite.models.packing import micro_batches
from pyrite.models.policy import Policy, RewardModel

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):\n")
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


@dataclass(frozen=True)
class Asks:
    """A scorer that asks models, each with the class it is loaded by."""

    score: Scorer
    models: tuple[tuple[Any, str], ...]
    new_head: bool = False

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        return self.score(prompts, responses)

    def verify(self) -> None:
        """Refuse a model that could not be loaded, without loading it."""
        for kind, path in self.models:
            verify(kind, path, new_head=self.new_head)


def reward_model(*, path: str) -> Scorer:
    """Scorer: a trained reward model, a folder or a Hub name, standardized if it knows how.

    With a chat template, a prompt is the user's turn of it, and a conversation in text form its turns; without
    one, the text itself. Loaded at the first texts. Raises ValueError where there is no such model.
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
    where a text does not fit into a model.
    """
    first = cache(lambda: Policy.load(strong))
    second = first if strong == weak else cache(lambda: Policy.load(weak))

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        if not responses:
            return torch.empty(0)
        return (mean_logps(first(), prompts, responses) - mean_logps(second(), prompts, responses)).float()

    return Asks(score, ((AutoModelForCausalLM, strong), (AutoModelForCausalLM, weak)))


def paraphrase(*, model: str = "sentence-transformers/paraphrase-MiniLM-L6-v2") -> Scorer:
    """Scorer: cos(e(x), e(y)) + 2 J, the same said in other words; J = |X ∪ Y| / (2 max(|X|, |Y|)).

    e: mean of the last hidden states of `model`, a folder or Hub name of a text encoder. X, Y: the sets of tokens of
    prompt and response in lower case; J is ½ where one holds the other, 1 where they share nothing, 0 of two empty
    texts. From 0 to 3; a prompt said again scores 2. From the code of Singhal et al. 2024.
    """

    @cache
    def loaded() -> tuple[Any, Any]:
        encoder, tokenizer = opened(AutoModel, model, dtype="float32", new_head=True)
        return tokenizer, encoder.eval()

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        if not responses:
            return torch.empty(0)
        asked, said = (embeddings(*loaded(), texts) for texts in (prompts, responses))
        novel = torch.tensor([novelty(x, y) for x, y in zip(prompts, responses, strict=True)])
        return torch.cosine_similarity(asked, said) + 2 * novel

    return Asks(score, ((AutoModel, model),), new_head=True)


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


@torch.inference_mode()
def mean_logps(policy: Policy, prompts: Sequence[str], responses: Sequence[str], *, budget: int = 16384) -> Tensor:
    """Mean log-probability of each response's tokens, without the end token, (N,) float64 nats; 0 without tokens."""
    policy.eval()
    whole = text.encode_all(policy.tokenizer, prompts, responses, max_length=policy.context + 1, as_drawn=True)
    encoded = [replace(one, response=one.response[:-1]) for one in whole]  # all that the template writes but its end
    _refuse_cut(whole, policy.context)
    means = torch.zeros(len(encoded), dtype=torch.float64)
    index = [i for i, row in enumerate(encoded) if row.response]
    rows, owners = by_prompt([encoded[i] for i in index])
    for group in micro_batches(rows, budget=budget):
        logps = policy.logps(policy.pack([rows[g] for g in group]))
        means[[index[i] for g in group for i in owners[g]]] = (logps.sum.double() / logps.length).cpu()
    return means


@torch.inference_mode()
def embeddings(tokenizer: Any, model: Any, texts: Sequence[str], *, batch: int = 64) -> Tensor:
    """Mean of the last hidden states over each text's tokens, (N, H) float32; 0 of a text without tokens."""
    parts = []
    limit = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
    for begin in range(0, len(texts), batch):
        some = list(texts[begin : begin + batch])
        read = tokenizer(some, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
        mask = read["attention_mask"][..., None].float()
        states = model(input_ids=read["input_ids"].long(), attention_mask=read["attention_mask"]).last_hidden_state
        parts.append(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
    return torch.cat(parts)


def novelty(prompt: str, response: str) -> float:
    """J of `paraphrase`, of the sets of tokens in lower case.

    >>> novelty("My name is john", "...")
    0.625
    """
    asked, said = (set(tokens(words.lower())) for words in (prompt, response))
    return len(asked | said) / (2 * max(len(asked), len(said), 1))


def _refuse_cut(rows: Sequence[Encoded], context: int) -> None:
    long = next((i for i, row in enumerate(rows) if row.truncated), None)
    if long is not None:
        raise ValueError(f"row {long + 1}: prompt and response do not fit into the {context} tokens a model reads")
