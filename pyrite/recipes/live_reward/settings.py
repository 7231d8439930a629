"""What is run at each scale: data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyrite.training.loop import Training

Scale = Literal["toy"]


@dataclass(frozen=True)
class Method:
    """How a policy is trained: options of the job online, or a direct loss on pairs of the start."""

    silver: str | None = None
    """The discriminator; "{static}" and "{warm}" stand for reward models of all labels and of the first few."""
    schedule: str = "even()"
    offline: int = 0
    """Labels that were spent on the start's own answers, before the rounds."""
    online: int = 0
    """Labels for the rounds."""
    epochs: int = 1
    """Passes over each round's pairs."""
    pairs: Literal["labels", "all", "offline"] = "all"
    """What the policy learns: paid pairs alone, all pairs of a round, or the offline ones by DPO."""


WARM = "reward(path={warm!r}, lr=1e-3, epochs=3)"
SEVERAL = "reward(path={several!r}, lr=1e-3, epochs=3)"


def methods(labels: int, warm: int) -> dict[str, Method]:
    """Every method with the same number of labels."""
    rest = labels - warm
    return {
        "offline": Method(offline=labels, epochs=6, pairs="offline"),
        "gold": Method(online=labels, pairs="labels"),
        "gold_matched": Method(online=labels, epochs=3, pairs="labels"),
        "static": Method("reward(path={static!r})", "never()", offline=labels),
        "live": Method(WARM, "even(replay=3.0)", offline=warm, online=rest),
        "live_random": Method(WARM, "even(selector='random()', replay=3.0)", offline=warm, online=rest),
        "live_disagreement": Method(SEVERAL, "even(selector='disagreement()', replay=3.0)", offline=warm, online=rest),
        "implicit": Method("implicit(lr=3e-4, epochs=2)", "even(selector='random()')", online=labels),
        "self_reward": Method("self_reward()", "even(selector='random()')", online=labels),
    }


FEW = ("offline", "gold", "gold_matched", "static", "live", "live_random")


@dataclass(frozen=True)
class Task:
    """What is rewarded, and by which of the worlds' policies it is tried."""

    gold: str
    """"{strong}" and "{weak}" stand for two language models."""
    world: Literal["stories", "arithmetic"] = "stories"
    methods: tuple[str, ...] = FEW
    max_new_tokens: int = 64


TASKS = {
    # of the first 20 words, so that a longer answer is no better one
    "words": Task("truncated(gold=\"word_collector(words='toy')\", words=20)", methods=tuple(methods(2, 1))),
    "nouns": Task("truncated(gold=\"unique_nouns(tagger='toy')\", words=20)"),
    "distill": Task("distillation(strong={strong!r}, weak={weak!r})"),
    "math": Task("math_chain()", "arithmetic", ("gold", "static", "live"), 48),
}


@dataclass(frozen=True)
class Settings:
    """Two worlds' policies; in each task every method with the same number of labels, from the same start."""

    tasks: dict[str, Task] = field(default_factory=lambda: dict(TASKS))
    labels: int = 400
    """Paid labels of every method, those of its reward model's first training among them."""
    warm: int = 100
    """Of them for the first training of a reward model that is live."""
    members: int = 3
    """Of the ensemble whose disagreement selects."""
    rounds: int = 8
    prompts: int = 192
    """A round, where pairs need no label."""
    toy_demos: int = 24_000
    weak_demos: int = 2_000
    math_demos: int = 3_000
    math_prompts: int = 1_536
    answer_prompts: int = 64
    answers: int = 4
    """Answers to each held-out prompt after every round."""
    sft: Training = field(default_factory=Training)
    math_sft: Training = field(default_factory=Training)
    reward: Training = field(default_factory=Training)
    online: Training = field(default_factory=Training)
    loss: str = "dpo(beta=0.1)"


TOY = Settings(
    sft=Training(
        lr=4e-3,
        epochs=1,
        batch_size=48,
        lr_scheduler_type="cosine(warmup_steps=30, min_lr_ratio=0.05)",
        optim="adamw(weight_decay=0.01)",
        micro_batch_tokens=1 << 16,
    ),
    math_sft=Training(
        lr=4e-3,
        epochs=4,
        batch_size=32,
        lr_scheduler_type="cosine(warmup_steps=30, min_lr_ratio=0.05)",
        optim="adamw(weight_decay=0.01)",
        micro_batch_tokens=1 << 16,
    ),
    reward=Training(lr=1e-3, epochs=6, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16),
    online=Training(lr=3e-4, batch_size=32, lr_scheduler_type="constant(warmup_steps=5)", micro_batch_tokens=1 << 16),
)
