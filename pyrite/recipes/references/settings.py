"""What is run at each scale: data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyrite.recipes.toy import Shares
from pyrite.training.loop import Training

Scale = Literal["toy"]


@dataclass(frozen=True)
class Settings:
    """One chain: a policy, preference pairs, stronger models, and direct optimization against each reference."""

    gold: str
    """The scorer that plays the truth, in labels and in evaluation."""
    toy_demos: int = 24_000
    better_demos: int = 8_000
    """Demonstrations of the stronger models, in a better style."""
    better: Shares = Shares(drift=0.0, opening=0.9, closing=0.3, vivid=0.6, technical=0.0)
    sft: Training = field(default_factory=Training)
    stronger: Training = field(default_factory=Training)
    """How models are trained on the better demonstrations."""
    vocabulary: int = 700
    """Tokens of the other tokenizer, which splits words."""
    pair_prompts: int = 400
    pair_answers: int = 6
    pair_top_p: float = 1.0
    noise: float = 0.0
    """Share of the labels that are flipped."""
    dpo: Training = field(default_factory=Training)
    measure_every: int = 40
    """Steps between measurements, from which the best checkpoint is chosen."""
    betas: tuple[float, ...] = (1.0, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
    """Of the policy's own reference; the last ones are meant to degenerate."""
    other_betas: tuple[float, ...] = (1.0, 0.1, 0.01, 0.003, 0.001)
    """Of every other reference."""
    answer_prompts: int = 128
    answers: int = 2
    max_new_tokens: int = 64


TOY = Settings(
    gold="pyrite.toy:story_quality()",
    sft=Training(
        lr=4e-3,
        epochs=1,
        batch_size=48,
        lr_scheduler_type="cosine(warmup_steps=30, min_lr_ratio=0.05)",
        optim="adamw(weight_decay=0.01)",
        micro_batch_tokens=1 << 16,
    ),
    stronger=Training(
        lr=2e-3,
        epochs=1,
        batch_size=48,
        lr_scheduler_type="cosine(warmup_steps=30, min_lr_ratio=0.05)",
        optim="adamw(weight_decay=0.01)",
        micro_batch_tokens=1 << 16,
    ),
    dpo=Training(
        lr=1e-3, epochs=4, batch_size=32, micro_batch_tokens=1 << 16, lr_scheduler_type="linear(min_lr_ratio=0.0)"
    ),
)
