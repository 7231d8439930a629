"""The cache of decoding rows: appending grows it, prompts end in one column, rows can be dropped."""

from __future__ import annotations

import torch

from pyrite.models.generation import BLOCK, DecodingCache, LayerCache


def test_appending_equals_concatenation() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 2, t, 4, generator=generator) for t in (5, 1, BLOCK, 1, 2 * BLOCK + 3)]
    layer = LayerCache()
    for index, part in enumerate(parts):
        keys, values = layer.update(part, -part)
        assert torch.equal(keys, torch.cat(parts[: index + 1], 2))
        assert torch.equal(values, -keys)
        assert layer.get_seq_length() == keys.shape[2]
    layer.select(torch.tensor([2, 0]))
    assert torch.equal(layer.update(part[:2], part[:2])[0][:, :, :-1][:, :, : keys.shape[2]][0], keys[2])


def test_prompts_are_repeated_and_end_in_one_column() -> None:
    prompts, cache = DecodingCache(), DecodingCache()
    block = torch.arange(12.0).view(2, 1, 6, 1) + 1
    prompts.update(block, -block, 0)
    lengths, source = torch.tensor([6, 2]), torch.tensor([0, 1, 1])
    cache.fill(prompts, source, lengths, start=1, rows=5, used=8)
    keys, values = (part[:, 0, :8, 0] for part in cache.parts[0].blocks)
    assert keys[1].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert keys[2, -2:].tolist() == keys[3, -2:].tolist() == [7, 8]
    assert keys[[0, 4]].abs().sum() == 0  # rows of other prompts
    assert keys.isfinite().all()  # what a mask hides must still be finite
    assert torch.equal(keys, -values)
