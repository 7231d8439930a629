"""Keys and values of the rows that decode together, in one block of memory a layer.

Rows are aligned at the right: the last prompt token of every row stands in the same column, so a step writes one
column for all of them. Columns left of a short prompt are zeros that a mask hides.
"""

from __future__ import annotations

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

    def allocate(self, like: Tensor, rows: int, used: int) -> None:
        """Room for `rows` rows with the heads, dtype and device of `like` (n, G, t, D); `used` columns of zeros."""
        shape = (rows, like.shape[1], used + BLOCK, like.shape[3])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
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
        self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query of this length sees, and the first of them."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.used

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def _grown(self, block: Tensor) -> Tensor:
        if self.used <= block.shape[2]:
            return block
        rows, heads, _, size = block.shape
        bigger = block.new_empty(rows, heads, self.used + BLOCK, size)
        bigger[:, :, : block.shape[2]] = block
        return bigger


class Columns(Cache):
    """The layers of one model for N rows: a transformers cache that can be filled from prompts and compacted."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Layer)

    def fill(self, prompts: Cache, source: Tensor, lengths: Tensor, start: int, rows: int, used: int) -> None:
        """Copy prefilled prompts into rows start, start + 1, ... of `rows`, ending at column `used`.

        prompts: keys of P prompts, written from column 0 on; lengths (P,) their tokens; source (n,) the prompt of
        each row.
        """
        width = prompts.layers[0].used
        columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        for index, layer in enumerate(prompts.layers):
            while len(self.layers) <= index:
                self.layers.append(Layer())
            if not self.layers[index].is_initialized:
                self.layers[index].allocate(layer.keys, rows, used)
            span = (slice(start, start + len(source)), slice(None), slice(used - width, used))
            self.layers[index].keys[span] = _aligned(layer.keys, columns, source)
            self.layers[index].values[span] = _aligned(layer.values, columns, source)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for layer in self.layers:
            layer.select(rows)


def _aligned(block: Tensor, columns: Tensor, source: Tensor) -> Tensor:
    """Rows of block (P, G, T, D) moved to the right edge (what was beyond it is padding), then repeated."""
    shape = (columns.shape[0], block.shape[1], columns.shape[1], block.shape[3])
    index = columns.clamp_min(0)[:, None, :, None].expand(shape)
    return block.gather(2, index).index_select(0, source)
