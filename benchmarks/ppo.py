"""A PPO step: our job `ppo` against trl's `PPOTrainer`, real loops that take turns.

A step draws an answer to each of 16 prompts, scores them, reads reference and critic, estimates advantages (GAE) and
updates policy and critic 8 times: 4 passes, 2 minibatches of 8 answers. Same Llama-shaped models of random weights:
policy; reference, a copy of the first policy; critic and reward model of the policy's size, one each. Same prompts as
the same token ids; 64 new tokens an answer (the tokenizer's end token lies beyond the model's vocabulary, so none is
ever drawn, and both look for it at every step); temperature 1, float32, AdamW, no gradient checkpointing, and no
clipping of gradients, which the peer does not do. Our side leaves out measurements and files; as in the job, its
reward model reads texts, where the peer's reads the drawn tokens. --critic shared: ours with a head on the policy's
trunk, the job's default, which the peer does not have.

The last trl with PPO is 1.12 (1.13 has none). It runs beside transformers 5.23 and torch 2.13, but not beside another
trl, so it wants an environment of its own, with the same torch, and --peer-python, its interpreter:

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    python benchmarks/ppo.py --quick --peer-python peer/bin/python

First, against a reference of other weights, the peer takes a step of two full batches at a rate at which the clip
holds tokens back; ours takes the same from the very same tokens. Shown to be equal: GAE's advantages, the gradients of
policy and critic in the first batch, and the losses of both batches. The peer whitens advantages with n − 1 in the
denominator and we with n, so that here ours learns from the peer's whitened ones. --profile: our seconds by stage.
--quick: one pass, two timed steps.
"""

from __future__ import annotations

import copy
import io
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _setting import Case, cases, make_model, options, synthetic, words
from _turns import Turn, _run, alone, compare, finish, held
from online import Laps
from torch import Tensor

NAME = "ppo"
ANSWERS, MINIBATCHES, PASSES = 16, 2, 4  # of a step: answers, updates a pass, passes
NEW = 64  # tokens an answer
LR, BETA = 1e-6, 0.05
COMPARED = ("advantages", "gradient", "loss")
Batches = list[list[list[int]]]  # the prompts of every step


@dataclass(frozen=True)
class Updates:
    """What a step learns by."""

    passes: int = PASSES
    minibatches: int = MINIBATCHES
    lr: float = LR


QUICK = Updates(passes=1)
FULL = Updates(passes=2, minibatches=1, lr=1e-3)  # for equality: the order of the answers does not matter


def batches(case: Case) -> Batches:
    """A warm-up step and the timed ones, in the order in which both sides see them."""
    asked = [pair.prompt for pair in synthetic(case, ANSWERS * (case.steps + 1))]
    return [asked[i : i + ANSWERS] for i in range(0, len(asked), ANSWERS)]


