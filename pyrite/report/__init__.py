"""Charts, and pages that open offline.

>>> from pyrite.report import Text, page
>>> page("A title", [Text("One **bold** word.", title="Start")]).startswith("<!doctype html>")
True
"""

from pyrite.report.bandit import bandit_page, save_bandit
from pyrite.report.charts import lines, mechanism, overoptimization, save, stages
from pyrite.report.page import Claims, Figure, Keys, Numbers, Samples, Table, Text, Views, page
from pyrite.report.run import run_page

__all__ = [
    "Claims",
    "Figure",
    "Keys",
    "Numbers",
    "Samples",
    "Table",
    "Text",
    "Views",
    "bandit_page",
    "lines",
    "mechanism",
    "overoptimization",
    "page",
    "run_page",
    "save",
    "save_bandit",
    "stages",
]
