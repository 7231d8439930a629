"""Gold functions of a text: scorers (prompts, responses) -> (N,), and the check on scores.

Some read texts by rule, some ask models, some are made of other golds. A score depends on its own prompt and response
alone. The toy world's gold is `pyrite.recipes.toy:story_quality()`.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pyrite.core import specs
from pyrite.data import text
from pyrite.data.responses import Responses
from pyrite.data.text import Prompt, plain
from pyrite.data.toy_words import TAGS, VIVID_ADJECTIVES, VIVID_NOUNS
from pyrite.math.ranges import AnyText, Count, Natural, NonNegative, Real, require
from pyrite.math.seeds import derive
from pyrite.models.forward import Packed, score
from pyrite.models.loading import verify
from pyrite.models.policy import Policy, RewardModel

__all__ = [
    "distillation",
    "length",
    "math_chain",
    "noisy",
    "nouns",
    "reward_model",
    "truncated",
    "unique_nouns",
    "weighted_sum",
    "with_prompt",
    "word_collector",
]
GONE = {  # golds of earlier versions, and what to use in their place
    "reverse_word_collector": "it is gone; weighted_sum(golds=[\"word_collector(words='common')\"], weights=[-1.0]) "
    "ranks answers alike"
}


# By rule ------------------------------------------------------------------------------------------------------------


Scorer = Callable[[list[str], list[str]], Tensor]


def each(points: Callable[[str, str], float]) -> Scorer:
    """The scorer that gives each row points(prompt, response). Raises ValueError for lists of unequal length."""

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        return torch.tensor([points(p, y) for p, y in zip(prompts, responses, strict=True)], dtype=torch.float32)

    return score


def check_rows(prompts: list[str], responses: list[str]) -> None:
    """Raise ValueError unless there is one prompt for each response."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; a scorer needs one prompt for each")


def check_scores(scores: Tensor | Sequence[float], n: int, *, name: str) -> Tensor:
    """The scores of `name` as a floating tensor (N,). Raises ValueError for a wrong count, NaN or infinity."""
    values = torch.as_tensor(scores)
    if values.shape != (n,):
        raise ValueError(f"{name} returned scores of shape {tuple(values.shape)}; {n} responses need ({n},)")
    if not values.is_floating_point():
        values = values.float()
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{name} scored row {row + 1} of {n} as {values[row].item()} ({len(bad)} such rows); scores must be finite"
        )
    return values


# Words ---------------------------------------------------------------------------------------------------------------


LISTS = {
    "d2po": tuple(
        "data hope information provide example your however first have help additionally important include finally "
        "following happy code two create question possible understand generate contains appropriate best respectful "
        "ensure experience safe".split()
    ),
    "toy": (*VIVID_NOUNS, *VIVID_ADJECTIVES),
    "common": tuple("the to and of in is that this with".split()),
}


def tokens(text: str) -> list[str]:
    """Words, hyphenated ones whole, and punctuation marks of a text, in order, case kept.

    >>> tokens("A well-made one ... is it?")
    ['A', 'well-made', 'one', '...', 'is', 'it', '?']
    """
    return re.findall(r"\w+(?:-\w+)*|\.\.\.|[^\w\s]", text)


def length(*, unit: Literal["words", "chars"] = "words") -> Scorer:
    """Scorer: length of the response, len(y), in words or characters; the plainest thing a proxy can learn.

    >>> length()(["Say hi."], ["hello my friend"])
    tensor([3.])
    """
    require(length, unit=unit)
    return each(lambda _, y: len(y.split()) if unit == "words" else len(y))


def word_collector(*, words: Sequence[str] | str = "d2po") -> Scorer:
    """Scorer: number of distinct listed words in the response, |W(y) ∩ words|; case-sensitive, repeats are free.

    words: a list of your own, or "d2po" (the 30 words of Singhal et al. 2024, Word Collector), or "toy" (the 30
    vivid words of the toy world, about 1 an answer at first), or "common" (nine of the commonest in English). Raises
    ValueError for another name or no words.

    >>> word_collector(words=["amber", "velvet"])([""], ["amber amber velvety"])
    tensor([1.])
    """
    listed = frozenset(LISTS.get(words, ()) if isinstance(words, str) else words)
    if not listed:
        raise ValueError(
            "word_collector needs words, a list such as words=['amber', 'velvet'] or the name of one: "
            f"{', '.join(LISTS)}"
        )
    return each(lambda _, y: len(listed.intersection(tokens(y))))


# Nouns ---------------------------------------------------------------------------------------------------------------

# tagger(text) -> [(word, part of speech), ...]; a part of speech is "noun", "verb", "adjective", "adverb" or anything
# else the tagger tells apart.