def tokenizer(case: Case) -> Any:
    """Words w0, w1, ... are the ids; end and pad are tokens that the model does not have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(case.vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left")
    made.add_special_tokens({"eos_token": "<end>", "pad_token": "<pad>"})
    return made


def talker(case: Case, *, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    model = make_model(case, AutoModelForCausalLM, seed=seed)
    model.generation_config.eos_token_id = model.config.eos_token_id = case.vocab
    return model


def classifier(case: Case, *, seed: int) -> Any:
    """Critic or reward model: one output."""
    from transformers import AutoModelForSequenceClassification

    return make_model(case, AutoModelForSequenceClassification, seed=seed, num_labels=1)


# The peer, in an environment of its own ---------------------------------------------------------------------------


def peer_trainer(case: Case, asked: Batches, ref: Any, folder: str, by: Updates, callbacks: list | None = None) -> Any:
    """PPOTrainer over these prompts, in order."""
    import datasets
    from transformers import PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    draws: dict[str, Any] = {"response_length": NEW, "temperature": 1.0, "stop_token": "eos"}
    batch = {"per_device_train_batch_size": ANSWERS, "total_episodes": ANSWERS * len(asked)}
    learns = {"num_mini_batches": by.minibatches, "num_ppo_epochs": by.passes, "learning_rate": by.lr}
    fixed = {"lr_scheduler_type": "constant", "kl_coef": BETA, "vf_coef": 1.0}  # the critic's loss counts as in ours
    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available()}
    silent = {"num_sample_generations": 0, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = PPOConfig(output_dir=folder, **draws, **batch, **learns, **fixed, **plain, **silent)
    rows = datasets.Dataset.from_list([{"input_ids": ids} for batch in asked for ids in batch])
    models = {"model": talker(case), "value_model": classifier(case, seed=2), "reward_model": classifier(case, seed=3)}
    sets = {"train_dataset": rows, "eval_dataset": rows}
    trainer = PPOTrainer(args, tokenizer(case), ref_model=ref, **models, **sets, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.dataloader = [trainer.data_collator([{"input_ids": ids} for ids in batch]) for batch in asked]
    return trainer


def peer_loop(by: Updates, turn: Turn, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peer_trainer(case, batches(case), None, folder, by, [held(turn)]).train()


def recorded(by: Updates, case: Case) -> dict[str, Any]:
    """A step of the peer against a reference of other weights: its tokens, advantages, losses and first gradients."""
    from trl.experimental.ppo import ppo_trainer  # type: ignore[import-not-found]

    seen: dict[str, Any] = {"losses": []}
    generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def drawing(*given: Any) -> Any:
        drawn = generate(*given)
        seen["tokens"] = drawn[0][:, -NEW:].clone()
        return drawn

    def whitening(values: Tensor, mask: Tensor) -> Tensor:
        assert bool(mask.all()), "an answer ended early"
        seen["advantages"], seen["whitened"] = values.clone(), whiten(values, mask)
        return seen["whitened"].clone()

    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, batches(case)[:1], talker(case, seed=1), folder, by)
        backward = trainer.accelerator.backward

        def learning(loss: Tensor) -> None:
            seen["losses"].append(loss.item())
            backward(loss)
            if "gradients" not in seen:
                seen["gradients"] = gradients({"policy": trainer.model.policy, "critic": trainer.model.value_model})

        trainer.accelerator.backward = learning
        with patch.multiple(ppo_trainer, batch_generation=drawing, masked_whiten=whitening):
            trainer.train()
    return seen


def gradients(models: dict[str, Any]) -> dict[str, Tensor]:
    named = ((f"{side}.{name}", p.grad) for side, model in models.items() for name, p in model.named_parameters())
    return {name: gradient.clone() for name, gradient in named if gradient is not None}


def answer(address: str) -> None:
    """What runs in the peer's environment: one call of those above, for the process at the other end of the line."""
    with Client(address, family="AF_UNIX") as line:
        call, case, by = line.recv()
        if call == "loop":
            return _run(partial(peer_loop, Updates(**by)), line, case)
        file = io.BytesIO()
        torch.save(recorded(Updates(**by), case), file)
        line.send(file.getvalue())


@contextmanager
def other(python: str, call: str, case: Case, by: Updates) -> Iterator[Connection]:
    """A line to a process of the peer's interpreter that answers a call."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "line")
        run = [python, "-W", "ignore", "-c", f"import ppo; ppo.answer({address!r})"]
        env = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": ""}
        start = partial(subprocess.Popen, run, cwd=Path(__file__).parent, env=env, stdout=subprocess.DEVNULL)
        with Listener(address, family="AF_UNIX") as listener, start(), listener.accept() as line:
            line.send((call, case, asdict(by)))  # of plain values: this module has another name there
            yield line


def peer(python: str, by: Updates, turn: Turn, case: Case) -> None:
    """Hands on what the peer's process reports, its peak memory last, and gives it its turns."""
    with other(python, "loop", case, by) as line:
        while True:
            report = line.recv()
            turn.line.send(report)
            if isinstance(report, dict) and "peak" in report:
                return
            line.send(turn.line.recv())


