"""log softmax at chosen tokens: kept or recomputed, the same numbers and gradients as the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrite.models.forward import logp_details, selective_logp


def inputs(rows: int = 23, size: int = 16, vocabulary: int = 50, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=g).to(dtype).requires_grad_()
    return [hidden, weight, torch.randint(vocabulary, (rows,), generator=g)]


def plainly(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)


MODES = {"kept": {}, "recomputed": {"keep_bytes": 0, "chunk": 5}, "one chunk": {"keep_bytes": 0, "chunk": 100}}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients(dtype: torch.dtype, options: dict) -> None:
    hidden, weight, target = inputs(dtype=dtype)
    got, want = selective_logp(hidden, weight, target, **options), plainly(hidden, weight, target)
    assert got.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    up = torch.linspace(-1, 2, len(target))
    for a, b in zip(
        torch.autograd.grad((got * up).sum(), [hidden, weight]),
        torch.autograd.grad((want * up).sum(), [hidden, weight]),
        strict=True,
    ):
        assert a.dtype == dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a.float() / scale, b.float() / scale, atol=tolerance, rtol=0)


def test_gradient_is_that_of_finite_differences() -> None:
    hidden, weight, target = inputs(rows=3, size=4, vocabulary=7)
    (gradient,) = torch.autograd.grad(selective_logp(hidden, weight, target).sum(), [hidden])
    base = hidden.detach().double()
    for i in range(3):
        for j in range(4):
            step = torch.zeros_like(base)
            step[i, j] = 1e-5
            up, down = (
                ((base + sign * step) @ weight.detach().double().T).log_softmax(-1).gather(1, target[:, None]).sum()
                for sign in (1, -1)
            )
            assert gradient[i, j].item() == pytest.approx((up - down).item() / 2e-5, abs=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, target = inputs()
    got = selective_logp(hidden * 1000, weight, target)
    torch.testing.assert_close(got, plainly(hidden * 1000, weight, target), atol=1e-2, rtol=1e-5)
    assert got.isfinite().all()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(False)
    selective_logp(hidden, weight, target).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_rows() -> None:
    hidden, weight, target = inputs(rows=0)
    assert selective_logp(hidden, weight, target).shape == (0,)


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, target = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = selective_logp(hidden, weight, target)
    exact, rounded = plainly(hidden, weight, target), plainly(hidden.bfloat16(), weight.bfloat16(), target)
    torch.testing.assert_close(got, rounded, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(got, exact, atol=1e-5)
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("chunk", [5, 100])
def test_details_are_those_of_the_whole_distribution(chunk: int) -> None:
    hidden, weight, target = inputs()
    ref = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    logp, theirs = (hidden @ weight.T).log_softmax(-1), (hidden @ ref.T).log_softmax(-1).detach()
    want = torch.stack(
        [logp.gather(1, target[:, None])[:, 0], (theirs.exp() * (theirs - logp)).sum(-1), (2 * logp).logsumexp(-1)]
    )
    got = logp_details(lambda rows: hidden[rows] @ weight.T, target, lambda rows: hidden[rows] @ ref.T, chunk=chunk)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    up = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(
        torch.autograd.grad(got, [hidden, weight], up), torch.autograd.grad(want, [hidden, weight], up), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_without_a_reference_there_is_no_divergence() -> None:
    hidden, weight, target = inputs()
    assert torch.equal(logp_details(lambda rows: hidden[rows] @ weight.T, target)[1], torch.zeros(len(target)))
