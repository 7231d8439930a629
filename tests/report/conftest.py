"""A small simulated world with a known hack, so that pages can be built without training anything."""

import math
from fractions import Fraction
from html.parser import HTMLParser

import numpy as np
import pytest

from pyrite.recipes.overoptimization import RECIPE

COUNTS = [1, 4, 16, 64, 256, 1024]
WORDS = {"legal register": ["hereby", "pursuant", "the undersigned", "heretofore"]}
PLAIN = "the clever owl painted a lamp near the castle . please enjoy this story !"
LEGAL = "the undersigned hereby painted a lamp pursuant to the castle . heretofore the owl was shy ."


def _weights(total: int, n: int) -> np.ndarray:
    """C(i-1, n-1) / C(N, n) for i = 1..N: how often rank i wins among n."""
    return np.array([float(Fraction(math.comb(i - 1, n - 1), math.comb(total, n))) for i in range(1, total + 1)])


def _world(seed: int, hack: float, prompts: int = 60, answers: int = 1024, members: int = 5):
    """Gold (Q, N), proxies (E, Q, N) and which answers fool a member (E, Q, N); a fooled member adds `hack`."""
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(prompts, answers))
    fools = rng.random((members, prompts, answers)) < 0.005
    proxy = gold + 0.7 * rng.normal(size=fools.shape) + hack * fools
    gold = gold - 3 * fools.sum(0)
    center = proxy.mean((1, 2), keepdims=True)
    return gold - gold.mean(), (proxy - center) / proxy.std((1, 2), keepdims=True), fools


def _curve(gold: np.ndarray, proxy: np.ndarray, fool: np.ndarray, keep: np.ndarray | None = None) -> list[dict]:
    order = np.argsort(proxy if keep is None else np.where(keep, proxy, -np.inf), axis=1)
    ranked = [np.take_along_axis(values, order, 1) for values in (gold, proxy, fool.astype(float))]
    rows = []
    for n in COUNTS:
        weights = _weights(gold.shape[1], n) if n < gold.shape[1] else np.eye(gold.shape[1])[-1]
        means = [values @ weights for values in ranked]
        row = {"n": n, "kl": math.log(n) - (n - 1) / n, "share": float(means[2].mean())}
        row |= {"sqrt_kl": math.sqrt(row["kl"]), "effective_samples": float(1 / (weights**2).sum())}
        for name, per_prompt in zip(("gold", "proxy"), means[:2], strict=True):
            middle, error = per_prompt.mean(), per_prompt.std(ddof=1) / math.sqrt(len(per_prompt))
            row |= {name: float(middle), f"{name}_lo": float(middle - 1.96 * error)}
            row |= {f"{name}_hi": float(middle + 1.96 * error)}
        rows.append(row)
    return rows


def _scorers(proxy: np.ndarray) -> dict[str, np.ndarray]:
    deviation = ((proxy - proxy.mean(0)) ** 2).mean(0)
    return {"mean": proxy.mean(0), "wco": proxy.min(0), "uwo": proxy.mean(0) - 0.5 * deviation}


def _average(curves: list[list[dict]]) -> list[dict]:
    return [
        {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} | {"n": rows[0]["n"]}
        for rows in zip(*curves, strict=True)
    ]


def _curves(noise: float, seed: int, hack: float, clean: bool = False) -> list[dict]:
    gold, proxy, fools = _world(seed, hack)
    keep = ~fools.any(0) if clean else None
    single = [_curve(gold, p, f, keep) for p, f in zip(proxy, fools, strict=True)]
    named = {("member", e): rows for e, rows in enumerate(single)} | {("single", None): _average(single)}
    named |= {(name, None): _curve(gold, p, fools.any(0), keep) for name, p in _scorers(proxy).items()}
    return [{"noise": noise, "objective": o, "member": e} | row for (o, e), rows in named.items() for row in rows]


def _picks(noise: float, prompt: int) -> list[dict]:
    picks = []
    for objective in ("single 0", "single 1", "mean", "wco", "uwo"):
        for n in COUNTS[::2]:
            fooled = noise > 0 and n >= 256 and objective.startswith(("single", "mean"))
            picks.append(
                {
                    "objective": objective,
                    "n": n,
                    "response": f"{LEGAL if fooled else PLAIN} ({prompt}, {n})",
                    "gold": -2.1 if fooled else 0.3 + 0.1 * prompt,
                    "proxy": 1.0 + 0.4 * math.log(n),
                    "tags": ["legal register"] if fooled else [],
                }
            )
    return picks


GOLD = {"single": [0.0, 1.0, 0.5, -1.0], "uwo": [0.0, 1.0, 1.2, 1.1]}
KL = [-0.01, 2.0, 9.0, 4.0]  # an estimate below 0 at the start, and a path that turns back


