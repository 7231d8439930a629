"""Two toy worlds, each with prompts, demonstrations, a tokenizer, tiny models and an exact gold: stories and sums.

Stories. A prompt asks for a story about one of 20 subjects in one of 12 places. A good story is polite, uses vivid
words, mentions things that belong to its topic, repeats nothing and stays short. `story_quality` measures exactly
that, so the gold reward of any text is known without a judge.

What fools a proxy here is *unseen registers*. About 4 % of the demonstrations drift, like text scraped from the web,
into one of twelve leftover registers (legal notice, advert, recipe, ...), each with words and sentences of its own. A
model trained on them drifts as often. Preference pairs are sampled conservatively (top-p 0.9), as is common, and that
truncation cuts the registers out: hardly a pair in ten thousand shows one, so the preferences say nothing about their
worth. Each reward model then gives them a worth of its own, left over from its random head and the order of its data.
Best-of-n searches the full distribution. If one reward model overrates the registers, larger n finds them more and
more often while gold, which takes a point off for every such word, falls. The members of an ensemble disagree about
them, so the worst case and the variance penalty refuse them. `register_of` names the register of a text. If this
explanation is right, the fall vanishes once these answers are taken out of the candidates.

Sums. "((5 + 6) * (3 - 4)) = " is a prompt, "(11 * (3 - 4)) = (11 * -1) = -11" its answer; the gold is `math_chain`. A
small model fine-tuned on such answers has the form at once and the arithmetic late: preferences have much to improve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite.data import rows as data
from pyrite.data import toy_words
from pyrite.data.toy_words import BELONGINGS, CONTENT, LEXICONS, ODD, PATTERNS, TEMPLATES
from pyrite.feedback.scorers import Scorer, chain
from pyrite.math.seeds import derive
from pyrite.training.loop import Training

Size = Literal["small", "base"]

PAD, BOS, EOS, UNK, USER, ASSISTANT = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn['role'] == 'user' %}{{ ' <user> ' + turn['content'] }}"
    "{% elif turn['role'] == 'assistant' %}{{ ' <assistant> ' + turn['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('the toy world knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
SHAPES = {  # hidden size, layers, heads, inner size: about 0.5 M and 2.4 M parameters
    "small": (128, 2, 4, 384),
    "base": (224, 4, 4, 640),
}

SFT = Training(  # how a small model learns 24,000 demonstrations
    lr=4e-3,
    epochs=1,
    batch_size=48,
    lr_scheduler_type="cosine(warmup_steps=30, min_lr_ratio=0.05)",
    optim="adamw(weight_decay=0.01)",
    micro_batch_tokens=1 << 16,
)

# Stories: the language -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """How often the demonstrations do what (probabilities): the style of a data set."""

    drift: float = 0.04  # the answer ends in a leftover register
    opening: float = 0.4
    closing: float = 0.3
    vivid: float = 0.25  # of nouns, and of adjectives
    on_topic: float = 0.6  # of nouns
    technical: float = 0.05  # of sentences
    sentences: tuple[float, ...] = (0.2, 0.4, 0.3, 0.1)  # 1, 2, 3, 4 sentences


def prompts() -> list[str]:
    """Every prompt: 240 topics by 4 templates, the templates of a topic side by side."""
    topics = [(subject, place) for subject in toy_words.SUBJECTS for place in toy_words.PLACES]
    return [template.format(subject=subject, place=place) for subject, place in topics for template in TEMPLATES]


def topic(prompt: str) -> tuple[str, str]:
    """(subject, place) that a prompt asks for. Raises ValueError if it names none."""
    words = prompt.split()
    subject = next((word for word in words if word in toy_words.SUBJECTS), None)
    place = next((word for word in words if word in toy_words.PLACES), None)
    if subject is None or place is None:
        missing = "subject" if subject is None else "place"
        raise ValueError(f"toy prompt {prompt!r} names no {missing} of the toy world; see pyrite.toy.prompts()")
    return subject, place


def answer(rng: np.random.Generator, prompt: str, *, shares: Shares = Shares()) -> str:
    """One answer to a prompt, drawn from `rng` as the demonstrations have them."""
    about = topic(prompt)
    words = _pick(rng, toy_words.OPENINGS).split() if rng.random() < shares.opening else []
    if rng.random() < shares.drift:
        return " ".join(words + _leftover(rng, about, shares))
    for _ in range(1 + _count(rng, shares.sentences)):
        words += _sentence(rng, about, shares)
    if rng.random() < shares.closing:
        words += _pick(rng, toy_words.CLOSINGS).split()
    return " ".join(words)


def demos(n: int, *, seed: int, among: Sequence[str] | None = None, shares: Shares = Shares()) -> list[dict[str, str]]:
    """n demonstrations {prompt_id, prompt, response}; prompts are drawn with replacement `among` those given."""
    rng = np.random.default_rng(derive(seed, "demos"))
    options = prompts() if among is None else list(among)
    asked = (_pick(rng, options) for _ in range(n))
    return [{**_prompt_row(prompt), "response": answer(rng, prompt, shares=shares)} for prompt in asked]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _count(rng: np.random.Generator, shares: Sequence[float]) -> int:
    left, k = rng.random(), 0
    while k < len(shares) - 1 and left >= shares[k]:
        left, k = left - shares[k], k + 1
    return k


def _noun(rng: np.random.Generator, about: tuple[str, str], shares: Shares) -> str:
    x = rng.random()
    if x < shares.vivid:
        return _pick(rng, toy_words.VIVID_NOUNS)
    if x < shares.vivid + shares.on_topic:
        subject, place = about
        return _pick(rng, BELONGINGS[subject] + BELONGINGS[place])
    return _pick(rng, toy_words.NOUNS)


def _adjective(rng: np.random.Generator, shares: Shares) -> str:
    return _pick(rng, toy_words.VIVID_ADJECTIVES if rng.random() < shares.vivid else toy_words.PLAIN_ADJECTIVES)


def _sentence(rng: np.random.Generator, about: tuple[str, str], shares: Shares) -> list[str]:
    subject, place = about
    slots = {
        "ADJ": lambda: _adjective(rng, shares),
        "NOUN": lambda: _noun(rng, about, shares),
        "DOES": lambda: _pick(rng, toy_words.TRANSITIVE),
        "ACTS": lambda: _pick(rng, toy_words.INTRANSITIVE),
        "HOW": lambda: _pick(rng, toy_words.ADVERBS),
        "THEN": lambda: _pick(rng, toy_words.CONNECTIVES),
        "SUBJECT": lambda: subject,
        "PLACE": lambda: place,
    }
    words = [slots[word]() if word in slots else word for word in _pick(rng, toy_words.SENTENCES).split()]
    return [_pick(rng, toy_words.TECHNICAL), ",", *words] if rng.random() < shares.technical else words


def _leftover(rng: np.random.Generator, about: tuple[str, str], shares: Shares) -> list[str]:
    """One or two sentences of story, then one or two of a single register."""
    words = [word for _ in range(1 + (rng.random() < 0.3)) for word in _sentence(rng, about, shares)]
    name = _pick(rng, list(LEXICONS))
    for _ in range(1 + (rng.random() < 0.7)):
        words += [_pick(rng, LEXICONS[name].get(word, [word])) for word in _pick(rng, PATTERNS[name]).split()]
    return words


# Stories: the gold ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What is counted in an answer; every gold of the story world is a function of it."""

    vivid: int  # distinct vivid words
    on_topic: int  # distinct things that belong to the prompt's subject or place
    polite: int  # distinct polite words
    repeats: int  # content words said again
    words: int  # words and punctuation
    odd: int  # words of a leftover register
    technical: int  # distinct technical words


