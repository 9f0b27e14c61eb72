"""The staging ring: host buffers that a step's data is written to before one copy takes them to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Event(Protocol):
    """A point in a stream's order, as ``torch.cuda.Event``."""

    def record(self) -> None:
        """Mark the current point of the current stream."""

    def query(self) -> bool:
        """Return whether the device has passed the mark."""

    def synchronize(self) -> None:
        """Wait until it has."""


@dataclass(slots=True)
class StagingBuffer:
    """One host buffer of the ring, and the event after which the device no longer reads it."""

    index: int
    memory: torch.Tensor
    event: Event
    in_flight: bool = False


@dataclass
class StagingRing:
    """Host buffers used in turn, each guarded: none is handed out again before the device has read it.

    Args:
        nbytes: size of each buffer in bytes.
        count: number of buffers: how many steps the host may be ahead of the device.
        host_buffer: makes a host buffer, uint8 ``[nbytes]``, pinned where the device profits.
        event: makes an event.
    """

    nbytes: int
    count: int
    host_buffer: Callable[[int], torch.Tensor]
    event: Callable[[], Event]
    waits: int = 0
    """How often the host had to wait for the device to free a buffer."""
    buffers: tuple[StagingBuffer, ...] = field(init=False, repr=False)
    _next: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        self.buffers = tuple(StagingBuffer(i, self.host_buffer(self.nbytes), self.event()) for i in range(self.count))

    def acquire(self) -> StagingBuffer:
        """Return the next buffer, waiting until the device has read what it last held."""
        buffer = self.buffers[self._next]
        self._next = (self._next + 1) % self.count
        if buffer.in_flight:
            if not buffer.event.query():
                self.waits += 1
                buffer.event.synchronize()
            buffer.in_flight = False
        return buffer

    def release(self, buffer: StagingBuffer) -> None:
        """Say that the copy from ``buffer`` has been put on the current stream."""
        buffer.event.record()
        buffer.in_flight = True
