"""The tabular world: all instances at once against a plain loop over them, in the setting of the published study.

20 responses, rewards N(0, 1), β = 3, learning rate 10, exact gradients under uniform, mix_r and mix_p pairs. The peer
is the published experiment's own way: one instance at a time, a matrix of log-ratios, automatic differentiation and
plain SGD, the metric taken before every update; in float64, so that trajectories can be compared. Trajectories are
compared before anything is timed; both then take turns on one thread, which the peer's small matrices like best.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrite.math import samplers, tabular

RESPONSES, BETA, RATE = 20, 3.0, 10.0
NAMES = ("uniform", "mix_r", "mix_p")


def weights(name: str, logp: Tensor, reward: Tensor) -> Tensor:
    """Joint pair distribution (n, n) of one instance, from its closed form."""
    if name == "uniform":
        return torch.full((len(reward), len(reward)), 1 / len(reward) ** 2, dtype=reward.dtype)
    x = reward if name == "mix_r" else BETA * logp
    apart = (x[:, None] - x[None, :]).exp()
    pairs = 2 + apart + apart.T
    return pairs / pairs.sum()


def one_by_one(name: str, rewards: Tensor, steps: int) -> Tensor:
    """Mean |δ| of every instance before each update, (steps, I)."""
    columns = []
    for reward in rewards:
        logits = torch.zeros(RESPONSES, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=RATE)
        wins, seen = (reward[:, None] - reward[None, :]).sigmoid(), []
        for _ in range(steps):
            logp = logits.log_softmax(0)
            with torch.no_grad():
                joint, x = weights(name, logp, reward), reward - BETA * logp
                seen.append((x[:, None] - x[None, :]).abs().mean())
            h = BETA * (logp[:, None] - logp[None, :])
            loss = -(joint * (wins * F.logsigmoid(h) + (1 - wins) * F.logsigmoid(-h))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        columns.append(torch.stack(seen))
    return torch.stack(columns, 1)


def together(name: str, rewards: Tensor, steps: int) -> Tensor:
    """The same, from pyrite."""
    world = tabular.world(rewards, beta=BETA)
    sampler = samplers.mix_p() if name == "mix_p" else getattr(samplers, name)()
    return tabular.descend(world, sampler, steps=steps, rate=RATE).mean_error[:-1]


def timed(call: Callable[[str, Tensor, int], Tensor], rewards: Tensor, steps: int) -> float:
    start = time.perf_counter()
    for name in NAMES:
        call(name, rewards, steps)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--instances", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, rounds = (50, 3) if options.quick else (100, 5)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(options.instances, RESPONSES, generator=generator, dtype=torch.float64)
    equal = max((together(n, rewards, steps) - one_by_one(n, rewards, steps)).abs().max().item() for n in NAMES)
    assert equal <= 1e-9, f"trajectories differ by {equal}"
    turns = [(timed(one_by_one, rewards, steps), timed(together, rewards, steps)) for _ in range(rounds)]
    ratios = [peer / ours for peer, ours in turns]
    result = {
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "equal": equal,
        "seconds": statistics.median(ours for _, ours in turns),
        "peer_seconds": statistics.median(peer for peer, _ in turns),
        "setting": {"instances": options.instances, "steps": steps, "samplers": NAMES, "responses": RESPONSES},
    }
    print(json.dumps({"name": "bandit", "peer": "one instance at a time", **result}))


if __name__ == "__main__":
    main()
