"""A thread beside the event loop, for what takes so long that streams would wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class OneThread:
    """Runs functions one after the other in a thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._jobs: set[Future[Any]] = set()

    @property
    def jobs(self) -> int:
        """How many functions run or wait. One whose caller has left counts until it has run."""
        return len(self._jobs)

    async def run(self, function: Callable[[], T]) -> T:
        """Return what a function returns."""
        job = self._pool.submit(function)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Run nothing more than what runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
