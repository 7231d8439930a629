"""Best-of-n: what the answer a reward model likes best among n is worth, for every n at once.

Each prompt's N candidates are scored by every member, standardized on all of them (they are samples of the initial
policy), aggregated, and the exact unbiased estimator gives gold and proxy as functions of KL = ln n - (n-1)/n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pyrite.core import runs, specs
from pyrite.core.processes import progress, say
from pyrite.core.runs import Run
from pyrite.data.responses import Responses
from pyrite.data.rows import cut_hint, load
from pyrite.feedback import scorers
from pyrite.math import ensembles, statistics
from pyrite.math.ranges import Count, Some
from pyrite.models.loading import verify
from pyrite.models.policy import RewardModel, member_paths

OUTPUTS = {
    "curves.json": "gold, proxy and KL by objective and n, with intervals over prompts",
    "scores.safetensors": "proxy (E, Q, N), gold (Q, N), row (Q, N) of the candidates",
}


@dataclass(frozen=True)
class Config:
    """Best-of-n against single reward models and ensembles."""

    candidates: str
    """Candidates with a column `gold`, as `pyrite label` writes them."""
    proxy: str
    """Folder of a reward run."""
    out: Path
    """Folder of the run, new or empty."""
    objectives: Some[str] = ("mean()", "wco()", "uwo(weight=0.5)")
    """How to combine the members' scores. Every single member is reported as well."""
    n: tuple[Count, ...] = ()
    """Values of n; powers of two up to the number of answers by default."""
    truncated: Literal["exclude", "keep"] = "exclude"
    """What to do with answers cut before their end token."""
    min_answers: Count | None = None
    """Prompts with fewer answers to choose from are left out, and counted. By default as many as make the most of the
    answers, prompts times answers each; at least the largest n, if --n is given."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"candidates": config.candidates, "proxy": config.proxy}


def run(config: Config) -> Run:
    """Score, standardize, aggregate, estimate."""
    run = runs.start("best_of_n", config, inputs=inputs)
    if run.done:
        return run
    objectives = {spec: specs.part(spec, ensembles) for spec in config.objectives}
    for objective in objectives.values():
        objective(torch.zeros(2, 1))  # an option out of range is refused now
    rows = load(config.candidates, "candidates")
    pool, left_out = answer_grid(rows, truncated=config.truncated, n=config.n, least=config.min_answers)
    cut = sum(not row["finished"] for row in rows)
    n = _counts(config.n, pool.shape[1])
    gold = _gold(rows, pool, config)
    members = member_paths(config.proxy)
    for path in members:
        verify(AutoModelForSequenceClassification, path)
    run.open()
    say(f"best_of_n: {pool.shape[0]} prompts x {pool.shape[1]} answers, {len(members)} members, {cut} cut answers")
    if left_out:
        what = "finished answers" if config.truncated == "exclude" else "answers"
        say(
            f"best_of_n: {left_out} of {left_out + len(pool)} prompts are left out, as they have fewer than "
            f"{pool.shape[1]} {what}; --min-answers says how many a prompt needs{_hint(rows, config)}"
        )
    if pool.shape[1] == 1:
        say(f"best_of_n: with one answer a prompt there is nothing to choose from{_hint(rows, config)}")
    raw = torch.stack([_scores(run, path, rows, pool) for path in members])
    flat = raw.flatten(1)
    proxy = ensembles.standardize(flat, flat.mean(1), flat.std(1, correction=0)).view_as(raw)
    if run.writes:
        tensors = {"proxy": proxy.float(), "raw": raw.float(), "gold": gold.float(), "row": pool}
        save_file(tensors, run.folder / "scores.safetensors")
        runs.write_json(run.folder / "curves.json", curves(proxy, gold, n, objectives))
    found = {"prompts": len(pool), "prompts_left_out": left_out, "answers": pool.shape[1], "truncated": cut, "n": n}
    return run.finish(**found, gold_mean=gold.mean().item(), gold_std=gold.std(correction=0).item())


def answer_grid(
    rows: list[dict[str, Any]], *, truncated: str, n: tuple[int, ...] = (), least: int | None = None
) -> tuple[Tensor, int]:
    """Row numbers (Q, N) of each prompt's first N answers, N the same for all; and how many prompts have too few.

    least: answers that a prompt needs; by default as many as make Q · N largest, two where a prompt has two, and at
    least the largest n.
    """
    by_prompt: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        some = by_prompt.setdefault(row["prompt_id"], [])
        if row["finished"] or truncated == "keep":
            some.append(index)
    counts = sorted((len(indices) for indices in by_prompt.values()), reverse=True)
    if not counts[0]:
        raise ValueError("every answer was cut before its end token; raise --max-new-tokens of `pyrite generate`")
    most = max(n, default=1)
    enough = [(count * (place + 1), place, count) for place, count in enumerate(counts) if count >= most and count]
    several = [one for one in enough if one[2] > 1 or n]  # of one answer there is nothing to choose
    needed = least if least is not None else max(several or enough)[2] if enough else most
    kept = [indices for indices in by_prompt.values() if len(indices) >= max(needed, 1)]
    size = min(map(len, kept), default=0)
    if size < most:
        raise ValueError(
            f"n = {most} but the fewest finished answers to a prompt are {size or counts[-1]}, and the most are "
            f"{counts[0]}: give a smaller --n or a larger --min-answers, generate more answers, or count cut ones too "
            "with --truncated keep"
        )
    return torch.tensor([indices[:size] for indices in kept]), len(by_prompt) - len(kept)


def _hint(rows: list[dict[str, Any]], config: Config) -> str:
    """What to do about cut answers."""
    hint = cut_hint(rows) if config.truncated == "exclude" else ""
    return f"{hint}, or count them too with --truncated keep" if hint else ""


def curves(
    proxy: Tensor, gold: Tensor, n: list[int], objectives: dict[str, Callable[[Tensor], Tensor]]
) -> list[dict[str, Any]]:
    """One row per objective and n; proxy (E, Q, N) and gold (Q, N) standardized on these candidates.

    "single" is the average single member: each picks for itself, then the mean is taken.
    """
    gold = (gold - gold.mean()) / gold.std(correction=0)
    named = {f"member {member}": scores for member, scores in enumerate(proxy)}
    named |= {name: objective(proxy.flatten(1)).view_as(gold) for name, objective in objectives.items()}
    picked = {
        name: (statistics.best_of_n(scores, gold, n), statistics.best_of_n(scores, scores, n))
        for name, scores in named.items()
    }
    members = list(picked.values())[: len(proxy)]
    single = torch.stack([g for g, _ in members]).mean(0), torch.stack([p for _, p in members]).mean(0)
    return [row for name, pair in {"single": single, **picked}.items() for row in _curve(name, *pair, n, gold.shape[1])]


def _curve(name: str, gold: Tensor, proxy: Tensor, n: list[int], answers: int) -> list[dict[str, Any]]:
    """Rows of gold and proxy (M, Q), with intervals over prompts."""
    columns: dict[str, Tensor] = {}
    for which, values in (("gold", gold), ("proxy", proxy)):
        columns[which], columns[f"{which}_lo"], columns[f"{which}_hi"] = statistics.bootstrap(values)
    kl = statistics.best_of_n_kl(n)
    columns |= {"kl": kl, "sqrt_kl": kl.sqrt(), "effective_samples": statistics.effective_samples(answers, n)}
    lists = {key: column.double().tolist() for key, column in columns.items()}
    return [{"objective": name, "n": m, **{key: lists[key][i] for key in lists}} for i, m in enumerate(n)]


def _counts(asked: tuple[int, ...], answers: int) -> list[int]:
    return sorted(set(asked)) if asked else [2**i for i in range(answers.bit_length()) if 2**i <= answers]


def _gold(rows: list[dict[str, Any]], pool: Tensor, config: Config) -> Tensor:
    missing = next((i for i in pool.flatten().tolist() if rows[i].get("gold") is None), None)
    if missing is not None:
        raise ValueError(f"{config.candidates}: row {missing + 1} has no `gold`; score it with `pyrite label` first")
    gold = [rows[i]["gold"] for i in pool.flatten().tolist()]
    scores = scorers.check_scores(torch.tensor(gold, dtype=torch.float64), len(gold), name="gold").view_as(pool)
    if len(pool) < 2 or scores.std() == 0:
        why = "answers of at least 2 prompts are needed" if len(pool) < 2 else f"gold scores every answer {gold[0]:g}"
        raise ValueError(f"{config.candidates}: {why}, so there is no curve to estimate")
    return scores


def _scores(run: Run, path: Path, rows: list[dict[str, Any]], pool: Tensor) -> Tensor:
    """Raw scores (Q, N) of one member, prompt by prompt, resumable."""
    model = RewardModel.load(path)
    with progress(f"score by {path.name}", pool.numel(), unit="answers") as advance:

        def score(begin: int, end: int) -> dict[str, list]:
            some = [rows[i] for i in pool[begin:end].flatten().tolist()]
            said = Responses.said(some, [row["response"] for row in some], finished=[row["finished"] for row in some])
            return {"score": model.raw_scores(model.encode(said, as_drawn=True), progress=advance).tolist()}

        size = max(1, 16384 // pool.shape[1])
        table = runs.in_parts(run.folder / "parts" / path.name, len(pool), score, size=size)
    scores = torch.tensor(table["score"].to_pylist(), dtype=torch.float64)
    return scorers.check_scores(scores, pool.numel(), name=str(path)).view_as(pool)
