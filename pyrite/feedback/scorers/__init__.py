"""Gold functions of a text: scorers (prompts, responses) -> (N,), and the check on scores.

One family a file: words counts words, tagged nouns, chains checks arithmetic, neural asks models, syntax parses,
compose makes golds of golds. A score depends on its own prompt and response alone. The toy world's gold is
`pyrite.toy:story_quality()`.
"""

from pyrite.feedback.scorers.compose import noisy, truncated, weighted_sum, with_prompt
from pyrite.feedback.scorers.neural import distillation, paraphrase, reward_model
from pyrite.feedback.scorers.words import Scorer as Scorer
from pyrite.feedback.scorers.words import check_scores as check_scores
from pyrite.feedback.scorers.words import (
    dependency_depth,
    length,
    math_chain,
    nouns,
    reading_grade,
    reverse_word_collector,
    token_density,
    unique_nouns,
    word_collector,
)

__all__ = [
    "dependency_depth",
    "distillation",
    "length",
    "math_chain",
    "noisy",
    "nouns",
    "paraphrase",
    "reading_grade",
    "reverse_word_collector",
    "reward_model",
    "token_density",
    "truncated",
    "unique_nouns",
    "weighted_sum",
    "with_prompt",
    "word_collector",
]
