"""What is run at each scale: data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyrite.jobs.pairs import Kind
from pyrite.recipes.toy import Shares
from pyrite.training.loop import Training

Scale = Literal["toy"]
METHODS = ("vb", "pp", "mt", "rlhf", "pmorl", "psoups", "psoups_factor", "psoups_dpo")
GENERAL = "pyrite.toy:story_quality()"


@dataclass(frozen=True)
class Settings:
    """One chain: a world that half follows preferences, pairs along them, reward models, every method, duels."""

    methods: tuple[str, ...] = METHODS
    dimensions: str = "toy"
    general: str = GENERAL
    added: str | None = "lively"
    """An option that comes later: what it takes to serve it too."""
    demos: int = 16_000
    follow: float = 0.6
    """How often a demonstration's prompt names an option of a dimension."""
    test_prompts: int = 40
    answers: int = 1
    """To each test prompt under each combination."""
    train_prompts: int = 128
    """Prompts with answers under every option and none, of which pairs are made."""
    candidates: int = 4
    """Answers to each of them."""
    general_prompts: int = 640
    """Prompts with two answers each, of which general pairs are made."""
    kinds: tuple[Kind, ...] = ("labelled", "positive_vs_negative")
    max_new_tokens: int = 64
    sft: Training = field(default_factory=Training)
    multitask: Training = field(default_factory=Training)
    reward: Training = field(default_factory=Training)
    dpo: Training = field(default_factory=Training)
    ppo: Training = field(default_factory=Training)
    lora: str = "lora(r=8, alpha=16.0)"
    beta: float = 0.1
    steps: int = 24
    """PPO steps of the policy of one option; the policy of all combinations gets as many for each of its options."""
    prompts_per_step: int = 64
    missing_eos: float = 3.0


# How the demonstrations follow an option that their prompt names; what several options change adds up.
FOLLOWED: dict[str, dict[str, float | tuple[float, ...]]] = {
    "technical": {"technical": 0.25},
    "plain": {"technical": 0.02},
    "brief": {"sentences": (0.45, 0.4, 0.1, 0.05)},
    "detailed": {"sentences": (0.05, 0.25, 0.4, 0.3)},
    "kind": {"opening": 0.6, "closing": 0.5},
    "curt": {"opening": 0.2, "closing": 0.15},
    "lively": {"vivid": 0.35},
}
NEUTRAL = Shares(drift=0.0, technical=0.1)


def _fast(lr: float, epochs: int = 1) -> Training:
    return Training(lr=lr, epochs=epochs, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16)


TOY = Settings(
    sft=Training(
        lr=4e-3,
        epochs=1,
        batch_size=48,
        lr_scheduler_type="cosine(warmup_steps=30, min_lr_ratio=0.05)",
        optim="adamw(weight_decay=0.01)",
        micro_batch_tokens=1 << 16,
    ),
    multitask=_fast(1e-3, 2),
    reward=_fast(5e-4, 2),
    dpo=_fast(2e-3, 2),
    ppo=Training(lr=3e-3, epochs=2, batch_size=32, lr_scheduler_type="constant()", micro_batch_tokens=1 << 16),
)
