"""Log-probabilities of given tokens, without the (tokens x vocabulary) matrix where memory is short."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_BYTES = 1 << 30  # logits up to this size are kept for the backward pass instead of being recomputed


def selective_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, *, keep_bytes: int = KEEP_BYTES, chunk: int = 1024
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], in float32.

    hidden (R, H), weight (V, H), target (R,) to (R,) nats. The logits are kept for the backward pass if they
    take at most `keep_bytes`; otherwise `chunk` rows at a time are computed, and computed again.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    keep = hidden.shape[0] * weight.shape[0] * dtype.itemsize <= keep_bytes
    step = hidden.shape[0] if keep else chunk
    return _SelectiveLogp.apply(hidden.to(dtype), weight.to(dtype), target, max(step, 1), keep)


class _SelectiveLogp(torch.autograd.Function):
    """d logp / d logits = onehot(target) - softmax, applied chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int, keep: bool) -> Tensor:
        logp = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        lse = torch.empty_like(logp)
        kept = None
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = F.linear(hidden[rows], weight)
            lse[rows] = torch.logsumexp(logits.float(), -1)
            logp[rows] = logits.gather(1, target[rows, None]).squeeze(1).float() - lse[rows]
            kept = logits if keep else None
        ctx.save_for_backward(hidden, weight, target, lse, kept)
        ctx.chunk = chunk
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, target, lse, kept = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for begin in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            logits = F.linear(hidden[rows], weight) if kept is None else kept
            d = logits.float().sub(lse[rows, None]).exp_().mul_(-grad[rows, None])
            d.scatter_add_(1, target[rows, None], grad[rows, None])
            d = d.to(hidden.dtype)
            torch.mm(d, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += torch.mm(d.t(), hidden[rows])
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None