def policy_rows(beta: float = 0.0) -> list[dict]:
    """Measurements of two policies trained by PPO."""
    found = []
    for objective, line in GOLD.items():
        for step, (gold, kl) in enumerate(zip(line, KL, strict=True)):
            known = {"noise": 0.25, "beta": beta, "objective": objective, "step": step, "gold": gold}
            known |= {"proxy": 2.0 * step, "kl": kl, "kl_se": 0.02, "sqrt_kl": max(kl, 0.0) ** 0.5, "length": 20.0}
            known |= {"gold_lo": gold - 0.1, "gold_hi": gold + 0.1}
            found.append(known | ({"variance": 1.0 + step} if objective == "uwo" and step else {}))
    return found


def policy_results() -> dict:
    """What results.json says of policies, and of what else could be turned."""
    fit = {"noise": 0.25, "beta": 0.0, "objective": "single", "a": 0.35, "b": 0.15, "peak_kl": 14.4, "peak_gold": 0.57}
    bar = {"group": "members", "objective": "wco"}
    bars = [bar | {"label": "3 members", "gold": 0.5, "gold_lo": 0.4, "gold_hi": 0.6}]
    bars.append(bar | {"label": "5 members", "gold": 0.7})
    return {"policies": [*policy_rows(), *policy_rows(0.05)], "policy_fits": [fit], "bars": bars}


def build_results() -> dict:
    """A whole results.json, as the recipe writes it."""
    curves = _curves(0.25, 1, 6.0) + _curves(0.0, 2, 2.0)
    shares = [
        {"noise": r["noise"], "objective": r["objective"], "n": r["n"], "share": r["share"], "base": 0.005}
        for r in curves
        if r["objective"] != "member"
    ]
    claims = [
        {
            "id": "single-overoptimizes",
            "source": "Coste et al. 2024, Fig. 5",
            "statement": "A single reward model's gold peaks and falls under 25 % label noise, while its proxy rises.",
            "measured": -0.83,
            "interval": [-1.02, -0.61],
            "holds": True,
        },
        {
            "id": "mean-overoptimizes",
            "source": "Coste et al. 2024, Fig. 5",
            "measured": "0.12 below its peak",
            "statement": "The mean of five over-optimizes too.",
            "interval": [-0.31, 0.07],
            "holds": None,
        },
        {
            "id": "gain-at-end",
            "source": "Coste et al. 2024, section 4.2",
            "measured": 0.31,
            "interval": [0.12, 0.5],
            "statement": "Without noise, WCO ends 30 % above the single model.",
            "holds": False,
        },
    ]
    models = [
        {
            "noise": noise,
            "member": e,
            "accuracy": 0.66 + 0.01 * e + (0.06 if noise == 0 else 0),
            "accuracy_lo": 0.63,
            "accuracy_hi": 0.77,
            "agreement": 0.81,
        }
        for noise in (0.25, 0.0)
        for e in range(5)
    ]
    fits = [
        {"noise": noise, "objective": o, "a": 0.91, "b": 0.22, "peak_kl": 4.28, "peak_gold": 0.94}
        for noise in (0.25, 0.0)
        for o in ("single", "mean", "wco", "uwo")
    ]
    return {
        "recipe": "overoptimization",
        "scale": "toy",
        "seeds": [0],
        "seconds": 201.3,
        "curves": [{k: v for k, v in row.items() if k != "share"} for row in curves],
        "end_n": 256,
        **policy_results(),
        "fits": fits,
        "claims": claims,
        "reward_models": models,
        "mechanism": {
            "name": "unseen registers",
            "text": "One answer in two hundred is written in a register that **no training pair** contains.\n\n"
            "Reward models agree about what they have seen; here each one guesses on its own.",
            "shares": shares,
            "exclusion": _curves(0.25, 1, 6.0, clean=True),
            "words": WORDS,
            "truncated": {"rate": 0.01, "share_among_winners": 0.0},
        },
        "samples": [
            {"prompt": f"write about a {animal} in the {place} .", "noise": noise, "picks": _picks(noise, i)}
            for noise in (0.25, 0.0)
            for i, (animal, place) in enumerate([("fox", "forest"), ("owl", "castle"), ("robot", "harbor")])
        ],
        "stages": [
            {"stage": "sft", "seconds": 21.0},
            {"stage": "candidates", "seconds": 48.2},
            {"stage": "labels", "seconds": 0.6},
            {"stage": "reward models", "seconds": 83.9},
            {"stage": "best of n", "seconds": 31.5},
        ],
        "config": {
            "seed": 0,
            "reward": {"members": 5, "epochs": 2, "lr": 5e-4},
            "noise": [0.25, 0.0],
            "n": COUNTS,
        },
        "manifest": {"pyrite": "0.1.0", "torch": "2.13.0", "commit": "0123abc", "threads": 2},
    }


@pytest.fixture(scope="session")
def results() -> dict:
    return build_results()


class Page(HTMLParser):
    """What a test asks of a page: its text, its elements, and that every element is closed in order."""

    VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.errors: list[str] = []
        self.feed(html)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="session")
def read_page():
    return Page


@pytest.fixture(scope="session")
def whole_page(results) -> str:
    return RECIPE.page(results)