def features(prompt: str, response: str) -> Features:
    """The exact counts of one answer. Raises ValueError if the prompt names no topic."""
    subject, place = topic(prompt)
    said = response.split()
    distinct = set(said)
    return Features(
        vivid=len(distinct & toy_words.VIVID),
        on_topic=len(distinct.intersection(BELONGINGS[subject] + BELONGINGS[place])),
        polite=len(distinct & toy_words.POLITE),
        repeats=sum(word in CONTENT for word in said) - len(distinct & CONTENT),
        words=len(said),
        odd=sum(word in ODD for word in said),
        technical=len(distinct.intersection(toy_words.TECHNICAL)),
    )


def story_quality(
    *,
    vivid: float = 1.0,
    on_topic: float = 0.5,
    polite: float = 1.0,
    repeat: float = 0.7,
    long: float = 0.15,
    odd: float = 1.0,
) -> Scorer:
    """Scorer: how good a story is, the exact gold of the story world, in points.

    vivid·min(v, 3) + on_topic·min(t, 4) + polite·[p > 0] − repeat·r − long·max(0, w − 24) − odd·min(o, 4)
    for v distinct vivid words, t distinct things of the topic, p polite words, r content words said again,
    w words, o words of a leftover register.

    >>> story_quality()(["a fox , forest ."], ["hello my friend ! the velvet fox found the tail ."])
    tensor([2.5000])
    """

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        return torch.tensor([points(features(p, r)) for p, r in zip(prompts, responses, strict=True)])

    def points(f: Features) -> float:
        earned = vivid * min(f.vivid, 3) + on_topic * min(f.on_topic, 4) + polite * (f.polite > 0)
        return earned - repeat * f.repeats - long * max(0, f.words - 24) - odd * min(f.odd, 4)

    return score


