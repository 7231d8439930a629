"""Charts, and pages that open offline.

>>> from pyrite.report import Text, page
>>> page("A title", [Text("One **bold** word.", title="Start")]).startswith("<!doctype html>")
True
"""

from pyrite.report.bandit import bandit_page, save_bandit
from pyrite.report.charts import lines, mechanism, overoptimization, save, stages
from pyrite.report.live_reward import live_reward_page
from pyrite.report.overoptimization import overoptimization_page
from pyrite.report.page import page
from pyrite.report.references import references_page
from pyrite.report.run import run_page
from pyrite.report.samplers import samplers_page
from pyrite.report.sections import Claims, Figure, Keys, Numbers, Samples, Table, Text, Views
from pyrite.report.soups import soups_page

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
    "live_reward_page",
    "mechanism",
    "overoptimization",
    "overoptimization_page",
    "page",
    "references_page",
    "run_page",
    "samplers_page",
    "save",
    "save_bandit",
    "soups_page",
    "stages",
]
