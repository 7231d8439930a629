"""Judges: judge(prompts, a, b) -> (N,) P(a beats b) in [0, 1], NaN where there is no verdict.

scores: a judge made of any scorer; llm: a language model at an endpoint, its answers kept in a ledger (forms asks,
endpoints sends, asking paces, verdicts reads, answers keeps, costs counts); humans: people, by file; agreement: how far
two of them agree.
"""

from pyrite.judges.humans import human
from pyrite.judges.llm import llm
from pyrite.judges.scores import Judge as Judge
from pyrite.judges.scores import bradley_terry
from pyrite.judges.scores import check_verdicts as check_verdicts

__all__ = ["bradley_terry", "human", "llm"]
