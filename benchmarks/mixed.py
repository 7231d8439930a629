"""Mixed decoding: `sample_mixed` against `sample` from one model, same prompts, same number of tokens.

lora   policy = base with low-rank adapters on every linear layer, reference = the same base with its adapters off
two    policy and reference are two models

Every row is drawn from pi^1.5 pi_ref^-0.5 or pi^0.5 pi_ref^0.5, so both models decode all of them. `times` is mixed
time over that of `sample` from the policy (on_policy), `times_base` over that from the base without adapters; `ratio`
is 1 / times. Float32, end tokens ignored, runs in turns after one unmeasured turn; wall time, with --threads 1
processor time, which a busy neighbor disturbs less.
`equal`: the largest difference in log-probability between adapters on and off and two separate models, tokens being
the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from pyrite.models.generation import Samples, sample, sample_mixed

MODELS = {
    "toy": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
}
# model, vocabulary, rows: new tokens and rounds, full and quick
CASES = {
    ("toy", 500, 128): ((64, 7), (32, 3)),
    ("30M", 4096, 32): ((32, 3), (6, 1)),
    ("30M", 4096, 128): ((12, 3), None),
    ("30M", 32768, 32): ((24, 3), (6, 1)),
}
APART = torch.tensor([[1.5, -0.5], [0.5, 0.5]])


def make(name: str, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**MODELS[name], **sizes, pad_token_id=0, eos_token_id=2)).eval()


def adapted(base: LlamaForCausalLM) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)).eval()


def make_prompts(vocabulary: int, rows: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(rows)
    lengths = torch.randint(10, 31, (rows // 2,), generator=g).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=g).tolist() for length in lengths]


def seconds(call: Callable[[], Samples]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def compare(name: str, vocabulary: int, rows: int, steps: int, rounds: int) -> dict[str, Any]:
    base = make(name, vocabulary)
    plain, prompts = copy.deepcopy(base), make_prompts(vocabulary, rows)
    policy = adapted(base)
    merged = copy.deepcopy(policy).merge_and_unload()
    options: dict[str, Any] = {"eos": [], "max_new_tokens": steps}
    arms = APART.expand(len(prompts), -1, -1)
    calls: dict[str, Callable[[], Samples]] = {
        "policy": lambda: sample(policy, prompts, k=2, **options),
        "lora": lambda: sample_mixed(policy, None, prompts, exponents=arms, **options),
        "base": lambda: sample(plain, prompts, k=2, **options),
        "two": lambda: sample_mixed(merged, plain, prompts, exponents=arms, **options),
        "merged": lambda: sample(merged, prompts, k=2, **options),
    }
    times = [{label: seconds(call) for label, call in calls.items()} for _ in range(rounds + 1)][1:]
    lora, two = calls["lora"](), calls["two"]()
    same = (lora.tokens == two.tokens).all(1)
    ours, theirs = (torch.stack([s.logps, s.policy_logps, s.ref_logps])[:, same] for s in (lora, two))

    def over(one: str, other: str) -> list[float]:
        return [turn[one] / turn[other] for turn in times]

    case = {
        "model": name,
        "vocabulary": vocabulary,
        "rows": rows,
        "times": round(statistics.median(over("lora", "policy")), 2),
        "spread_times": [round(min(over("lora", "policy")), 2), round(max(over("lora", "policy")), 2)],
        "times_base": round(statistics.median(over("lora", "base")), 2),
        "times_two": round(statistics.median(over("two", "merged")), 2),
        "tokens_per_second": round(rows * steps / statistics.median(turn["lora"] for turn in times)),
        "path": [lora.path, two.path],
        "same_rows": int(same.sum()),
        "equal": (ours - theirs).abs().max().item(),
    }
    print(json.dumps(case), flush=True)
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--threads", type=int, help="of torch (all by default)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    logging.set_verbosity_error()
    sizes = {case: both[options.quick] for case, both in CASES.items()}
    cases = [compare(*case, *size) for case, size in sizes.items() if size]
    times = [case["times"] for case in cases]
    result = {
        "name": "mixed",
        "peer": "pyrite.models.generation.sample, one model",
        "ratio": round(1 / statistics.median(times), 2),
        "spread": [
            round(1 / max(c["spread_times"][1] for c in cases), 2),
            round(1 / min(c["spread_times"][0] for c in cases), 2),
        ],
        "times": max(times),
        "equal": max(case["equal"] for case in cases),
        "threads": torch.get_num_threads(),
        "cases": cases,
    }
    assert result["equal"] < 1e-4, f"adapters on and off differ from two models: {result['equal']}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
