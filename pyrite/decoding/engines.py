"""Rows that decode together: prompts prefilled once, then one token a step from a preallocated cache.

`Decoder.step` maps the last token of every row to the logits of the next, `Decoder.keep` drops rows: all that a
sampling loop needs, of one model or of two that it mixes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrite.decoding.adapters import innermost, silent
from pyrite.decoding.cached_attention import additive, attend, attending
from pyrite.decoding.caches import Columns
from pyrite.decoding.lean import Lean, is_lean
from pyrite.ways import told

TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox"})
PREFILL = 16384  # tokens, padding included, of one prefill forward

Path = Literal["lean", "cached", "generate", "uncached"]
Mask = Tensor | dict[str, Tensor | None] | None
Forward = Callable[[Tensor, Tensor, Columns, Mask], Tensor]  # tokens, positions (N, T) -> logits (N, V)


class Engine(NamedTuple):
    """How a model is run: its path, the forward, and the sliding window of its layer kinds (None: full)."""

    path: Path
    forward: Forward
    windows: dict[str, int | None]


def open_engine(model: nn.Module, columns: int) -> Engine | None:
    """The fastest way to run a causal LM over up to `columns` tokens from our cache; None where there is none.

    Families outside `TESTED`, and wrapped models, are compared with the stock forward on a few tokens first: a small
    model of the same architecture, and the model itself in its own precision. Under autocast the engine computes in
    that of autocast.
    """
    windows = _windows(model, columns)
    if windows is None:
        return None
    if set(windows.values()) == {None} and _is_tested(inside := innermost(model)) and is_lean(inside):
        return Engine("lean", Lean(inside, columns, attend), windows)
    engine = Engine("cached", _stock(model), windows)
    if _is_tested(model):
        return engine
    if not _is_tested(stock := transformers_model(model)) and not told(stock, _caches):
        return None
    return engine if _agrees(model, engine) else None


def without_adapters(engine: Engine, layers: Sequence[Any]) -> Engine:
    """The same engine, on the same weights, with these adapted layers silent."""
    whole = engine.forward
    if isinstance(whole, Lean):
        return engine._replace(forward=whole.without_adapters())

    def forward(tokens: Tensor, positions: Tensor, cache: Columns, mask: Mask) -> Tensor:
        with silent(layers):
            return whole(tokens, positions, cache, mask)

    return engine._replace(forward=forward)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in evaluation mode; each module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts (token ids), longest first, and how many rows each gets."""

    tokens: Sequence[Sequence[int]]
    repeats: Sequence[int]


