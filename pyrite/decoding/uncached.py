"""Whole texts through the stock model: log-probabilities of given tokens, and decoding for any model, slowly.

Texts are padded at the right and nothing is masked: no token of a causal model sees what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyrite.decoding.draws import token_logp
from pyrite.decoding.engines import PREFILL, Prompts
from pyrite.decoding.voices import Voice

LOGITS = 2**26  # of one forward, at most


def score(voice: Voice, prompts: Prompts, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities (N, T) of the responses `tokens` (N, T) of `lengths` (N,), nats; 0 beyond the length."""
    texts = _Texts(prompts, tokens.shape[1], tokens.device)
    step = torch.arange(tokens.shape[1], device=tokens.device)
    columns = texts.start[:, None] + step
    texts.ids.scatter_(1, columns, tokens)
    found = torch.zeros(tokens.shape, device=tokens.device)
    order = (texts.start + lengths).argsort(descending=True)
    for rows, first, logits in texts.logits(voice, order, texts.start - 1, texts.start + lengths - 1):
        at = (columns[rows] - 1 - first).clamp_max(logits.shape[1] - 1)
        logps = token_logp(logits.gather(1, at[..., None].expand(-1, -1, logits.shape[2])), tokens[rows])
        found[rows] = logps.masked_fill_(step >= lengths[rows, None], 0.0)
    return found


class Uncached:
    """The rows of some prompts under one model, as `Decoder`, but with the whole text read anew at every step."""

    def __init__(self, voice: Voice, prompts: Prompts, *, steps: int, device: torch.device) -> None:
        self.voice, self.texts = voice, _Texts(prompts, steps, device)
        self.last = self.texts.start - 1  # a prompt's last token is the first step's input

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (N, V) after one more token (N,) in each row."""
        row = torch.arange(len(tokens), device=tokens.device)
        self.texts.ids[row, self.last] = tokens
        found, order = [], []
        for rows, first, logits in self.texts.logits(self.voice, row, self.last, self.last + 1):
            found.append(logits[row[: len(rows)], self.last[rows] - first])
            order.append(rows)
        self.last = self.last + 1
        return torch.cat(found)[torch.cat(order).argsort()]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.texts.ids, self.last = self.texts.ids[rows], self.last[rows]


class _Texts:
    """Token ids (N, columns) of prompts, repeated, with room for responses; `start` (N,) is each prompt's length."""

    def __init__(self, prompts: Prompts, steps: int, device: torch.device) -> None:
        width = len(prompts.tokens[0])
        block = [[*prompt, *[0] * (width + steps - len(prompt))] for prompt in prompts.tokens]
        repeats = torch.tensor(prompts.repeats, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts.tokens], device=device)
        self.ids = torch.tensor(block, device=device).repeat_interleave(repeats, 0)
        self.start = lengths.repeat_interleave(repeats)

    def logits(self, voice: Voice, order: Tensor, begin: Tensor, end: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Logits of columns begin (N,) to end (N,) of every row, some rows at a time, in this order if they may mix.

        Yields the rows (n,), the first of their columns and the logits from it on (n, columns, V).
        """
        vocabulary = voice.model.config.get_text_config().vocab_size
        first, width = int(begin.min()), int(end.max())
        size = min(LOGITS // ((width - first) * vocabulary), PREFILL // width)
        groups = [order[group] for group in voice.ways.apart(end[order].tolist())]
        for rows in (rows for group in groups for rows in group.split(max(1, size))):
            first, width = int(begin[rows].min()), int(end[rows].max())
            yield rows, first, voice.logits(self.ids[rows, :width], width - first)
