"""Judges: judge(prompts, a, b) -> (N,) P(a beats b) in [0, 1], NaN where there is no verdict.

llm: a language model at an endpoint, its answers kept in a ledger; questions: how it is asked, and how its answers are
read; people: people, by file, and a judge made of any scorer; agreement: how far two of them agree.
"""

from pyrite.feedback.judges.llm import llm
from pyrite.feedback.judges.people import Judge as Judge
from pyrite.feedback.judges.people import bradley_terry, human
from pyrite.feedback.judges.people import check_verdicts as check_verdicts

__all__ = ["bradley_terry", "human", "llm"]