class Decoder:
    """The rows of some prompts under one model, prompt by prompt, with room for `steps` new tokens."""

    def __init__(self, engine: Engine, prompts: Prompts, *, steps: int, device: torch.device) -> None:
        self.engine, self.cache = engine, Columns()
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts.tokens], device=device)
        self.column = len(prompts.tokens[0]) - 1  # the last token of a prompt is the first step's input
        self.shift = _repeated(self.column - lengths, prompts.repeats)
        self.bias = None  # hides the columns left of a short prompt, (N, 1, 1, S)
        if len(prompts.tokens[-1]) - 1 < self.column:
            column = torch.arange(self.column + steps, device=device)
            self.bias = additive((column < self.shift[:, None])[:, None, None])
        self._prefill(prompts, lengths, device)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (N, V) after one more token (N,) in each row."""
        positions = self.column - self.shift
        self.column += 1
        return self.engine.forward(tokens[:, None], positions[:, None], self.cache, self._mask(self.column))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.select(rows)
        self.shift = self.shift[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def _prefill(self, prompts: Prompts, lengths: Tensor, device: torch.device) -> None:
        start, row, total = 0, 0, sum(prompts.repeats)
        while start < len(prompts.tokens) and (width := len(prompts.tokens[start]) - 1) > 0:
            stop = min(len(prompts.tokens), start + max(1, PREFILL // width))
            block = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts.tokens[start:stop]]
            tokens, cache = torch.tensor(block, device=device), Columns()
            positions = torch.arange(width, device=device).expand_as(tokens)
            self.engine.forward(tokens, positions, cache, self._causal(width, device))
            source = _repeated(torch.arange(stop - start, device=device), prompts.repeats[start:stop])
            self.cache.fill(cache, source, lengths[start:stop], start=row, rows=total, used=self.column)
            start, row = stop, row + len(source)

    def _mask(self, columns: int) -> Mask:
        """What one new token of each row sees: None for all, or additive (N, 1, 1, columns)."""
        bias = None if self.bias is None else self.bias[..., :columns]

        def near(window: int) -> Tensor:
            full = torch.zeros(1, 1, 1, columns, device=self.shift.device) if bias is None else bias.clone()
            full[..., : columns - window] = float("-inf")
            return full

        return self._by_kind(columns, bias, near)

    def _causal(self, width: int, device: torch.device) -> Mask:
        """What the tokens of a right-padded prompt see: None for all before, or additive (1, 1, width, width)."""
        column = torch.arange(width, device=device)
        back = column[:, None] - column
        return self._by_kind(width, None, lambda w: additive(((back < 0) | (back >= w))[None, None]))

    def _by_kind(self, columns: int, full: Tensor | None, near: Callable[[int], Tensor]) -> Mask:
        """One mask for all layers, or one a kind where the kinds differ, as transformers wants it."""
        windows = self.engine.windows
        if all(window is None or window >= columns for window in windows.values()):
            return full
        masks = {kind: full if window is None else near(window) for kind, window in windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _stock(model: nn.Module) -> Forward:
    """The model's own forward over our cache."""
    last = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(transformers_model(model).forward).parameters
        else {}
    )

    def forward(tokens: Tensor, positions: Tensor, cache: Columns, mask: Mask) -> Tensor:
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last,
        )
        return output.logits[:, -1]

    return forward


def _is_tested(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.config.model_type in TESTED


def _caches(model: PreTrainedModel) -> bool:
    windows = _windows(model, 32)
    return windows is not None and _agrees(model, Engine("cached", _stock(model), windows))


def _agrees(model: nn.Module, engine: Engine) -> bool:
    """Whether a ragged batch of two prompts decodes to the stock forward's logits, taken one row at a time."""
    device = next(model.parameters()).device
    rows = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 4, 3, 2]], device=device) % _text(model).vocab_size
    off = torch.autocast(device.type, enabled=False)  # where there is less rounding to tell from a mistake
    with off:
        stock = [model(row[None]).logits[0, -1].float() for row in (rows[0], rows[1, 2:])]
    try:
        with off, attending(model):
            decoder = Decoder(
                engine, Prompts([rows[0, :3].tolist(), rows[1, 2:3].tolist()], [1, 1]), steps=3, device=device
            )
            ours = [decoder.step(rows[:, column]) for column in (2, 3, 4)][-1]
    except Exception:  # whatever a foreign model raises, it cannot take our cache
        return False
    gap, scale = (ours.float() - torch.stack(stock)).abs().max(), torch.stack(stock).abs().max()
    return bool(gap <= (1e-4 if ours.dtype == torch.float32 else 5e-2) * scale)


def _repeated(values: Tensor, times: Sequence[int]) -> Tensor:
    return values.repeat_interleave(torch.tensor(times, device=values.device))


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside any wrapper."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _text(model: nn.Module) -> Any:
    return transformers_model(model).config.get_text_config()


def _windows(model: nn.Module, columns: int) -> dict[str, int | None] | None:
    """Layer kinds and their windows, None for one that never binds; None where a kind is not known here."""
    text = _text(model)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    binds = window is not None and window < columns
    return {kind: window if kind == "sliding_attention" and binds else None for kind in sorted(set(kinds))}
