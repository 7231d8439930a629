"""Labels: score candidates with a gold scorer, or ask a judge, and make preference pairs with exact label noise.

Answers 0 and 1, 2 and 3, ... to a prompt form pairs; the higher gold score, or the judge's verdict, says which is
chosen. Noise flips exactly round(noise * N) of the training pairs, once, by its own seed; the mask is stored and
held-out pairs stay clean. No label is invented: a cut or empty answer, equal answers, a tie and a judge without a
verdict make no pair, and each is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyrite.core import runs, specs
from pyrite.core.processes import progress, say
from pyrite.core.runs import Run
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.files import Row
from pyrite.feedback import judges, pairing, scorers
from pyrite.feedback.pairing import Rows, Ties
from pyrite.math import seeds
from pyrite.math.ranges import Fraction, Half, Natural

OUTPUTS = {
    "candidates.parquet": "the candidates with a column `gold`",
    "pairs.parquet": "training pairs: prompt, chosen, rejected, strength, flipped",
    "held_out.parquet": "clean pairs of held-out prompts",
}


@dataclass(frozen=True)
class Config:
    """Label candidates with a gold scorer or a judge, and pair them."""

    candidates: str
    """Candidates as `pyrite generate` writes them."""
    out: Path
    """Folder of the run, new or empty."""
    gold: str | None = None
    """Gold scorer, the reward that counts as true, such as "length()" or "mine.py:score()"."""
    judge: str | None = None
    """Judge that compares the answers of a pair, in place of the gold: "bradley_terry(gold='length()')"."""
    pairs: bool = True
    """Also make pairs, not only scores. Two equal answers make no pair; they are counted."""
    noise: Half = 0.0
    """Exact share of the training pairs whose label is flipped."""
    noise_seed: Natural = 0
    """Random seed of the flipped labels."""
    held_out: Fraction = 0.1
    """Share of the prompts whose pairs are held out for measuring accuracy, without label noise."""
    ties: Ties = "drop"
    """What to do with two equally good answers: leave the pair out, or keep it with strength 0.
    Losses that read strengths, such as soft_dpo, learn a probability of one half; for the others they are left out."""
    on_cut: Literal["drop", "rematch"] = "drop"
    """What to do with an answer that was cut before its end: leave its pair out, or pair the finished answers to its
    prompt among themselves."""
    seed: Natural = 0
    """Random seed of held-out prompts and of ties."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    return {"candidates": config.candidates}


def run(config: Config) -> Run:
    """Score, pair, flip, store."""
    run = runs.start("label", config, inputs=inputs)
    if run.done:
        return run
    if not (config.gold or (config.judge and config.pairs)):
        raise ValueError("label needs --gold, or --judge for pairs; `pyrite list golds` shows what there is")
    scorer = specs.part(config.gold, scorers) if config.gold else None
    judge = specs.part(config.judge, judges) if config.judge else None
    rows = data.load(config.candidates, "candidates")
    if scorer:  # one that cannot score is refused now
        some = rows[:2]  # two, so that one number for all is found out
        given = scorer([text.plain(row["prompt"]) for row in some], [row["response"] for row in some])
        scorers.check_scores(given, len(some), name=str(config.gold))
    couples, left_out = _couples(rows, config)
    hint = _hint(rows, config)
    if config.pairs and not couples:
        raise ValueError(
            f"{config.candidates}: no pair could be made (0 ties; left out: {pairing.counted(left_out)}){hint}"
        )
    if judge and judge.own and config.pairs:  # likewise
        some = [[row["response"] for row in side] for side in zip(*couples[:2], strict=True)]
        pairing.check_verdicts(judge(_prompts(couples[:2]), *some), len(some[0]), name=str(config.judge))
    run.open()
    if scorer:
        for row, gold in zip(rows, _scored(run, rows, scorer, str(config.gold)), strict=True):
            row["gold"] = gold
    found: dict[str, Any] = {}
    if config.pairs:
        if judge:
            folder, name = run.folder / "parts" / "judge", str(config.judge)
            verdicts = pairing.judged(folder, judge, _prompts(couples), couples, name=name, title="judge")
            strengths = pairing.log_odds(verdicts)
        else:
            strengths = [a["gold"] - b["gold"] for a, b in couples]
        found = _write_pairs(run, couples, strengths, left_out, hint, config)
    if run.writes:
        data.write(rows, run.folder / "candidates.parquet")
    return run.finish(answers=len(rows), **found)


def _scored(run: Run, rows: list[Row], scorer: Callable, name: str) -> list[float]:
    """The gold score of every answer, kept in parts, so that an interrupted run goes on."""
    with progress("label", len(rows), unit="answers") as advance:

        def score(begin: int, end: int) -> dict[str, list]:
            some = rows[begin:end]
            given = scorer([text.plain(row["prompt"]) for row in some], [row["response"] for row in some])
            advance(end - begin)
            return {"gold": scorers.check_scores(given, len(some), name=name).tolist()}

        return runs.in_parts(run.folder / "parts" / "gold", len(rows), score, size=4096)["gold"].to_pylist()


def _prompts(couples: list[Rows]) -> list[str]:
    return [text.plain(a["prompt"]) for a, _ in couples]


def _couples(rows: list[Row], config: Config) -> tuple[list[Rows], Counter[str]]:
    """Consecutive answers to each prompt, and how many couples (with --on-cut rematch, how many cut answers) are left
    out, by reason."""
    kept = [row for row in rows if row["finished"] or config.on_cut == "drop"]
    left_out = Counter(cut=len(rows) - len(kept), equal=0, empty=0)
    return pairing.sound(pairing.consecutive(kept), left_out), left_out


def _hint(rows: list[Row], config: Config) -> str:
    """What to do about cut answers."""
    hint = data.cut_hint(rows)
    several = len(rows) > 2 * len({row["prompt_id"] for row in rows}) and config.on_cut == "drop"
    return f"{hint}, or pair the finished ones among themselves with --on-cut rematch" if hint and several else hint


def _write_pairs(
    run: Run, couples: list[Rows], strengths: list[float], left_out: Counter[str], hint: str, config: Config
) -> dict[str, Any]:
    pairs = []
    for chosen, rejected, strength in pairing.preferred(couples, strengths, left_out, ties=config.ties):
        asked = {name: chosen[name] for name in ("prompt_id", "prompt", *data.CONDITIONED) if name in chosen}
        pairs.append({**asked, "chosen": chosen["response"], "rejected": rejected["response"], "strength": strength})
    ties = strengths.count(0.0)
    del left_out["tie"]  # they are counted apart, also where they are kept
    lost = pairing.counted(left_out)
    if not pairs:
        run.refuse(f"{config.candidates}: no pair could be made ({ties} ties; left out: {lost}){hint}")
    train, held = data.split(pairs, fraction=config.held_out, seed=seeds.derive(config.seed, "held out"))
    noisy, mask = data.flip_labels(train, p=config.noise, seed=config.noise_seed)
    if run.writes:
        data.write(noisy, run.folder / "pairs.parquet")
        if held:
            data.write(held, run.folder / "held_out.parquet")
    flipped = int(mask.sum())
    say(f"label: {len(train)} pairs ({flipped} flipped), {len(held)} held out; {ties} ties; left out: {lost}{hint}")
    counts = {"pairs": len(train), "flipped": flipped, "held_out": len(held), "ties": ties}
    return counts | {f"left_out_{reason}": left_out[reason] for reason in ("cut", "equal", "empty", "no_verdict")}