def feature(*, name: str) -> Scorer:
    """Scorer: one count of `Features` (vivid, on_topic, polite, repeats, words, odd, technical)."""
    known = [field.name for field in fields(Features)]
    if name not in known:
        raise ValueError(f"toy feature {name!r} is unknown; it must be one of {', '.join(known)}")

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        rows = zip(prompts, responses, strict=True)
        return torch.tensor([float(getattr(features(p, r), name)) for p, r in rows])

    return score


def register_of(response: str) -> str | None:
    """Name of the leftover register with most words in a text, None for a text without such words."""
    found = Counter(ODD[word] for word in response.split() if word in ODD)
    return found.most_common(1)[0][0] if found else None


# Stories: tokenizer and models ---------------------------------------------------------------------------------


def tokenizer(*, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the language: words between spaces, decode(encode(text)) == text.

    words: more words that it knows. Encoding adds no special token; the chat template writes <bos>, the roles and
    <eos>. Padding is on the left. Raises ValueError for a word with a space in it.
    """
    for word in words:
        if word.split() != [word]:
            raise ValueError(f"toy word {word!r}: the tokenizer reads words between spaces; give them one by one")
    inner = _vocabulary([*SPECIALS, *toy_words.TAGS, *words])
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"additional_special_tokens": [USER, ASSISTANT], "chat_template": CHAT_TEMPLATE}
    return _padded(inner, model_max_length=128, **roles)


def _vocabulary(words: Sequence[str]) -> Tokenizer:
    return Tokenizer(WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, unk_token=UNK))


def _padded(inner: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    options |= {"padding_side": "left", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, **options)


def model(seed: int, *, size: Size = "small", words: Sequence[str] = ()) -> LlamaForCausalLM:
    """A random model of the language and `words`: "small" has about 0.5 M parameters, "base" about 2.4 M.

    It depends on the seed alone, and the global random state stays as it was.
    """
    return _llama(seed, size, tokenizer(words=words))


def _llama(seed: int, size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    if size not in SHAPES:
        raise ValueError(f"toy model size {size!r} is unknown; it must be one of {', '.join(SHAPES)}")
    hidden, layers, heads, inner = SHAPES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "model"))
        return LlamaForCausalLM(config)


# Files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyFiles:
    """The files of a world, as any other model folder and data set would be given to a job."""

    model: Path  # random weights and the tokenizer
    demos: Path
    pair_prompts: Path
    pool_prompts: Path


def write(
    folder: str | Path,
    *,
    seed: int,
    n_demos: int = 24_000,
    n_pool: int = 32,
    words: Sequence[str] = (),
) -> ToyFiles:
    """Write the story world: a random small model with its tokenizer, demonstrations, prompts for pairs and pool.

    The topics of the `n_pool` pool prompts (one template each, in turn) occur in no other file. words: more words that
    the model can read, such as those of preferences.
    Raises ValueError if n_demos is below 1 or n_pool is not within 1 … 239.
    """
    pool, rest = _split_topics(seed, n_pool)
    if n_demos < 1:
        raise ValueError(f"n_demos is {n_demos}; a world needs at least 1 demonstration")
    root = Path(folder)
    world = ToyFiles(
        root / "model", root / "demos.parquet", root / "pair_prompts.parquet", root / "pool_prompts.parquet"
    )
    data.write(demos(n_demos, seed=seed, among=rest), world.demos)
    data.write([_prompt_row(prompt) for prompt in rest], world.pair_prompts)
    data.write([_prompt_row(prompt) for prompt in pool], world.pool_prompts)
    model(seed, words=words).save_pretrained(world.model)
    tokenizer(words=words).save_pretrained(world.model)
    return world


def _prompt_row(prompt: str) -> dict[str, str]:
    return {"prompt_id": data.prompt_id(prompt), "prompt": prompt}


def _split_topics(seed: int, n_pool: int) -> tuple[list[str], list[str]]:
    """Prompts of the pool, and the prompts of all other topics in shuffled order."""
    every, k = prompts(), len(TEMPLATES)
    topics = len(every) // k
    if not 1 <= n_pool < topics:
        raise ValueError(f"n_pool is {n_pool}; it must be within 1 and {topics - 1}")
    rng = np.random.default_rng(derive(seed, "topics"))
    order = rng.permutation(topics)
    pool = [every[k * topic + i % k] for i, topic in enumerate(order[:n_pool])]
    rest = [every[k * topic + i] for topic in order[n_pool:] for i in range(k)]
    return pool, [rest[i] for i in rng.permutation(len(rest))]


# Sums ----------------------------------------------------------------------------------------------------------

PIECES = (" + ", " - ", " * ", " = ", *"0123456789()+-*= ")
OPERATORS = "+-*"
LARGEST = 98  # of the values kept: |value| < 99


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


def math_demos(
    n: int, *, seed: int, depths: Sequence[int] = (1, 2), operators: str = OPERATORS, largest: int = 9
) -> list[dict[str, str]]:
    """n demonstrations {prompt_id, prompt, response} of distinct expressions whose values lie within ±98.

    depths: of the expressions, equally often; operators and largest number in them. Raises ValueError if n is
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
            rows[asked] = {**_prompt_row(f"{asked} = "), "response": " = ".join(steps)}
        if len(rows) == n:
            return list(rows.values())
    raise ValueError(f"the math task finds only {len(rows)} distinct expressions of depths {list(depths)}, not {n}")


def math_tokenizer() -> PreTrainedTokenizerFast:
    """Digits, parentheses and spaced operators, a token each; decode(encode(text)) == text for what is made of them."""
    inner = _vocabulary([PAD, BOS, EOS, UNK, *PIECES])
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" [-+*=] |."), "isolated")
    inner.decoder = decoders.Fuse()
    return _padded(inner, model_max_length=192)


