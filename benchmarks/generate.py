"""Decoding: `sample` against transformers' `generate`, same prompts, same number of new tokens.

Float32, end tokens ignored on both sides, prompts of 10 to 30 tokens left-padded for the peer, which runs with its
default cache, the fastest of its own here. Each case is run in turns, ours and theirs, after one unmeasured turn.
Wall time; with --threads 1 processor time, which a busy neighbor disturbs less.
Greedy tokens must be identical; where rows part, `equal` is the largest gap in log-probability between the two
choices (a tie in float32), else 0.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from pyrite.models.generation import sample

MODELS = {
    "toy": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
}
VOCABULARY = {"toy": 500, "30M": 4096}
BATCHES = (32, 256)
# new tokens and rounds of a case: full, quick
FULL = {("toy", 32): (64, 9), ("toy", 256): (64, 7), ("30M", 32): (48, 5), ("30M", 256): (48, 3)}
QUICK = {("toy", 32): (48, 5), ("toy", 256): (48, 3), ("30M", 32): (12, 2), ("30M", 256): (6, 1)}


def make(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY[name], "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**MODELS[name], **size, pad_token_id=0, eos_token_id=2)).eval()


def make_prompts(model: LlamaForCausalLM, rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(10, 31, (rows,), generator=generator).tolist()
    top = model.config.vocab_size
    return [torch.randint(3, top, (length,), generator=generator).tolist() for length in lengths]


def peer(model: LlamaForCausalLM, prompts: list[list[int]], steps: int, sampled: bool) -> Tensor:
    """transformers' `generate`: new tokens (N, steps)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    visible = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    never = model.config.vocab_size  # an end token that does not exist
    options = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=steps, eos_token_id=never, pad_token_id=0, **options)
    return model.generate(ids, attention_mask=visible, generation_config=config)[:, width:]


def ours(model: LlamaForCausalLM, prompts: list[list[int]], steps: int, sampled: bool) -> Tensor:
    return sample(model, prompts, eos=[], max_new_tokens=steps, temperature=float(sampled)).tokens


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = call()
    return clock() - start, result


def gap(model: LlamaForCausalLM, prompts: list[list[int]], a: Tensor, b: Tensor) -> float:
    """Largest difference in log-probability of the two choices where greedy rows part; 0 when none do."""
    gaps = [0.0]
    for row in (a != b).any(1).nonzero().squeeze(1).tolist():
        step = int((a[row] != b[row]).nonzero()[0])
        with torch.no_grad():
            logits = model(torch.tensor([prompts[row] + a[row, :step].tolist()])).logits[0, -1]
        gaps.append((logits[a[row, step]] - logits[b[row, step]]).abs().item())
    return max(gaps)


def compare(model: LlamaForCausalLM, name: str, rows: int, steps: int, rounds: int) -> list[dict]:
    prompts = make_prompts(model, rows)
    cases = []
    for mode in ("greedy", "sampling"):
        sampled, times = mode == "sampling", []
        for _ in range(rounds + 1):
            theirs, expected = seconds(lambda s=sampled: peer(model, prompts, steps, s))
            mine, tokens = seconds(lambda s=sampled: ours(model, prompts, steps, s))
            times.append((theirs, mine))
        times = times[1:]
        ratios = [theirs / mine for theirs, mine in times]
        case = {
            "model": name,
            "batch": rows,
            "mode": mode,
            "ratio": round(statistics.median(ratios), 2),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "tokens_per_second": round(rows * steps / statistics.median(mine for _, mine in times)),
            "peer_tokens_per_second": round(rows * steps / statistics.median(theirs for theirs, _ in times)),
        }
        if not sampled:
            case |= {
                "same_rows": int((tokens == expected).all(1).sum()),
                "equal": gap(model, prompts, tokens, expected),
            }
        print(json.dumps(case), flush=True)
        cases.append(case)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--threads", type=int, help="of torch (all by default)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    settings = QUICK if options.quick else FULL
    transformers_logging.set_verbosity_error()
    logging.basicConfig(level=logging.WARNING)
    cases = []
    for name in MODELS:
        model = make(name)
        for rows in BATCHES:
            cases += compare(model, name, rows, *settings[name, rows])
    greedy = [case for case in cases if case["mode"] == "greedy"]
    result = {
        "name": "generate",
        "peer": "transformers generate",
        "ratio": round(statistics.median(case["ratio"] for case in cases), 2),
        "spread": [min(case["spread"][0] for case in cases), max(case["spread"][1] for case in cases)],
        "equal": max(case["equal"] for case in greedy),
        "threads": torch.get_num_threads(),
        "cases": cases,
    }
    assert result["equal"] < 1e-4, f"greedy tokens differ where the choice is no tie: {result['equal']}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
