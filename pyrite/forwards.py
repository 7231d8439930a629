"""What policies and reward models share: running packed rows through a stock model, padding where it cannot take them.

At load a small probe compares the packed path with the model's own padded forward (`agrees`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyrite.attention import packed_forward
from pyrite.logps import Logps
from pyrite.packing import Packed, Row, pack
from pyrite.text import Encoded


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


def as_padded(batch: Packed, *, pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (N, L) of a batch packed as one bucket."""
    (bucket,) = batch.buckets
    mask = torch.arange(bucket.queries, device=batch.ids.device) < bucket.lengths[:, None]
    ids = batch.ids[batch.query].view(mask.shape)
    return (ids if pad is None else ids.masked_fill(~mask, pad)), mask.long()


def unpadded(values: Tensor, batch: Packed) -> Tensor:
    """(N, L, ...) back to the packed order (T, ...)."""
    return values.flatten(0, 1).index_select(0, batch.restore)


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


@torch.inference_mode()
def agrees(
    fast: Callable[[Packed], Tensor],
    plain: Callable[[Packed], Tensor],
    model: PreTrainedModel,
    *,
    tol: float = 1e-3,
) -> bool:
    """Whether the packed path gives the model's own numbers, on two rows of different shapes."""
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        return False  # small logits would hide it from the probe
    was_training = model.training
    model.eval()
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    pad = model.config.get_text_config().pad_token_id
    ids = [token if token != pad else (token + 1) % vocab for token in ids]
    rows = [Row(ids[:5], [ids[5:12], ids[12:15]]), Row(ids[15:18], [ids[18:32], ids[32:40]])]
    try:
        got = fast(pack(rows).to(model.device))
        want = plain(pack(rows, padded=True).to(model.device))
    except (TypeError, RuntimeError, AttributeError, ValueError, KeyError):  # NotImplementedError is a RuntimeError
        return False
    finally:
        model.train(was_training)
    tolerance = tol if model.dtype == torch.float32 else 50 * tol
    error = (got.float() - want.float()).abs().max().item()
    return math.isfinite(error) and error <= tolerance * max(1.0, want.abs().max().item())
