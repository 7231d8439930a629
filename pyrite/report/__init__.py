"""Charts, and pages that open offline.

>>> from pyrite.report import page, text
>>> page("A title", [text("One **bold** word.", title="Start")]).startswith("<!doctype html>")
True
"""

from pyrite.report.bandit import bandit_page, convergence
from pyrite.report.charts import lines, overoptimization, save
from pyrite.report.page import answers, claims, details, figure, numbers, page, table, tabs, text
from pyrite.report.run import run_page

__all__ = [
    "answers",
    "bandit_page",
    "claims",
    "convergence",
    "details",
    "figure",
    "lines",
    "numbers",
    "overoptimization",
    "page",
    "run_page",
    "save",
    "table",
    "tabs",
    "text",
]
