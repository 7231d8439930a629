"""Streams by purpose."""

from __future__ import annotations

import torch

from pyrite.math.seeds import derive, generator


def test_one_purpose_one_stream_on_every_machine() -> None:
    assert derive(0, "order", 1) == derive(0, "order", 1) == 1332101017241992705
    assert torch.equal(torch.rand(5, generator=generator(3, "a")), torch.rand(5, generator=generator(3, "a")))


def test_streams_differ_and_fit_63_bits() -> None:
    seen = {derive(seed, name, i) for seed in range(20) for name in ("order", "head", "1") for i in range(20)}
    assert len(seen) == 20 * 3 * 20
    assert all(0 <= value < 2**63 for value in seen)
    assert derive(0, "1") != derive(0, 1)
    assert derive(0, "a", "b") != derive(0, "ab")


def test_streams_are_unrelated() -> None:
    a, b = (torch.rand(4000, generator=generator(0, "x", i)) for i in (0, 1))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.06


def test_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    generator(0, "x")
    assert torch.equal(torch.rand(3), want)
