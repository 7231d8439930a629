"""Gold functions of a text: scorers (prompts, responses) -> (N,), and the check on scores.

words reads texts by rule, neural asks models, compose makes golds of golds. A score depends on its own prompt and
response alone. The toy world's gold is `pyrite.recipes.toy:story_quality()`.
"""

from pyrite.feedback.scorers.compose import noisy, truncated, weighted_sum, with_prompt
from pyrite.feedback.scorers.compose import scorer as scorer
from pyrite.feedback.scorers.neural import distillation, reward_model
from pyrite.feedback.scorers.words import Scorer as Scorer
from pyrite.feedback.scorers.words import check_scores as check_scores
from pyrite.feedback.scorers.words import (
    length,
    math_chain,
    nouns,
    reverse_word_collector,
    unique_nouns,
    word_collector,
)

__all__ = [
    "distillation",
    "length",
    "math_chain",
    "noisy",
    "nouns",
    "reverse_word_collector",
    "reward_model",
    "truncated",
    "unique_nouns",
    "weighted_sum",
    "with_prompt",
    "word_collector",
]
