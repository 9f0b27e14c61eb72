"""Turns: one call at a time in a runner, and outputs that no other thread's call overwrites."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from graphmode.errors import GraphModeError


class Turns:
    """Lets one call at a time into a runner, and guards the outputs that a thread holds.

    Args:
        name: of the runner's function, for messages.
        hand_over: waits for the device; called when a call comes from another thread than the last one.
    """

    def __init__(self, name: str, hand_over: Callable[[], None]) -> None:
        self._name = name
        self._hand_over = hand_over
        self._lock = threading.Lock()
        self._inside: int | None = None
        self._last: int | None = None
        self._lent: list[weakref.ref[torch.Tensor]] = []

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if self._inside == thread:
            raise GraphModeError(
                f"the GraphRunner of {self._name} was called inside of its own call; call the function itself there"
            )
        self._lock.acquire()
        try:
            if self._last not in (None, thread):
                if any(ref() is not None for ref in self._lent):
                    raise GraphModeError(
                        f"the GraphRunner of {self._name} was called from two threads: one still holds outputs that "
                        "this call would overwrite. Where threads share a runner pass own=True, or give each its own"
                    )
                self._hand_over()
        except BaseException:
            self._lock.release()
            raise
        self._inside = self._last = thread

    def __exit__(self, *error: object) -> None:
        self._inside = None
        self._lock.release()

    def lend(self, outputs: Sequence[torch.Tensor]) -> None:
        """Remember what the caller gets."""
        self._lent = [weakref.ref(output) for output in outputs]
