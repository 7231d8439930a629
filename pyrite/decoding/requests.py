"""What a caller asks of a decoding loop, checked before any work: prompts, counts, options, models that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrite.decoding.adapters import adapter_layers, base_of
from pyrite.decoding.engines import transformers_model
from pyrite.decoding.sampling import Chunk, Job, chunks
from pyrite.decoding.voices import Voice
from pyrite.loading import context_of

ROWS, ROWS_CPU = 512, 128  # that decode together by default; on a processor its caches should hold theirs


@dataclass(frozen=True)
class Request:
    """Everything but the models; `generate.sample` says what each is."""

    prompts: Sequence[Sequence[int]]
    k: int
    eos: int | Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    keys: Sequence[int] | None
    max_rows: int | None
    progress: Callable[[int], None] | None

    @property
    def columns(self) -> int:
        """Tokens of the longest text that may come of it."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    def check(self, *models: Any) -> None:
        """Raises ValueError for options out of range, and prompts that one of the models cannot read."""
        rows = 1 if self.max_rows is None else self.max_rows
        for name, value in (("k", self.k), ("max_new_tokens", self.max_new_tokens), ("max_rows", rows)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a share of probability above 0, at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give a number of tokens, or 0 for all")
        if not len(self.prompts):
            raise ValueError("no prompts: give at least one")
        if self.keys is not None and len(self.keys) != len(self.prompts):
            raise ValueError(f"{len(self.keys)} keys for {len(self.prompts)} prompts: give one key a prompt")
        for model in models:
            _check_prompts(model, self.prompts, self.max_new_tokens)

    def job(self, voices: Sequence[Voice]) -> Job:
        """The loop's side of it, for these models."""
        ends = [self.eos] if isinstance(self.eos, int) else list(self.eos)
        return Job(
            voices=voices,
            eos=torch.tensor(ends, dtype=torch.int64, device=voices[0].device),
            steps=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            progress=self.progress or (lambda _: None),
        )

    def chunks(self, device: torch.device, group: Group | None = None) -> Iterator[Chunk]:
        """All rows of all prompts, or of a group, as they decode together."""
        keys = range(len(self.prompts)) if self.keys is None else self.keys
        rows = self.max_rows or (ROWS_CPU if device.type == "cpu" else ROWS)
        which = {"among": group.rows, "exponents": group.exponents} if group else {}
        return chunks(self.prompts, torch.tensor(list(keys), device=device), self.k, self.seed, rows, **which)


class Group(NamedTuple):
    """Rows (P, k) bool whose arms need the same models, and their exponents (P, k, 2), None where 1 of one model."""

    policy: bool
    ref: bool
    rows: Tensor
    exponents: Tensor | None


def groups(arms: Tensor) -> list[Group]:
    """The rows of arms (P, k, 2) by the models that they need; (0, 0), uniform, only to be read by the policy."""
    ref = arms[..., 1] != 0
    policy = (arms[..., 0] != 0) | ~ref
    plain = (policy ^ ref) & (arms.sum(-1) == 1)
    code = 4 * policy + 2 * ref + plain
    return [Group(bool(c & 4), bool(c & 2), code == c, None if c & 1 else arms) for c in code.unique().tolist()]


def check_arms(exponents: Tensor, prompts: int) -> Tensor:
    """Exponents (P, k, 2) as float32 on the CPU. Raises ValueError for another shape, or one that is not finite."""
    if exponents.dim() != 3 or exponents.shape[0] != prompts or exponents.shape[2] != 2:
        raise ValueError(
            f"exponents {tuple(exponents.shape)}: give ({prompts}, k, 2), of policy and reference for each sample"
        )
    arms = exponents.detach().float().cpu()
    if not bool(arms.isfinite().all()):
        index = (~arms.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"exponents of prompt {index[0]}, sample {index[1]} are not finite: give plain numbers")
    return arms


def check_reference(policy: Any, ref: Any) -> Any:
    """The model that holds the reference's weights; ref None is the policy with its adapters off.

    Raises ValueError where there are no adapters to switch off, for a reference that is the adapted policy itself,
    and for one with another vocabulary or on another device.
    """
    if ref is None:
        return base_of(policy)[0]
    ours, theirs = transformers_model(policy), transformers_model(ref)
    if ours is theirs and adapter_layers(policy):
        raise ValueError(
            "the reference is the policy itself, adapters included: give ref_model=None to switch them off"
        )
    sizes = [model.config.get_text_config().vocab_size for model in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the policy's vocabulary has {sizes[0]} tokens, the reference's {sizes[1]}: "
            "only models of one tokenizer can be mixed"
        )
    places = [next(model.parameters()).device for model in (ours, theirs)]
    if places[0] != places[1]:
        raise ValueError(f"the policy is on {places[0]}, the reference on {places[1]}: move them to one device")
    return ref


def check_tokenizers(policy: Any, ref: Any) -> None:
    """Refuse two tokenizers that do not give each token the same id: their models' logits cannot be mixed."""
    ours, theirs = policy.get_vocab(), ref.get_vocab()
    if ours != theirs:
        token, index = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
        raise ValueError(
            f"the tokenizers of policy ({len(ours)} tokens) and reference ({len(theirs)}) differ, first at id {index} "
            f"({token!r}): only models of one tokenizer can be mixed"
        )


def _check_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    text = model.config.get_text_config()
    context = context_of(transformers_model(model))
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: give at least one token, such as a start token")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, beyond the "
                f"model's context of {context}: shorten one of them"
            )
        if min(prompt) < 0 or max(prompt) >= text.vocab_size:
            raise ValueError(f"prompt {index} has a token outside 0..{text.vocab_size - 1}: wrong tokenizer?")
