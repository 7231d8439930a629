"""A DPO optimizer step: `pyrite.training.loop.fit` against trl's `DPOTrainer`, real loops that take turns.

Same Llama-shaped model of random weights, same 8 pairs a step as the same token ids, fused AdamW, clipping at 1,
same precision (bfloat16 is autocast over float32 weights on both sides). The peer's set-ups:

best     precomputed reference, no gradient checkpointing; ours reads the same precomputed reference
default  what DPOTrainer does unless told otherwise (bfloat16 where that is asked for): gradient checkpointing and the
         reference model run in every step; ours runs its reference in every step too, without checkpointing
+grouped pairs of similar length in a batch, what the peer's train_sampling_strategy="group_by_length" makes
+tuned   both sides under MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_=0 (glibc)

padding_free, the peer's own packing, is switched off in this version: it warns and pads. Its log-probabilities are
chunked over the vocabulary everywhere; only where Triton runs does it leave out prompts and pads.
First, in float32 and with another reference, loss and gradients of one batch are shown to be equal.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from typing import Any

import torch
from _setting import PAIRS, Case, Pair, make_model, make_pairs, tokenizer, words
from _turns import Turn, differences, held, run, train


def peer_trainer(case: Case, pairs: list[Pair], ref: Any, folder: str, callbacks: list | None = None) -> Any:
    """DPOTrainer over these pairs, in order."""
    import datasets
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    best = case.peer == "best"
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PAIRS,
        max_steps=len(pairs) // PAIRS,
        learning_rate=1e-6,
        bf16=case.precision == "bfloat16",
        precompute_ref_log_probs=best,
        gradient_checkpointing=not best,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    texts = [[words(ids) for ids in pair] for pair in pairs]
    rows = [{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in texts]
    trainer = DPOTrainer(
        model=make_model(case, AutoModelForCausalLM),
        ref_model=ref,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(case),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def peer(turn: Turn, case: Case) -> None:
    from transformers import AutoModelForCausalLM

    ref = None if case.peer == "best" else make_model(case, AutoModelForCausalLM)
    with tempfile.TemporaryDirectory() as folder:
        peer_trainer(case, make_pairs(case), ref, folder, [held(turn)]).train()


def learner(case: Case, pairs: list[Pair], ref: Any | None = None) -> tuple[Any, Any, Any]:
    """Our policy, pairs as tokens, and batch loss; `ref` runs along, or once and beforehand as the peer's does."""
    from transformers import AutoModelForCausalLM

    from pyrite.data.responses import Responses
    from pyrite.math.losses import dpo
    from pyrite.models.policy import Policy
    from pyrite.training.pairs import Preferences, batch_loss

    words_of = tokenizer(case)
    policy = Policy(make_model(case, AutoModelForCausalLM), words_of)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    read = Responses.of([(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs])
    places = torch.arange(len(read))
    prefs = Preferences(read, places[::2], places[1::2])
    scorer = policy if ref is None else Policy(ref, words_of).to(policy.device)
    if case.peer == "default":
        live = copy.deepcopy(policy).eval() if ref is None else scorer
        return policy, read, batch_loss(policy, dpo, prefs, live=live)
    return policy, read, batch_loss(policy, dpo, replace(prefs, ref=scored(scorer, read)))


@torch.no_grad()
def scored(policy: Any, read: Any) -> Any:
    """Log-probabilities of all answers, in order."""
    from pyrite.math.logps import Logps

    pairs = read.groups()
    parts = [policy.logps(policy.pack(read, pairs[i : i + PAIRS])) for i in range(0, len(pairs), PAIRS)]
    return Logps.from_sums(*(torch.cat([getattr(p, name).cpu() for p in parts]) for name in ("sum", "length")))


def ours(turn: Turn, case: Case) -> None:
    train(turn, case, *learner(case, make_pairs(case)))


def equality(case: Case) -> dict[str, float]:
    """One batch against a reference of other weights."""
    from transformers import AutoModelForCausalLM

    case = replace(case, precision="float32", peer="best")
    pairs = make_pairs(case)[:PAIRS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, pairs, make_model(case, AutoModelForCausalLM, seed=1), folder)
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    policy, read, of = learner(case, pairs, make_model(case, AutoModelForCausalLM, seed=1))
    value, _ = of(policy, policy.pack(read), list(range(PAIRS)))
    return differences(trainer.model, loss, policy.model, value / PAIRS)


if __name__ == "__main__":
    run("dpo", "trl 1.16.0 DPOTrainer", __doc__, {"peer": peer, "ours": ours}, equality, learner)