# Ours -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """What our steps are made of."""

    players: Any
    rewards: list
    learners: Any

    @classmethod
    def make(cls, case: Case, critic: str, by: Updates, *, ref: Any | None = None) -> Ours:
        from pyrite.models.policy import Policy, RewardEnsemble, RewardModel, ValueModel, WithValue
        from pyrite.training.loop import Learner, Training
        from pyrite.training.ppo import Critic, Learners, Reward
        from pyrite.training.rollouts import Players

        reads = tokenizer(case)
        same: dict[str, Any] = {
            "lr": by.lr,
            "optim": "adamw(betas=(0.9, 0.999))",
            "lr_scheduler_type": "constant(warmup_steps=0)",
            "max_grad_norm": 1e9,
        }
        training = Training(batch_size=ANSWERS // by.minibatches, epochs=by.passes, **same)
        rest: dict[str, Any] = {"by": Critic(), "steps": case.steps + 1, "clip": 0.2, "seed": 0}
        policy = Policy(talker(case), reads)
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        start = copy.deepcopy(policy) if ref is None else Policy(ref, reads).to(policy.device)
        members = RewardEnsemble([RewardModel(classifier(case, seed=3), reads).to(policy.device)])
        reward = Reward("model", members.standardized)
        if critic == "shared":
            both = WithValue(policy)
            learners = Learners(Learner(both, training), both, None, **rest)
        else:
            value = ValueModel(classifier(case, seed=2), reads).to(policy.device)
            learners = Learners(Learner(policy, training), value, Learner(value, training), **rest)
        return cls(Players(policy, start.requires_grad_(False)), [reward], learners)

    def collect(self, number: int, ids: list[list[int]]) -> Any:
        from pyrite.training.ppo import collect

        rows = [{"prompt_id": f"{number}-{i}", "prompt": words(prompt)} for i, prompt in enumerate(ids)]
        options: dict[str, Any] = {"k": 1, "max_new_tokens": NEW, "seed": 0, "critic": self.learners.critic}
        drawn = collect(self.players, self.rewards, rows, ids, number, **options)
        assert bool(drawn.mask.all()) and drawn.mask.shape == (ANSWERS, NEW), "an answer ended early"
        return drawn

    def advantages(self, drawn: Any) -> Any:
        """Not yet whitened."""
        from pyrite.math.policy_gradient import token_rewards
        from pyrite.training.ppo import estimates

        score = drawn.scores.total.float()
        shaped = token_rewards(score, drawn.logps.tokens, drawn.ref.tokens, drawn.mask, beta=BETA)
        return estimates(drawn, shaped)

    def learn(self, drawn: Any, made: Any, number: int) -> None:
        from pyrite.math.policy_gradient import whiten

        made = made._replace(advantages=whiten(made.advantages, drawn.mask))
        self.learners.learn(drawn, made, number)


def our_loop(turn: Any, case: Case, critic: str, by: Updates, lap: Callable[[str], None]) -> None:
    """Held after every step; `lap` is told what has just been done."""
    side = Ours.make(case, critic, by)
    turn.ready()
    for number, ids in enumerate(batches(case)):
        drawn = side.collect(number, ids)
        lap("collect")
        made = side.advantages(drawn)
        lap("advantages")
        side.learn(drawn, made, number)
        lap("learn")
        turn.step()


def ours(critic: str, by: Updates, turn: Turn, case: Case) -> None:
    our_loop(turn, case, critic, by, lambda _: None)


def stages(case: Case, critic: str, by: Updates) -> dict[str, float]:
    torch.set_num_threads(case.threads or torch.get_num_threads())
    laps = Laps()
    our_loop(laps, case, critic, by, laps.lap)
    return laps.medians()


# Both -------------------------------------------------------------------------------------------------------------


def equality(case: Case, python: str) -> dict[str, Any]:
    """The peer's recorded step, taken by ours; differences relative to the peer's values, of losses beyond 1."""
    from pyrite.data import text
    from pyrite.data.responses import Responses
    from pyrite.math.policy_gradient import Estimates
    from pyrite.models.forward import score
    from pyrite.training.ppo import batch_loss
    from pyrite.training.rollouts import Players

    with other(python, "recorded", case, FULL) as line:
        theirs = torch.load(io.BytesIO(line.recv()))
    prompts = batches(case)[0]
    told = Responses.of([(ids, [tokens]) for ids, tokens in zip(prompts, theirs["tokens"].tolist(), strict=True)])
    side = Ours.make(case, "own", FULL, ref=talker(case, seed=1))
    texts = text.decode(side.players.policy.tokenizer, told.tokens())
    rows = [{"prompt_id": str(i), "prompt": words(prompt)} for i, prompt in enumerate(prompts)]
    read = score(side.players.policy, told, told.groups())
    told = replace(told, rows=rows, texts=texts, finished=told.finished & False, logps=read)
    with patch.object(Players, "draw", lambda *_, **__: told):
        drawn = side.collect(0, prompts)
    made = side.advantages(drawn)
    learned = Estimates(theirs["whitened"].cpu(), made.returns)
    learners = (side.learners.policy, side.learners.value)
    losses, clipped, mine = [], 0.0, {}
    for _ in range(FULL.passes):
        both = [
            batch_loss(it.model, drawn, learned)(it.model, it.model.pack(drawn.responses), [*range(ANSWERS)])
            for it in learners
        ]
        loss = (both[0][0] + both[1][0]) / (ANSWERS * NEW)
        loss.backward()
        losses.append(loss.item())
        clipped = both[0][1]["clip_fraction"].item() / (ANSWERS * NEW)
        mine = mine or gradients({"policy": learners[0].model.model, "critic": learners[1].model.model})
        for learner in learners:
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=True)
    assert mine.keys() == theirs["gradients"].keys(), "gradients of other parameters"
    gaps, norms = zip(*((mine[n] - g, g) for n, g in theirs["gradients"].items()), strict=True)
    return {
        "losses": [round(loss, 6) for loss in theirs["losses"]],
        "clip_fraction": round(clipped, 4),
        "advantages": apart([made.advantages - theirs["advantages"].cpu()], [theirs["advantages"]]),
        "gradient": apart(gaps, norms),
        "loss": max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, theirs["losses"], strict=True)),
    }


