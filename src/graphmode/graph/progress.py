"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Go through ``items`` and show how far that is, under the words ``what``."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, console=Console(stderr=True), transient=True)
