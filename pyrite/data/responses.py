"""The record that all work on text passes on: N responses to P prompts, as texts and as tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Prompt = str | list[dict[str, Any]]
Answer = str | Mapping[str, Any]  # a text, or a message of which the content is the text


@dataclass(frozen=True, eq=False)
class Responses:
    """N responses to P prompts, flat: R tokens, one response after another, without padding.

    Pairs, groups and batches of responses are index columns into it. Texts that no tokenizer has read yet have no
    `prompt_ids` and no `ids`; tokens that were not decoded have no `texts`.
    """

    rows: Sequence[dict[str, Any]]  # P prompts as their file has them: prompt, prompt_id and more
    prompt_ids: Sequence[Sequence[int]]  # P prompts as tokens
    prompt: Tensor  # (N,) which prompt each response answers
    texts: Sequence[Any]  # N, what was said: texts, or messages (`Answer`)
    ids: Tensor  # (R,) response tokens, the end token included
    lengths: Tensor  # (N,) tokens of each response
    finished: Tensor  # (N,) bool: it ends with its end token
    truncated: Tensor | None = None  # (N,) bool: it was cut to a length when it was read
    # (R,) nats: of each token, under the policy that drew it, at temperature 1; NaN if the policy did not draw it, as
    # with a sampler's reference arm. Records that are joined lose the column.
    logps: Tensor | None = None

    @classmethod
    def said(
        cls,
        rows: Sequence[dict[str, Any]],
        texts: Sequence[Answer],
        *,
        prompt: Tensor | Sequence[int] | None = None,
        finished: bool | Sequence[bool] | Tensor = True,
    ) -> Responses:
        """Texts without tokens; `text.encode` adds these. prompt: by default each text answers a row of its own."""
        index = torch.arange(len(rows)) if prompt is None else torch.as_tensor(prompt, dtype=torch.int64)
        if len(index) != len(texts):
            raise ValueError(f"{len(index)} prompts but {len(texts)} responses")
        ends = torch.full((len(texts),), finished) if isinstance(finished, bool) else torch.as_tensor(finished)
        none = torch.zeros(0, dtype=torch.int64)
        return cls(rows, [], index, texts, none, torch.zeros(len(texts), dtype=torch.int64), ends.bool())

    @classmethod
    def of(cls, given: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Responses:
        """Tokens without texts: prompts, each with its responses.

        >>> Responses.of([([1, 2], [[3], [4, 5]])]).lengths
        tensor([1, 2])
        """
        answers = [(p, answer) for p, (_, some) in enumerate(given) for answer in some]
        ids = torch.tensor([token for _, answer in answers for token in answer], dtype=torch.int64)
        return cls(
            rows=[{} for _ in given],
            prompt_ids=[list(prompt) for prompt, _ in given],
            prompt=torch.tensor([p for p, _ in answers], dtype=torch.int64),
            texts=[],
            ids=ids,
            lengths=torch.tensor([len(answer) for _, answer in answers], dtype=torch.int64),
            finished=torch.ones(len(answers), dtype=torch.bool),
        )

    @classmethod
    def joined(cls, parts: Sequence[Responses]) -> Responses:
        """One after another, without what only some of them have."""
        begins = [0, *itertools.accumulate(len(part.rows) for part in parts)]
        return cls(
            rows=[row for part in parts for row in part.rows],
            prompt_ids=[ids for part in parts for ids in part.prompt_ids],
            prompt=torch.cat([part.prompt + begin for part, begin in zip(parts, begins, strict=False)]),
            texts=[said for part in parts for said in part.texts],
            ids=torch.cat([part.ids for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            finished=torch.cat([part.finished for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def owners(self) -> list[dict[str, Any]]:
        """The row of the prompt that each of the N responses answers."""
        return [self.rows[p] for p in self.prompt.tolist()]

    @property
    def prompts(self) -> list[Prompt]:
        """What each of the N responses answers."""
        return [row["prompt"] for row in self.owners]

    @property
    def sample(self) -> list[int]:
        """The place of each of the N responses among those to its prompt."""
        place = {i: k for group in self.groups() for k, i in enumerate(group)}
        return [place[i] for i in range(len(self))]

    def asked(self) -> list[Sequence[int]]:
        """The prompt of each of the N responses, as tokens."""
        return [self.prompt_ids[p] for p in self.prompt.tolist()]

    def tokens(self) -> list[list[int]]:
        """N lists of token ids."""
        return [part.tolist() for part in self.split(self.ids)]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values of all tokens (R,) as N tensors."""
        return values.split(self.lengths.tolist())

    def padded(self, values: Tensor) -> Tensor:
        """Values of all tokens (R,) as a table (N, T), 0 behind the end of each response."""
        return pad_sequence(list(self.split(values)), batch_first=True)

    def groups(self) -> list[list[int]]:
        """Indices of the responses to each prompt that has any, in their order."""
        found: dict[int, list[int]] = {}
        for i, p in enumerate(self.prompt.tolist()):
            found.setdefault(p, []).append(i)
        return list(found.values())

    def table(self, values: Tensor) -> Tensor:
        """Values (N,) as a table (P, K), a row for each prompt. Raises ValueError if prompts have unequal numbers."""
        groups = self.groups()
        if len({len(group) for group in groups}) > 1:
            raise ValueError("these prompts have unequal numbers of responses: values do not make a table")
        return values[torch.tensor(groups, dtype=torch.int64)]

    def take(self, index: Sequence[int] | Tensor) -> Responses:
        """Some of the responses, by their indices; the prompts stay as they are."""
        at = torch.as_tensor(index, dtype=torch.int64)
        tokens = torch.from_numpy(self.places(at.numpy()))
        return replace(
            self,
            prompt=self.prompt[at],
            texts=[self.texts[i] for i in at.tolist()] if self.texts else [],
            ids=self.ids[tokens],
            lengths=self.lengths[at],
            finished=self.finished[at],
            truncated=None if self.truncated is None else self.truncated[at],
            logps=None if self.logps is None else self.logps[tokens],
        )

    def alone(self, index: Sequence[int]) -> Responses:
        """Some of the responses, each with a prompt of its own, so that no other prompt is kept."""
        some = self.take(index)
        ids = some.asked() if some.prompt_ids else []  # of texts that no tokenizer has read there are none
        return replace(some, rows=some.owners, prompt_ids=ids, prompt=torch.arange(len(some)))

    def places(self, index: np.ndarray) -> np.ndarray:
        """Where the tokens of some responses stand in `ids`, one response after another."""
        size = self.lengths.numpy()[index]
        return np.repeat(self.begins[index] - (np.cumsum(size) - size), size) + np.arange(size.sum())

    @cached_property
    def begins(self) -> np.ndarray:
        """(N,) where each response begins in `ids`."""
        lengths = self.lengths.numpy()
        return np.cumsum(lengths) - lengths

    @cached_property
    def flat_prompts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All prompts' tokens one after another, where each begins, and (P,) their lengths."""
        lengths = np.array([len(prompt) for prompt in self.prompt_ids], dtype=np.int64)
        flat = [token for prompt in self.prompt_ids for token in prompt]
        return np.array(flat, dtype=np.int64), np.cumsum(lengths) - lengths, lengths