def apart(gaps: Any, values: Any) -> float:
    gap, norm = (torch.stack([x.norm() for x in some]).norm().item() for some in (gaps, values))
    return gap / norm


def measured(case: Case, python: str, critic: str, by: Updates) -> dict[str, Any]:
    """The race in figures, with the tokens of the timed steps."""
    timed = batches(case)[1:]
    drawn = ANSWERS * NEW * len(timed)
    packed = drawn + sum(len(ids) for batch in timed for ids in batch)
    padded = sum(ANSWERS * (max(map(len, batch)) + NEW) for batch in timed)
    found = compare({"peer": partial(peer, python, by), "ours": partial(ours, critic, by)}, case)
    found["tokens"] = {"packed": packed, "padded": padded, "answers": drawn}
    return found | {"critic": critic, "answers": ANSWERS, "new": NEW, "updates": by.passes * by.minibatches}


def version(python: str) -> str:
    """trl's, of the peer's environment, which must have PPO."""
    asks = "import trl, trl.experimental.ppo as ppo; assert ppo.PPOTrainer; print(trl.__version__)"
    done = subprocess.run([python, "-W", "ignore", "-c", asks], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--peer-python {python}: no trl with PPO there; give the interpreter of one with trl==1.12.*")
    return done.stdout.split()[-1]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--peer-python", required=True, help="interpreter of an environment with trl==1.12.*")
    parser.add_argument("--critic", choices=["own", "shared"], default="own", help="ours; the peer has its own")
    parser.set_defaults(sizes=["6M"], vocab=[4096], data=["synthetic"], precision=["float32"])
    chosen = parser.parse_args()
    if (chosen.data, chosen.precision) != (["synthetic"], ["float32"]):
        raise SystemExit("give --data synthetic --precision float32, or neither: there is nothing else here")
    python = str(Path(chosen.peer_python).absolute())
    name, asked, by = f"trl {version(python)} PPOTrainer", cases(chosen), Updates()
    if chosen.quick:
        asked, by = [replace(case, steps=2) for case in asked], QUICK
    if chosen.profile:
        profiles = [{"size": c.size, "vocab": c.vocab, **alone(stages, c, chosen.critic, by)} for c in asked]
        return finish({"name": NAME, "profile": profiles}, chosen.out)
    equal, found = [], []
    for (size, vocab), case in {(case.size, case.vocab): case for case in asked}.items():
        equal.append({"size": size, "vocab": vocab, **alone(equality, case, python)})
        print(json.dumps({"equality": equal[-1]}), flush=True)
        assert max(equal[-1][what] for what in COMPARED) <= 1e-4, f"not the same step: {equal[-1]}"
    for case in asked:
        found.append(measured(case, python, chosen.critic, by))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "name": NAME,
        "peer": name,
        "ratio": round(statistics.median(case["ratio"] for case in found), 2),
        "spread": [min(case["spread"][0] for case in found), max(case["spread"][1] for case in found)],
        "equal": max(case[what] for case in equal for what in COMPARED),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "not run on a GPU",
        "threads": chosen.threads or torch.get_num_threads(),
        "equality": equal,
        "cases": found,
    }
    finish(result, chosen.out)


if __name__ == "__main__":
    main()
