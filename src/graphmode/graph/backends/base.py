"""What a device must offer: one small protocol, and the registry that finds the backend of a device type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch

from graphmode.graph.errors import BackendError
from graphmode.graph.staging import Event

ENTRY_POINT_GROUP = "graphmode.backends"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        runs_while_capturing: capture also executes the work (the CPU tape), instead of only recording it.
        shared_pool: graphs of one pool share the memory of their intermediate results.
        random: random operators inside a graph give new numbers at each replay.
        pinned_host_memory: copies from the staging ring are asynchronous.
    """

    runs_while_capturing: bool
    shared_pool: bool
    random: bool
    pinned_host_memory: bool


class Graph(Protocol):
    """Recorded device work."""

    def replay(self) -> None:
        """Put the recorded work on the current stream."""


class Recording(Protocol):
    """One function being recorded, in one segment or, where calls break the graph, in several."""

    def installed(self, generators: Sequence[torch.Generator]) -> AbstractContextManager[None]:
        """Surround the whole recording. ``generators`` are those that the function draws from, beside the default."""

    def begin(self) -> None:
        """Start to record a segment."""

    def end(self) -> Graph:
        """Stop recording and return the segment."""

    def abort(self) -> None:
        """Drop the segment being recorded and leave the device usable. Does nothing between segments."""

    def finish(self) -> None:
        """Say that all segments are recorded. What Python still holds is read later; the rest may now share memory."""


@runtime_checkable
class Backend(Protocol):
    """A device with graphs. One instance serves one device."""

    device: torch.device
    capabilities: Capabilities

    def make_pool(self) -> Any:
        """Return a new memory pool for recordings to share."""

    def recording(self, pool: Any) -> Recording:
        """Return a recording whose intermediate results live in ``pool``."""

    def capture_stream(self) -> AbstractContextManager[None]:
        """Make the backend's capture stream current, after all work put on the current stream so far."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Return uint8 ``[nbytes]`` on the host, pinned where that makes copies asynchronous."""

    def event(self) -> Event:
        """Return an event of this device."""

    def synchronize(self) -> None:
        """Wait for all work put on the device."""

    def memory_used(self, pool: Any) -> int:
        """Return the bytes of device memory in use, of which the growth during capture is the graphs' cost."""


def _cuda(device: torch.device) -> Backend:
    from graphmode.graph.backends.cuda import CudaBackend

    return CudaBackend(device)


def _cpu(device: torch.device) -> Backend:
    from graphmode.graph.backends.cpu import CpuBackend

    return CpuBackend(device)


_BUILT_IN: dict[str, Callable[[torch.device], Backend]] = {"cuda": _cuda, "cpu": _cpu}


def available_backends() -> dict[str, Callable[[torch.device], Backend]]:
    """Return the backend factories by device type: the built-in ones and those of installed packages.

    A package adds one by the entry point group ``graphmode.backends``: the name is the device type, the object a
    callable that takes a ``torch.device`` and returns a :class:`Backend`.
    """
    plugins = {
        entry.name: lambda device, entry=entry: entry.load()(device) for entry in entry_points(group=ENTRY_POINT_GROUP)
    }
    return {**_BUILT_IN, **plugins}


def default_device() -> torch.device:
    """Return the current accelerator if torch sees one that has a backend, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in available_backends():
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def get_backend(device: str | torch.device = "auto") -> Backend:
    """Return the backend that serves ``device``: a device, a device type, or ``"auto"`` for the best one present.

    Raises:
        BackendError: no backend is registered for the device type, or the device is not there.
    """
    try:
        resolved = default_device() if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"{device!r} is not a device that torch knows: {error}") from error
    backends = available_backends()
    if resolved.type not in backends:
        raise BackendError(
            f"no backend for device type {resolved.type!r}; there are {sorted(backends)}. A package can add one by the "
            f"entry point group {ENTRY_POINT_GROUP!r}"
        )
    return backends[resolved.type](resolved)
