"""Best-of-n curves: pyrite's estimator against direct evaluation of its definition.

The peer computes every weight C(i-1, n-1)/C(N, n) from exact integers, as published code does, with
C(N, n) taken once for each n and the answers already sorted in its favor; without ties, which it does
not treat. Both get the same scores of N = 12,600 answers a prompt, in turns. The full setting, 1,000
prompts at 16 values of n, is timed for pyrite alone, in a process of its own for its peak memory.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyrite.math.statistics import best_of_n

ANSWERS, PROMPTS = 12_600, 1_000
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192, 12_500)


def scores(prompts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(prompts, ANSWERS, generator=generator, dtype=torch.float64)
    return proxy, torch.randn(prompts, ANSWERS, generator=generator, dtype=torch.float64)


def direct(gold_by_rank: list[list[float]], n: int) -> list[float]:
    """The definition, term by term: one value a prompt."""
    whole = math.comb(ANSWERS, n)
    weights = [math.comb(rank - 1, n - 1) / whole for rank in range(n, ANSWERS + 1)]
    return [math.fsum(w * g for w, g in zip(weights, row[n - 1 :], strict=True)) for row in gold_by_rank]


def timed(call: Callable[[], Tensor | list[float]], repeats: int = 1) -> tuple[float, Tensor | list[float]]:
    """Median seconds of a call, and its result."""
    seconds, result = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def compare(ns: tuple[int, ...], prompts: int, rounds: int) -> dict:
    proxy, gold = scores(prompts)
    ranked = gold.gather(-1, proxy.argsort(-1)).tolist()
    ours, theirs, equal = [], [], 0.0
    for _ in range(rounds):
        runs = [timed(lambda n=n: direct(ranked, n)) for n in ns]
        seconds, values = timed(lambda: best_of_n(proxy, gold, ns), repeats=5)
        expected = torch.tensor([values for _, values in runs], dtype=torch.float64)
        equal = max(equal, (torch.as_tensor(values) - expected).abs().max().item())
        theirs.append(sum(seconds for seconds, _ in runs))
        ours.append(seconds)
    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "equal": equal,
        "seconds": statistics.median(ours),
        "peer_seconds": statistics.median(theirs),
        "setting": {"n": ns, "prompts": prompts, "answers": ANSWERS},
    }


def full_setting() -> None:
    """Seconds, and MiB beyond the scores, of 1,000 prompts at 16 values of n; prints JSON."""
    proxy, gold = scores(PROMPTS)
    before = memory("VmRSS")
    seconds, _ = timed(lambda: best_of_n(proxy, gold, NS), repeats=5)
    print(json.dumps({"full_seconds": seconds, "full_peak_mib": memory("VmHWM") - before}))


def memory(field: str) -> float:
    """MiB of this process, from Linux; NaN elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--full-setting", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full_setting:
        return full_setting()
    result = compare((64, 256, 512), 8, rounds=5) if options.quick else compare((64, 512, 2048), 32, rounds=3)
    assert result["equal"] <= 1e-12, f"results differ by {result['equal']}"
    command = [sys.executable, __file__, "--full-setting"]
    full = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(json.dumps({"name": "best_of_n", "peer": "exact binomials", **result, **json.loads(full)}))


if __name__ == "__main__":
    main()
