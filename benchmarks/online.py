"""A strictly on-policy DPO step: `pyrite online` against trl's `OnlineDPOTrainer`, real loops that take turns.

A step draws two answers to each of 8 prompts, judges them, learns from the 8 pairs and updates: on our side what job
`online` does in a round, without its measurements and files. Same Llama-shaped model of random weights, same prompts
as the same token ids, 64 new tokens an answer on both sides (the tokenizer's end token lies beyond the model's
vocabulary, so none is ever drawn, and both look for it at every step), temperature 0.9, same reward (a checksum of the
answer's text: no ties, no cost), same reference, a copy of the first policy that runs in every step, fused AdamW,
clipping at 1. With bfloat16 both sides draw, score and learn under autocast. The peer's set-ups:

best     no gradient checkpointing, hence its key-value cache
default  what OnlineDPOTrainer does unless told otherwise: gradient checkpointing, which switches its cache off
+tuned   both sides under MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_=0 (glibc)

First, in float32 and with a reference of other weights, the peer draws a batch and learns from it, then ours learns
from the very same tokens, judged anew: loss and gradients are shown to be equal. --profile: our seconds by stage, both
sides' seconds of drawing, and operations.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from _profile import profile
from _setting import PAIRS, Case, Pair, cases, clock, make_model, make_pairs, options, tokenizer, words
from _turns import Turn, alone, compare, differences, finish, held
from torch import Tensor

NAME, PEER = "online", "trl 1.16.0 OnlineDPOTrainer"
NEW = 64  # tokens an answer, the peer's default; so are 8 prompts a step and the temperature
TEMPERATURE = 0.9


def talker(case: Case, *, seed: int = 0) -> tuple[Any, Any]:
    """Model and tokenizer, whose end token is one that the model does not have."""
    from transformers import AutoModelForCausalLM

    model, words_of = make_model(case, AutoModelForCausalLM, seed=seed), tokenizer(case)
    words_of.add_special_tokens({"eos_token": "<end>"})
    model.generation_config.eos_token_id = model.config.eos_token_id = words_of.eos_token_id
    return model, words_of


def scores(answers: list[str]) -> list[float]:
    return [zlib.crc32(answer.encode()) / 2**32 for answer in answers]


def reward(completions: list[str], **_: Any) -> list[float | None]:
    """The peer's judge."""
    return [*scores(completions)]


def judge(prompts: list[str], a: list[str], b: list[str]) -> Tensor:
    """Ours: the same scores as P(a beats b)."""
    first, second = (torch.tensor(scores(side), dtype=torch.float64) for side in (a, b))
    return torch.sigmoid(first - second)


