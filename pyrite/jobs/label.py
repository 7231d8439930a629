"""Labels: score candidates with a gold scorer and turn them into preference pairs, with exact label noise.

Answers 0 and 1, 2 and 3, ... to a prompt form pairs; the higher gold score is chosen. Noise flips exactly
round(noise * N) of the training pairs, once, by its own seed; the mask is stored and held-out pairs stay clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pyrite import data, golds, parts, runs, seeds, text
from pyrite.progress import progress, say
from pyrite.runs import Run

OUTPUTS = {
    "candidates.parquet": "the candidates with a column `gold`",
    "pairs.parquet": "training pairs: prompt, chosen, rejected, strength, flipped",
    "held_out.parquet": "clean pairs of held-out prompts",
}


@dataclass(frozen=True)
class Config:
    """Label candidates with a gold scorer and pair them."""

    candidates: str
    """Candidates as `pyrite generate` writes them."""
    gold: str
    """The scorer that plays the truth, such as "length()" or "mine.py:score()"."""
    out: Path
    pairs: bool = True
    """Also make pairs, not only scores."""
    noise: float = 0.0
    """Share of the training pairs whose label is flipped, exactly."""
    noise_seed: int = 0
    held_out: float = 0.1
    """Share of the prompts whose pairs are kept, clean, for measuring accuracy."""
    ties: Literal["random", "drop"] = "random"
    """What to do with two answers of equal gold."""
    truncated: Literal["drop", "keep"] = "drop"
    """What to do with a pair in which an answer was cut before its end token."""
    seed: int = 0


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"candidates": config.candidates}


def run(config: Config) -> Run:
    """Score, pair, flip, store."""
    run = runs.start("label", config, inputs=inputs(config))
    if run.done:
        return run
    if not 0 <= config.noise <= 0.5:
        raise ValueError(f"--noise {config.noise}: a share of flipped labels lies between 0 and 0.5")
    scorer = parts.part(config.gold, golds)
    rows = data.load(config.candidates, "candidates")
    first = scorer([text.plain(rows[0]["prompt"])], [rows[0]["response"]])
    golds.check_scores(first, 1, name=config.gold)  # a scorer that cannot score is refused now
    run.open()
    with progress("label", len(rows), unit="answers") as advance:

        def score(begin: int, end: int) -> dict[str, list]:
            some = rows[begin:end]
            given = scorer([text.plain(row["prompt"]) for row in some], [row["response"] for row in some])
            advance(end - begin)
            return {"gold": golds.check_scores(given, len(some), name=config.gold).tolist()}

        gold = runs.in_parts(run.folder / "parts", len(rows), score, size=4096)["gold"].to_pylist()
    labelled = [{**row, "gold": value} for row, value in zip(rows, gold, strict=True)]
    if run.writes:
        data.write(labelled, run.folder / "candidates.parquet")
    if not config.pairs:
        return run.finish(answers=len(rows))
    return run.finish(answers=len(rows), **_write_pairs(run, labelled, config))


def _write_pairs(run: Run, labelled: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    pairs, ties, cut = _pair(labelled, config)
    if not pairs:
        raise ValueError(f"{config.candidates}: no pair could be made ({ties} ties, {cut} with a cut answer dropped)")
    train, held = data.split(pairs, fraction=config.held_out, seed=seeds.derive(config.seed, "held out"))
    noisy, mask = data.flip_labels(train, p=config.noise, seed=config.noise_seed)
    if run.writes:
        data.write(noisy, run.folder / "pairs.parquet")
        if held:
            data.write(held, run.folder / "held_out.parquet")
    flipped = int(sum(mask))
    say(f"label: {len(train)} training pairs ({flipped} flipped), {len(held)} held out; {ties} ties, {cut} cut")
    return {
        "pairs": len(train),
        "flipped": flipped,
        "held_out": len(held),
        "ties": ties,
        "dropped_truncated": cut,
    }


def _pair(labelled: list[dict[str, Any]], config: Config) -> tuple[list[dict[str, Any]], int, int]:
    """Pairs of consecutive answers to a prompt, the number of ties met and of pairs dropped for a cut answer."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for row in labelled:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    couples = [(a[i], a[i + 1]) for a in by_prompt.values() for i in range(0, len(a) - 1, 2)]
    coins = torch.rand(len(couples), generator=seeds.generator(config.seed, "ties")).tolist()
    pairs, ties, cut = [], 0, 0
    for (a, b), coin in zip(couples, coins, strict=True):
        if config.truncated == "drop" and not (a["finished"] and b["finished"]):
            cut += 1
            continue
        tie = a["gold"] == b["gold"]
        ties += tie
        same = a["response"] == b["response"]
        if same or not (a["response"] and b["response"]) or (tie and config.ties == "drop"):
            continue  # two equal answers carry no preference, an empty one cannot be chosen
        chosen, rejected = (a, b) if (coin < 0.5 if tie else a["gold"] > b["gold"]) else (b, a)
        pairs.append(
            {
                "prompt_id": a["prompt_id"],
                "prompt": a["prompt"],
                "chosen": chosen["response"],
                "rejected": rejected["response"],
                "strength": chosen["gold"] - rejected["gold"],
            }
        )
    return pairs, ties, cut
