"""Attention over packed rows equals attention over each path alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import Row, build
from test_packing import paths_of
from torch import Tensor
from transformers import AttentionInterface

from pyrite.data.responses import Responses
from pyrite.models import forward
from pyrite.models.forward import Bucket, Packed, attend, pack, packed_attention, packed_forward

ROWS = [Row([1, 2, 3], [[4, 5], [6], [7, 8, 9, 10]]), Row([1], [[2, 3, 4]]), Row([1] * 9, [[2], []])]


def inputs(batch: Packed, *, heads: int, groups: int, size: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(len(batch.ids), h, size, generator=g).requires_grad_() for h in (heads, groups, groups)]


def by_mask(query: Tensor, key: Tensor, value: Tensor, batch: Packed, scale: float | None) -> Tensor:
    """Full attention with an explicit mask: what precedes on one of the token's paths."""
    see = torch.zeros(len(batch.ids), len(batch.ids), dtype=torch.bool)
    for path in paths_of(batch):
        for i in range(len(path)):
            see[path[i], path[: i + 1]] = True
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    q, k, v = (part.transpose(0, 1) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=see, scale=scale).transpose(0, 1)


class Kernel:
    """torch's own kernel, which processors use for dropout only, in the place of ours."""

    @staticmethod
    def apply(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
        return forward._kernel(q, k, v, bucket, scale, 0.0)


@pytest.mark.parametrize("way", ["kept", "blocks", "kernel"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_attend_is_masked_attention(
    heads: int, groups: int, scale: float | None, padded: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS, Row([1] * 20, [[2] * 37, [3] * 16])]  # several blocks of 16
    monkeypatch.setattr(forward, "SHORT", 512 if way == "kept" else 0)
    monkeypatch.setattr(forward, "CACHED", 1)
    if way == "kernel":
        monkeypatch.setattr(forward, "_Long", Kernel)
    batch = pack(Responses.of(rows), padded=padded)
    parts = inputs(batch, heads=heads, groups=groups)
    got = attend(*parts, batch, scale=scale)
    want = by_mask(*parts, pack(Responses.of(rows)), scale)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), parts), torch.autograd.grad((want * weight).sum(), parts), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_siblings_do_not_see_each_other() -> None:
    batch = pack(Responses.of([Row([1, 2], [[3, 4], [5, 6]])]))
    query, key, value = inputs(batch, heads=2, groups=2)
    before = attend(query, key, value, batch)
    changed = value.detach().clone()
    changed[2:4] += 1.0  # the first response
    after = attend(query, key, changed, batch)
    assert torch.equal(before[[0, 1, 4, 5]], after[[0, 1, 4, 5]])
    assert not torch.equal(before[[2, 3]], after[[2, 3]])


def test_query_and_key_follow_the_values_dtype() -> None:
    batch = pack(Responses.of(ROWS))
    query, key, value = inputs(batch, heads=2, groups=2)
    assert attend(query, key, value.bfloat16(), batch).dtype == torch.bfloat16


def test_dropout_drops_and_is_off_by_default() -> None:
    batch = pack(Responses.of(ROWS))
    parts = inputs(batch, heads=2, groups=2)
    torch.manual_seed(0)
    assert torch.equal(attend(*parts, batch), attend(*parts, batch))
    assert not torch.equal(attend(*parts, batch, dropout=0.5), attend(*parts, batch))


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}], ids=["softcap", "sinks"])
def test_what_packed_attention_cannot_do_is_refused(extra: dict) -> None:
    batch = pack(Responses.of(ROWS))
    q, k, v = (part.transpose(0, 1)[None] for part in inputs(batch, heads=2, groups=2))
    with pytest.raises(NotImplementedError, match="no soft-capping and no sinks"):
        packed_attention(torch.nn.Identity(), q, k, v, None, packed=batch, **extra)


def test_the_model_gets_its_own_attention_back() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), packed_forward(model):
        assert model.config._attn_implementation != before
        assert model.config._attn_implementation in AttentionInterface().valid_keys()
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before