def peer_trainer(case: Case, pairs: list[Pair], ref: Any, folder: str, callbacks: list | None = None) -> Any:
    """OnlineDPOTrainer over the prompts of these pairs, in order."""
    import datasets
    from transformers import PrinterCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    datasets.disable_progress_bars()
    args = OnlineDPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PAIRS,
        max_steps=len(pairs) // PAIRS,
        max_new_tokens=NEW,
        max_length=2048,
        temperature=TEMPERATURE,
        learning_rate=1e-6,
        bf16=case.precision == "bfloat16",
        gradient_checkpointing=case.peer != "best",
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model, words_of = talker(case)
    trainer = OnlineDPOTrainer(
        model=model,
        ref_model=ref,
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": words(pair.prompt)} for pair in pairs]),
        processing_class=words_of,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def peer(turn: Turn, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peer_trainer(case, make_pairs(case), None, folder, [held(turn)]).train()


@dataclass(frozen=True)
class Ours:
    """What our rounds are made of."""

    players: Any
    learner: Any

    @classmethod
    def make(cls, case: Case, *, ref: Any | None = None) -> Ours:
        from pyrite.jobs.online import RoundLearner
        from pyrite.math.losses import dpo
        from pyrite.models.policy import Policy
        from pyrite.training.loop import Training
        from pyrite.training.rollouts import Players

        policy = Policy(*talker(case))
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        start = copy.deepcopy(policy) if ref is None else Policy(ref, policy.tokenizer).to(policy.device)
        precision: Any = case.precision
        training = Training(
            lr=1e-6, batch_size=PAIRS, precision=precision, lr_scheduler_type="constant(warmup_steps=0)"
        )
        learner = RoundLearner(policy, dpo, training, rounds=case.steps + 1, restart=False)
        return cls(Players(policy, start.requires_grad_(False), precision), learner)

    def draw(self, number: int, ids: list[list[int]]) -> Any:
        rows = [{"prompt_id": f"{number}-{i}", "prompt": words(prompt)} for i, prompt in enumerate(ids)]
        drawn = self.players.draw(rows, ids, number, max_new_tokens=NEW, temperature=TEMPERATURE)
        assert bool((drawn.lengths == NEW).all()), "an answer ended early"
        return drawn

    def label(self, drawn: Any) -> list:
        from pyrite.feedback.pairing import label

        pairs = label(judge, drawn.prompts, drawn.texts, drawn.groups(), labels="hard").pairs
        assert len(pairs) == PAIRS, "a tie"
        return pairs

    def preferences(self, drawn: Any, pairs: list) -> Any:
        from pyrite.jobs.online import preferences

        return preferences(self.players, drawn, pairs, self.learner.wanted)


def prompts(pairs: list[Pair]) -> list[list[list[int]]]:
    """The prompts of every step."""
    return [[pair.prompt for pair in pairs[i : i + PAIRS]] for i in range(0, len(pairs), PAIRS)]


def learn(turn: Any, _: Case, side: Ours, batches: list[list[list[int]]], lap: Callable[[str], None]) -> None:
    """Our loop, held after every step; `lap` is told what has just been done."""
    turn.ready()
    for number, ids in enumerate(batches):
        drawn = side.draw(number, ids)
        lap("draw")
        pairs = side.label(drawn)
        lap("judge")
        prefs = side.preferences(drawn, pairs)
        lap("reference")
        side.learner.learn(prefs, number)
        lap("learn")
        turn.step()


def learner(case: Case, pairs: list[Pair]) -> tuple[Ours, list, Callable[[str], None]]:
    return Ours.make(case), prompts(pairs), lambda _: None


def ours(turn: Turn, case: Case) -> None:
    learn(turn, case, *learner(case, make_pairs(case)))


def equality(case: Case) -> dict[str, float]:
    """One batch, drawn by the peer, against a reference of other weights."""
    from pyrite.data import text
    from pyrite.data.responses import Responses
    from pyrite.training.pairs import batch_loss

    case = replace(case, precision="float32", peer="best")
    pairs = make_pairs(case)[:PAIRS]
    drawn, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, pairs, talker(case, seed=1)[0], folder)
        generate = trainer._generate
        trainer._generate = lambda *given: drawn.append(generate(*given)) or drawn[-1]
        trainer.accelerator.backward = lambda loss, **_: losses.append(loss)  # `differences` does it
        trainer.training_step(trainer.model, {"prompt": [words(pair.prompt) for pair in pairs]})
    _, _, tokens, mask, _ = drawn[0]
    assert tokens.shape == (2 * PAIRS, NEW) and bool(mask.all()), "an answer ended early"
    # prompt by prompt, where the peer has all first answers before all second ones
    tokens = tokens.cpu().unflatten(0, (2, PAIRS)).transpose(0, 1).flatten(0, 1)
    each = tokens.unflatten(0, (PAIRS, 2)).tolist()
    seen = Responses.of([(pair.prompt, both) for pair, both in zip(pairs, each, strict=True)])
    side = Ours.make(case, ref=talker(case, seed=1)[0])
    rows = [{"prompt_id": i, "prompt": words(pair.prompt)} for i, pair in enumerate(pairs)]
    seen = replace(seen, rows=rows, texts=text.decode(side.players.policy.tokenizer, seen.tokens()))
    prefs = side.preferences(seen, side.label(seen))
    policy = side.players.policy
    value, _ = batch_loss(policy, side.learner.loss, prefs)(
        policy, policy.pack(prefs.responses, prefs.groups), [*range(PAIRS)]
    )
    return differences(trainer.model, losses[0], policy.model, value / PAIRS)


class Laps:
    """In the place of a turn: seconds by stage, the first step's apart."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = defaultdict(list)

    def ready(self) -> None:
        self.begin = self.last = clock()

    def lap(self, stage: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stages[stage].append(clock() - self.last)
        self.last = clock()

    def step(self) -> None:
        self.stages["step"].append(clock() - self.begin)
        self.begin = self.last = clock()

    def medians(self) -> dict[str, float]:
        return {stage: round(statistics.median(seconds[1:]), 4) for stage, seconds in self.stages.items()}


def our_stages(case: Case) -> dict[str, float]:
    torch.set_num_threads(case.threads or torch.get_num_threads())
    laps = Laps()
    side, batches, _ = learner(case, make_pairs(case))
    learn(laps, case, side, batches, laps.lap)
    return laps.medians()


def peer_stages(case: Case) -> dict[str, float]:
    torch.set_num_threads(case.threads or torch.get_num_threads())
    laps: Any = Laps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, make_pairs(case), None, folder, [held(laps)])
        generate = trainer._generate

        def timed(*given: Any) -> Any:
            laps.last = clock()
            drawn = generate(*given)
            laps.lap("draw")
            return drawn

        trainer._generate = timed
        trainer.train()
    return laps.medians()


def profiled(case: Case) -> dict[str, Any]:
    stages = {"stages": alone(our_stages, case), "peer_stages": alone(peer_stages, case)}
    return {"peer": case.peer, **stages, **alone(profile, learn, learner, case)}


def measured(case: Case) -> dict[str, Any]:
    """The race in figures, with the tokens of the timed steps."""
    timed = prompts(make_pairs(case))[1:]
    read, drawn = sum(len(ids) for batch in timed for ids in batch), 2 * PAIRS * NEW * len(timed)
    padded = sum(2 * PAIRS * (max(map(len, batch)) + NEW) for batch in timed)
    found = compare({"peer": peer, "ours": ours}, case)
    return found | {
        "tokens": {"packed": read + drawn, "padded": padded, "answers": drawn},
        "prompts": PAIRS,
        "new": NEW,
    }


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(data=["synthetic"], precision=["float32"])
    chosen = parser.parse_args()
    asked = cases(chosen)
    if chosen.profile:
        profiles = []
        for case in asked:
            profiles.append(profiled(case))
            print(json.dumps(profiles[-1]), flush=True)
        return finish({"name": NAME, "profile": profiles}, chosen.out)
    equal, found = [], []
    for (size, vocab, data), case in {(case.size, case.vocab, case.data): case for case in asked}.items():
        equal.append({"size": size, "vocab": vocab, "data": data, **alone(equality, case)})
        print(json.dumps({"equality": equal[-1]}), flush=True)
        assert equal[-1]["loss"] <= 1e-5 and equal[-1]["gradient"] <= 1e-4, f"not the same step: {equal[-1]}"
    for case in asked:
        found.append(measured(case))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "name": NAME,
        "peer": PEER,
        "ratio": round(statistics.median(case["ratio"] for case in found), 2),
        "spread": [min(case["spread"][0] for case in found), max(case["spread"][1] for case in found)],
        "equal": max(max(case["loss"], case["gradient"]) for case in equal),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "not run on a GPU",
        "threads": chosen.threads or torch.get_num_threads(),
        "equality": equal,
        "cases": found,
    }
    finish(result, chosen.out)


if __name__ == "__main__":
    main()
