"""What is run at each scale: data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pyrite.recipes import toy
from pyrite.training.loop import Training

Scale = Literal["toy", "toy_wide", "small", "paper"]


@dataclass(frozen=True)
class Optimizing:
    """Policies trained by PPO against the reward models: one for every label noise, KL strength and objective."""

    betas: tuple[tuple[float, tuple[float, ...]], ...] = ((0.25, (0.0, 0.05)),)
    """Label noise, and the KL strengths tried at it."""
    singles: int = 1
    """Members that are optimized against alone."""
    prompts_per_step: int = 64
    steps: int = 60
    measure_every: int = 6
    eval_k: int = 4
    """Answers to each pool prompt at a measurement."""
    missing_eos: float = 3.0
    """Taken off the score of an answer that was cut, standard deviations of the reward model."""
    training: Training = field(default_factory=lambda: Training(lr=1e-6, epochs=4, batch_size=32, max_grad_norm=1.0))


@dataclass(frozen=True)
class Settings:
    """One chain: SFT, candidates, labels, reward models at every noise level, best-of-n, PPO."""

    gold: str
    model: str = ""
    """Folder or Hub name; the toy world makes its own model and data."""
    reward_model: str = ""
    """What reward models start from; the SFT model by default."""
    toy_demos: int = 24_000
    """Demonstrations of the toy world; 12,000 are too few for it to keep to its topic."""
    demos: str = ""
    demo_columns: str | None = None
    pair_prompts: str = ""
    pool_prompts: str = ""
    prompt_columns: str | None = None
    sft: Training = field(default_factory=Training)
    pair_limit: int | None = None
    """Prompts from which pairs are drawn; all by default."""
    pair_answers: int = 2
    """Answers to each of them; every two make a pair."""
    pair_top_p: float = 1.0
    """Nucleus from which the answers of a pair are sampled."""
    pool: int = 32
    """Prompts of the best-of-n pool."""
    answers: int = 1056
    """Answers to each of them, some of which will be cut and left out."""
    pool_top_p: float = 1.0
    max_new_tokens: int = 64
    noise: tuple[float, ...] = (0.25, 0.0)
    members: int = 5
    reward: Training = field(default_factory=Training)
    head_std: float = 0.02
    objectives: tuple[str, ...] = ("mean()", "wco()", "uwo(weight=0.5)")
    n: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    ppo: Optimizing = Optimizing()
    shares: tuple[float, ...] = ()
    """Shares of the pairs on which further reward models are trained, at the first level of noise."""
    sizes: tuple[toy.Size, ...] = ()
    """Toy sizes of further reward models, tuned on the demonstrations first, at the first level of noise."""


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
    pair_limit=760,  # about 2,000 training pairs once ties and held-out prompts are gone
    pair_answers=6,
    pair_top_p=0.9,
    reward=Training(lr=5e-4, epochs=2, batch_size=32, optim="adamw(weight_decay=0.01)", micro_batch_tokens=1 << 16),
    head_std=0.1,
    objectives=("mean()", "wco()", "uwo(weight=1.0)"),
    ppo=Optimizing(
        training=Training(lr=3e-4, epochs=2, batch_size=32, lr_scheduler_type="constant()", micro_batch_tokens=1 << 16)
    ),
)

# What a whole study adds: more KL strengths, fewer pairs, larger reward models.
TOY_WIDE = replace(
    TOY,
    ppo=replace(TOY.ppo, betas=((0.25, (0.0, 0.05, 0.2)),)),
    shares=(0.25, 0.5),
    sizes=("base",),
)

# Neither of the following has been run by us: they need a GPU and the Hub.
SMALL = Settings(
    gold="reward_model(path='Skywork/Skywork-Reward-V2-Qwen3-0.6B')",
    model="HuggingFaceTB/SmolLM2-135M",
    demos="tatsu-lab/alpaca",
    pair_prompts="tatsu-lab/alpaca",
    pool_prompts="tatsu-lab/alpaca_eval",
    prompt_columns="prompt=instruction",
    sft=Training(lr=2e-5, epochs=1, batch_size=64, lr_scheduler_type="cosine(warmup_steps=50)", precision="bfloat16"),
    pair_limit=10_000,
    pool=200,
    answers=1100,
    max_new_tokens=256,
    reward=Training(
        lr=2e-5, epochs=2, batch_size=64, lr_scheduler_type="cosine(warmup_steps=50)", precision="bfloat16"
    ),
    ppo=Optimizing(
        prompts_per_step=256, steps=100, training=Training(lr=1e-6, epochs=4, batch_size=64, precision="bfloat16")
    ),
)

# Models and data as their authors published them (sections 3 and 4 of arXiv:2310.02743).
PAPER = Settings(
    gold="reward_model(path='alpaca_farm_models/reward-model-human')",
    model="EleutherAI/pythia-1.4b",
    reward_model="tlc4418/pythia_70m_sft",
    demos="tatsu-lab/alpaca_farm:sft",
    pair_prompts="tatsu-lab/alpaca_farm:preference",
    pool_prompts="tatsu-lab/alpaca_farm:val",
    sft=Training(
        lr=8e-6,
        epochs=3,
        batch_size=32,
        lr_scheduler_type="linear(warmup_steps=10)",
        max_grad_norm=2.0,
        optim="adamw(betas=(0.9, 0.95))",
    ),
    pair_limit=46_000,
    pair_top_p=0.9,
    pool=1000,
    answers=12_600,
    pool_top_p=0.9,
    max_new_tokens=256,
    reward=Training(
        lr=1e-5,
        epochs=5,
        batch_size=32,
        lr_scheduler_type="linear(warmup_steps=50)",
        max_grad_norm=2.0,
        precision="bfloat16",
    ),
    n=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192, 12_500),
    ppo=Optimizing(  # table 3 and section 4: 3,000 optimizer steps on 256 answers at a time
        betas=((0.25, (0.0, 0.01, 0.1, 0.2)), (0.0, (0.0, 0.01, 0.1, 0.2))),
        singles=5,
        prompts_per_step=256,
        steps=94,
        measure_every=3,
        eval_k=1,
        missing_eos=0.0,
        training=Training(
            lr=1e-6, epochs=4, batch_size=32, optim="adamw(betas=(0.9, 0.95), weight_decay=1e-6)", precision="bfloat16"
        ),
    ),
)
