"""Pyrite: preference optimization of language models against a reward you cannot fully trust."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`pyrite.toy`, the toy worlds, loaded when first asked for."""
    if name != "toy":
        raise AttributeError(f"module 'pyrite' has no attribute {name!r}")
    return importlib.import_module("pyrite.recipes.toy")
