"""References: what a policy is compared with, computed once, stored with a fingerprint, verified, mixed, imported.

sources parses a spec; tables is the file; identity says what makes two files the same; scoring makes one, rules says
which may be used, imports takes in foreign ones; supply gives a trainer what it asked for.
"""

from pyrite.models.references.scoring import compute, import_table, obtain, same_tokenizer, spot_check, verify
from pyrite.models.references.tables import BadReference, Source, Table, Text, load, margins, parse, row_id

__all__ = [
    "BadReference",
    "Source",
    "Table",
    "Text",
    "compute",
    "import_table",
    "load",
    "margins",
    "obtain",
    "parse",
    "row_id",
    "same_tokenizer",
    "spot_check",
    "verify",
]
