"""How far a long loop is: shown as a bar on standard error, or told to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Go through ``items`` and show how far that is, under the words ``what``."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, console=Console(stderr=True), transient=True)


def reported(items: Iterable[T], total: int, report: Callable[[int, int], object]) -> Iterator[T]:
    """Go through ``items`` and report how many of the ``total`` are done: before the first, and after each."""
    report(0, total)
    for done, item in enumerate(items, start=1):
        yield item
        report(done, total)
