"""One process among its siblings."""

from __future__ import annotations

from pyrite.core.processes import on_main, world


def test_alone_it_is_the_main_one() -> None:
    """Several real processes are tested with the jobs."""
    assert world().num_processes == 1
    assert world().is_main_process


def test_alone_nothing_is_sent() -> None:
    def work(a: int) -> int:
        return a + 1

    assert on_main(work) is work
