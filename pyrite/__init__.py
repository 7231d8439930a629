"""Pyrite: preference optimization of language models against a reward you cannot fully trust."""

__version__ = "0.1.0"