Tagger = Callable[[str], list[tuple[str, str]]]

_PENN = {"NN": "noun", "VB": "verb", "JJ": "adjective", "RB": "adverb"}


def toy() -> Tagger:
    """Tagger: the toy world's own, exact there; a word of any other language is "unknown".

    >>> toy()("the velvet fox slept .")[1:4]
    [('velvet', 'adjective'), ('fox', 'noun'), ('slept', 'verb')]
    """
    return lambda text: [(word, TAGS.get(word, "unknown")) for word in tokens(text)]


def textblob() -> Tagger:
    """Tagger: TextBlob's PatternTagger for English, which brings its lexicon along; counts differ a little from NLTK's.

    Raises ValueError if TextBlob is not installed.
    """
    try:
        from textblob.taggers import PatternTagger  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tagging English needs the package {error.name}: install Pyrite's extra [nlp] "
            "(pip install textblob), or give tagger='toy' for texts of the toy world"
        ) from None
    tagger = PatternTagger()
    return lambda text: [(str(word), _PENN.get(str(tag)[:2], str(tag))) for word, tag in tagger.tag(text)]


TAGGERS = {"textblob": textblob, "toy": toy}


def nouns(*, tagger: str = "textblob") -> Scorer:
    """Scorer: number of nouns in the response, repeats counted.

    tagger: "textblob" for English, "toy" for the toy world, or one of your own as a spec, "mine.py:tagger()".

    >>> nouns(tagger="toy")([""], ["the fox hid the fox ."])
    tensor([2.])
    """
    tag = specs.part(tagger, TAGGERS)
    return each(lambda _, y: sum(kind == "noun" for _, kind in tag(y)))


def unique_nouns(*, tagger: str = "textblob") -> Scorer:
    """Scorer: number of distinct nouns in the response; case-sensitive. Singhal et al. 2024, Unique Nouns.

    tagger: "textblob" for English, "toy" for the toy world, or one of your own as a spec, "mine.py:tagger()".

    >>> unique_nouns(tagger="toy")([""], ["the fox hid the fox ."])
    tensor([1.])
    """
    tag = specs.part(tagger, TAGGERS)
    return each(lambda _, y: len({word for word, kind in tag(y) if kind == "noun"}))


# Arithmetic ----------------------------------------------------------------------------------------------------------


FAILED = -200.0  # an expression that cannot be evaluated
_GROUP = re.compile(r"\([^()]*\)")
_FLAT = re.compile(r"[+-]*[0-9]+(?:[+*-][+-]*[0-9]+)*")  # a sum of products of signed numbers


def math_chain(*, strict: bool = False, repeat_negative: bool = False) -> Scorer:
    """Scorer: −Σ_i d(P_i, G_i) over steps i ≥ 1, at most 0: how far an answer is from the exact evaluation.

    P: the parts of prompt + response between the equals signs (other letters dropped), P_0 being the expression;
    G: `chain(P_0)`; d: `levenshtein`, in characters. A missing step counts as the empty text, steps beyond the last
    are free unless `strict`. An expression that cannot be evaluated scores −200. repeat_negative: a negative value must
    be written twice, as in the code of Singhal et al. 2024 (Math); here once is right.

    >>> math_chain()(["((5 + 6) + 3) = "] * 3, ["(11 + 3) = 14", "(11 + 3) = 15 = 15", "14"])
    tensor([ 0., -1., -9.])
    """

    def points(prompt: str, response: str) -> float:
        said = [part.strip() for part in re.sub(r"[^0-9()+*\-= ]", "", prompt + response).strip().split("=")]
        try:
            wanted = chain(said[0])
        except ValueError:
            return FAILED
        if repeat_negative and wanted[-1].startswith("-"):
            wanted.append(wanted[-1])
        steps = list(zip_longest(said, wanted, fillvalue=""))[1 : None if strict else len(wanted)]
        return float(-sum(levenshtein(a, b) for a, b in steps))

    return each(points)


def chain(expression: str) -> list[str]:
    """The expression, then every step of its evaluation: innermost groups one by one, from the left, until a number.

    Whole numbers, + − * and parentheses. Raises ValueError for anything else.

    >>> chain("((5 + 6) * (3 - 4))")
    ['((5 + 6) * (3 - 4))', '(11 * (3 - 4))', '(11 * -1)', '-11']
    """
    steps = [expression]
    while not re.fullmatch(r"-?[0-9]+", steps[-1]):
        groups = _GROUP.findall(steps[-1]) or [steps[-1]]
        for group in groups:
            steps.append(steps[-1].replace(group, str(evaluate(group)), 1))
    return steps


