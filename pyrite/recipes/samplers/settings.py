"""What is run at each scale: data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyrite.training.loop import Training

Scale = Literal["toy"]


@dataclass(frozen=True)
class Race:
    """Samplers on the same reward tables of the exact world: options of the job bandit."""

    samplers: tuple[str, ...] = ("uniform", "mix_r", "mix_p")
    rate: str = "matched"
    scale: float = 1.0
    rewards: Literal["normal", "unit"] = "normal"
    steps: int = 60
    samples: int | None = None
    instances: int = 200
    """Reward tables a repetition."""


CAPPED = "mix_p(cap='range')"  # what sampled pairs can be drawn from: no pair weighs without bound
SHARED = ("mix_r(share=1.0)", "mix_r(share=0.5)", "mix_p(share=1.0)", "mix_p(share=0.5)")
FLOORS = (512, 2048, 8192)
RACES = {
    "orders": Race(),
    "bounds": Race(rewards="unit", steps=8),
    "best": Race(("uniform", "mix_r", "mix_p", *SHARED), rate="best", steps=60),
    "fixed": Race(rate="10.0"),  # what the authors' code uses for every sampler
    **{f"floor {n}": Race(("uniform", CAPPED), "best", 0.1, samples=n, steps=120, instances=40) for n in FLOORS},
    "sooner": Race(("uniform", "mix_r", CAPPED), "best", 0.1, samples=8192, steps=20, instances=40),
}


@dataclass(frozen=True)
class Settings:
    """Races in the exact world; and one chain: a policy, a scorer that stands in for gold, rounds of every method."""

    gold: str
    """The held-out gold: it labels the scorer's training pairs and measures, and labels no pair of the rounds."""
    races: dict[str, Race] = field(default_factory=lambda: dict(RACES))
    repetitions: int = 5
    """Of every race; intervals are over them."""
    toy_demos: int = 24_000
    sft: Training = field(default_factory=Training)
    scorer_answers: int = 4
    """Answers to each prompt from which the scorer's training pairs are made."""
    scorer: Training = field(default_factory=Training)
    margin: float = 1.0
    """Log-odds of a label for one standard deviation of the scorer."""
    methods: dict[str, str] = field(
        default_factory=lambda: {
            "offline": "reference()",
            "on_policy": "on_policy()",
            "hybrid": "hybrid()",
            "mixed": "mixed(kappa=0.5)",
            "mixed_in_part": "mixed(kappa=0.5, on_policy=0.3)",
        }
    )
    """How the pairs of a round are drawn: method -> sampler."""
    loss: str = "soft_dpo(beta=0.1)"
    rounds: int = 3
    prompts_per_round: int | None = None
    """The next ones in every round; all by default."""
    online: Training = field(default_factory=Training)
    round_answers: int = 2
    """Answers to each held-out prompt after every round."""
    answer_prompts: int = 128
    answers: int = 4
    """Answers to each held-out prompt at the end."""
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
    scorer=Training(lr=5e-4, epochs=2, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16),
    margin=4.0,  # as published for Safe-RLHF
    online=Training(
        lr=3e-4, epochs=2, batch_size=32, lr_scheduler_type="cosine(warmup_steps=5)", micro_batch_tokens=1 << 16
    ),
)
