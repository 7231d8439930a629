"""Float32 matrix products on processors: oneDNN where MKL, which torch calls by default, is up to twice as slow.

MKL does not use the wide vectors of every maker's processors; oneDNN does, and is as fast as MKL elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def onednn(x: Tensor) -> bool:
    """Whether products of `x` go to oneDNN."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients: x (..., K), weight (N, K), bias (N,) or None, to (..., N)."""
    if onednn(x) and weight.dtype == x.dtype and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FastLinears(TorchFunctionMode):
    """Within this context every linear layer of a stock model multiplies by `product`, gradients included."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and len(args) >= 2 and not torch.is_autocast_enabled("cpu") and onednn(args[0]):
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return linear(args[0], args[1], bias)
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with gradients."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        flat = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x = product(grad, weight.t()) if need_x else None
        d_weight = outer(flat, x.reshape(-1, x.shape[-1])) if need_weight else None
        return d_x, d_weight, flat.sum(0) if need_bias else None


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b: a (T, N), b (T, K), to (N, K)."""
    return product(b.t(), a.t()).t() if a.shape[1] > b.shape[1] else product(a.t(), b.t())
