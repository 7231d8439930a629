"""What policies and reward models share: running packed rows through a stock model, padding where it cannot take them.

`ways.ways` finds out how a model may be run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrite.attention import packed_forward
from pyrite.linears import FastLinears
from pyrite.logps import Logps
from pyrite.packing import Packed, Row
from pyrite.text import Encoded

NEVER = 1 << 40
STATES = frozenset({"conv1d_state", "recurrent_states"})  # RecurrentGemma's, which the next text would begin with


@dataclass(frozen=True)
class Ways:
    """What a model's architecture and config allow.

    causal: no token sees a later one. packed: the trunk reads packed rows. padded: rows of unequal length may share a
    batch, padded at the right. head: the model's own head, on the trunk's states alone, gives its logits. bare: so does
    the weight of its vocabulary head. longest: tokens of a packed text at most, such as a sliding window. turn: texts
    beyond this length are rotated otherwise than those within; dynamic: each length in its own way.
    """

    causal: bool = True
    packed: bool = False
    padded: bool = False
    head: bool = False
    bare: bool = False
    longest: int = NEVER
    turn: int = NEVER
    dynamic: bool = False

    def apart(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of texts of these lengths, in groups that may share a batch."""
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            own = not self.padded or (self.dynamic and length > self.turn)
            groups.setdefault(length if own else -int(length > self.turn), []).append(index)
        return list(groups.values())


def by_response(flat: Tensor, batch: Packed, *, tokens: bool = False) -> Logps:
    """Log-probabilities (R,) of response tokens as those of the N responses; sums are added up in float64."""
    if tokens:
        return Logps.from_tokens(list(flat.split(batch.lengths.tolist())))
    total = flat.new_zeros(batch.n, dtype=torch.float64).index_add(0, batch.owner, flat.double())
    return Logps.from_sums(total.float(), batch.lengths)


def trunk_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """Hidden states (T, H) of a packed batch after the final norm."""
    with packed_forward(model):
        out = model.base_model(
            input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, packed=batch
        )
    return out.last_hidden_state[0]


class Places(NamedTuple):
    """Where in a batch's states (S, H) response tokens, their predictors, (R,) each, and last tokens (N,) are."""

    predictor: Tensor
    response: Tensor
    last: Tensor


def places(batch: Packed) -> Places:
    """A prompt that several padded texts begin with has states in each of them, which need not be the same."""
    if not batch.padded:
        return Places(batch.predictor, batch.response, batch.last)
    (bucket,) = batch.buckets
    end = torch.arange(batch.n, device=batch.ids.device) * bucket.queries + bucket.lengths
    within = (
        torch.arange(len(batch.owner), device=batch.ids.device) - (batch.lengths.cumsum(0) - batch.lengths)[batch.owner]
    )
    response = (end - batch.lengths)[batch.owner] + within
    return Places(response - 1, response, end - 1)


def states(model: PreTrainedModel, batch: Packed, ways: Ways, *, pad: int | None = None) -> Tensor:
    """Hidden states (S, H) of a batch after the final norm, however it is laid out; `places` says what is where."""
    if not batch.padded:
        if ways.dynamic:
            forget(model)
        return trunk_states(model, batch)
    trunk = model.base_model
    return by_group(model, batch, ways, lambda ids, mask: run(trunk, ids, mask).last_hidden_state, pad=pad).flatten(
        0, 1
    )


Read = Callable[[Tensor, Tensor | None], Tensor]  # ids (N, L) and what of them is text, to (N, ...) or (N, L, ...)


def by_group(model: PreTrainedModel, batch: Packed, ways: Ways, read: Read, *, pad: int | None = None) -> Tensor:
    """What `read` gives of a padded batch, the texts that may not share a forward apart; nothing masked in texts of
    equal length."""
    (bucket,) = batch.buckets
    ids, mask = as_padded(batch, pad=pad)
    lengths: list[int] = bucket.lengths.tolist()
    parts, groups = [], ways.apart(lengths)
    for group in groups:
        width = max(lengths[i] for i in group)
        even = all(lengths[i] == width for i in group)
        rows = torch.tensor(group, device=ids.device)
        if ways.dynamic:
            forget(model)
        with FastLinears():
            part = read(ids[rows, :width], None if even else mask[rows, :width])
        rest = bucket.queries - width
        parts.append(F.pad(part, [0, 0] * (part.dim() - 2) + [0, rest]) if part.dim() > 2 and rest else part)
    if len(groups) == 1:
        return parts[0]
    order = torch.tensor([i for group in groups for i in group], device=ids.device)
    return torch.cat(parts)[order.argsort()]


def forget(model: nn.Module) -> None:
    """What modules keep of earlier texts is dropped: rotary embeddings grown to the longest, recurrent states."""
    for module in model.modules():
        first = getattr(module, "original_inv_freq", None)
        if isinstance(first, Tensor) and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = first.clone()
            module.max_seq_len_cached = module.original_max_seq_len
        for name in STATES & vars(module).keys():
            setattr(module, name, None)


def pad_of(model: PreTrainedModel) -> int | None:
    """The token that fills padded texts, where the model's config names one."""
    text = model.config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < text.vocab_size else None


def as_padded(batch: Packed, *, pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (N, L) of a batch packed as one bucket."""
    (bucket,) = batch.buckets
    mask = torch.arange(bucket.queries, device=batch.ids.device) < bucket.lengths[:, None]
    ids = batch.ids[batch.query].view(mask.shape)
    return (ids if pad is None else ids.masked_fill(~mask, pad)), mask.long()


def by_prompt(texts: Sequence[Encoded], *, most: int = 64) -> tuple[list[Row], list[list[int]]]:
    """Texts with the same prompt share a row, `most` responses at a time."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, text in enumerate(texts):
        by_prompt.setdefault(tuple(text.prompt), []).append(index)
    rows, members = [], []
    for prompt, indices in by_prompt.items():
        indices = sorted(indices, key=lambda i: -len(texts[i].response))
        for begin in range(0, len(indices), most):
            part = indices[begin : begin + most]
            rows.append(Row(prompt, [texts[i].response for i in part]))
            members.append(part)
    return rows, members


def run(module: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    """A model or its trunk on whole texts (N, L), without a cache."""
    takes = inspect.signature(module.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    return module(input_ids=ids, **options, **more, **({} if mask is None else {"attention_mask": mask}))


def own_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's own code from its trunk's states (R, H) to logits (R, V), with its scales, caps and biases."""
    name = model.base_model_prefix

    def logits(states: Tensor) -> Tensor:
        trunk = model._modules[name]
        model._modules[name] = _Said(states[None], trunk)
        try:
            return run(model, torch.zeros(1, len(states), dtype=torch.int64, device=states.device)).logits[0]
        finally:
            model._modules[name] = trunk

    return logits


class _Said(nn.Module):
    """In the place of a trunk: says states that are known already; all else is asked of the trunk."""

    def __init__(self, states: Tensor, trunk: Any) -> None:
        super().__init__()
        self.states, self.trunk = states, (trunk,)  # not a part of it: modules inside would be visited twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["trunk"][0], name)

    @property
    def decoder(self) -> _Said:  # where a model reads this part of its trunk
        return self

    def forward(self, *_: object, **__: object) -> _States:
        return _States(self.states)


class _States(tuple):
    """A trunk's output with nothing but its last states."""

    last_hidden_state: Tensor

    def __new__(cls, states: Tensor) -> _States:
        made = super().__new__(cls, (states,))
        made.last_hidden_state = states
        return made

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
