"""What the training benchmarks share: cases, Llama-shaped models of random weights, pairs of token ids."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

# made by benchmarks/judged.py, which says where the data come from
JUDGED = Path(__file__).with_name("judged_pairs.jsonl.gz")
JUDGED = JUDGED if JUDGED.exists() else Path(__file__).parents[2] / "shared" / "data" / "judged_pairs.jsonl.gz"
PAIRS = 8  # in one optimizer step: the peer's default batch
SORTED = 50  # batches that group_by_length sorts together
LONGEST = 1024  # tokens of prompt + response: the peer's default limit
END = 2
SIZES = {
    "6M": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 688},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    "0.5B": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
}


class Pair(NamedTuple):
    """Token ids; both answers end with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Case:
    """One comparison. peer: how the peer is set up; grouped: batches hold pairs of similar length."""

    size: str = "6M"
    vocab: int = 4096
    precision: str = "float32"
    data: str = "synthetic"
    peer: str = "best"
    grouped: bool = False
    tuned: bool = False
    steps: int = 5
    threads: int | None = None
    seed: int = 5


def clock() -> float:
    """Seconds; with one thread those of the processor, which a busy neighbor disturbs less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def config(case: Case, **options: Any) -> Any:
    from transformers import LlamaConfig

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    sizes = {"vocab_size": case.vocab, "max_position_embeddings": 2 * LONGEST, "tie_word_embeddings": True}
    return LlamaConfig(**SIZES[case.size], **sizes, **special, **options)


def make_model(case: Case, auto: Any, *, seed: int = 0, **options: Any) -> Any:
    """Random weights, the same on both sides."""
    torch.manual_seed(seed)
    return auto.from_config(config(case, **options)).to(torch.float32)


def make_pairs(case: Case) -> list[Pair]:
    """A warm-up batch and one for every timed step, in the order in which both sides see them."""
    draw, count = judged if case.data == "judged" else synthetic, case.steps + 1
    if not case.grouped:
        return draw(case, PAIRS * count)
    # as group_by_length does: 50 batches' pairs, sorted and cut; of these batches some of every length, mixed
    pairs = sorted(draw(case, PAIRS * SORTED), key=longer)
    places = [SORTED * (2 * i + 1) // (2 * count) for i in range(count)]
    random.Random(case.seed).shuffle(places)
    return [pair for place in places for pair in pairs[PAIRS * place : PAIRS * (place + 1)]]


def longer(pair: Pair) -> int:
    """Tokens of the prompt and the longer answer."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def synthetic(case: Case, count: int) -> list[Pair]:
    """Log-normal lengths: prompts of 20 to 200 tokens, median 60; answers of 10 to 300, median 85."""
    draw = random.Random(case.seed)

    def length(low: int, high: int, median: float, spread: float) -> int:
        return round(min(max(draw.lognormvariate(math.log(median), spread), low), high))

    def ids(n: int) -> list[int]:
        return [draw.randrange(4, case.vocab) for _ in range(n)]

    def pair() -> Pair:
        prompt, chosen, rejected = length(20, 200, 60, 0.6), length(10, 300, 85, 0.7), length(10, 300, 85, 0.7)
        return Pair(ids(prompt), [*ids(chosen - 1), END], [*ids(rejected - 1), END])

    return [pair() for _ in range(count)]


def judged(case: Case, count: int) -> list[Pair]:
    """Real instructions and answers, a token for each word and each punctuation mark."""
    if not JUDGED.exists():
        raise SystemExit(f"{JUDGED}: no such file; make it with benchmarks/judged.py, or leave out --data judged")

    def ids(text: str) -> list[int]:
        return [4 + zlib.crc32(word.encode()) % (case.vocab - 4) for word in re.findall(r"\w+|[^\w\s]", text)]

    with gzip.open(JUDGED, "rt") as file:
        rows = [json.loads(line) for line in file]
    random.Random(case.seed).shuffle(rows)
    pairs = (Pair(ids(r["prompt"]), [*ids(r["chosen"]), END], [*ids(r["rejected"]), END]) for r in rows)
    short = (pair for pair in pairs if longer(pair) <= LONGEST)
    return [next(short) for _ in range(count)]


def tokenizer(case: Case) -> Any:
    """Words w4, w5, ... are the ids 4, 5, ...: a peer that takes texts gets exactly our ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {**{name: i for i, name in enumerate(special)}, **{f"w{i}": i for i in range(len(special), case.vocab)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def words(ids: Sequence[int]) -> str:
    return " ".join("<eos>" if i == END else f"w{i}" for i in ids)


def tokens(pairs: Sequence[Pair]) -> dict[str, int]:
    """What the timed batches hold: packed with a shared prompt, as single sequences, padded, and answers alone."""
    timed = pairs[PAIRS:]
    prompts, answers = sum(len(p.prompt) for p in timed), sum(len(p.chosen) + len(p.rejected) for p in timed)
    widest = [max(map(longer, timed[i : i + PAIRS])) for i in range(0, len(timed), PAIRS)]
    padded = 2 * PAIRS * sum(widest)
    return {"packed": prompts + answers, "single": 2 * prompts + answers, "padded": padded, "answers": answers}


def options(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    many: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--quick", action="store_true", help="one small case, about a minute on 2 cores")
    parser.add_argument("--sizes", **many, choices=list(SIZES), default=["6M", "30M"])
    parser.add_argument("--vocab", **many, type=int, default=[4096, 32768])
    parser.add_argument("--precision", **many, choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--data", **many, choices=["synthetic", "judged"], default=None)
    parser.add_argument("--peer", **many, default=["best"], help="best, default; +grouped and +tuned change both sides")
    parser.add_argument("--steps", type=int, default=5, help="timed ones, after one that is not")
    parser.add_argument("--threads", type=int, help="of torch (all by default); with 1, processor time is measured")
    parser.add_argument("--profile", action="store_true", help="where our time goes, and the limit of the machine")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    return parser


def cases(chosen: argparse.Namespace) -> list[Case]:
    """Every combination that was asked for."""
    if chosen.quick:
        return [Case(steps=3, threads=chosen.threads)]
    data = chosen.data or ["synthetic", *(["judged"] if JUDGED.exists() else [])]
    made = []
    for size, vocab, precision, kind, setup in itertools.product(
        chosen.sizes, chosen.vocab, chosen.precision, data, chosen.peer
    ):
        peer, *more = setup.split("+")
        case = Case(size, vocab, precision, kind, peer, steps=chosen.steps, threads=chosen.threads)
        made.append(replace(case, grouped="grouped" in more, tuned="tuned" in more))
    return made
