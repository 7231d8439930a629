"""Keys and values of the rows that decode together, in one block of memory a layer.

Rows are aligned at the right: the last prompt token of every row stands in the same column, so a step writes one
column for all of them. Columns left of a short prompt are zeros that a mask hides.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 64  # columns added at a time


class Layer(CacheLayerMixin):
    """One layer's keys and values (N, G, columns, D), of which `used` columns are written."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.used = 0
        self.blocks: tuple[Tensor, ...] = ()  # keys, values

    def allocate(self, like: Tensor, rows: int, used: int) -> None:
        """Room for `rows` rows with the heads, dtype and device of `like` (n, G, t, D); `used` columns of zeros."""
        shape = (rows, like.shape[1], used + BLOCK, like.shape[3])
        self.blocks = (like.new_zeros(shape), like.new_zeros(shape))
        self.used, self.is_initialized = used, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Called by transformers before the first write."""
        self.allocate(key_states, key_states.shape[0], 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, G, T, D); return all that are written, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        if self.used > self.blocks[0].shape[2]:
            self.blocks = tuple(_grown(block, self.used + BLOCK) for block in self.blocks)
        keys, values = (block[:, :, : self.used] for block in self.blocks)
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.blocks = tuple(block.index_select(0, rows) for block in self.blocks)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query of this length sees, and the first of them."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.used

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class Columns(Cache):
    """The layers of one model for N rows: a transformers cache that can be filled from prompts and compacted."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Layer)

    @property
    def parts(self) -> list[Layer]:
        """The layers met so far."""
        return cast(list[Layer], self.layers)

    def fill(self, prompts: Columns, source: Tensor, lengths: Tensor, *, start: int, rows: int, used: int) -> None:
        """Copy prefilled prompts into rows start, start + 1, ... of `rows`, so that they end at column `used`.

        prompts: P prompts written from column 0 on; lengths (P,) their tokens; source (n,) the prompt of each row.
        """
        width = prompts.parts[0].used
        columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        while len(self.layers) < len(prompts.layers):
            self.layers.append(Layer())
        for ours, theirs in zip(self.parts, prompts.parts, strict=True):
            if not ours.is_initialized:
                ours.allocate(theirs.blocks[0], rows, used)
            for into, block in zip(ours.blocks, theirs.blocks, strict=True):
                into[start : start + len(source), :, used - width : used] = _aligned(block, columns, source)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for layer in self.parts:
            layer.select(rows)


def _grown(block: Tensor, columns: int) -> Tensor:
    bigger = block.new_empty(*block.shape[:2], columns, block.shape[3])
    bigger[:, :, : block.shape[2]] = block
    return bigger


def _aligned(block: Tensor, columns: Tensor, source: Tensor) -> Tensor:
    """Rows of block (P, G, T, D) moved to the right edge (what was beyond it is padding), then repeated."""
    shape = (columns.shape[0], block.shape[1], columns.shape[1], block.shape[3])
    index = columns.clamp_min(0)[:, None, :, None].expand(shape)
    return block.gather(2, index).index_select(0, source)
