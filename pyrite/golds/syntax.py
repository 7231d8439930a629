"""A gold that parses: the depth of a sentence's dependencies, by spaCy where it is installed."""

from __future__ import annotations

from typing import Any

from pyrite.golds.scores import Scorer, each


def dependency_depth(*, model: str = "en_core_web_sm") -> Scorer:
    """Scorer: depth of the deepest word of the response in its dependency tree, the root at 0; 0 of an empty response.

    model: an installed spaCy pipeline with a parser, by name or folder; nothing is downloaded. From the code of
    Singhal et al. 2024. Raises ValueError where spaCy or the pipeline is missing.
    """
    parse = _pipeline(model)
    return each(lambda _, y: max((depth(token) for token in parse(y)), default=0))


def depth(token: Any) -> int:
    """Heads above a token, which has itself as head where it is the root."""
    above = 0
    while token.head != token:
        token, above = token.head, above + 1
    return above


def _pipeline(model: str) -> Any:
    try:
        import spacy  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            "dependency_depth needs spaCy: install Pyrite's extra [nlp] (pip install spacy) and a pipeline, "
            f"python -m spacy download {model}"
        ) from None
    try:
        return spacy.load(model)
    except OSError as error:
        raise ValueError(
            f"dependency_depth finds no spaCy pipeline {model!r}: python -m spacy download {model}, or give a folder"
        ) from error
