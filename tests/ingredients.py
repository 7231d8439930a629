"""A toy base and policies with adapters trained on it, a little and in different directions."""

from __future__ import annotations

from pathlib import Path

import torch
from families import Row

from pyrite.data.responses import Responses
from pyrite.models.policy import Lora, Policy
from pyrite.recipes import toy

RESPONSES = ("hello my friend !", "the velvet fox found the tail .", "a fox , forest .")


def base(folder: Path) -> Path:
    """A random toy model whose logits are far from flat."""
    model = toy.model(0)
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, number: int, *, rank: int = 4, alpha: float = 8.0, steps: int = 4) -> Path:
    """A policy's adapters after a few steps toward one of the responses."""
    policy = Policy.load(base, lora=Lora(r=rank, alpha=alpha))
    read = policy.tokenizer(list(RESPONSES), add_special_tokens=False)["input_ids"]
    batch = policy.pack(Responses.of([Row(read[2], [read[number % 3]]), Row(read[1], [read[number % 3]])]))
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-policy(batch).mean()).backward()
        optimizer.step()
    policy.save(folder)
    return folder
