"""From their public source, the judged pairs behind the README's figures on real pairs and the tests on real data.

The source is tatsu-lab/alpaca_eval on GitHub (data under CC BY-NC 4.0, so they are not part of this repository):
answers of public models to 805 instructions, each compared with gpt4_1106_preview's by a GPT-4 judge.
    git clone --depth 1 --filter=blob:none --sparse https://github.com/tatsu-lab/alpaca_eval
    git -C alpaca_eval sparse-checkout set $(python benchmarks/judged.py --folders)
    python benchmarks/judged.py alpaca_eval
writes benchmarks/judged_pairs.jsonl.gz: prompt_id, prompt, chosen, rejected, probability (the judge's, that chosen is
better), model, source; and benchmarks/winrates.json: of each model both lengths, the preference, the published rates.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrite.core import runs
from pyrite.core.processes import say
from pyrite.data import rows as data
from pyrite.data.files import read

PAIRED = (
    *(f"FuseChat-{name}-Instruct" for name in ("Gemma-2-9B", "Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B")),
    *("FuseChat-Qwen-2.5-7B-Instruct", "alpaca-farm-ppo-human", "claude-2.1", "vicuna-7b-v1.5"),
)
RATED = (
    *("FuseChat-Llama-3.2-3B-Instruct", "alpaca-farm-ppo-human", "vicuna-7b-v1.5", "claude-2.1"),
    *("gpt-3.5-turbo-1106_concise", "gpt-3.5-turbo-1106_verbose", "alpaca-7b", "oasst-sft-pythia-12b"),
)
JUDGE = "weighted_alpaca_eval_gpt4_turbo"
BOARD = f"src/alpaca_eval/leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv"
COLUMNS = ("prompt_id", "model_chars", "baseline_chars", "preference_1_to_2")
RATES = ("win_rate", "standard_error", "length_controlled_winrate")
COUNTS = ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length")
Row = dict[str, Any]


def pairs(rows: list[Row], model: str, number: dict[str, int]) -> list[Row]:
    """Pairs of a model's annotations: output_1 is the baseline's, preference 1 if it is better, 2 if the model's is."""
    found = []
    for row in rows:
        wins = _preference(row) - 1
        better, worse = ("output_2", "output_1") if wins > 0.5 else ("output_1", "output_2")
        found.append(
            {
                "prompt_id": number[row["instruction"]],
                "prompt": row["instruction"],
                "chosen": row[better],
                "rejected": row[worse],
                "probability": round(max(wins, 1 - wins), 6),
                "model": model,
                "source": row["dataset"],
            }
        )
    return found


def lengths(rows: list[Row], number: dict[str, int]) -> list[list[float]]:
    """What win rates are made of: the prompt, both lengths in characters, the preference."""
    return [[number[row["instruction"]], len(row["output_2"]), len(row["output_1"]), _preference(row)] for row in rows]


def numbered(files: dict[str, list[Row]]) -> dict[str, int]:
    """Instructions by their place in the longest file, which is that of the evaluation set."""
    longest = max(files.values(), key=len)
    return {row["instruction"]: i for i, row in enumerate(longest)}


def build(source: Path, out: Path, paired: Sequence[str], rated: Sequence[str]) -> None:
    """Read a clone of the source, write both files."""
    wanted = dict.fromkeys((*paired, *rated))
    files = {model: read(str(source / "results" / model / JUDGE / "annotations.json")).rows for model in wanted}
    number = numbered(files)
    found = [pair for model in paired for pair in pairs(files[model], model, number)]
    data.write(sorted(found, key=lambda pair: pair["prompt_id"]), out / "judged_pairs.jsonl.gz")
    with (source / BOARD).open(newline="") as file:
        board = {row[""]: row for row in csv.DictReader(file)}
    table = {}
    for model in rated:
        rates = {name: float(board[model][name]) for name in RATES}
        counts = {name: int(float(board[model][name])) for name in COUNTS}
        table[model] = {"published": rates | counts, "rows": lengths(files[model], number)}
    runs.write_json(out / "winrates.json", {"columns": COLUMNS, "models": table})
    say(f"{len(found)} pairs in {out / 'judged_pairs.jsonl.gz'}; {len(rated)} models in {out / 'winrates.json'}")


def _preference(row: Row) -> float:
    """The judge's preference from 1 to 2, six digits of it; a tie, which may be written as 0, is halfway."""
    return round(float(row["preference"]) or 1.5, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="a clone of tatsu-lab/alpaca_eval")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--paired", nargs="+", default=PAIRED, help="models whose answers make pairs")
    parser.add_argument("--rated", nargs="*", default=RATED, help="models whose comparisons make win rates")
    parser.add_argument("--folders", action="store_true", help="print the folders of the clone that are needed")
    chosen = parser.parse_args()
    if chosen.folders:
        models = dict.fromkeys((*chosen.paired, *chosen.rated))
        say(" ".join([*(f"results/{model}/{JUDGE}" for model in models), str(Path(BOARD).parent)]))
        return
    if chosen.source is None:
        sys.exit("judged.py: give the folder of a clone of tatsu-lab/alpaca_eval")
    build(chosen.source, chosen.out, chosen.paired, chosen.rated)


if __name__ == "__main__":
    main()
