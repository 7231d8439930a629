"""Two real training loops that take turns.

Each side runs its own loop in a process of its own and is held after every optimizer step until it is its turn
again, so both meet the same neighbors and a process's peak memory is that side's alone.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _profile import profile
from _setting import PAIRS, Case, cases, clock, make_pairs, options, tokens

QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
# glibc: freed memory stays with the process, large blocks included, instead of being mapped and cleared anew
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "1099511627776", "MALLOC_MMAP_MAX_": "0"}


class Turn:
    """A side's end of the line: `ready` before the first step, `step` after each one, both hold the side."""

    def __init__(self, line: Connection) -> None:
        self.line = line

    def ready(self) -> None:
        self.line.send({"before": memory("VmRSS")})
        self.line.recv()
        self.begin = clock()

    def step(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.line.send(clock() - self.begin)
        self.line.recv()
        self.begin = clock()


Side = Callable[[Turn, Case], None]


def race(sides: dict[str, Side], case: Case) -> dict[str, dict[str, Any]]:
    """For each side its seconds a step, MiB before the first step and at the peak; the first step is not counted."""
    lines, children = {}, []
    context = multiprocessing.get_context("spawn")
    with environment(QUIET | (TUNED if case.tuned else {})):
        for name, side in sides.items():
            lines[name], theirs = context.Pipe()
            children.append(context.Process(target=_run, args=(side, theirs, case), daemon=True))
            children[-1].start()
            theirs.close()  # so that a dead side is noticed
    seen: dict[str, dict[str, Any]] = {name: {**line.recv(), "seconds": []} for name, line in lines.items()}
    for _ in range(case.steps + 1):
        for name, line in lines.items():
            line.send("go")
            seen[name]["seconds"].append(line.recv())
    for name, line in lines.items():
        line.send("go")
        seen[name] |= line.recv()
        seen[name]["seconds"] = seen[name]["seconds"][1:]
    for child in children:
        child.join()
    return seen


def _run(side: Side, line: Connection, case: Case) -> None:
    if case.threads:
        torch.set_num_threads(case.threads)
    side(Turn(line), case)
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory("VmHWM")
    line.send({"peak": peak})


def train(turn: Turn, case: Case, model: Any, read: Any, loss: Any) -> None:
    """Our side: `pyrite.training.loop.fit` over the pairs in this order, held after every step."""
    from pyrite.core.runs import Run
    from pyrite.training.loop import Logging, Training, fit, order

    pairs = read.groups()
    ordered = [0] * len(pairs)
    for place, index in enumerate(order(len(pairs), 0, seed=0)):
        ordered[index] = place  # the loop visits pair `index` at `place`

    def of(model: Any, batch: Any, indices: list[int]) -> Any:
        return loss(model, batch, [ordered[i] for i in indices])

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # no lines of progress
        run = Run(Path(folder), {}, {})
        run.open()
        turn.ready()
        fit(
            model,
            read,
            [pairs[place] for place in ordered],
            of,
            training=Training(
                lr=1e-6, batch_size=PAIRS, precision=case.precision, lr_scheduler_type="constant(warmup_steps=0)"
            ),
            logging=Logging(),
            seed=0,
            run=run,
            label="ours",
            watch=lambda _: turn.step(),
        )


def differences(peer: Any, peer_loss: torch.Tensor, ours: Any, our_loss: torch.Tensor) -> dict[str, float]:
    """How far two losses of one batch (relative beyond 1: the peer sums in float32) and their gradients are apart."""
    peer_loss.backward()
    our_loss.backward()
    theirs, mine = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (peer, ours))
    assert theirs.keys() == mine.keys(), f"gradients of other parameters: {sorted(theirs.keys() ^ mine.keys())}"
    apart = {name: ((mine[name] - g).norm(), g.norm()) for name, g in theirs.items()}
    gap, norm = (torch.stack(values).norm() for values in zip(*apart.values(), strict=True))
    worst = max((gap / norm.clamp(min=1e-12)).item() for gap, norm in apart.values())
    value = peer_loss.item()
    loss = abs(our_loss.item() - value) / max(1.0, abs(value))
    return {"loss_value": value, "loss": loss, "gradient": (gap / norm).item(), "worst_tensor": worst}


def held(turn: Turn) -> Any:
    """The peer's side: a callback that holds transformers' loop after every step."""
    from transformers import TrainerCallback

    class Held(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.ready()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.step()

    return Held()


def alone(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a process of its own."""
    with environment(QUIET), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def memory(field: str) -> float:
    """MiB of this process, from Linux; NaN elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else math.nan


def compare(sides: dict[str, Side], case: Case) -> dict[str, Any]:
    """The race in figures: peer against ours."""
    seen = race(sides, case)
    peer, ours = seen["peer"], seen["ours"]
    ratios = [theirs / mine for theirs, mine in zip(peer["seconds"], ours["seconds"], strict=True)]
    settings = {name: value for name, value in asdict(case).items() if name not in ("threads", "seed")}
    return {
        **settings,
        "ratio": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "whole_ratio": round(sum(peer["seconds"]) / sum(ours["seconds"]), 2),
        "seconds": round(statistics.median(ours["seconds"]), 4),
        "peer_seconds": round(statistics.median(peer["seconds"]), 4),
        "peak_mib": round(ours["peak"]),
        "peer_peak_mib": round(peer["peak"]),
        "memory_ratio": round(ours["peak"] / peer["peak"], 2),
        "before_mib": round(ours["before"]),
        "peer_before_mib": round(peer["before"]),
        "tokens": tokens(make_pairs(case)),
    }


def run(
    name: str, peer: str, about: str | None, sides: dict[str, Side], equality: Callable, learner: Callable[..., Any]
) -> None:
    """The command line of a benchmark: first that both compute the same, then how fast and in how much memory."""
    chosen = options(about).parse_args()
    asked = cases(chosen)
    if chosen.profile:
        profiles = []
        for case in asked:
            profiles.append(alone(profile, train, learner, case))
            print(json.dumps(profiles[-1]), flush=True)
        return finish({"name": name, "profile": profiles}, chosen.out)
    shapes = {(case.size, case.vocab, case.data): case for case in asked}
    equal = []
    for (size, vocab, data), case in shapes.items():
        equal.append({"size": size, "vocab": vocab, "data": data, **alone(equality, case)})
        print(json.dumps({"equality": equal[-1]}), flush=True)
        close = equal[-1]["loss"] <= 1e-5 and equal[-1]["gradient"] <= 1e-4
        assert close, f"not the same loss: {equal[-1]}"
    found = []
    for case in asked:
        found.append(compare(sides, case))
        print(json.dumps(found[-1]), flush=True)
    finish(
        {
            "name": name,
            "peer": peer,
            "ratio": round(statistics.median(case["ratio"] for case in found), 2),
            "spread": [min(case["spread"][0] for case in found), max(case["spread"][1] for case in found)],
            "equal": max(max(case["loss"], case["gradient"]) for case in equal),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "not run on a GPU",
            "threads": chosen.threads or torch.get_num_threads(),
            "equality": equal,
            "cases": found,
        },
        chosen.out,
    )


def finish(result: dict[str, Any], out: Path | None) -> None:
    """The JSON, on the last line and in a file."""
    line = json.dumps(result)
    if out:
        out.write_text(line + "\n")
    print(line)
