"""The toy judge of these tests, and pairs it can judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from judges.server import Server, truth
from pyrite.feedback.judges import WINS, JudgeOptions, LanguageJudge

Texts = tuple[list[str], list[str], list[str]]
Make = Callable[..., LanguageJudge]


def pairs(n: int, start: int = 0) -> Texts:
    """Prompts and answers whose lengths differ in all ways."""
    rows = range(start, start + n)
    a, b = ([f"{'w ' * (1 + i * step % 5)}{side}{i}" for i in rows] for side, step in (("a", 7), ("b", 3)))
    return [f"prompt {i}" for i in rows], a, b


def wanted(texts: Texts) -> list[float]:
    """What the toy judge must say."""
    return [WINS[truth(a, b)] for a, b in zip(*texts[1:], strict=True)]  # type: ignore


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def make(server: Server, tmp_path: Path) -> Make:
    """A language judge at the server, with its options."""

    def judge(
        *, model: str = "toy", criterion: str = "more words", criterion_id: str | None = None, **options: object
    ) -> LanguageJudge:
        fast = {"base_url": server.url, "backoff": 0.01, **options}
        return LanguageJudge(model, criterion, criterion_id, JudgeOptions(**fast), str(tmp_path / "judge.db"))  # type: ignore

    return judge
