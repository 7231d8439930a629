"""Scoring with 5 reward models, heads on one frozen trunk or LoRA members on one base, against one reward model.

30 M parameters (6 M with --quick), float32, two answers a prompt. The peer is transformers: 5 classifiers one by one,
padded batches of texts sorted by length. Time is measured in turns in one process, peak memory in a process for each
setting (`memory`: peak against that of one such member; `memory_beyond`: the same without what the libraries take).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _setting import PAIRS, Case, clock, make_model, make_pairs, tokenizer, words
from _turns import alone, finish, memory

MEMBERS, BATCH = 5, 32
KINDS = {"head": "head", "heads": "head", "lora": "lora", "loras": "lora"}  # each beside what it is compared with


def write_members(folder: Path, case: Case) -> None:
    """Runs of one member and of five, of heads and of adapters, as `pyrite reward` leaves them."""
    from transformers import AutoModelForSequenceClassification

    from pyrite.models.loading import Lora
    from pyrite.models.policy import RewardModel

    base = folder / "base"
    make_model(case, AutoModelForSequenceClassification, num_labels=1).save_pretrained(base)
    tokenizer(case).save_pretrained(base)
    for kind, one in KINDS.items():
        members, lora = MEMBERS if kind != one else 1, Lora(r=8) if "lora" in kind else None
        for member in range(members):
            model = RewardModel.load(base, head_seed=member, lora=lora)
            generator = torch.Generator().manual_seed(member)
            for parameter in model.parameters() if lora else ():
                if parameter.requires_grad:
                    parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
            model.save(folder / kind / f"member_{member}")
        (folder / kind / "done.json").write_text("{}")


def make_texts(case: Case) -> tuple[list[str], list[str]]:
    """Two answers a prompt."""
    pairs = make_pairs(case)[: 2 * PAIRS]
    prompts = [words(pair.prompt) for pair in pairs for _ in range(2)]
    return prompts, [" " + words(answer[:-1]) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def stock(models: list[Any], encoded: list[list[int]]) -> torch.Tensor:
    """transformers' own scores, (E, N)."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    out = torch.empty(len(models), len(encoded))
    for begin in range(0, len(order), BATCH):
        some = order[begin : begin + BATCH]
        width = len(encoded[some[0]])
        ids = torch.tensor([encoded[i] + [0] * (width - len(encoded[i])) for i in some])
        with torch.inference_mode():
            for member, model in enumerate(models):
                out[member, some] = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    return out


def footprint(folder: Path, case: Case) -> dict[str, float]:
    """MiB of a process that loads a run and scores: before it begins, once loaded, at the peak."""
    from pyrite.models.policy import RewardEnsemble

    if case.threads:
        torch.set_num_threads(case.threads)
    libraries = memory("VmRSS")
    ensemble = RewardEnsemble.load(folder)
    loaded = memory("VmRSS")
    ensemble.scores(*make_texts(case))
    return {"libraries": libraries, "loaded": loaded, "peak": memory("VmHWM")}


def beyond(foot: dict[str, float]) -> float:
    return foot["peak"] - foot["libraries"]


def seconds(call: Callable[[], Any]) -> float:
    begin = clock()
    call()
    return clock() - begin


def times(folder: Path, case: Case) -> dict[str, Any]:
    """Median seconds of each, in turns, and how far our scores are from those of the stock models."""
    from transformers import AutoModelForSequenceClassification

    from pyrite.data.responses import Responses
    from pyrite.models.policy import RewardEnsemble, RewardModel

    if case.threads:
        torch.set_num_threads(case.threads)
    texts = make_texts(case)
    runs = {kind: RewardEnsemble.load(folder / kind) for kind in KINDS}
    load = AutoModelForSequenceClassification.from_pretrained
    models = [load(folder / "heads" / f"member_{member}").eval() for member in range(MEMBERS)]
    said = Responses.said([{"prompt": prompt} for prompt in texts[0]], texts[1])
    read = runs["heads"].members[0].encode(said)
    prompts = [list(read.prompt_ids[p]) for p in read.prompt.tolist()]
    encoded = [[*prompt, *ids] for prompt, ids in zip(prompts, read.tokens(), strict=True)]
    gap = (runs["heads"].scores(*texts) - stock(models, encoded)).abs().max().item()
    apart = [RewardModel.load(folder / "loras" / f"member_{member}") for member in range(MEMBERS)]
    lora_gap = (runs["loras"].scores(*texts) - torch.stack([one.scores(*texts) for one in apart])).abs().max().item()
    calls = {kind: lambda kind=kind: runs[kind].scores(*texts) for kind in runs}
    calls["peer"] = lambda: stock(models, encoded)
    turns = [{kind: seconds(call) for kind, call in calls.items()} for _ in range(case.steps + 1)][1:]
    return {
        "equal": max(gap, lora_gap),
        "seconds": {kind: round(statistics.median(turn[kind] for turn in turns), 4) for kind in calls},
        "ratios": [turn["peer"] / turn["heads"] for turn in turns],
        "heads": [turn["heads"] / turn["head"] for turn in turns],
        "loras": [turn["loras"] / turn["lora"] for turn in turns],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--threads", type=int, help="of torch (all by default); with 1, processor time is measured")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    case = Case(size="6M" if options.quick else "30M", steps=3 if options.quick else 5, threads=options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(write_members, folder, case)
        seen = alone(times, folder, case)
        feet = {kind: alone(footprint, folder / kind, case) for kind in KINDS}
    assert seen["equal"] <= 1e-4, f"scores differ by {seen['equal']}"
    ratios = seen["ratios"]
    result = {
        "name": "ensemble",
        "peer": "transformers, one classifier after the other",
        "ratio": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "equal": seen["equal"],
        "members": MEMBERS,
        "size": case.size,
        "seconds": seen["seconds"],
        "time": {kind: round(statistics.median(seen[kind]), 2) for kind in ("heads", "loras")},
        "memory": {kind: round(feet[kind]["peak"] / feet[KINDS[kind]]["peak"], 2) for kind in ("heads", "loras")},
        "memory_beyond": {
            kind: round(beyond(feet[kind]) / beyond(feet[KINDS[kind]]), 2) for kind in ("heads", "loras")
        },
        "mib": {kind: {name: round(value) for name, value in foot.items()} for kind, foot in feet.items()},
        "threads": options.threads or torch.get_num_threads(),
    }
    finish(result, options.out)


if __name__ == "__main__":
    main()