def evaluate(flat: str) -> int:
    """Value of whole numbers joined by + − *, products first, perhaps in one pair of parentheses.

    >>> evaluate("(2 - -3 * 4)")
    14
    """
    inside = flat[1:-1] if _GROUP.fullmatch(flat) else flat
    if re.search(r"[0-9]\s+[0-9]", inside) or not _FLAT.fullmatch(packed := "".join(inside.split())):
        raise ValueError(f"cannot evaluate {flat!r}: give whole numbers joined by + - *")
    total = 0
    for product in re.findall(r"[+-]*[0-9]+(?:\*[+-]*[0-9]+)*", packed):
        value = 1
        for factor in product.split("*"):
            value *= int(factor.lstrip("+-")) * (-1) ** factor.count("-")
        total += value
    return total


def levenshtein(a: str, b: str) -> int:
    """Fewest characters inserted, deleted or replaced that turn a into b.

    >>> levenshtein("(23 * 3)", "(24 * 30)")
    2
    """
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


# By models ----------------------------------------------------------------------------------------------------------


_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):\n")
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


@dataclass(frozen=True)
class Asks:
    """A scorer that asks models, with the class that loads each of them."""

    score: Scorer
    models: tuple[tuple[Any, str], ...]

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        return self.score(prompts, responses)

    def verify(self) -> None:
        """Refuse a model that cannot be loaded, without loading it."""
        for kind, path in self.models:
            verify(kind, path)


def reward_model(*, path: str) -> Scorer:
    """Scorer: a trained reward model, a folder or a Hub name, standardized if it knows how.

    With a chat template, a prompt is the user's turn of it, and a conversation in text form its turns; without
    one, the text itself. Loaded at the first texts. Raises ValueError if there is no such model.
    """
    model = cache(lambda: RewardModel.load(path))

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        if not responses:
            return torch.empty(0)
        asked = [turns(prompt) for prompt in prompts] if model().tokenizer.chat_template else prompts
        return model().scores(asked, responses)

    return Asks(score, ((AutoModelForSequenceClassification, path),))


def distillation(*, strong: str, weak: str) -> Scorer:
    """Scorer: mean_t log p_strong(y_t | x, y_<t) − mean_t log p_weak(y_t | x, y_<t), nats a token.

    strong, weak: folders or Hub names of any two causal language models, each with its own tokenizer and template. The
    mean is over the response's tokens alone, without the end token; a response without tokens scores 0. Singhal et al.
    2024, Contrastive Distill (OPT-1.3b and OPT-125m; there also over the prompt: see `with_prompt`). Raises ValueError
    if a text does not fit into a model.
    """
    first = cache(lambda: Policy.load(strong))
    second = first if strong == weak else cache(lambda: Policy.load(weak))

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        if not responses:
            return torch.empty(0)
        return (mean_logps(first(), prompts, responses) - mean_logps(second(), prompts, responses)).float()

    return Asks(score, ((AutoModelForCausalLM, strong), (AutoModelForCausalLM, weak)))


def turns(prompt: str) -> Prompt:
    """The messages of a conversation that `pyrite.data.text.plain` wrote as text; any other text as it is.

    >>> turns("Human:\\nhi\\n\\nAssistant:\\nhello\\n\\nHuman:\\nbye\\n\\nAssistant:\\n")[1]
    {'role': 'assistant', 'content': 'hello'}
    """
    before, *parts = _TURN.split(prompt)
    if before or parts[-2:] != ["Assistant", ""] or len(parts) < 4:
        return prompt
    pairs = zip(parts[:-2:2], parts[1:-2:2], strict=True)
    return [{"role": _ROLES[speaker], "content": content} for speaker, content in pairs]


def mean_logps(policy: Policy, prompts: Sequence[str], responses: Sequence[str], *, budget: int = 16384) -> Tensor:
    """Mean log-probability of each response's tokens, without the end token, (N,) float64 nats; 0 without tokens."""
    said = Responses.said([{"prompt": prompt} for prompt in prompts], responses)
    whole = text.encode(policy.tokenizer, said, max_length=policy.context + 1, as_drawn=True)
    _refuse_cut(whole, policy.context)
    kept = torch.ones(len(whole.ids), dtype=torch.bool)
    kept[whole.lengths.cumsum(0) - 1] = False  # the end token
    spoken = replace(whole, ids=whole.ids[kept], lengths=whole.lengths - 1)
    some = [i for i, length in enumerate(spoken.lengths.tolist()) if length]

    def read(batch: Packed) -> Tensor:
        logps = policy.logps(batch)
        return logps.sum.double() / logps.length

    means = torch.zeros(len(spoken), dtype=torch.float64)
    if some:
        means[some] = score(policy, spoken.take(some), read=read, each="response", budget=budget)
    return means


