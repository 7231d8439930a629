"""Where the time of our steps goes, and how far they are from their matrix products alone on this machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from _setting import Case, clock, make_pairs
from torch.profiler import ProfilerActivity

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
GROUPS = {
    "matrix products": PRODUCTS,
    "attention kernel": ("scaled_dot_product", "flash"),
    "softmax": ("softmax", "exp", "logsumexp"),
    "optimizer and clipping": ("adamw", "_foreach", "linalg_vector_norm"),
    "gathers": ("index", "embedding", "gather", "scatter", "cat"),
    "copies and casts": ("copy", "clone", "contiguous", "fill", "zero", "empty"),
    "elementwise": ("mul", "add", "silu", "sub", "neg", "pow", "rsqrt", "div", "mean", "sum", "sin", "cos", "gelu"),
}


class Profiled:
    """In the place of a turn: the first step warms up, the others are recorded."""

    def __init__(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.recorder = torch.profiler.profile(activities=kinds, record_shapes=True)
        self.done = 0

    def ready(self) -> None:
        """Nothing to wait for."""

    def step(self) -> None:
        if self.done == 0:
            self.recorder.start()
            self.begin = clock()
        self.seconds = clock() - self.begin
        self.done += 1


def profile(train: Callable, learner: Callable, case: Case) -> dict[str, Any]:
    """Shares of a step by kind of operation, and what its matrix products take by themselves."""
    if case.threads:
        torch.set_num_threads(case.threads)
    turn = Profiled()
    train(turn, case, *learner(case, make_pairs(case)))
    turn.recorder.stop()
    events = turn.recorder.key_averages(group_by_input_shape=True)
    spent: Counter[str] = Counter()
    for event in events:
        spent[group(event.key)] += event.self_cpu_time_total
    flops, limit = products(events, getattr(torch, case.precision))
    step = turn.seconds / case.steps
    return {
        **{name: value for name, value in asdict(case).items() if name not in ("threads", "seed", "peer")},
        "seconds": round(step, 4),
        "shares": {name: round(value / spent.total(), 3) for name, value in spent.most_common()},
        "gflop": round(flops / case.steps / 1e9, 1),
        "gflop_per_second": round(flops / case.steps / 1e9 / step, 1),
        "products_alone_seconds": round(limit / case.steps, 4),
        "products_alone_gflop_per_second": round(flops / limit / 1e9, 1),
        "share_of_limit": round(limit / case.steps / step, 2),
    }


def group(operation: str) -> str:
    name = operation.lower()
    if operation in PRODUCTS:
        return "matrix products"
    found = [
        kind for kind, parts in GROUPS.items() if kind != "matrix products" and any(part in name for part in parts)
    ]
    return found[0] if found else "other"


def products(events: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Operations of all recorded matrix products, and seconds for them by the faster of MKL and oneDNN."""
    flops = seconds = 0.0
    for event in events:
        if event.key in PRODUCTS:
            a, b = [shape for shape in event.input_shapes if len(shape) >= 2][-2 if "addmm" in event.key else 0 :][:2]
            if "linear" in event.key:
                a, b = [math.prod(a[:-1]), a[-1]], b[::-1]
            flops += 2 * math.prod(a) * b[-1] * event.count
            seconds += fastest(tuple(a), tuple(b), dtype) * event.count
    return flops, seconds


def fastest(a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype, *, repeats: int = 3) -> float:
    """Seconds of one product of these shapes: a (..., M, K), b (..., K, N)."""
    from pyrite.models.forward import product

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.randn(a, dtype=dtype, device=device), torch.randn(b, dtype=dtype, device=device)
    calls = [lambda: left @ right]
    if len(a) == 2 and dtype == torch.float32:
        weight = right.t().contiguous()
        calls.append(lambda: product(left, weight))
    return min(timed(call) for call in calls for _ in range(repeats))


def timed(call: Callable[[], Any]) -> float:
    begin = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin
