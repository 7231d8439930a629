"""results.json: curves, claims, the mechanism, reward models, samples and timing of one or more chains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrite.data import toy_words as words
from pyrite.math import statistics
from pyrite.recipes import toy
from pyrite.recipes.overoptimization import claims, ppo_claims, ppo_results
from pyrite.recipes.overoptimization.chain import Chain, Scores, gold_at, objectives
from pyrite.recipes.overoptimization.settings import Settings

MECHANISM = "leftover registers"
EXPLAINED = (
    "About 4 % of the demonstrations drift into a leftover register, such as a legal notice or an advert, with words "
    "of its own, and so does a policy trained on them. Preference pairs are drawn conservatively (top-p 0.9), which "
    "cuts the registers out: no reward model ever sees one judged. Each then gives them a worth of its own, left over "
    "from its random head and the order of its data. Best-of-n searches the full distribution; where a reward model "
    "happens to like them, larger n finds them more and more often, while gold takes a point off for every such word. "
    "The members of an ensemble disagree about them, so the worst case and the penalty on disagreement mostly refuse "
    "them. Every answer in the pool ends properly: answers cut short are left out before anything is scored."
)
SHOWN = (1, 16, 256, 1024)  # values of n in the browser of samples
PROMPTS = 12  # prompts in the browser of samples


def collect(chains: list[Chain], settings: Settings) -> dict[str, Any]:
    """Everything the report shows, from finished chains."""
    end = end_index(settings, chains)
    golds = [{noise: gold_at(scores, settings) for noise, scores in chain.scores.items()} for chain in chains]
    curves = [row for noise in settings.noise for row in _curves([c.scores[noise] for c in chains], settings, noise)]
    optimized = [chain.optimized for chain in chains]
    policies = ppo_results.curves(optimized)
    found: dict[str, Any] = {
        "end_n": settings.n[end],
        "curves": curves,
        "fits": [fit for noise in settings.noise for fit in _fits(curves, noise, settings.n[end])],
        "policies": policies,
        "policy_fits": ppo_results.fits(policies),
        "bars": ppo_results.bars(chains, settings, end=end),
        "claims": [*claims.check(golds, end=end), *ppo_claims.check(optimized)],
        "reward_models": [row for chain in chains for row in _reward_models(chain, settings)],
        "samples": _samples(chains[0], settings),
        "stages": [{"stage": n, "seconds": (r.results or {})["seconds"]} for n, r in chains[0].runs.items()],
    }
    if not settings.model:
        found["mechanism"] = _mechanism(chains, settings)
    return found


def end_index(settings: Settings, chains: list[Chain]) -> int:
    """Index of the largest n that is at most a quarter of the answers to a prompt, in every chain."""
    fewest = min(scores.gold.shape[1] for chain in chains for scores in chain.scores.values())
    return max(i for i, n in enumerate(settings.n) if n <= max(fewest / 4, 1))


def _curves(scores: list[Scores], settings: Settings, noise: float) -> list[dict[str, Any]]:
    """Gold and proxy by objective and n; bands over prompts of one chain, or over whole chains."""
    n = list(settings.n)
    per_chain = [_gold_and_proxy(s, settings) for s in scores]
    rows = []
    for name in per_chain[0]:
        gold, proxy = (_band([chain[name][i] for chain in per_chain]) for i in range(2))
        for i, m in enumerate(n):
            kl = statistics.best_of_n_kl(m)
            row = {"noise": noise, "objective": name, "member": None, "n": m, "kl": kl, "sqrt_kl": kl**0.5}
            row |= {key: band[i].item() for key, band in zip(("gold", "gold_lo", "gold_hi"), gold, strict=True)}
            row |= {key: band[i].item() for key, band in zip(("proxy", "proxy_lo", "proxy_hi"), proxy, strict=True)}
            answers = scores[0].gold.shape[1]
            rows.append({**row, "effective_samples": statistics.effective_samples(answers, [m]).item()})
    if len(scores) == 1:
        rows += _member_curves(scores[0], n, noise)
    return rows


def _gold_and_proxy(scores: Scores, settings: Settings) -> dict[str, tuple[Tensor, Tensor]]:
    """(gold, proxy), each (M, Q), by objective; single is the average over members of their own picks."""
    n = list(settings.n)
    pairs = [(statistics.best_of_n(p, scores.gold, n), statistics.best_of_n(p, p, n)) for p in scores.proxy]
    found = {"single": (torch.stack([g for g, _ in pairs]).mean(0), torch.stack([p for _, p in pairs]).mean(0))}
    for name, proxy in objectives(scores.proxy, settings).items():
        found[name] = (statistics.best_of_n(proxy, scores.gold, n), statistics.best_of_n(proxy, proxy, n))
    return found


def _member_curves(scores: Scores, n: list[int], noise: float) -> list[dict[str, Any]]:
    rows = []
    for member, proxy in enumerate(scores.proxy):
        gold, own = (statistics.best_of_n(proxy, values, n).mean(1).tolist() for values in (scores.gold, proxy))
        for i, m in enumerate(n):
            kl = statistics.best_of_n_kl(m)
            row = {"noise": noise, "objective": "member", "member": member, "n": m, "kl": kl, "sqrt_kl": kl**0.5}
            rows.append({**row, "gold": gold[i], "proxy": own[i]})
    return rows


def _band(values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and interval (M,) of per-prompt values (M, Q): over prompts of one chain, or over chains."""
    if len(values) == 1:
        return tuple(statistics.bootstrap(values[0]))  # type: ignore[return-value]
    return tuple(statistics.t_interval(torch.stack([v.mean(1) for v in values], -1)))  # type: ignore[return-value]


def _fits(curves: list[dict[str, Any]], noise: float, end: int) -> list[dict[str, Any]]:
    """R(d) = d (a - b d) with d = sqrt KL, up to the end."""
    rows = []
    for name in dict.fromkeys(row["objective"] for row in curves if row["member"] is None):
        line = [r for r in curves if r["noise"] == noise and r["objective"] == name and 1 < r["n"] <= end]
        d, gold = (torch.tensor([r[key] for r in line], dtype=torch.float64) for key in ("sqrt_kl", "gold"))
        fit = statistics.fit_best_of_n(d, gold)
        peaks = fit.b > 0
        rows.append(
            {
                "noise": noise,
                "objective": name,
                "a": fit.a,
                "b": fit.b,
                "peak_kl": fit.peak**2 if peaks else None,
                "peak_gold": fit.peak_gold if peaks else None,
            }
        )
    return rows


def _mechanism(chains: list[Chain], settings: Settings) -> dict[str, Any]:
    """What fools the proxy, its share among the picks by n, and the curves without it."""
    lexicons = words.LEXICONS
    pools = [chain.runs["pool answers"].results or {} for chain in chains]
    return {
        "name": MECHANISM,
        "text": EXPLAINED,
        "words": {name: sorted(set().union(*kinds.values())) for name, kinds in lexicons.items()},
        "shares": _shares_by_noise(chains, settings),
        "exclusion": _exclusion(chains, settings),
        "truncated": {
            "rate": sum(pool["missing_eos"] for pool in pools) / len(pools),
            "share_among_winners": 0.0,  # they are left out of the pool before anything is scored
        },
    }


def _shares_by_noise(chains: list[Chain], settings: Settings) -> list[dict[str, Any]]:
    return [row for noise in settings.noise for row in _shares([c.scores[noise] for c in chains], settings, noise)]


def _shares(scores: list[Scores], settings: Settings, noise: float) -> list[dict[str, Any]]:
    n = list(settings.n)
    by_objective: dict[str, list[Tensor]] = {}
    for s in scores:
        mark = s.mark.double()
        single = torch.stack([statistics.best_of_n(p, mark, n).mean(1) for p in s.proxy]).mean(0)
        by_objective.setdefault("single", []).append(single)
        for name, proxy in objectives(s.proxy, settings).items():
            by_objective.setdefault(name, []).append(statistics.best_of_n(proxy, mark, n).mean(1))
    base = torch.stack([s.mark.double().mean() for s in scores]).mean().item()
    return [
        {"noise": noise, "objective": name, "n": m, "share": share, "base": base}
        for name, shares in by_objective.items()
        for m, share in zip(n, torch.stack(shares).mean(0).tolist(), strict=True)
    ]


def _without(scores: Scores) -> Scores:
    """The same pool without marked answers: the first answers of each prompt, as many as every prompt has."""
    keep = int((~scores.mark).sum(1).min())
    index = torch.stack([(~mark).nonzero().squeeze(1)[:keep] for mark in scores.mark])
    proxy = torch.stack([p.gather(1, index) for p in scores.proxy])
    mark, row = scores.mark.gather(1, index), scores.row.gather(1, index)
    return Scores(scores.gold.gather(1, index), proxy, mark, row, scores.rows)


def _exclusion(chains: list[Chain], settings: Settings) -> list[dict[str, Any]]:
    """The curves again on pools without marked answers; none where such an answer is all a prompt has."""
    shorter = _shorter(settings, chains)
    rows: list[dict[str, Any]] = []
    for noise in settings.noise if shorter.n else ():
        rows += _curves([_without(chain.scores[noise]) for chain in chains], shorter, noise)
    return [row for row in rows if row["objective"] != "member"]


def _shorter(settings: Settings, chains: list[Chain]) -> Settings:
    """The same settings with the values of n that a pool without marked answers still has."""
    fewest = min(int((~s.mark).sum(1).min()) for chain in chains for s in chain.scores.values())
    return replace(settings, n=tuple(n for n in settings.n if n <= fewest))


def _reward_models(chain: Chain, settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for noise in settings.noise:
        run = chain.runs[f"reward models, noise {100 * noise:g} %"]
        together = torch.corrcoef(chain.scores[noise].proxy.flatten(1))
        others = (together.sum(1) - 1) / (len(together) - 1)
        for member, measured in enumerate((run.results or {})["members"]):
            kept = {key: measured[key] for key in ("accuracy", "accuracy_lo", "accuracy_hi")}
            agreement = others[member].item()
            rows.append({"seed": chain.seed, "noise": noise, "member": member, **kept, "agreement": agreement})
    return rows


def _samples(chain: Chain, settings: Settings) -> list[dict[str, Any]]:
    """What each scorer really picks among the first n answers of a prompt."""
    rows = []
    for noise, scores in chain.scores.items():
        judges = {f"single {member}": proxy for member, proxy in enumerate(scores.proxy[:3])}
        judges |= objectives(scores.proxy, settings)
        for q in range(min(PROMPTS, len(scores.gold))):
            picks = []
            for name, proxy in judges.items():
                for n in (n for n in SHOWN if n <= proxy.shape[1]):
                    best = int(proxy[q, :n].argmax())
                    answer = scores.rows[int(scores.row[q, best])]
                    register = toy.register_of(answer["response"]) if not settings.model else None
                    picks.append(
                        {
                            "objective": name,
                            "n": n,
                            "response": answer["response"],
                            "gold": scores.gold[q, best].item(),
                            "proxy": proxy[q, best].item(),
                            "tags": [register] if register else [],
                        }
                    )
            prompt = scores.rows[int(scores.row[q, 0])]["prompt"]
            rows.append({"prompt": str(prompt), "noise": noise, "picks": picks})
    return rows
