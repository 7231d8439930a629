"""A reward model's optimizer step: `fit` against trl's `RewardTrainer`, real loops that take turns.

Same Llama-shaped classifier of random weights, same 8 pairs a step as the same token ids, Bradley-Terry loss, fused
AdamW, clipping at 1, same precision (bfloat16 is autocast over float32 weights on both sides). The peer's set-ups:

best     no gradient checkpointing
default  what RewardTrainer does unless told otherwise (bfloat16 where that is asked for): gradient checkpointing
+grouped pairs of similar length in a batch, what the peer's train_sampling_strategy="group_by_length" makes
+tuned   both sides under MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_=0 (glibc)

First, in float32, loss and gradients of one batch are shown to be equal.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
from _setting import PAIRS, Case, Pair, make_model, make_pairs, tokenizer
from _turns import Turn, differences, held, run, train


def make_classifier(case: Case) -> Any:
    from transformers import AutoModelForSequenceClassification

    return make_model(case, AutoModelForSequenceClassification, num_labels=1)


def peer_trainer(case: Case, pairs: list[Pair], folder: str, callbacks: list | None = None) -> Any:
    """RewardTrainer over these pairs, in order."""
    import datasets
    from transformers import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    datasets.disable_progress_bars()
    args = RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=PAIRS,
        max_steps=len(pairs) // PAIRS,
        learning_rate=1e-6,
        bf16=case.precision == "bfloat16",
        gradient_checkpointing=case.peer == "default",
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected} for p in pairs]
    trainer = RewardTrainer(
        model=make_classifier(case),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(case),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def peer(turn: Turn, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peer_trainer(case, make_pairs(case), folder, [held(turn)]).train()


def learner(case: Case, pairs: list[Pair]) -> tuple[Any, Any, Any]:
    """Our reward model, its pairs as tokens, and the batch loss."""
    from pyrite.data.responses import Responses
    from pyrite.math.reward_losses import bradley_terry
    from pyrite.models.policy import RewardModel

    model = RewardModel(make_classifier(case), tokenizer(case))
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def loss(module: Any, batch: Any, _: list[int]) -> Any:
        chosen, rejected = module(batch).view(-1, 2).unbind(1)
        wins = (chosen > rejected).float().sum()
        return bradley_terry(chosen, rejected).sum(), {"accuracy": wins, "margin": (chosen - rejected).sum()}

    return model, Responses.of([(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]), loss


def ours(turn: Turn, case: Case) -> None:
    train(turn, case, *learner(case, make_pairs(case)))


def equality(case: Case) -> dict[str, float]:
    """One batch on both sides."""
    case = replace(case, precision="float32", peer="best")
    pairs = make_pairs(case)[:PAIRS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, pairs, folder)
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    model, rows, of = learner(case, pairs)
    value, _ = of(model, model.pack(rows), list(range(PAIRS)))
    return differences(trainer.model, loss, model.model, value / PAIRS)


if __name__ == "__main__":
    run("reward", "trl 1.16.0 RewardTrainer", __doc__, {"peer": peer, "ours": ours}, equality, learner)
