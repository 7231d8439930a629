"""oneDNN products: torch's own numbers and gradients, for stock layers inside the context."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrite.models import forward
from pyrite.models.forward import FastLinears, linear, outer, product


def inputs(bias: bool, shape: tuple[int, ...] = (2, 7, 5)) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=g).requires_grad_() for size in (shape, (6, shape[-1]), (6,))]
    return [*made[:2], made[2] if bias else None]


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_torch(bias: bool) -> None:
    parts = inputs(bias)
    given = [part for part in parts if part is not None]
    got, want = linear(*parts), F.linear(*parts)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    up = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(got, given, up), torch.autograd.grad(want, given, up), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(3, 8), (8, 3)])
def test_outer_product_either_way_round(n: int, k: int) -> None:
    a, b = torch.randn(11, n), torch.randn(11, k)
    torch.testing.assert_close(outer(a, b), a.T @ b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_go_to_torch(dtype: torch.dtype) -> None:
    x, weight, _ = (part.detach().to(dtype) if part is not None else None for part in inputs(False))
    assert torch.equal(product(x, weight), F.linear(x, weight))  # type: ignore[arg-type]


def test_an_empty_batch() -> None:
    assert product(torch.empty(0, 5), torch.ones(6, 5)).shape == (0, 6)


def test_stock_layers_use_it_inside_the_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(forward, "linear", lambda x, w, b=None: seen.append(x.shape) or F.linear(x, w, b))
    layer = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2, bias=False))
    layer(torch.ones(3, 5))
    assert not seen
    with FastLinears():
        layer(torch.ones(3, 5))
        layer.to(torch.bfloat16)(torch.ones(3, 5, dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            layer.to(torch.float32)(torch.ones(3, 5))
    assert seen == [(3, 5), (3, 6)]