def _refuse_cut(rows: Responses, context: int) -> None:
    assert rows.truncated is not None  # they have been encoded
    if rows.truncated.any():
        long = int(rows.truncated.nonzero()[0])
        raise ValueError(f"row {long + 1}: prompt and response do not fit into the {context} tokens a model reads")


# Golds made of golds ------------------------------------------------------------------------------------------------


def weighted_sum(*, golds: Sequence[str], weights: Sequence[Real]) -> Scorer:
    """Scorer: Σ_i weights_i · golds_i, of golds named as spec strings. Raises ValueError unless one weight each.

    >>> weighted_sum(golds=["length()", "word_collector(words=['fox'])"], weights=[-0.5, 3])([""], ["a fox"])
    tensor([2.])
    """
    if isinstance(golds, str) or not golds or len(golds) != len(weights):
        raise ValueError("weighted_sum needs as many weights as golds, as in golds=['length()'], weights=[1.0]")
    scorers = [named(gold) for gold in golds]

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        scored = [scorer(prompts, responses) for scorer in scorers]
        return torch.stack([weight * some for weight, some in zip(weights, scored, strict=True)]).sum(0)

    return score


def noisy(*, gold: str, sd: NonNegative, seed: Natural = 0) -> Scorer:
    """Scorer: gold + sd · ε, ε ~ N(0, 1) a function of (seed, prompt, response): a text asked twice answers the same.

    >>> score = noisy(gold="length()", sd=1.0)
    >>> bool((score(["p", "p"], ["one", "two"]) == score(["p", "p"], ["two", "one"]).flip(0)).all())
    True
    """
    require(noisy, sd=sd)
    scorer = named(gold)

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        clean = scorer(prompts, responses)
        keys = (derive(seed, "noisy", p, y) for p, y in zip(prompts, responses, strict=True))
        return clean + sd * torch.tensor([random.Random(key).gauss() for key in keys], dtype=clean.dtype)

    return score


def truncated(*, gold: str, words: Count = 50) -> Scorer:
    """Scorer: gold of the first `words` words of the response; the prompt stays whole.

    >>> truncated(gold="length()", words=2)(["one two three"], ["one two three"])
    tensor([2.])
    """
    require(truncated, words=words)
    scorer = named(gold)
    return lambda prompts, responses: scorer(prompts, [_first(y, words) for y in responses])


def with_prompt(*, gold: str, separator: AnyText = " ") -> Scorer:
    """Scorer: gold of prompt + separator + response, given as the response to an empty prompt.

    >>> with_prompt(gold="word_collector()")(["data hope"], ["nothing"])
    tensor([2.])
    """
    scorer = named(gold)

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        whole = [prompt + separator + response for prompt, response in zip(prompts, responses, strict=True)]
        return scorer([""] * len(whole), whole)

    return score


def scorer(gold: str | Scorer) -> Callable[..., Tensor]:
    """A gold that also reads a record of answers: score(answers) is a table (P, K), a row for each prompt.

    gold: a spec string, or your own function scorer(prompts, responses). Given lists of texts, score(prompts,
    responses), it is that scorer: (N,). Raises ValueError for an unknown gold.
    """
    if not isinstance(gold, str) and not callable(gold):
        raise ValueError(f"a scorer is a spec string or a function, not {gold!r}")
    function = named(gold) if isinstance(gold, str) else gold
    name = gold if isinstance(gold, str) else getattr(gold, "__name__", type(gold).__name__)

    def score(prompts: Responses | list[str], responses: list[str] | None = None) -> Tensor:
        if not isinstance(prompts, Responses):
            if not isinstance(prompts, list) or not isinstance(responses, list):
                raise ValueError("a scorer reads answers, or two lists of texts, prompts and responses")
            check_rows(prompts, responses)
            return check_scores(function(prompts, responses), len(responses), name=name)
        texts = [str(said) for said in prompts.texts]
        found = check_scores(function([plain(one) for one in prompts.prompts], texts), len(texts), name=name)
        return prompts.table(found)

    if isinstance(gold, str):
        score.spec = gold  # type: ignore[attr-defined]
    return score


def named(gold: str) -> Scorer:
    """The gold of a spec string; its scores are checked. Raises ValueError for a gold that is unknown or cannot be
    read."""
    scorer = specs.part(gold, sys.modules["pyrite.feedback.scorers"])

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        check_rows(prompts, responses)
        return check_scores(scorer(prompts, responses), len(responses), name=gold)

    return score


def _first(text: str, words: Count) -> str:
    """A text up to the end of its n-th word; spaces are kept."""
    said = text.split()
    if len(said) <= words:
        return text
    rest = text.split(maxsplit=words)[words]
    return text[: len(text) - len(rest)].rstrip()
