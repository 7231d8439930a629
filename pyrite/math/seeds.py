"""One seed, many independent streams: every use of randomness names its purpose."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose`; streams of different purposes (or seeds) are unrelated.

    >>> derive(0, "order", 1) != derive(1, "order", 0)
    True
    """
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A torch generator of the stream (seed, purpose)."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def uniform(seed: int, *purpose: str | int) -> float:
    """One number in [0, 1) of the stream (seed, purpose): the same one in whatever batch, order or process.

    >>> uniform(0, "label", "a") == uniform(0, "label", "a") != uniform(0, "label", "b")
    True
    """
    return (derive(seed, *purpose) >> 10) * 2.0**-53