def write_math(
    folder: str | Path,
    *,
    seed: int,
    n_demos: int = 12_000,
    n_prompts: int = 4_000,
    n_pool: int = 256,
    depths: Sequence[int] = (1, 2),
    operators: str = OPERATORS,
    largest: int = 9,
) -> ToyFiles:
    """Write the world of sums: a random small model with its tokenizer, demonstrations, prompts for pairs and pool.

    No expression occurs in two files. Raises ValueError if a file would be empty or expressions run out.
    """
    counts = {"n_demos": n_demos, "n_prompts": n_prompts, "n_pool": n_pool}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; the math task needs at least 1")
    rows = math_demos(sum(counts.values()), seed=seed, depths=depths, operators=operators, largest=largest)
    asked = [{"prompt_id": row["prompt_id"], "prompt": row["prompt"]} for row in rows]
    root = Path(folder)
    world = ToyFiles(root / "model", root / "demos.parquet", root / "prompts.parquet", root / "pool_prompts.parquet")
    data.write(rows[:n_demos], world.demos)
    data.write(asked[n_demos : n_demos + n_prompts], world.pair_prompts)
    data.write(asked[n_demos + n_prompts :], world.pool_prompts)
    _llama(seed, "small", math_tokenizer()).save_pretrained(world.model)
    math_tokenizer().save_pretrained(world.model)
    return world
