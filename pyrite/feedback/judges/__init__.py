"""Judges: judge(prompts, a, b) -> (N,) P(a beats b) in [0, 1], NaN without a verdict.

llm: a language model at an endpoint, its answers kept in a ledger; questions: how it is asked, and how its answers are
read; basic: judges made of a scorer, or of a file of verdicts.
"""

from pyrite.feedback.judges.basic import Judge as Judge
from pyrite.feedback.judges.basic import bradley_terry, human
from pyrite.feedback.judges.basic import check_verdicts as check_verdicts
from pyrite.feedback.judges.llm import llm

__all__ = ["bradley_terry", "human", "llm"]
