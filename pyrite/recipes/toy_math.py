"""The math task: expressions to evaluate step by step, an exact gold (`golds.math_chain`), a tokenizer, tiny models.

"((5 + 6) * (3 - 4)) = " is a prompt, "(11 * (3 - 4)) = (11 * -1) = -11" its answer. A small model fine-tuned on such
answers has the form at once and the arithmetic late, so there is much for preferences to improve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite.data import rows as data
from pyrite.feedback.scorers.words import chain
from pyrite.math.seeds import derive
from pyrite.recipes import toy

PAD, BOS, EOS, UNK = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PIECES = (" + ", " - ", " * ", " = ", *"0123456789()+-*= ")
LARGEST = 98  # of the values kept: |value| < 99
OPERATORS = "+-*"
CONTEXT = 192


@dataclass(frozen=True)
class Task:
    """Where `write` put things."""

    model: Path  # random weights and the tokenizer
    demos: Path
    prompts: Path
    pool_prompts: Path


def expression(
    rng: np.random.Generator, *, depth: int, operators: str = OPERATORS, largest: int = 9, spine: bool = True
) -> str:
    """A random expression in parentheses: + − *, numbers 1 … `largest`, at most `depth` levels below the first.

    The left side goes on to the full depth; any other side goes on with probability ½ a level, else it is a number.
    """

    def side(*, always: bool) -> str:
        if depth and (always or rng.random() < 0.5):
            return expression(rng, depth=depth - 1, operators=operators, largest=largest, spine=always)
        return str(1 + int(rng.random() * largest))

    return f"({side(always=spine)} {operators[int(rng.random() * len(operators))]} {side(always=False)})"


def demos(
    n: int, *, seed: int, depths: Sequence[int] = (1, 2), operators: str = OPERATORS, largest: int = 9
) -> list[dict[str, str]]:
    """n demonstration rows {prompt_id, prompt, response} of distinct expressions whose values lie within ±98.

    depths: of the expressions, equally often; operators and largest number in them. Raises ValueError where n is
    below 1, there are not so many, or operators or numbers are others than + - * and 1 to 9.
    """
    if not operators or set(operators) - set(OPERATORS) or not 1 <= largest <= 9:
        raise ValueError(f"the math task knows + - * and 1 to 9, not operators={operators!r}, largest={largest}")
    if n < 1 or not depths or min(depths) < 0:
        raise ValueError(f"the math task makes {n} rows of depths {list(depths)}; give 1 or more, of depths from 0 up")
    rng = np.random.default_rng(derive(seed, "math"))
    rows: dict[str, dict[str, str]] = {}
    for _ in range(100 * n + 10_000):
        depth = depths[int(rng.random() * len(depths))]
        asked, *steps = chain(expression(rng, depth=depth, operators=operators, largest=largest))
        if abs(int(steps[-1])) <= LARGEST:
            prompt = f"{asked} = "
            rows[asked] = {"prompt_id": data.prompt_id(prompt), "prompt": prompt, "response": " = ".join(steps)}
        if len(rows) == n:
            return list(rows.values())
    raise ValueError(f"the math task finds only {len(rows)} distinct expressions of depths {list(depths)}, not {n}")


def tokenizer() -> PreTrainedTokenizerFast:
    """Digits, parentheses and spaced operators, a token each; decode(encode(text)) == text for what is made of them."""
    inner = Tokenizer(WordLevel({piece: i for i, piece in enumerate([*SPECIALS, *PIECES])}, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" [-+*=] |."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def model(seed: int, *, size: toy.Size = "small") -> LlamaForCausalLM:
    """A randomly initialized model for the task's tokens, a function of the seed alone; "small" has about 0.4 M."""
    config = toy.config(size=size)
    config.update({"vocab_size": len(SPECIALS) + len(PIECES), "max_position_embeddings": CONTEXT})
    config.update({f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos"))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "model"))
        return LlamaForCausalLM(config)


def write(
    folder: str | Path,
    *,
    seed: int,
    size: toy.Size = "small",
    n_demos: int = 12_000,
    n_prompts: int = 4_000,
    n_pool: int = 256,
    depths: Sequence[int] = (1, 2),
    operators: str = OPERATORS,
    largest: int = 9,
) -> Task:
    """The task in a folder: a random model with its tokenizer, demonstrations, prompts to train on, prompts for a pool.

    No expression occurs in two files. Raises ValueError where a file would be empty or expressions run out.
    """
    counts = {"n_demos": n_demos, "n_prompts": n_prompts, "n_pool": n_pool}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; the math task needs at least 1")
    rows = demos(sum(counts.values()), seed=seed, depths=depths, operators=operators, largest=largest)
    asked = [{"prompt_id": row["prompt_id"], "prompt": row["prompt"]} for row in rows]
    root = Path(folder)
    task = Task(root / "model", root / "demos.parquet", root / "prompts.parquet", root / "pool_prompts.parquet")
    data.write(rows[:n_demos], task.demos)
    data.write(asked[n_demos : n_demos + n_prompts], task.prompts)
    data.write(asked[n_demos + n_prompts :], task.pool_prompts)
    model(seed, size=size).save_pretrained(task.model)
    tokenizer().save_pretrained(task.model)
    return task
